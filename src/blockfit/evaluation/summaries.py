"""What evaluations and analyses found, as lines and tables for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from blockfit.fit.similarity import Tables
from blockfit.search.summaries import BEFORE_AFTER, figures
from blockfit.summary import Part, Table
from blockfit.units import amount, number, percent, share


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
    rows = [
        ("top-1", *map(percent, top1), change),
        row("parameters", "parameters", amount),
        row("FLOPs per image", "flops", amount),
        row("file", "size_bytes", _bytes),
        (*row("images per second", "images_per_second", _rate)[:3], percent(after.get("speedup"))),
        row("latency, ms", "latency_ms", _timing, "median"),
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
    header = BEFORE_AFTER
    if worth["original"] is None:
        header, rows = ("", "model"), [(name, value) for name, _, value, _ in rows]
    labelled = after.get("labelled", 0)
    some = f", {labelled} of them labelled" if 0 < labelled < worth["images"] else ""
    parts: list[Part] = [Table.of(header, rows, f"On {worth['images']} images{some}")]
    if found := figures(worth.get("intervals") or {}):
        ends = ", ".join(f"{name} {ends}" for name, _, ends, _ in found)
        parts.append(f"{worth['intervals']['confidence']:.0%} intervals: {ends}")
    return parts


def _protocol_rows(protocol: str, models: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One figure per model (accuracy), or several (recall by how many are looked at, mIoU)."""
    if isinstance(models["compressed"], Mapping):
        before, after = models.get("original", {}), models["compressed"]
        return [
            (f"{protocol} {key}", percent(before.get(key)), percent(value), "")
            for key, value in after.items()
        ]
    rows: list[tuple[str, ...]] = [
        (protocol, percent(models.get("original")), percent(models["compressed"]), "")
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


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _bytes(value: float | None) -> str:
    return amount(value, "B")


def _rate(value: float | None) -> str:
    return number(value, 1)


def _timing(value: Mapping[str, float] | None) -> str:
    return "–" if value is None else f"{value['median']:.2f} ± {value['spread'] / 2:.2f}"
