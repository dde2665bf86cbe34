"""The examples that the documentation names, on the demo model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import blockfit

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *words: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_main_measurement_is_repeated_on_any_model(tmp_path: Path) -> None:
    out = tmp_path / "repeat"
    run(
        "repeat.py", "--model", "demo", "--train", "digits", "--test", "digits:test", "--limit", 48,
        "--test-limit", 60, "--sizes", 0.7, "--recipes", "default", "magnitude", "-o", out,
    )  # fmt: skip
    lines = (out / "table.md").read_text("utf-8").splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["default", "magnitude"]
    for line in lines[2:]:
        assert float(line.split("|")[1].strip().rstrip("%")) <= 70.05
    told = json.loads((out / "default-70.json").read_text("utf-8"))
    assert f"{told['compressed']['top1']:.2%}" in lines[2]
    page = (out / "report.html").read_text("utf-8")
    assert "default-70" in page
    assert "magnitude-70" in page


def test_a_small_model_is_trained_and_loaded_again(tmp_path: Path) -> None:
    model = blockfit.load("demo")
    images = blockfit.images("digits", model, limit=40)
    blockfit.save(blockfit.compress(model, images, remove=6, final=0), tmp_path / "small")
    said = run(
        "finetune.py", tmp_path / "small", "--teacher", "demo", "--train", "digits",
        "--epochs", 0.8, "--lr", 3e-4, "-o", tmp_path / "tuned",
    )  # fmt: skip
    found = re.search(r"(\d+) steps; .* first quarter ([\d.]+), of the last ([\d.]+)", said)
    assert found is not None
    assert int(found[1]) == 30
    assert float(found[3]) < float(found[2])
    before, after = blockfit.load(tmp_path / "small"), blockfit.load(tmp_path / "tuned")
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert any((one != other).any() for one, other in pairs)
