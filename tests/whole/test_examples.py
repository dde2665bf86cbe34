"""The examples that the documentation names, on the demo model."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import fresh
import pytest
from PIL import Image

import blockfit

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *words: object) -> str:
    return fresh.python(EXAMPLES / name, *words).stdout


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


def benchmark(name: str) -> ModuleType:
    """A script of ``benchmarks/`` as a module."""
    folder = EXAMPLES.parent / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def test_an_accelerator_is_measured_beside_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = benchmark("device")
    words = [
        "--model", "demo", "--images", "digits", "--limit", "16", "--params", "0.8",
        "--device", "cpu", "--batch-sizes", "1", "--dtypes", "float32", "--engines", "eager",
        "--rounds", "2", "-o", str(tmp_path / "device.md"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["device.py", *words])
    device.main()
    page = (tmp_path / "device.md").read_text()
    assert page in capsys.readouterr().out
    assert page.startswith("# demo on cpu\n")
    assert page.count("| cpu |") == 2
    assert "- Plan: the same." in page
    assert "differ by 0.00% of" in page
    with pytest.raises(SystemExit, match="is there already"):
        device.main()


def test_what_fine_tuning_gives_back_is_measured_and_a_stopped_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune = benchmark("finetune")

    def run(cache: str) -> dict[str, Any]:
        words = [
            "--model", "demo", "--images", "digits", "--test", "digits:test", "--limit", "48",
            "--test-limit", "60", "--train-limit", "64", "--batch-size", "16", "--epochs", "1.5",
            "--lr", "1e-3", "--keep", "2", "--sizes", "70", "--recipes", "magnitude",
            "--device", "cpu", "--teacher", "--cache", str(tmp_path / cache),
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
        finetune.main()
        found = json.loads((tmp_path / cache / "magnitude-70.json").read_text())
        return {name: value for name, value in found.items() if name != "seconds"}

    whole = run("whole")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[2].strip() for line in lines] == ["recipe", "magnitude", "original"]
    assert whole["steps"] == 6
    assert whole["last_loss"] < whole["first_loss"]
    assert whole["after"] != whole["before"]

    loss, calls = finetune.Training.loss, iter(range(3))

    def stops(*arguments: Any) -> Any:
        if next(calls) == 3 - 1:  # the third step
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(finetune.Training, "loss", stops)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    assert (tmp_path / "stopped" / "magnitude-70.training").exists()
    monkeypatch.setattr(finetune.Training, "loss", loss)
    assert run("stopped") == whole
    monkeypatch.setattr(finetune.Training, "loss", None)  # all is known: nothing is trained again
    assert run("stopped") == whole


def test_hierarchical_models_are_trained_and_narrowed_and_a_run_goes_on(tmp_path: Path) -> None:
    for name in ("left", "right"):
        for number in range(12):
            picture = Image.new("RGB", (32, 32))
            side = (0, 0, 12, 32) if name == "left" else (20, 0, 32, 32)
            picture.paste((100 + 10 * number, 200, 50), side)
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / "photos" / name / f"{number}.png")
    words = [
        "hierarchical.py", "--train", tmp_path / "photos", "--test", tmp_path / "photos",
        "--families", "convnext", "--minutes", 0.01, "--batch-size", 8, "--images", 16,
        "--sizes", 0.8, "-o", tmp_path / "out",
    ]  # fmt: skip
    said = run(*words)
    assert "epoch 1:" in said
    lines = (tmp_path / "out" / "table.md").read_text("utf-8").splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["default", "corp", "vbp"]
    assert all(float(line.split("|")[3].strip().rstrip("%")) <= 80.05 for line in lines[2:])
    assert blockfit.load(tmp_path / "out" / "convnext").config.num_labels == 2
    again = run(*words)
    assert "epoch" not in again
    assert again.splitlines()[-3:] == lines[2:]


def test_both_towers_of_a_small_clip_are_trained_and_narrowed(tmp_path: Path) -> None:
    for name in ("left", "right"):
        for number in range(12):
            picture = Image.new("RGB", (32, 32))
            picture.paste((100 + 10 * number, 200, 50), (0 if name == "left" else 20, 0, 32, 32))
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / "photos" / name / f"{number}.png")
    words = [
        "two_towers.py", "--train", tmp_path / "photos", "--test", tmp_path / "photos",
        "--minutes", 0.02, "--depth", 3, "--sizes", 0.8, "-o", tmp_path / "out",
    ]  # fmt: skip
    *_, both, alone = run(*words).splitlines()
    cells = [cell.strip() for cell in both.split("|")[1:-1]]
    assert cells[1] == "both"
    assert float(cells[0].rstrip("%")) <= 80.05
    assert alone.split("|")[2].strip() == "image alone"
    small, clip = (blockfit.load(tmp_path / "out" / name) for name in ("both-0.8", "clip"))
    counts = [sum(p.numel() for p in model.text_model.parameters()) for model in (small, clip)]
    assert counts[0] < counts[1]
