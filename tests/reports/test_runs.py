"""Folders of runs, read for a report: figures as written, commands that make the same again."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commandline import FEW, blockfit_command
from reports import made as made
from reports import runs as runs

import blockfit
from blockfit.errors import BlockfitError
from blockfit.fit.intervals import Interval
from blockfit.fit.plan import Plan
from blockfit.provenance import command_line, started_with
from blockfit.reports.content import Candidate, short_name, suggested
from blockfit.reports.runs import read_run, read_runs
from blockfit.search.final import Final


def written(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def made_again(line: str, folder: Path) -> dict[str, Any]:
    """The plan and report of running ``line`` with another folder to write to."""
    words = shlex.split(line)
    assert words[0] == "blockfit"
    words[words.index("-o") + 1] = str(folder)
    assert blockfit_command(*words[1:], "--quiet").code == 0
    return written(folder / "blockfit.json")


def test_a_saved_folder_is_read_as_it_was_written(runs: dict[str, Path]) -> None:
    found = read_run(runs["small"]).compressed
    saved = written(runs["small"] / "blockfit.json")
    assert found is not None
    assert found.plan.to_json() == saved["plan"]
    assert (found.depth, found.removed) == (12, 4)
    assert found.before["parameters"] == saved["report"]["parameters_before"]
    assert found.after["size_bytes"] == (runs["small"] / "model.safetensors").stat().st_size
    assert found.fidelity["kl"] == saved["report"]["held_out"]["kl"]
    assert [entry.patch for entry in found.maps] == [m["patch"] for m in saved["report"]["maps"]]
    assert found.repaired == tuple(saved["report"]["repaired_blocks"]) == (4, 5, 6, 7, 8, 11)


@pytest.mark.parametrize(
    "options",
    [
        ("--remove", "1", "--recipe", "paper", "--hold-out", "0.3", "--protect", "0,3"),
        ("--span=2:4", "--map", "low-rank", "--rank", "3", "--ridge", "auto", "--seed", "3"),
        ("--params", "90%", "--cuts", "mlp"),
    ],
)
def test_a_run_writes_its_own_command_down(tmp_path: Path, options: tuple[str, ...]) -> None:
    target = tmp_path / "with space"
    first = ("compress", "demo", *FEW, *options, "-o", target, "--quiet")
    assert blockfit_command(*first).code == 0
    found = read_run(target).compressed
    assert found is not None
    assert found.command is not None
    assert shlex.split(found.command) == ["blockfit", *map(str, first)]
    again = made_again(found.command, tmp_path / "again")
    before = written(target / "blockfit.json")
    assert again["plan"] == before["plan"]
    assert again["report"]["held_out"] == before["report"]["held_out"]


def test_python_has_no_command_and_old_names_are_written_as_the_new_ones(tmp_path: Path) -> None:
    images = blockfit.images("digits", blockfit.load("demo"), limit=40)
    report = blockfit.compress("demo", images, spans=["9:11"], map="identity").report
    assert "command" not in report
    assert command_line() is None
    with started_with(["blockfit", "compress", "a b"]):
        assert command_line() == "blockfit compress 'a b'"
    folder = tmp_path / "paper"
    old = ("reproduce", "--model", "demo", "--data", "digits", "--quick")
    few = ("--experiments", "similarity", "--limit", "40", "--test-limit", "20")
    assert blockfit_command(*old, *few, "-o", folder, "--quiet").code == 0
    (line,) = (one.line for one in read_run(folder).commands)
    assert line.startswith("blockfit reproduce demo --images digits --quick --experiments")


def test_plans_of_a_sweep_have_commands_that_make_exactly_them(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    found = read_run(runs["sweep"])
    points = written(runs["sweep"] / "sweep.json")["points"]
    assert [c.removed for c in found.frontier] == list(range(1, 11))
    for candidate, point in zip(found.frontier, points, strict=True):
        assert candidate.top1[1] == candidate.value("top1") == point["top1"]
        assert candidate.share("latency") == point["latency"]["ratio"]
    assert "--select last --repair none --measure-latency 1 -o" in found.commands[0].line
    facts = {fact.name: fact.value for fact in found.facts}
    assert facts["latency measured with"].startswith("1 image per forward pass, ")
    assert facts["duration"].endswith(" s")
    assert facts["images skipped"] == "none"
    assert facts["date"].endswith(" UTC")
    assert facts["machine"]
    assert "torch" in facts["versions"]
    straight = [c for c in found.frontier if c.command]
    assert all("--from" in str(c.command) for c in straight)
    for candidate in straight[:2]:
        assert candidate.command is not None
        again = made_again(candidate.command, tmp_path / str(candidate.removed))
        point = next(p for p in points if p["removed"] == candidate.removed)
        assert again["plan"] == point["plan"]
        assert again["report"]["held_out"] == pytest.approx(point["held_out"], rel=1e-4)
    assert straight


def test_a_plan_that_a_smaller_model_beats_has_no_command(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    shutil.copytree(runs["sweep"], folder)
    data = written(folder / "sweep.json")
    for point in data["points"]:
        point["held_out"]["kl"] = 0.5 if point["removed"] == 2 else 0.01 * point["removed"]
    (folder / "sweep.json").write_text(json.dumps(data))
    beaten = read_run(folder).frontier[1]
    assert beaten.command is None
    assert any("removing 3 blocks is smaller" in text for text in beaten.warnings)


def test_an_analysis_is_read_as_it_was_written(runs: dict[str, Path]) -> None:
    found = read_run(runs["analysis"])
    assert found.similarity is not None
    assert found.similarity.to_json() == written(runs["analysis"] / "analysis.json")["similarity"]
    assert "blockfit analyze demo --images digits --limit 40" in found.commands[0].line


def test_runs_of_one_model_are_put_together(runs: dict[str, Path]) -> None:
    whole = read_runs(place for name, place in runs.items() if name != "thin")
    assert whole.compressed == read_run(runs["small"]).compressed == whole.chosen
    assert len(whole.frontier) == 10
    assert whole.similarity is not None
    assert whole.evaluation is not None
    assert whole.evaluation.images == 300
    told = written(runs["evaluation.json"])
    assert whole.evaluation.compressed.top1 == told["compressed"]["top1"]
    assert whole.evaluation.compressed.latency_ms == told["compressed"]["latency_ms"]["median"]
    assert whole.model == "demo"


def test_runs_that_do_not_belong_together_are_refused(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs["analysis"], other)
    data = written(other / "analysis.json")
    (other / "analysis.json").write_text(json.dumps({**data, "model": "another"}))
    with pytest.raises(BlockfitError, match="is of the model another, the other runs are of demo"):
        read_runs([runs["small"], other])
    with pytest.raises(BlockfitError, match="both hold similarity tables"):
        read_runs([runs["analysis"], runs["thin"]])
    told = written(runs["evaluation.json"])
    told["compressed"]["parameters"] += 1
    (tmp_path / "evaluation.json").write_text(json.dumps(told))
    with pytest.raises(BlockfitError, match="evaluation is of a model that none"):
        _ = read_runs([runs["small"], tmp_path / "evaluation.json"]).chosen


def test_runs_of_one_model_stand_on_one_frontier(runs: dict[str, Path], tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(runs["sweep"], twin)  # both of the same second
    whole = read_runs([runs["sweep"], runs["small"], twin, runs["evaluation.json"]])
    assert [one.name for one in whole.series] == [
        "sweep (default)", "small (default)", "twin (default)"
    ]  # fmt: skip
    keys = [candidate.key for one in whole.series for candidate in one.candidates]
    assert len(keys) == len(set(keys)) == 21
    told = written(runs["evaluation.json"])["intervals"]
    (small,) = whole.series[1].candidates
    found = small.tested("top1")
    assert found is not None
    assert vars(found[0]) == told["top1_after"]
    assert found[1] == told["labelled"]
    assert whole.series[0].candidates[0].test is None
    facts = {(fact.name, fact.run) for fact in whole.facts}
    assert ("duration", "sweep") in facts
    assert ("date", "evaluation.json") in facts
    assert {("date", "sweep"), ("date", "twin")} <= facts
    assert sum(name == "machine" for name, _ in facts) == 1


def test_a_plan_is_suggested_by_images_that_decided_nothing() -> None:
    """Held-out figures chose the plans: by them the smallest one here would do."""

    def candidate(
        kept: float, held_out: float, high: float | None, command: str | None = None
    ) -> Candidate:
        kl = None if high is None else Interval(high / 2, 0.0, high)
        error = Interval(0.2, 0.1, 0.3)
        final = None if kl is None else Final(9, 0, "mine", None, None, None, None, kl, error)
        sizes = {"parameters": 100.0}, {"parameters": kept}
        return Candidate(Plan(), 4, *sizes, {"kl": held_out}, command=command, final=final)

    large, small = candidate(80, 0.01, 0.05), candidate(50, 0.02, 0.2)
    assert suggested([large, small]) is large
    assert suggested([candidate(80, 0.01, None), other := candidate(50, 0.02, None)]) is other
    assert suggested([small]) is small
    made = candidate(60, 0.01, 0.3, "blockfit compress --from sweep --params 60% -o small")
    assert suggested([large, made, small]) is made, "no command makes the others"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/data/models/dinov2-small/", "dinov2-small"),
        ("../models/vit", "vit"),
        ("C:\\models\\vit", "vit"),
        ("facebook/dinov2-small", "facebook/dinov2-small"),
        ("timm/vit_tiny_patch16_224", "timm/vit_tiny_patch16_224"),
    ],
)
def test_a_report_opens_on_a_name(name: str, shown: str) -> None:
    assert short_name(name) == shown


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BlockfitError, match="does not exist; give a folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(BlockfitError, match="holds no run; give a folder"):
        read_run(tmp_path)
    (tmp_path / "some.json").write_text("{}")
    with pytest.raises(BlockfitError, match="not what evaluate --json printed"):
        read_run(tmp_path / "some.json")


TABLE = ("similarity", "metrics", "mse", "all")


def change(*keys: Any, to: Any) -> Callable[[Any], None]:
    def apply(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("run", "name", "damage", "message"),
    [
        ("small", "blockfit.json", change("report", "held_out", "kl", to="x"), "kl must be a num"),
        ("small", "blockfit.json", change("report", "maps", 0, "span", to="<b>"), "as a span"),
        ("small", "blockfit.json", change("report", "maps", 0, "map", to="<b>"), "unknown map"),
        ("small", "blockfit.json", change("report", "repaired_blocks", to=[99]), "no block 99"),
        ("small", "blockfit.json", change("report", "warnings", to="x"), "list"),
        ("small", "blockfit.json", change("plan", 0, "map", to="<script>"), "unknown map"),
        ("analysis", "analysis.json", change("similarity", "boundaries", to=[0]), "boundaries"),
        ("analysis", "analysis.json", change(*TABLE, to=[]), "13 × 13"),
        ("analysis", "analysis.json", change(*TABLE, 0, 0, to="x"), "must be a number"),
        ("analysis", "analysis.json", change("similarity", "metrics", to={}), "hold no tables"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_with_its_file_and_key(
    runs: dict[str, Path], tmp_path: Path, run: str, name: str, damage: Any, message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(runs[run], folder)
    data = written(folder / name)
    damage(data)
    (folder / name).write_text(json.dumps(data))
    with pytest.raises(BlockfitError, match=message) as caught:
        read_run(folder)
    assert str(folder / name) in str(caught.value) or "as a span" in str(caught.value)


def test_older_folders_say_less_and_are_still_read(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(runs["small"], folder)
    data = written(folder / "blockfit.json")
    data["report"] = {}
    (folder / "blockfit.json").write_text(json.dumps(data))
    found = read_run(folder).compressed
    assert found is not None
    assert found.repaired is found.command is found.loss is None
    assert found.maps == ()
    assert blockfit.load(folder) is not None
