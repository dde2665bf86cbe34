"""What evaluations and analyses found, as lines and tables for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from blockfit.errors import BlockfitError
from blockfit.fit.similarity import Tables
from blockfit.search.summaries import BEFORE_AFTER, FINAL, figures
from blockfit.summary import Part, Table
from blockfit.units import amount, number, percent, share

MEASURED = ("images per second", "latency, ms", "peak memory")
"""Figures that are left out where they were not measured."""

ROWS = 10
"""Classes and images of a comparison that are shown where not all are asked for."""


def evaluation(worth: Mapping[str, Any]) -> list[Part]:
    """What ``Evaluation.to_json`` holds, one row per figure."""
    before, after = worth["original"] or {}, worth["compressed"]

    def row(name: str, key: str, show: Callable[[Any], str], *inner: str) -> tuple[str, ...]:
        old, new = before.get(key), after.get(key)
        shown = (name, show(old), show(new))
        for step in inner:
            old, new = (old or {}).get(step), (new or {}).get(step)
        return (*shown, share(new, old))

    top1 = [before.get("top1"), after["top1"]]
    change = "–" if None in top1 else f"{100 * (top1[1] - top1[0]):+.2f} points"
    rate = partial(number, digits=1)
    faster, slower = after.get("speedup"), after.get("latency_part")
    rows = [
        ("top-1", *map(percent, top1), change),
        row("parameters", "parameters", amount),
        row("FLOPs per image", "flops", amount),
        row("file", "size_bytes", _bytes),
        (*row("images per second", "images_per_second", rate)[:3], _paired(faster, ".2f", "×")),
        (*row("latency, ms", "latency_ms", _timing, "median")[:3], _paired(slower, ".1%")),
        row("peak memory", "peak_memory_bytes", _bytes),
    ]
    if (fidelity := worth["fidelity"]) is not None:
        rows += [
            ("KL from the original", "", number(fidelity["kl"]), ""),
            ("top-1 agreement", "", percent(fidelity["agreement"]), ""),
            ("feature cosine", "", number(fidelity["feature_cosine"]), ""),
            ("feature relative error", "", number(fidelity["feature_relative_error"]), ""),
        ]
    for protocol, models in worth.get("protocols", {}).items():
        rows += _protocol_rows(protocol, models)
    rows = [row for row in rows if row[0] not in MEASURED or {*row[1:]} - {"–"}]
    header = BEFORE_AFTER
    if worth["original"] is None:
        header, rows = ("", "model"), [(name, value) for name, _, value, _ in rows]
    labelled = after.get("labelled", 0)
    some = f", {labelled} of them labelled" if 0 < labelled < worth["images"] else ""
    parts: list[Part] = [Table.of(header, rows, f"On {worth['images']} images{some}")]
    if why := after.get("no_head"):
        missing = "no top-1" if worth["original"] is None else "no top-1, KL and agreement"
        parts.append(f"{missing}: no head was recognised; {why}")
    if found := figures(worth.get("intervals") or {}):
        ends = ", ".join(f"{name} {ends}" for name, _, ends, _ in found)
        parts.append(f"{worth['intervals']['confidence']:.0%} intervals: {ends}")
    return parts


COSTS = {
    "parameters": ("parameters",),
    "FLOPs": ("flops",),
    "file": ("size_bytes",),
    "latency": ("latency_ms", "median"),
    "peak memory": ("peak_memory_bytes",),
    "top-1": ("top1",),
}
"""What can be a part of the original's, by its keys in ``Evaluation.to_json``."""


def remaining(worth: Mapping[str, Any]) -> dict[str, float]:
    """What remains of the original, by name; what was not measured is left out.

    Raises:
        BlockfitError: where there was no original.
    """
    if worth["original"] is None:
        raise BlockfitError(
            "there is nothing to compare with; give evaluate the original as against="
        )
    found = {}
    for name, keys in COSTS.items():
        before, after = worth["original"], worth["compressed"]
        for key in keys:
            before, after = (before or {}).get(key), (after or {}).get(key)
        if before and after is not None:
            found[name] = after / before
    paired = worth["compressed"].get("latency_part")
    return found if paired is None else {**found, "latency": paired}


def evaluation_rows(worth: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The figures of ``Evaluation.to_json`` as numbers, a row each; the unknown are left out."""
    before, after = worth["original"] or {}, worth["compressed"]
    intervals = worth["intervals"]
    ends = {"top1": intervals.get("top1_after")}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, Mapping):
            old, value = (old or {}).get("median"), value["median"]
        if value is not None:
            yield _with_ends({"figure": key, "original": old, "compressed": value}, ends.get(key))
    for key, value in (worth["fidelity"] or {}).items():
        row = {"figure": key, "original": None, "compressed": value}
        yield _with_ends(row, intervals.get(FINAL.get(key, key)))
    if (drop := intervals.get("drop")) is not None:
        row = {"figure": "drop", "original": None, "compressed": drop["value"]}
        yield _with_ends(row, drop)


def _with_ends(row: dict[str, Any], interval: Mapping[str, float] | None) -> dict[str, Any]:
    found = interval or {}
    return {**row, "low": found.get("low"), "high": found.get("high")}


def _protocol_rows(protocol: str, models: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One figure per model (accuracy), or several (recall by how many are looked at, mIoU)."""
    if isinstance(models["compressed"], Mapping):
        before, after = models.get("original", {}), models["compressed"]
        return [
            (f"{protocol} {key}", percent(before.get(key)), percent(value), "")
            for key, value in after.items()
        ]
    drop = (models.get("intervals") or {}).get("drop")
    lost = ""
    if drop is not None:
        lost = f"{-drop['value']:+.2f} points ({-drop['high']:+.2f} to {-drop['low']:+.2f})"
    rows: list[tuple[str, ...]] = [
        (protocol, percent(models.get("original")), percent(models["compressed"]), lost)
    ]
    if (fixed := models.get("compressed_with_original_head")) is not None:
        rows.append((f"{protocol}, learnt from the original", "", percent(fixed), ""))
    return rows


def analysis(tables: Tables) -> Table:
    """The input of every block beside its output."""
    rows = [
        (str(start), *(_digits(tables.at(metric, start, stop)) for metric in tables.values))
        for start, stop in zip(tables.boundaries, tables.boundaries[1:], strict=False)
    ]
    title = "Input and output of each block, all tokens"
    return Table.of(("block", *tables.values), rows, title)


def comparison(found: Mapping[str, Any], whole: bool = False) -> list[Part]:
    """Models side by side, the classes that lose most, the images on which they part.

    Args:
        whole: all classes and images, not ``ROWS`` of each.
    """
    reference = found["reference"]
    first = found["models"][reference]
    called = {name: f"{name} *" if one is first else name for name, one in found["models"].items()}
    sizes = [
        (
            called[name],
            amount(one["parameters"]),
            share(one["parameters"], first["parameters"]),
            amount(one["flops"]),
            share(one["flops"], first["flops"]),
            _bytes(one["size_bytes"]),
        )
        for name, one in found["models"].items()
    ]
    rows = [
        (
            called[name],
            _ends(one["top1"], percent, 100),
            _ends(one["drop"], lambda value: f"{value:.2f}"),
            percent((one["agreement"] or {}).get("value")),
            number((one["kl"] or {}).get("value")),
            "–" if one["drop"] is None else f"{one['lost']} / {one['gained']}",
        )
        for name, one in found["models"].items()
    ]
    header = ("", "top-1", "points lost", "agreement", "KL", "lost / gained")
    return [
        Table.of(("", "parameters", "of *", "FLOPs per image", "of *", "file"), sizes),
        Table.of(header, rows, f"On {found['images']:,} images of {found['source']}"),
        "*: what the others are compared with, image by image; in brackets: "
        f"{found['confidence']:.0%} intervals; lost / gained: images that only {reference} "
        "answers rightly, and that only the other does",
        *(
            f"{name} has no top-1, agreement or KL: {one['no_head']}"
            for name, one in found["models"].items()
            if one["no_head"]
        ),
        *_classes(found, whole),
        _flips(found, whole),
    ]


def _classes(found: Mapping[str, Any], whole: bool) -> list[Part]:
    if not found["classes"]:
        return []
    others = [name for name in found["models"] if name != found["reference"]]
    shown = found["classes"] if whole else found["classes"][:ROWS]
    rows = []
    for row in shown:
        cells = [_share_of(row["top1"].get(found["reference"]))]
        for name in others:
            lost = _ends(row["drop"].get(name), lambda points: f"{points:.1f}")
            cells += [_share_of(row["top1"].get(name)), lost]
        rows.append((row["name"], str(row["images"]), *cells))
    header = ["class", "images", found["reference"]]
    header += [text for name in others for text in (name, "points lost")]
    more = "" if len(shown) == len(found["classes"]) else f", {ROWS} of {len(found['classes'])}"
    return [Table.of(header, rows, f"Top-1 of the classes that lose most{more}")]


def _flips(found: Mapping[str, Any], whole: bool) -> Part:
    if not found["flips"]:
        return f"no image flips: on each one every model does as {found['reference']} does"
    labelled = any(one["top1"] is not None for one in found["models"].values())
    shown = found["flips"] if whole else found["flips"][:ROWS]
    rows = [
        (flip["image"], *([flip["label"] or "–"] if labelled else []), *flip["answers"].values())
        for flip in shown
    ]
    header = ("image", *(["label"] if labelled else []), *found["models"])
    what = "Images that flip between right and wrong" if labelled else "Images with several answers"
    more = "" if len(shown) == len(found["flips"]) else f"{len(shown)} of "
    return Table.of(header, rows, f"{what}: {more}{len(found['flips'])}")


def _share_of(found: Mapping[str, float] | None) -> str:
    return percent(None if found is None else found["value"])


def _ends(
    found: Mapping[str, float] | None, shown: Callable[[float], str], times: float = 1
) -> str:
    """A value with the ends of its interval in brackets."""
    if found is None:
        return "–"
    low, high = (f"{times * end:.1f}" for end in (found["low"], found["high"]))
    return f"{shown(found['value'])} ({low} to {high})"


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _bytes(value: float | None) -> str:
    return amount(value, "B")


def _paired(ratio: float | None, form: str, unit: str = "") -> str:
    """Of rounds that were timed together, so not always what the two medians give."""
    return "–" if ratio is None else f"{ratio:{form}}{unit} (paired)"


def _timing(value: Mapping[str, float] | None) -> str:
    return "–" if value is None else f"{value['median']:.2f} ± {value['spread'] / 2:.2f}"
