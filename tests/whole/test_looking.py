"""Case 14: everything that consumes FLOPs works for models that look at values, and without any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import one_thread  # noqa: F401
from looking import LOOKING, Uncountable, looking
from small import small_images, small_pictures

import blockfit
from blockfit.evaluation.bench import bench
from blockfit.evaluation.evaluate import evaluate
from blockfit.evaluation.speed import Settings
from blockfit.reports.bench_page import draw, markdown
from blockfit.reports.page import render
from blockfit.reports.runs import read_run
from blockfit.search.budget import Budget
from blockfit.search.sweep import from_sweep, read_sweep, sweep


@pytest.mark.parametrize("kind", LOOKING.values(), ids=list(LOOKING))
def test_models_that_look_at_values_are_compressed(kind: Any) -> None:
    model = looking(kind)
    small = blockfit.compress(model, small_images(24), flops=0.8)
    assert small.report["flops_after"] <= 0.8 * small.report["flops_before"]
    worth = evaluate(small.model, small_images(8), against=model)
    assert worth.compressed.flops == small.report["flops_after"]


def test_without_flops_all_but_their_budget_works(tmp_path: Path) -> None:
    model = looking(Uncountable, 4)
    model.img_size = (12, 12)  # as timm says what a model takes
    images = small_images(24)
    with pytest.raises(blockfit.BlockfitError, match=r"FLOPs are unknown.*use remove, params"):
        blockfit.compress(model, images, flops=0.8)
    small = blockfit.compress(model, images, remove=1)
    assert small.report["flops_before"] is small.report["flops_after"] is None
    assert any("FLOPs are unknown" in line for line in small.report["warnings"])

    worth = evaluate(small.model, small_images(8), against=model)
    assert worth.compressed.flops is None
    json.dumps(worth.to_json())

    found = bench(model, {"small": small.model}, Settings(batch_sizes=(1,), rounds=2, threads=1))
    assert found.rows[0].promised is None
    assert "FLOPs are unknown" in markdown(found)
    draw(found, tmp_path / "bench.png")

    sweep(model, images, tmp_path / "sweep", cuts="blocks")
    frontier = read_sweep(tmp_path / "sweep")
    assert [point["flops"] for point in frontier.points] == [None, None]
    chosen = from_sweep(tmp_path / "sweep", Budget("params", 0.9), model)
    assert chosen.report["flops_after"] is None
    with pytest.raises(blockfit.BlockfitError, match="does not know FLOPs"):
        frontier.best(Budget("flops", 0.9))
    assert "FLOPs are unknown" in render(read_run(tmp_path / "sweep"))
    assert torch.isfinite(small.model(small_pictures(2))).all()
