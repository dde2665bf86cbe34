"""What results say of themselves in Python: in a line, as a summary, a frame, a picture."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import blockfit_command
from torch import nn

import blockfit
from blockfit.models.demo import load_demo

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("pandas")


@pytest.fixture(autouse=True)
def _without_a_window(monkeypatch: pytest.MonkeyPatch) -> Any:
    matplotlib.use("agg")
    yield
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        pyplot.close("all")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_demo()


@pytest.fixture(scope="module")
def images(model: nn.Module) -> Any:
    return blockfit.images("digits", model, limit=48)


@pytest.fixture(scope="module")
def result(model: nn.Module, images: Any) -> blockfit.Result:
    return blockfit.compress(model, images, params="75%", final=12)


@pytest.fixture(scope="module")
def evaluation(result: blockfit.Result, model: nn.Module) -> blockfit.Evaluation:
    return result.evaluate(blockfit.images("digits:test", model, limit=60), against=model)


@pytest.fixture(scope="module")
def analysis(model: nn.Module, images: Any) -> blockfit.Analysis:
    return blockfit.analyze(model, images)


@pytest.fixture(scope="module")
def frontier(
    model: nn.Module, images: Any, tmp_path_factory: pytest.TempPathFactory
) -> blockfit.Frontier:
    folder = tmp_path_factory.mktemp("sweeps") / "sweep"
    how = {"points": [0.9, 0.7], "cuts": "mlp", "final": 12, "latency_images": 1}
    return blockfit.sweep(model, images.take(32), folder, **how)


@pytest.mark.parametrize("name", ["result", "evaluation", "analysis", "frontier"])
def test_everything_has_a_short_line_a_summary_and_a_small_table(
    name: str, request: pytest.FixtureRequest
) -> None:
    value = request.getfixturevalue(name)
    assert repr(value).startswith(f"{type(value).__name__}(")
    assert len(repr(value)) < 150
    assert "\n" not in repr(value)
    assert str(value.summary()).count("\n") > 3
    page = value._repr_html_()
    assert page.count("<table>") == page.count("</table>") > 0
    assert len(page) < 12_000


def test_the_line_of_a_result_says_what_the_model_is(
    result: blockfit.Result, model: nn.Module
) -> None:
    count = sum(p.numel() for p in result.model.parameters())
    share = count / sum(p.numel() for p in model.parameters())
    assert f"{share:.1%}" in repr(result)
    assert repr(result.plan) == f"Plan({result.plan.brief})"


def test_a_summary_holds_the_cells_that_the_command_prints(tmp_path: Path) -> None:
    words = ["--images", "digits", "--limit", "40", "--span", "3:4", "-o", str(tmp_path / "small")]
    printed = blockfit_command("compress", "demo", *words).out
    model = load_demo()
    images = blockfit.images("digits", model, limit=40)
    told = str(blockfit.compress(model, images, spans=[(3, 4)]).summary())
    for line in told.splitlines():
        for cell in line.split():
            assert cell in printed or set(cell) <= {"─"} or line.startswith("warning"), cell


def test_the_frame_of_a_result_holds_the_figures_of_its_report(result: blockfit.Result) -> None:
    table = result.to_frame()
    assert table.loc["parameters", "compressed"] == result.report["parameters_after"]
    held_out = table[table["on"] == "held out"]
    final = table[table["on"] == "final"]
    assert held_out.loc["kl", "compressed"] == result.report["held_out"]["kl"]
    assert final.loc["kl", "high"] == result.report["final"]["kl"]["high"]
    assert final.loc["top1", "original"] == result.report["final"]["top1_before"]["value"]


def test_the_frame_of_a_plan_says_what_every_part_keeps(result: blockfit.Result) -> None:
    rows = result.plan.to_frame().to_dict("records")
    found = {(r["first"], r["cut"]): (r["kept"], r["size"]) for r in rows}
    cuts = {(n.block, n.part): (n.kept, n.size) for n in result.plan.narrowings}
    assert found == cuts
    spans = blockfit.Plan.of([(3, 5)], "affine").to_frame().to_dict("records")
    assert [(r["first"], r["last"], r["map"]) for r in spans] == [(3, 4, "affine")]


def test_the_bars_of_a_plan_are_what_is_left(result: blockfit.Result) -> None:
    axis = result.plot()
    heights = sorted(round(patch.get_height(), 6) for patch in axis.patches)
    plan = result.plan
    every = [(n.block, n.part) for n in plan.narrowings]
    whole = len({part for _, part in every}) * result.blocks.depth - len(every)
    expected = [round(n.kept / n.size, 6) for n in plan.narrowings] + [1.0] * whole
    assert heights == sorted(expected)
    given = axis.figure.add_subplot()
    assert result.plot(ax=given) is given


def test_a_plan_is_saved_read_and_applied_to_other_weights(
    result: blockfit.Result, images: Any, tmp_path: Path
) -> None:
    result.plan.save(tmp_path / "plan.json")
    plan = blockfit.Plan.load(tmp_path / "plan.json")
    assert plan == result.plan
    with pytest.raises(blockfit.BlockfitError, match=r"plan\.json"):
        plan.save(tmp_path / "plan.json")
    plan.save(tmp_path / "plan.json", overwrite=True)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(blockfit.BlockfitError, match="holds no plan"):
        blockfit.Plan.load(tmp_path / "other.json")
    other = load_demo()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    again = blockfit.compress(other, images.take(24), plan=plan)
    assert again.plan == plan
    assert again.report["parameters_after"] == result.report["parameters_after"]
    names = [n for n, p in again.model.named_parameters() if p.ndim == 2]
    ours = dict(result.model.named_parameters())
    assert any(not torch.equal(dict(again.model.named_parameters())[n], ours[n]) for n in names)


def test_a_result_saves_and_evaluates_itself(
    result: blockfit.Result, evaluation: blockfit.Evaluation, model: nn.Module, tmp_path: Path
) -> None:
    result.save(tmp_path / "small")
    batch = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(blockfit.load(tmp_path / "small")(batch), result.model(batch))
    test = blockfit.images("digits:test", model, limit=60)
    right = sum(int((result.model(b.inputs).argmax(1) == b.labels).sum()) for b in test.batches())
    assert evaluation.compressed.top1 == right / 60


def test_an_evaluation_is_a_frame_a_picture_and_a_file_that_reports_read(
    evaluation: blockfit.Evaluation, result: blockfit.Result, tmp_path: Path
) -> None:
    table = evaluation.to_frame()
    assert table.loc["parameters", "compressed"] == evaluation.compressed.parameters
    assert evaluation.intervals is not None
    assert table.loc["drop", "high"] == evaluation.intervals.drop.high
    axis = evaluation.plot()
    shares = [label.get_text() for label in axis.get_yticklabels()]
    assert {"parameters", "FLOPs", "file", "latency", "top-1"} <= set(shares)
    evaluation.save(tmp_path / "worth.json")
    assert json.loads((tmp_path / "worth.json").read_text()) == evaluation.to_json()
    result.save(tmp_path / "small")
    blockfit.report([tmp_path / "small", tmp_path / "worth.json"], tmp_path / "page.html")
    evaluation.save(tmp_path / "worth.json", overwrite=True)
    assert "latency, ms" in str(evaluation.summary())
    alone = result.evaluate(blockfit.images("digits:test", limit=8), measure=False)
    assert "parameters" in str(alone.summary())
    assert "latency" not in str(alone.summary())
    with pytest.raises(blockfit.BlockfitError, match="against="):
        alone.plot()


def test_an_analysis_is_a_frame_a_picture_and_a_folder(
    analysis: blockfit.Analysis, tmp_path: Path
) -> None:
    table = analysis.to_frame().set_index(["metric", "token_type", "start", "stop"])["value"]
    assert table["cka", "all", 2, 5] == analysis.tables.at("cka", 2, 5)
    (image,) = analysis.plot("cosine", "patch").images
    shown = image.get_array()
    assert float(shown[2, 5]) == analysis.tables.at("cosine", 2, 5, "patch")
    with pytest.raises(blockfit.BlockfitError, match="metrics are"):
        analysis.plot("cosinus")
    analysis.save(tmp_path / "analysis")
    assert json.loads((tmp_path / "analysis" / "analysis.json").read_text()) == analysis.to_json()


def test_a_frontier_is_a_frame_and_a_curve(frontier: blockfit.Frontier) -> None:
    table = frontier.to_frame()
    points, original = frontier.points, frontier.data["original"]
    assert table["parameters_left"].tolist() == [
        p["parameters"] / original["parameters"] for p in points
    ]
    assert table["final_kl_high"].tolist() == [p["final"]["kl"]["high"] for p in points]
    for size, loss in (("parameters", None), ("latency", "agreement"), ("flops", "top1")):
        axis = frontier.plot(size, loss)
        line = axis.lines[0]
        left = {"parameters": "parameters_left", "latency": "latency_left", "flops": "flops_left"}
        assert line.get_xdata().tolist() == table[left[size]].tolist()
        assert line.get_ydata().tolist() == table[f"final_{loss or 'kl'}"].tolist()
    with pytest.raises(blockfit.BlockfitError, match="unknown size 'weight'"):
        frontier.plot("weight")


@pytest.mark.parametrize(
    "budget", [{"params": "75%"}, {"flops": 0.8}, {"max_kl": 0.5}, {"latency": 50.0}]
)
def test_the_best_point_is_chosen_by_any_budget(
    frontier: blockfit.Frontier, budget: dict[str, Any]
) -> None:
    if "latency" in budget:
        budget = {"latency": 1.0}
        timed = [
            dataclasses.replace(e, latency=dataclasses.replace(e.latency, ratio=ratio))
            for e, ratio in zip(frontier.entries, (1.2, 0.8), strict=True)
        ]
        content = dataclasses.replace(frontier.content, points=tuple(timed))
        frontier = blockfit.Frontier(frontier.folder, content)
    found = frontier.best(**budget, force=True)
    assert found == frontier.entries[-1]
    assert repr(found).startswith("Entry(70% of the parameters, loss ")
    with pytest.raises(blockfit.BlockfitError, match="one budget"):
        frontier.best()


def test_a_frontier_makes_its_models_without_images(
    frontier: blockfit.Frontier, model: nn.Module
) -> None:
    made = frontier.compress(params="75%", model=model)
    assert made.plan == frontier.best(params="75%").plan
    assert made.report["parameters_after"] == frontier.best(params="75%").parameters
    with pytest.raises(blockfit.BlockfitError, match="unknown budget 'parameters'"):
        frontier.compress(parameters="75%", model=model)


def test_without_matplotlib_one_sentence_says_what_to_install(
    result: blockfit.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(blockfit.BlockfitError, match=r"^plot\(\) needs matplotlib.*\[plots\]"):
        result.plot()
