"""``blockfit evaluate`` and ``blockfit analyze``."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from commandline import FEW, Done, blockfit_command
from commandline import small as small
from families import one_thread as one_thread
from pictures import folder_of

from blockfit.models.demo import digits, load_demo


def test_evaluate_prints_the_promised_keys_as_fractions(small: tuple[Path, Done]) -> None:
    done = blockfit_command(
        "evaluate", small[0], "--against", "demo", "--images", "digits:test", "--json"
    )
    told = done.json
    assert told["images"] == 599
    keys = {"top1", "parameters", "flops", "size_bytes", "images_per_second"}
    for name in ("original", "compressed"):
        assert keys <= told[name].keys()
        assert 0.9 < told[name]["top1"] <= 1
    assert told["fidelity"].keys() == {
        "kl", "agreement", "feature_cosine", "feature_relative_error",
    }  # fmt: skip
    pictures, labels = digits("test")
    with torch.inference_mode():
        right = (load_demo()(pictures).argmax(1) == labels).float().mean()
    assert told["original"]["top1"] == pytest.approx(float(right), abs=1e-6)
    assert told["compressed"]["parameters"] == small[1].json["parameters_after"]
    assert told["compressed"]["flops"] == small[1].json["flops_after"]


def test_evaluate_of_a_single_model_has_no_original(small: tuple[Path, Done]) -> None:
    done = blockfit_command("evaluate", "demo", "--images", "digits:test", "--limit", "30")
    assert done.code == 0
    assert "On 30 images" in done.out
    assert "original" not in done.out


def test_evaluate_judges_features_by_protocols(small: tuple[Path, Done]) -> None:
    given = ("evaluate", small[0], "--data", "digits:test", "--limit", "100")
    more = ("--protocol", "knn", "--protocol", "probe", "--protocol", "retrieval")
    learn = ("--train", "digits", "--train-limit", "300")
    told = blockfit_command(*given, "--against", "demo", *more, *learn, "--json").json
    assert told["protocols"].keys() == {"knn", "probe", "retrieval"}
    for name in ("knn", "probe"):
        found = told["protocols"][name]
        assert found.keys() == {"original", "compressed", "compressed_with_original_head"}
        assert all(0.85 < value <= 1 for value in found.values())
    shown = blockfit_command(*given, "--protocol", "knn", *learn)
    assert "knn" in shown.out
    for part in (("--protocol", "knn"), learn):
        assert "go together" in blockfit_command(*given, *part).error


def test_evaluate_prepares_images_as_the_original_where_the_small_model_does_not_say(
    small: tuple[Path, Done], tmp_path: Path
) -> None:
    silent = tmp_path / "silent"
    shutil.copytree(small[0], silent)
    manifest = json.loads((silent / "blockfit.json").read_text())
    assert manifest["base"]["preprocessing"] is not None
    manifest["base"]["preprocessing"] = None
    (silent / "blockfit.json").write_text(json.dumps(manifest))
    pictures = folder_of(tmp_path / "pictures", 3)
    alone = blockfit_command("evaluate", silent, "--data", pictures)
    assert "does not say how its images are prepared" in alone.error
    helped = blockfit_command("evaluate", silent, "--data", pictures, "--against", "demo")
    assert "preprocessing: resize to 8 × 8" in helped.err
    assert helped.code == 0


def test_analyze_writes_the_tables(tmp_path: Path) -> None:
    folder = tmp_path / "analysis"
    done = blockfit_command("analyze", "demo", *FEW, "-o", folder, "--json")
    told = done.json
    assert told["output"] == str(folder)
    assert told["similarity"]["boundaries"] == list(range(13))
    with (folder / "similarity.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    assert first["metric"] == "mse"
    assert json.loads((folder / "analysis.json").read_text())["similarity"] == told["similarity"]
    again = blockfit_command("analyze", "demo", *FEW, "-o", folder)
    assert "--overwrite" in again.error


def test_images_that_the_model_was_made_with_or_learns_from_are_told_of(
    small: tuple[Path, Done], tmp_path: Path
) -> None:
    for name in "01":
        folder_of(tmp_path / "photos" / name, 6)
    shutil.copytree(tmp_path / "photos", tmp_path / "others")
    known = tmp_path / "known"
    shutil.copytree(small[0], known)
    manifest = json.loads((known / "blockfit.json").read_text())
    manifest["report"]["calibration"]["source"] = str(tmp_path / "photos")
    (known / "blockfit.json").write_text(json.dumps(manifest))
    judged = ("evaluate", known, "--no-speed", "--protocol", "knn", "--train", tmp_path / "photos")
    same = blockfit_command(*judged, "--images", tmp_path / "photos").err
    assert "the model was calibrated on 40 of the images of" in same
    assert "12 of the 12 test images are among the training images" in same
    other = blockfit_command(*judged, "--images", tmp_path / "others").err
    assert "warning" not in other
