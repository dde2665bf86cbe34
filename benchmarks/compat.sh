#!/bin/sh
# The quick tests with the oldest and the newest versions that pyproject.toml allows.
#
#   benchmarks/compat.sh [oldest] [newest]      both by default; PYTHON names the interpreter
#
# Each set gets a virtual environment of its own in .compat/SET, of 2 to 6 GB with torch's CUDA
# libraries; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu makes it 1 GB. The last lines
# say which versions were there and whether the tests passed.
set -eu

cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OLDEST="torch==2.4.* torchvision==0.19.* timm==1.0.31 transformers==5.11.* numpy==1.26.* \
safetensors==0.4.3 pillow==10.* typer==0.20.* rich==13.* scikit-learn==1.4.*"
NEWEST="torch torchvision timm transformers numpy safetensors pillow typer rich scikit-learn"
QUICK="tests/fit/test_plan.py tests/fit/test_maps.py tests/fit/test_moments.py tests/fit/test_closed_form.py \
tests/models/test_blocks.py tests/models/test_surgery.py tests/contract/test_contract.py tests/formats/test_folder.py \
tests/formats/test_store_refused.py tests/formats/test_store_writing.py tests/models/test_load.py tests/contract/test_models_loading.py \
tests/data/test_decode.py tests/whole/test_security.py tests/whole/test_cli.py tests/whole/test_api.py \
tests/search/test_calibrate.py"

run() {
    name=$1
    shift
    place=.compat/$name
    "$PYTHON" -m venv "$place"
    # Word splitting makes the versions separate arguments.
    # shellcheck disable=SC2086
    "$place/bin/python" -m pip install --quiet --disable-pip-version-check \
        $* pytest pytest-timeout hypothesis scipy
    "$place/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    result=passed
    # shellcheck disable=SC2086
    "$place/bin/python" -m pytest -q $QUICK || result=failed
    "$place/bin/python" - "$name" "$result" <<'PYTHON'
import platform, sys
from importlib import metadata
names = ("torch", "torchvision", "timm", "transformers", "numpy", "safetensors", "pillow")
print(sys.argv[1], sys.argv[2], "python", platform.python_version(),
      *(f"{name} {metadata.version(name)}" for name in names))
PYTHON
    [ "$result" = passed ]
}

for set in ${*:-oldest newest}; do
    case $set in
        oldest) run oldest $OLDEST ;;
        newest) run newest $NEWEST ;;
        *) echo "no set $set; give oldest or newest" >&2; exit 2 ;;
    esac
done
