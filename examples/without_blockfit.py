"""Run exported models where blockfit is not installed, and compare them with blockfit's outputs.

    python examples/without_blockfit.py small/ plain/ hub/ small.pt2 small.onnx

Makes an environment of its own that holds all installed packages but blockfit, loads each export
there by its own library, and prints the largest difference from the model in ``small/``. Ends with
code 1 where one is more than 1e-5 (ONNX: 1e-3).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from safetensors.torch import load_file, save_file

from blockfit import api
from blockfit.formats import folder as store
from blockfit.formats.parity import Pictures
from blockfit.formats.traced import Bare, primary, run

ALLOWED = {".onnx": 1e-3}
ALLOWED_ELSEWHERE = 1e-5

CHILD = """
import importlib.util, json, sys
from pathlib import Path
assert importlib.util.find_spec("blockfit") is None, "blockfit is there"
import torch
from safetensors.torch import load_file, save_file

exported, images, result = Path(sys.argv[1]), load_file(sys.argv[2])["images"], sys.argv[3]
torch.set_grad_enabled(False)
if exported.suffix == ".onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession(exported)
    out = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
elif exported.suffix == ".pt2":
    out = torch.export.load(exported).module()(images)
elif (exported / "open_clip_config.json").is_file():
    import open_clip
    model = open_clip.create_model(f"local-dir:{exported}").eval()
    out = model.encode_image(images)
else:
    config = json.loads((exported / "config.json").read_text())
    if "hidden_dim" in config:
        import torchvision
        model = torchvision.models.VisionTransformer(**config)
        model.load_state_dict(load_file(exported / "model.safetensors"))
    elif "architecture" in config:
        import timm
        model = timm.create_model(f"local-dir:{exported}", pretrained=True)
    else:
        import transformers
        own = config.get("auto_map", {})
        name = next((auto for auto in own if auto != "AutoConfig"), config["architectures"][0])
        model = getattr(transformers, name).from_pretrained(exported, trust_remote_code=bool(own))
    out = model.eval()(images)
if not isinstance(out, torch.Tensor):
    names = ("logits", "image_embeds", "last_hidden_state")
    out = next(out[name] for name in names if name in out)
assert "blockfit" not in sys.modules
save_file({"out": out.contiguous()}, result)
"""


def environment(folder: Path) -> Path:
    """The Python of a new environment in ``folder``: this one's packages without blockfit.

    The packages are links to the installed ones; what makes an editable install of blockfit
    importable (``.pth`` files) is left out, and so is the environment of this process.
    """
    venv.EnvBuilder(with_pip=False).create(folder)
    places = {"base": str(folder), "platbase": str(folder)}
    there = Path(sysconfig.get_path("purelib", "venv", places))
    for name in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(name)).iterdir():
            link = there / entry.name
            if "blockfit" not in entry.name and entry.suffix != ".pth" and not link.exists():
                link.symlink_to(entry)
    scripts = Path(sysconfig.get_path("scripts", "venv", places))
    return scripts / Path(sys.executable).name


def output_elsewhere(python: Path, exported: Path, traffic: Path) -> Path:
    """Run an export in the environment of ``python``.

    Args:
        python: from ``environment``.
        exported: a plain or Hub folder, a ``.pt2`` or an ``.onnx`` file.
        traffic: a folder with the images, ``in.safetensors``.

    Returns:
        The file with the primary output, under the name ``out``.
    """
    result = traffic / "out.safetensors"
    arguments = [exported.resolve(), traffic / "in.safetensors", result]
    command = [python, "-I", "-c", CHILD, *arguments]
    environ = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(traffic / "home"), "OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in command], check=True, env=environ, cwd=traffic)  # noqa: S603
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("small", type=Path, help="the folder that blockfit saved")
    parser.add_argument("exported", type=Path, nargs="+", help="what blockfit export wrote")
    parser.add_argument("--images", help="any that blockfit reads; by default sample photographs")
    parser.add_argument("--limit", type=int, default=64, help="draw this many of --images")
    told = parser.parse_args()
    saved = store.load_saved(told.small)
    images = told.images and api.images(told.images, saved.model, limit=told.limit, batch_size=256)
    pictures = Pictures.of(saved.model, saved.source, images)
    batch = next(iter(pictures))
    outputs = run(Bare(saved.model), batch)
    expected = outputs[primary(outputs)]
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder) / "environment")
        save_file({"images": batch}, Path(folder) / "in.safetensors")
        for exported in told.exported:
            found = load_file(output_elsewhere(python, exported, Path(folder)))["out"]
            error = float((found - expected).abs().max())
            allowed = ALLOWED.get(exported.suffix, ALLOWED_ELSEWHERE)
            fine &= error <= allowed
            print(
                f"{exported}: largest difference {error:.1e} on {len(batch)} images of "
                f"{pictures.source} ({'fine' if error <= allowed else 'TOO MUCH'})"
            )
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
