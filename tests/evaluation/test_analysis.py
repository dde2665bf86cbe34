"""The analysis folder holds what the model's own hidden states say, and is written whole."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import DEPTH, FAMILIES
from families import one_thread as one_thread

from blockfit.data.images import images
from blockfit.errors import BlockfitError
from blockfit.evaluation import analysis
from blockfit.evaluation.analysis import analyze
from blockfit.files import check_target


@pytest.fixture
def model() -> torch.nn.Module:
    return FAMILIES["plain"].build()


def pictures(count: int = 12) -> torch.Tensor:
    return FAMILIES["plain"].images(count)


def test_tables_equal_the_models_own_hidden_states(model: torch.nn.Module) -> None:
    result = analyze(model, pictures())
    assert result.blocks.path == "transformer"
    with torch.no_grad():
        states = [s.double().numpy() for s in model.hidden_states(pictures())]
    for start in range(DEPTH + 1):
        for stop in range(DEPTH + 1):
            expected = np.mean((states[start] - states[stop]) ** 2)
            assert result.tables.at("mse", start, stop) == pytest.approx(expected, rel=1e-5)
    cut = states[1][:, :1].reshape(12, -1), states[3][:, :1].reshape(12, -1)
    norms = [np.linalg.norm(rows, axis=1) for rows in cut]
    expected = np.mean((cut[0] * cut[1]).sum(1) / norms[0] / norms[1])
    assert result.tables.at("cosine", 1, 3, "prefix") == pytest.approx(expected, rel=1e-5)


def test_prefix_tokens_weigh_what_they_weigh_among_all_tokens_where_few_patches_are_taken(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = analyze(model, pictures())
    monkeypatch.setattr(analysis, "TOKENS_PER_IMAGE", 4)
    part = analyze(model, pictures())
    assert part.report["patch_tokens_per_image"] == {"all": 16, "taken": 4}
    assert part.tables.tokens == {"prefix": 12, "patch": 48}
    for tables in (whole.tables, part.tables):
        prefix, patch = (tables.at("mse", 0, 4, name) for name in ("prefix", "patch"))
        assert prefix is not None
        assert patch is not None
        assert tables.at("mse", 0, 4) == pytest.approx((prefix + 16 * patch) / 17)


def test_pairs_that_do_not_fit_into_memory_are_taken_in_several_passes(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = analyze(model, pictures())
    monkeypatch.setattr(analysis, "MOST_BYTES", 0)
    lines: list[str] = []
    counts: list[tuple[int, int]] = []
    parts = analyze(
        model, pictures(), say=lines.append, progress=lambda done, all: counts.append((done, all))
    )
    assert lines[0] == "hidden states, pass 1 of 3"
    assert counts == [(12, 12)] * 3
    for one, other in zip(parts.tables.rows(), whole.tables.rows(), strict=True):
        assert one[:4] == other[:4]
        if other[4] is None:  # the class token at h[0] is always the same
            assert one[4] is None
        else:
            assert one[4] == pytest.approx(other[4], rel=1e-9, abs=1e-12)


def test_the_folder_holds_json_csv_and_a_picture(model: torch.nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "analysis"
    result = analyze(model, pictures(), folder)
    assert result.files == ("analysis.json", "similarity.csv", "similarity.png")
    assert {path.name for path in folder.iterdir()} == set(result.files)
    read = json.loads((folder / "analysis.json").read_text())
    assert read == result.to_json()
    assert read["calibration"]["used"] == 12
    assert read["blocks"]["depth"] == DEPTH
    with (folder / "similarity.csv").open(newline="") as file:
        assert sum(1 for _ in csv.DictReader(file)) == len(list(result.tables.rows()))


def test_without_matplotlib_the_rest_is_written_and_the_extra_named(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = analyze(model, pictures(), tmp_path / "analysis")
    assert result.files == ("analysis.json", "similarity.csv")
    assert "blockfit[plots]" in result.warnings[-1]


def test_a_taken_folder_is_refused_before_any_image_is_read(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    monkeypatch.setattr(analysis, "calibrate", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(BlockfitError, match="not empty"):
        analyze(model, pictures(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


def test_an_analysis_is_replaced_only_when_asked(model: torch.nn.Module, tmp_path: Path) -> None:
    result = dataclasses.replace(analyze(model, pictures()), files=())
    folder = tmp_path / "analysis"
    check_target(folder, analysis.FORM, False)
    analysis.write(result, folder)
    with pytest.raises(BlockfitError, match="overwrite"):
        check_target(folder, analysis.FORM, False)
    check_target(folder, analysis.FORM, True)
    analysis.write(result, folder, overwrite=True)


def test_few_images_are_warned_of(model: torch.nn.Module) -> None:
    result = analyze(model, images(pictures(2)))
    assert [warning.split(" are few")[0] for warning in result.warnings] == [
        "2 prefix tokens",
        "32 patch tokens",
    ]


def test_the_model_is_left_as_it_was(model: torch.nn.Module) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analyze(model, pictures())
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
