"""The commands as functions: models by name, results and folders alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commandline import Done
from commandline import small as small
from families import one_thread as one_thread

import blockfit
from blockfit.evaluation.paper import setup
from blockfit.evaluation.paper.lab import QUICK
from blockfit.models.demo import digits, load_demo

CHEAP = blockfit.Recipe(maps=("identity",), select="last", options=blockfit.Options(repair="none"))


@pytest.fixture(scope="module")
def result() -> blockfit.Result:
    images = blockfit.images("digits", load_demo(), limit=40)
    return blockfit.compress("demo", images, spans=["9:11"], map="identity", repair="none")


def test_evaluate_takes_names_folders_and_results(
    small: tuple[Path, Done], result: blockfit.Result
) -> None:
    told = blockfit.evaluate(small[0], "digits:test", against="demo", measure=False)
    assert told.images == 599
    pictures, labels = digits("test")
    with torch.inference_mode():
        right = (load_demo()(pictures).argmax(1) == labels).float().mean()
    assert told.original is not None
    assert told.original.top1 == pytest.approx(float(right), abs=1e-6)
    of_result = blockfit.evaluate(result, "digits:test", measure=False)
    of_module = blockfit.evaluate(result.model, "digits:test", measure=False)
    assert of_result.compressed.top1 == of_module.compressed.top1
    assert of_result.original is None


def test_a_sweep_by_name_gives_a_model_for_a_budget(tmp_path: Path) -> None:
    images = blockfit.images("digits", load_demo(), limit=40)
    frontier = blockfit.sweep("demo", images, tmp_path / "sweep", recipe=CHEAP)
    assert len(frontier.points) == 10
    made = blockfit.from_sweep(tmp_path / "sweep", remove=3)
    assert len(made.plan.removed_blocks) == 3
    for wrong in ({}, {"remove": 3, "params": "60%"}):
        with pytest.raises(blockfit.BlockfitError, match="one budget"):
            blockfit.from_sweep(tmp_path / "sweep", **wrong)
    page = blockfit.report(tmp_path / "sweep", tmp_path / "page.html")
    assert page.read_text("utf-8").startswith("<!doctype html>")


def test_analyze_takes_a_name() -> None:
    images = blockfit.images("digits", load_demo(), limit=20)
    assert blockfit.analyze("demo", images).tables.boundaries == tuple(range(13))


def test_bench_takes_results_and_folders(small: tuple[Path, Done], result: blockfit.Result) -> None:
    smalls = {"from a folder": small[0], "a result": result}
    told = blockfit.bench("demo", smalls, batch_sizes=[2], rounds=2)
    assert [row.name for row in told.rows] == list(smalls)
    assert told.models.keys() == {"original", *smalls}


def test_a_result_is_exported_as_its_folder_is(
    small: tuple[Path, Done], result: blockfit.Result, tmp_path: Path
) -> None:
    pictures = digits("test")[0][:4]
    for number, one in enumerate((result, small[0], "demo")):
        path = tmp_path / f"{number}.pt2"
        done = blockfit.export_program(one, path)
        assert done.path == path
        model = result.model if one is result else blockfit.load(one)
        with torch.inference_mode():
            torch.testing.assert_close(
                torch.export.load(path).module()(pictures), model(pictures), atol=1e-5, rtol=1e-5
            )


def test_plain_and_hub_take_a_result_and_say_what_they_cannot_write(
    result: blockfit.Result, tmp_path: Path
) -> None:
    for write in (blockfit.export_plain, blockfit.export_hub):
        with pytest.raises(blockfit.BlockfitError, match=r"demo|transformers"):
            write(result, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_reproduce_runs_an_experiment_and_refuses_before_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "reproduction"
    told = blockfit.reproduce(
        "demo", "digits", folder, experiments="similarity", quick=True, limit=20, test_limit=20
    )
    assert json.loads((folder / "reproduction.json").read_text()) == told
    assert list(told["experiments"]) == ["similarity"]
    monkeypatch.setattr(blockfit.api, "load", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(blockfit.BlockfitError, match="unknown experiment"):
        blockfit.reproduce("demo", "digits", tmp_path / "other", experiments="alchemy")
    with pytest.raises(blockfit.BlockfitError, match="a train and a test part"):
        blockfit.reproduce("demo", None, tmp_path / "other", train="digits")
    assert setup.settings_for(True, seed=3).starts == QUICK.starts
