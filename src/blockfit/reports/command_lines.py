"""Command lines that make a run again, from what the run wrote down.

A line is given only where it makes the same: what options cannot say is not said.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockfit.fields import Values
from blockfit.fit.plan import Plan
from blockfit.models.source import Source
from blockfit.search.budget import Budget
from blockfit.search.recipes import RECIPES, recipe_for, recipe_json
from blockfit.search.session import HOLD_OUT

SMALL = Path("small")
"""Where a model goes that lies nowhere yet."""


def compress_line(report: Values, plan: Plan, source: Source, folder: Path) -> str | None:
    """For a saved folder; ``None`` where the folder does not tell all of it."""
    budget = (report.text("budget") or "").split()
    if len(budget) != 2:
        return by_hand_line(report, plan, source, folder)
    sized = [f"--{budget[0].replace('_', '-')}", budget[1]]
    if (sweep := report.text("sweep")) is not None:
        return _line("compress", "--from", sweep, *sized, "-o", str(folder))
    how = _recipe(report.inner("recipe"), by_hand=False)
    words = None if how is None else [*sized, *how]
    return _on_images("compress", report, source.loads_as, words, folder)


def from_line(sweep: Path, budget: Budget) -> str:
    """For a plan of a sweep."""
    value = f"{budget.value:.0f}" if budget.kind == "remove" else f"{100 * budget.value:g}%"
    words = (f"--{budget.kind}", value, "-o", str(SMALL))
    return _line("compress", "--from", str(sweep), *words)


def by_hand_line(run: Values, plan: Plan, source: Source, folder: Path = SMALL) -> str | None:
    """With every span named; ``None`` where options cannot say it."""
    if plan.narrowings:
        return None
    kinds = {(entry.map, entry.rank, entry.per_token_type) for entry in plan}
    how = _recipe(run.inner("recipe"), by_hand=True)
    if len(kinds) != 1 or how is None or plan.narrowings:
        return None
    kind, rank, split = kinds.pop()
    words = [word for entry in plan for word in ("--span", str(entry.span))]
    words += ["--map", kind, *([] if rank is None else ["--rank", str(rank)])]
    words += ["--per-token-type"] if split else []
    return _on_images("compress", run, source.loads_as, [*words, *how], folder)


def sweep_line(run: Values, source: Source, folder: Path, timed: int | None) -> str | None:
    """For a whole sweep; ``timed`` is the number of images that its latencies are of."""
    how = _recipe(run.inner("recipe"), by_hand=False)
    if how is not None and timed is not None:
        how += ["--measure-latency", str(timed)]
    return _on_images("sweep", run, source.loads_as, how, folder)


def analyze_line(data: Values, model: str, folder: Path) -> str | None:
    """For an analysis."""
    return _on_images("analyze", data, model or None, [], folder)


def _on_images(
    command: str, run: Values, model: str | None, how: list[str] | None, folder: Path
) -> str | None:
    calibration = run.inner("calibration")
    images, seed = calibration.text("source"), run.whole("seed")
    total, drawn = calibration.whole("total"), calibration.whole("drawn")
    if model is None or how is None or images is None or drawn is None:
        return None
    words = [model, "--images", images]
    words += [] if drawn == total else ["--limit", str(drawn)]
    words += ["--seed", str(seed)] if seed else []
    if blocks := run.wholes("protect"):
        words += ["--protect", ",".join(map(str, blocks))]
    words += _hold_out(run)
    return _line(command, *words, *how, "-o", str(folder))


def _hold_out(run: Values) -> list[str]:
    """The part of the images that judged, where it is not the usual one."""
    part = run.number("hold_out")
    fit, held = (run.inner("calibration").whole(name) for name in ("fit", "held_out"))
    if part is None and fit is not None and held is not None:
        usual = round(HOLD_OUT * (fit + held)) == held
        part = None if usual else held / (fit + held)
    return [] if part is None or part == HOLD_OUT else ["--hold-out", f"{part:g}"]


def _recipe(recipe: Values, by_hand: bool) -> list[str] | None:
    """Options that turn a stock recipe into this one; ``None`` where none do.

    Of spans that are written by hand, the maps are said beside them, and nothing is selected.
    """
    name = recipe.text("name")
    if name not in RECIPES:
        return None
    usual = recipe_json(recipe_for(name, by_hand))
    own: dict[str, Any] = {key: recipe.raw(key) for key in usual if key != "options"}
    changed = _changed(own, usual)
    options = recipe.inner("options")
    changed |= _changed({key: options.raw(key) for key in usual["options"]}, usual["options"])
    if by_hand:
        for key in ("maps", "rank", "per_token_type", "select", "contiguous", "longest", "cuts"):
            changed.pop(key, None)
    if isinstance(maps := changed.pop("maps", None), list):
        if len(maps) != 1:
            return None
        changed["map"] = maps[0]
    words = [] if name == "default" else ["--recipe", name]
    for key, value in changed.items():
        if key in ("longest", "refit") or value is False:
            return None  # there is no such option
        words.append(f"--{key.replace('_', '-')}")
        if isinstance(value, list):
            words.append(",".join(map(str, value)))
        elif value is not True:
            words.append("auto" if value is None else str(value))
    return words


def _changed(own: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in own.items() if value != usual[key]}


def _line(command: str, *words: str) -> str:
    return shlex.join(["blockfit", command, *words])
