"""What runs and sweeps found, as lines and tables for people; every figure is in the JSON too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from blockfit.fit.plan import Plan
from blockfit.search.session import SAFE_LOSS
from blockfit.summary import Part, Table
from blockfit.units import amount, number, percent, share

MUCH_CLOSER = 2.0
"""How many times the error of the images that a model was solved on others may have before more
images are asked for (docs/guides/budget.md)."""

BEFORE_AFTER: tuple[str, ...] = ("", "original", "compressed", "of original")


def plan_lines(plan: Plan) -> list[Part]:
    """What the plan cuts, a line per block, where parts of blocks are narrowed."""
    if not plan.narrowings:
        return []
    title = "what stays, of what there was (of values and keys, of each head):"
    return [title, *(f"  {line}" for line in plan.lines())]


def compression(report: Mapping[str, Any], depth: int, maps: bool = False) -> list[Part]:
    """Sizes before and after, fidelity, final figures and a verdict.

    Args:
        maps: with the table of every map's error.
    """
    kept = depth - report["removed_blocks"]
    sizes = [("blocks", str(depth), str(kept), share(kept, depth))]
    for name, key in (("parameters", "parameters"), ("FLOPs per image", "flops")):
        before, after = report[f"{key}_before"], report[f"{key}_after"]
        sizes.append((name, amount(before), amount(after), share(after, before)))
    parts: list[Part] = [Table.of(BEFORE_AFTER, sizes)]
    if maps:
        parts.append(_maps(report["maps"]))
    held_out = report["held_out"]
    words = []
    if held_out["kl"] is not None:
        words = [f"KL {held_out['kl']:.4f}", f"agreement {held_out['agreement']:.2%}"]
    if report["top1_after"] is not None:
        before, after = percent(report["top1_before"]), percent(report["top1_after"])
        words.append(f"top-1 {after} (original {before})")
    words += [
        f"feature cosine {held_out['feature_cosine']:.4f}",
        f"relative error {held_out['feature_relative_error']:.4f}",
    ]
    told = f"on {held_out['images']} held-out images, which chose the plan: {', '.join(words)}"
    return [*parts, told, *_fitted(report), *_final(report), f"verdict: {verdict(report)}"]


def figure_rows(report: Mapping[str, Any], depth: int) -> Iterator[dict[str, Any]]:
    """The same figures as numbers, a row each; what is not known is left out."""
    kept = depth - report["removed_blocks"]
    yield _row("blocks", depth, kept)
    for key in ("parameters", "flops"):
        yield _row(key, report[f"{key}_before"], report[f"{key}_after"])
    held_out = report["held_out"]
    on = {"images": held_out["images"], "on": "held out"}
    if report["top1_after"] is not None:
        yield _row("top1", report["top1_before"], report["top1_after"], **on)
    for key in ("kl", "agreement", "feature_cosine", "feature_relative_error"):
        if held_out[key] is not None:
            yield _row(key, None, held_out[key], **on)
    final = report.get("final") or {}
    for name, key in FINAL.items():
        if (found := final.get(key)) is None:
            continue
        images = final["labelled" if key in ("top1_after", "drop") else "images"]
        before = final["top1_before"]["value"] if key == "top1_after" else None
        ends = {"low": found["low"], "high": found["high"]}
        yield _row(name, before, found["value"], images=images, on="final", **ends)


FINAL = {
    "top1": "top1_after",
    "drop": "drop",
    "agreement": "agreement",
    "kl": "kl",
    "feature_relative_error": "feature_error",
}
"""Figures by their names in ``Fidelity`` → by those of ``Final``."""


def _row(figure: str, original: Any, compressed: Any, **more: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("low", "high", "images", "on"))
    return {"figure": figure, "original": original, "compressed": compressed, **empty, **more}


def verdict(report: Mapping[str, Any]) -> str:
    """Whether the small model can be used as it is, and what its maps are worth, in one line.

    By the images that decided nothing, with the whole interval, where there are some.
    """
    close = _close_by(report.get("final")) or _close_by_held_out(report)
    worst = max(report["maps"], key=lambda entry: entry["error"], default=None)
    if worst is None or not worst["identity_error"]:
        return close
    left = share(worst["error"], worst["identity_error"])
    return f"{close}; the weakest map, of {worst['span']}, leaves {left} of the error without it"


def _close_by(final: Mapping[str, Any] | None) -> str | None:
    """Whether it is close by figures that have intervals; ``None`` without them."""
    name = next((n for n in ("kl", "feature_error") if final and final.get(n) is not None), None)
    if final is None or name is None:
        return None
    figure, what = final[name], {"kl": "KL", "feature_error": "feature error"}[name]
    low, high = figure["low"], figure["high"]
    told = f"{what} {number(figure['value'])}, {number(low)} to {number(high)}"
    if high <= SAFE_LOSS:
        return f"close to the original ({told}; at most {SAFE_LOSS} is){_surely_lost(final)}"
    if low > SAFE_LOSS:
        return f"not close to the original ({told}; above {SAFE_LOSS})"
    return (
        f"{final['images']} images do not tell whether it is close to the original "
        f"({told}; at most {SAFE_LOSS} is)"
    )


def _surely_lost(final: Mapping[str, Any]) -> str:
    """What a small KL hides: points of top-1, where their interval leaves no doubt of a loss."""
    drop = final.get("drop")
    if drop is None or drop["low"] <= 0:
        return ""
    points = [f"{drop[end]:.2f}" for end in ("value", "low", "high")]
    return ", yet it loses {} points of top-1 ({} to {})".format(*points)


def _close_by_held_out(report: Mapping[str, Any]) -> str:
    loss = loss_of(report)
    name = "KL" if report["held_out"]["kl"] is not None else "feature error"
    if loss <= SAFE_LOSS:
        return f"close to the original ({name} {number(loss)}, at most {SAFE_LOSS} is)"
    return f"not close to the original ({name} {number(loss)}, above {SAFE_LOSS})"


def _maps(maps: Iterable[Mapping[str, Any]]) -> Table:
    """The held-out error of every map beside identity's."""
    header = ["span", "map"]
    for name in ("error", "prefix", "patch"):
        header += [name, "identity"]
    keys = ("error", "identity_error", "prefix", "identity_prefix", "patch", "identity_patch")
    rows = [(m["span"], m["map"], *(number(m[key]) for key in keys)) for m in maps]
    title = "Held-out error of each map and of identity: all tokens, prefix, patch"
    return Table.of(header, rows, title)


def _fitted(report: Mapping[str, Any]) -> Iterator[Part]:
    """How close it is on images that it was solved on, next to others: what more images would do.

    The others are those that decided nothing, with their interval, where there are some.
    """
    if (fitted := report.get("fitted")) is None:
        return
    own = fitted["feature_relative_error"]
    told = f"on {fitted['images']} of the images it was solved on: relative error {number(own)}"
    if own > 0:
        found = (report.get("final") or {}).get("feature_error")
        other = report["held_out"]["feature_relative_error"] if found is None else found["value"]
        told += f"; {other / own:.1f} times that on "
        if found is None:
            told += f"the {report['held_out']['images']} held-out ones"
        else:
            ends = f"{found['low'] / own:.1f} to {found['high'] / own:.1f}"
            told += f"{report['final']['images']} that decided nothing ({ends})"
        if other > MUCH_CLOSER * own:
            told += ", so more calibration images would make a better model"
    yield told


def _final(report: Mapping[str, Any]) -> Iterator[Part]:
    """How a budget of loss was judged, and the figures of images that decided nothing."""
    if (judged := report.get("judged")) is not None:
        yield (
            f"{report['budget']}: {judged['value']:.3g} on {judged['images']} images, and no more "
            f"than {judged['bound']:.3g} in all ({judged['confidence']:.0%}, one-sided)"
        )
    if (final := report.get("final")) is not None:
        title = f"Final figures, on images that decided nothing: {final['source']}"
        header = ("", "value", f"{final['confidence']:.0%} interval", "images")
        yield Table.of(header, figures(final), title)


def figures(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, value, interval and number of images of every figure that has an interval."""
    return [
        (
            name,
            shown(figure["value"]),
            f"{shown(figure['low'])} to {shown(figure['high'])}",
            str(found.get(on, "")),
        )
        for name, key, shown, on in (
            ("top-1 of the original", "top1_before", percent, "labelled"),
            ("top-1", "top1_after", percent, "labelled"),
            ("points of top-1 lost", "drop", lambda value: f"{value:.2f}", "labelled"),
            ("agreement", "agreement", percent, "images"),
            ("KL", "kl", number, "images"),
            ("feature error", "feature_error", number, "images"),
        )
        if (figure := found.get(key)) is not None
    ]


def frontier(points: Iterable[Mapping[str, Any]], original: Mapping[str, Any]) -> Table:
    """The points of a sweep: size, what remains, held-out fidelity, plan.

    Latency and top-1 have a column where the sweep knows them.
    """
    known = list(points)
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "removed": lambda point: str(point["removed"]),
        "parameters": lambda point: share(point["parameters"], original["parameters"]),
        "FLOPs": lambda point: share(point["flops"], original["flops"]),
    }
    if any("latency" in point for point in known):
        columns["latency"] = lambda point: share(point.get("latency", {}).get("ratio"), 1)
    columns |= {
        "KL": lambda point: number(point["held_out"]["kl"]),
        "agreement": lambda point: percent(point["held_out"]["agreement"]),
    }
    if any(point.get("top1") is not None for point in known):
        columns["top-1"] = lambda point: percent(point.get("top1"))
    columns |= {
        "feature error": lambda point: number(point["held_out"]["feature_relative_error"]),
        "plan": lambda point: Plan.from_json(point["plan"]).brief,
    }
    if all("share" in point for point in known):
        del columns["removed"]
    title = "The best plan for every size, on held-out images"
    if original.get("top1") is not None:
        title += f"; the original's top-1 is {percent(original['top1'])}"
    rows = [tuple(shown(point) for shown in columns.values()) for point in known]
    return Table.of(columns, rows, title)


def point_row(point: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one point of a sweep as numbers: what remains, held-out and final figures."""
    found: dict[str, Any] = {"share": point.get("share"), "removed": point["removed"]}
    for key in ("parameters", "flops"):
        found |= {key: point[key], f"{key}_left": _part(point[key], original[key])}
    if "latency" in point:
        found["latency_left"] = point["latency"]["ratio"]
    found |= {key: value for key, value in point["held_out"].items() if key != "images"}
    found["top1"] = point.get("top1")
    final = point.get("final") or {}
    for name, key in FINAL.items():
        value = final.get(key) or {}
        found |= {f"final_{name}{end}": value.get(k) for end, k in _ENDS.items()}
    return {**found, "plan": Plan.from_json(point["plan"]).brief}


_ENDS = {"": "value", "_low": "low", "_high": "high"}


def _part(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def curve_of(
    points: Iterable[Mapping[str, Any]], original: Mapping[str, Any], size: str, loss: str
) -> list[tuple[float, float, tuple[float, float] | None]]:
    """What ``drawing.curve`` draws: final figures with intervals where all points have them."""
    rows = [point_row(point, original) for point in points]
    rows = [row for row in rows if row.get(f"{size}_left") is not None]
    final = all(row[f"final_{loss}"] is not None for row in rows)
    found: list[tuple[float, float, tuple[float, float] | None]] = []
    for row in rows:
        if final:
            ends = row[f"final_{loss}_low"], row[f"final_{loss}_high"]
            found.append((row[f"{size}_left"], row[f"final_{loss}"], ends))
        elif row[loss] is not None:
            found.append((row[f"{size}_left"], row[loss], None))
    return found


def loss_of(point: Mapping[str, Any]) -> float:
    """The held-out loss of a report or point: KL, or relative feature error without a head."""
    held_out = point["held_out"]
    kl = held_out["kl"]
    return float(held_out["feature_relative_error"] if kl is None else kl)
