"""What the folders of runs hold, read for a report: nothing in them is trusted, all is checked.

``READERS`` says which file marks which kind of run; a new kind adds its mark and its reader.
"""

from __future__ import annotations

import io
import os
import shlex
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from blockfit.data.decode import Unreadable, decode
from blockfit.errors import BlockfitError
from blockfit.evaluation import analysis
from blockfit.evaluation.answers import Answers
from blockfit.evaluation.paper import study as reproduce
from blockfit.evaluation.paper.pages import FRACTIONS, WORDS
from blockfit.fields import Values, read, read_values
from blockfit.files import expanded
from blockfit.fit.intervals import Interval
from blockfit.fit.plan import MAP_KINDS, Plan, Span
from blockfit.fit.similarity import METRICS, Tables
from blockfit.formats import folder as store
from blockfit.formats.manifest import read_manifest
from blockfit.models.source import Source
from blockfit.reports.content import (
    FIDELITY,
    Candidate,
    Command,
    Content,
    Evaluated,
    Experiment,
    Fact,
    Measured,
    joined,
)
from blockfit.reports.facts import (
    duration,
    made_facts,
    model_facts,
    only_known,
    run_facts,
    timing_facts,
    written_with,
)
from blockfit.search import sweep as sweeps
from blockfit.search.budget import Budget
from blockfit.search.final import Final
from blockfit.search.held_out import MapError
from blockfit.search.sweep_file import MARK as SWEEP_MARK

MOST_BOUNDARIES = 512
"""More hidden states than any model has blocks."""

MOST_PIXELS = 8_000_000
"""Of the picture of an experiment."""

MOST_ROWS = 300
"""Rows of an experiment's table that are shown."""

TOKEN_TYPES = ("prefix", "patch", "all")


def read_runs(paths: Iterable[str | Path]) -> Content:
    """The findings of folders that blockfit wrote, and of files that ``evaluate --json`` printed.

    Args:
        paths: folders of ``compress``, ``sweep`` and ``analyze`` on one model, and JSON files; of
            sweeps, models and evaluations there may be several.

    Raises:
        BlockfitError: where one is none of these or is damaged, or they do not belong together.
    """
    parts = {str(path): read_run(path) for path in dict.fromkeys(paths)}
    return joined(parts)


def read_run(path: str | Path) -> Content:
    """The findings of one folder or file.

    Raises:
        BlockfitError: where it is none of blockfit's, or is damaged.
    """
    place = expanded(path)
    if place.is_file():
        return _evaluation(place)
    for mark, reader in READERS.items():
        if (place / mark).is_file():
            return reader(place)
    what = "holds no run" if place.is_dir() else "does not exist"
    raise BlockfitError(
        f"{path} {what}; give a folder that compress, sweep, analyze or reproduce wrote, or a file "
        "with what evaluate --json printed"
    )


def _saved(folder: Path) -> Content:
    mark, weights = folder / store.MARK, folder / store.WEIGHTS
    manifest = read_manifest(mark)
    found = result_content(
        manifest.plan,
        manifest.blocks.depth,
        manifest.source,
        Values(manifest.report, f"{mark}: report"),
        weights.stat().st_size if weights.is_file() else None,
    )
    return replace(found, facts=(*found.facts, written_with(manifest.versions)))


def result_content(
    plan: Plan,
    depth: int,
    source: Source,
    report: Values,
    size_bytes: float | None = None,
) -> Content:
    """The findings of one compression."""
    before, after = (
        {name: report.number(f"{name}_{when}") for name in ("parameters", "flops")}
        for when in ("before", "after")
    )
    if size_bytes is not None:
        after["size_bytes"] = size_bytes
    candidate = Candidate(
        plan=plan,
        depth=depth,
        before=before,
        after=after,
        fidelity=_fidelity(report.inner("held_out")),
        maps=_map_errors(report),
        repaired=_repaired(report, depth),
        warnings=report.texts("warnings"),
        command=report.text("command"),
        top1=(report.number("top1_before"), report.number("top1_after")),
        latency=_latency(report),
        final=_final(report.inner("final")),
    )
    facts = [*model_facts(source), *run_facts(report, report.inner("calibration"))]
    facts += [*timing_facts([report]), *made_facts(report.inner("made"))]
    recipe = report.inner("recipe").text("name") or ""
    return Content(source.name, candidate, facts=only_known(facts), run=recipe)


def _sweep(folder: Path) -> Content:
    where = folder / SWEEP_MARK
    found = sweeps.read_sweep(folder)
    data = Values(found.data, str(where))
    source = Source.from_json(data.raw("source"), f"{where}: source")
    depth, run = data.inner("blocks").whole("depth"), data.inner("run")
    if depth is None:
        raise BlockfitError(f"{where}: blocks: key 'depth' is missing; run the sweep again")
    points = [Values(point, str(where)) for point in found.points]
    candidates = [_point(point, found, data, depth, source) for point in points]
    commands = _commands("The sweep", data.text("command"))
    return Content(
        source.name,
        frontier=tuple(candidates),
        facts=only_known(
            [
                *model_facts(source),
                *run_facts(run, run.inner("calibration")),
                *timing_facts(points),
                Fact("duration", duration(sum(p.number("seconds") or 0.0 for p in points))),
                *made_facts(data.inner("made")),
            ]
        ),
        commands=commands,
        run=run.inner("recipe").text("name") or "",
    )


def _commands(what: str, line: str | None) -> tuple[Command, ...]:
    """The command that a run wrote down; none where Python started it."""
    return () if line is None else (Command(what, line),)


def suggestion(folder: str | Path) -> str | None:
    """The command that makes the plan with which the report of a sweep opens.

    Raises:
        BlockfitError: where the folder holds no sweep, or is damaged.
    """
    if (chosen := read_run(folder).chosen) is None:
        return None
    return chosen.command or _from_sweep(Path(folder), _budget(chosen.removed, chosen.target))


def _budget(removed: int, target: float | None) -> Budget:
    return Budget("remove", removed) if target is None else Budget("params", target)


def _from_sweep(folder: Path, budget: Budget) -> str:
    """The command that makes the model of a sweep's plan."""
    value = f"{budget.value:.0f}" if budget.kind == "remove" else f"{100 * budget.value:g}%"
    words = ("blockfit", "compress", "--from", str(folder), f"--{budget.kind}", value)
    return shlex.join((*words, "-o", "small"))


def _point(
    point: Values, found: sweeps.Frontier, data: Values, depth: int, source: Source
) -> Candidate:
    """One plan of a sweep, and the command that makes exactly it where the sweep gives it."""
    plan = Plan.from_json(point.raw("plan"), f"{point.where}: plan")
    plan.check(depth)
    original = data.inner("original")
    removed, warnings = len(plan.removed_blocks), point.texts("warnings")
    target = point.number("share")
    budget = _budget(removed, target)
    line: str | None = _from_sweep(found.folder, budget)
    best = found.best(budget)
    if best.file != point.text("file"):
        warnings += (
            f"the plan {best.named(gerund=True)} is smaller and lost less on the held-out "
            f"images: --from with the budget of this one makes that one",
        )
        line = None
    return Candidate(
        plan=plan,
        depth=depth,
        before={key: original.number(key) for key in ("parameters", "flops")},
        after={key: point.number(key) for key in ("parameters", "flops")},
        fidelity=_fidelity(point.inner("held_out")),
        maps=_map_errors(point),
        repaired=_repaired(point, depth),
        warnings=warnings,
        command=line,
        top1=(original.number("top1"), point.number("top1")),
        latency=_latency(point),
        final=_final(point.inner("final")),
        target=target,
    )


def _analysis(folder: Path) -> Content:
    return analysis_content(read_values(folder / analysis.MARK))


def analysis_content(data: Values) -> Content:
    """The findings of ``Analysis.to_json``."""
    name, calibration = data.text("model") or "", data.inner("calibration")
    return Content(
        name,
        similarity=_tables(data.inner("similarity")),
        facts=only_known(
            [
                *run_facts(data, calibration, "images of the similarity"),
                *made_facts(data.inner("made")),
            ]
        ),
        commands=_commands("The analysis", data.text("command")),
        warnings=data.texts("warnings"),
    )


def _reproduction(folder: Path) -> Content:
    data = read_values(folder / reproduce.MARK)
    about, entries = data.inner("about"), data.inner("experiments")
    model, test = about.inner("model"), about.inner("test")
    experiments = []
    for name in entries.keys():  # noqa: SIM118 - no mapping
        entry = entries.inner(name)
        known = reproduce.BY_NAME.get(name)
        rows = entry.several("rows")
        experiments.append(
            Experiment(
                title=name if known is None else known.title,
                finding=entry.text("finding") or "",
                picture=None if known is None else _chart(folder / f"{name}.png"),
                **_rows_shown(rows),
            )
        )
    facts = [
        Fact("experiments judged by", about.text("judge") or ""),
        Fact("test images", f"{test.whole('images') or 0} from {test.text('source') or '–'}"),
    ]
    return Content(
        model.text("name") or "",
        experiments=tuple(experiments),
        facts=only_known(facts),
        commands=_commands("The experiments", data.text("command")),
    )


def _chart(path: Path) -> bytes | None:
    """The picture of an experiment, encoded again: the file may be anybody's."""
    if not path.is_file() or os.path.realpath(path.parent) != os.path.dirname(
        os.path.realpath(path)
    ):
        return None
    try:
        image = decode(path, MOST_PIXELS)
    except Unreadable as error:
        raise BlockfitError(
            f"{path} is no picture ({error}); delete it, and reproduce draws it again"
        ) from error
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _rows_shown(rows: list[Values]) -> dict[str, Any]:
    """Header and cells of a table; none where it would be too long to read."""
    if not rows or len(rows) > MOST_ROWS:
        return {"header": (), "rows": ()}
    columns = [name for name in rows[0].keys() if any(name in row for row in rows)]  # noqa: SIM118
    return {
        "header": tuple(WORDS.get(name, name) for name in columns),
        "rows": tuple(tuple(_cell(name, row.raw(name)) for name in columns) for row in rows),
    }


def _cell(column: str, value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2%}" if column in FRACTIONS else f"{value:.4g}"
    return "–" if value is None or value == "" else str(value)


READERS: dict[str, Callable[[Path], Content]] = {
    store.MARK: _saved,
    SWEEP_MARK: _sweep,
    analysis.MARK: _analysis,
    reproduce.MARK: _reproduction,
}
"""File that marks a kind of run → what reads its folder."""


def _evaluation(path: Path) -> Content:
    data = read_values(path)
    if "compressed" not in data:
        raise BlockfitError(
            f"{path} is not what evaluate --json printed: it has no figures of a compressed model; "
            "save that output to a file and give the file"
        )
    skipped = [f for part in data.several("data") for f in part.texts("skipped")]
    facts = [
        Fact("test images", data.inner("intervals").text("source") or ""),
        Fact("test images skipped", f"{len(skipped)}" if skipped else "none"),
        *made_facts(data.inner("made")),
    ]
    return Content("", evaluation=read_evaluation(data), facts=only_known(facts))


def read_evaluation(data: Values) -> Evaluated:
    """Figures of ``Evaluation.to_json``, checked."""
    original = data.inner("original") if "original" in data else None
    return Evaluated(
        images=data.whole("images") or 0,
        compressed=_measured(data.inner("compressed")),
        original=None if original is None else _measured(original),
        fidelity={k: data.inner("fidelity").number(k) for k in FIDELITY},
        speedup=data.inner("compressed").number("speedup"),
        intervals=_final(data.inner("intervals")),
        answers=_answers(data),
    )


def _answers(data: Values) -> Answers | None:
    """Top-1 by class and the flips; ``None`` where an older version wrote the file."""
    if "flipped" not in data:
        return None
    return read(Answers, {one.name: data.raw(one.name) for one in fields(Answers)}, data.where)


def _measured(data: Values) -> Measured:
    names = {field.name for field in fields(Measured)} - {"latency_ms"}
    latency = data.inner("latency_ms").number("median")
    return Measured(latency_ms=latency, **{name: data.number(name) for name in names})


def _fidelity(data: Values) -> dict[str, float | None]:
    return {"images": data.whole("images"), **{name: data.number(name) for name in FIDELITY}}


def _latency(data: Values) -> tuple[float, float, float] | None:
    """The ratio and its quartiles; ``None`` where nothing was timed."""
    ratio, low, high = (data.inner("latency").number(key) for key in ("ratio", "low", "high"))
    return None if ratio is None or low is None or high is None else (ratio, low, high)


def _final(data: Values) -> Final | None:
    """Figures of images that decided nothing; ``None`` where a run has none."""
    images, error = data.whole("images"), _interval(data.inner("feature_error"))
    if images is None or error is None:
        return None
    names = ("top1_before", "top1_after", "drop", "agreement", "kl")
    figures = {name: _interval(data.inner(name)) for name in names}
    labelled, source = data.whole("labelled") or 0, data.text("source") or ""
    return Final(images, labelled, source, feature_error=error, **figures)


def _interval(data: Values) -> Interval | None:
    value, low, high = (data.number(key) for key in ("value", "low", "high"))
    return None if value is None or low is None or high is None else Interval(value, low, high)


def _map_errors(data: Values) -> tuple[MapError, ...]:
    numbers = [field.name for field in fields(MapError) if field.name not in ("span", "map")]
    rows = []
    for entry in data.several("maps"):
        values: dict[str, Any] = {name: entry.number(name) for name in numbers}
        for name in ("error", "identity_error"):
            if values[name] is None:
                raise BlockfitError(f"{entry.where}: key {name!r} is missing")
        span, kind = str(Span.parse(entry.text("span") or "")), entry.text("map") or ""
        if kind not in MAP_KINDS:
            raise BlockfitError(f"{entry.where}: unknown map {kind!r}")
        rows.append(MapError(span, kind, **values))
    return tuple(rows)


def _repaired(data: Values, depth: int) -> tuple[int, ...] | None:
    found = data.wholes("repaired_blocks")
    if found and max(found) >= depth:
        raise BlockfitError(f"{data.where}: repaired_blocks: there is no block {max(found)}")
    return found


def _tables(data: Values) -> Tables:
    boundaries, metrics = data.wholes("boundaries") or (), data.inner("metrics")
    if not 2 <= len(boundaries) <= MOST_BOUNDARIES:
        raise BlockfitError(f"{data.where}: boundaries must name 2 to {MOST_BOUNDARIES} states")
    tokens = {name: data.inner("tokens").whole(name) or 0 for name in ("prefix", "patch")}
    values = {}
    for metric in (m for m in METRICS if m in metrics):
        types = metrics.inner(metric)
        values[metric] = {
            name: _table(types.raw(name), len(boundaries), f"{types.where}: {name}")
            for name in TOKEN_TYPES
            if name in types
        }
    if (
        not values
        or len({tuple(types) for types in values.values()}) != 1
        or not all(values.values())
    ):
        raise BlockfitError(f"{data.where}: metrics hold no tables, or not of the same token types")
    return Tables(boundaries, tokens, values)


def _table(value: Any, size: int, where: str) -> list[list[float | None]]:
    square = isinstance(value, list) and len(value) == size
    if not square or not all(isinstance(line, list) and len(line) == size for line in value):
        raise BlockfitError(f"{where} must be a table of {size} × {size} numbers")
    names = [f"column {column}" for column in range(size)]
    rows = [Values(dict(zip(names, line, strict=True)), where) for line in value]
    return [[row.number(name) for name in names] for row in rows]
