"""Results as tables for people; every figure is in the JSON too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from blockfit.fit.plan import Plan
from blockfit.units import amount, number, percent, share

if TYPE_CHECKING:
    from blockfit.commands.output import Output
    from blockfit.data.images import Images
    from blockfit.fit.similarity import Tables

BEFORE_AFTER: tuple[str, ...] = ("", "original", "compressed", "of original")


def show_images(
    out: Output, images: Images, device: str | None = None, usual: bool = False
) -> None:
    """Which images are used, how they are prepared and their labels matched; and where.

    ``usual`` says that nobody asked for that number of images. What is skipped is told with the
    result, when all of them have been read.
    """
    told = images.description()
    drawn = "" if told["used"] == told["total"] else f", drawn with seed {told['seed']}"
    drawn += "; --limit all for all" if usual else ""
    out.note(f"images: {told['used']:,} of {told['total']:,} from {told['source']}{drawn}")
    out.note(f"preprocessing: {told['preprocessing']}")
    if told["labels"] is not None:
        out.note(told["labels"]["line"])
    if device is not None:
        out.note(f"device: {device}")
    out.reads(images)


def show_plan(out: Output, plan: Plan) -> None:
    """What the plan cuts, a line per block, where parts of blocks are narrowed."""
    if plan.narrowings:
        out.line("what stays, of what there was (of values and keys, of each head):")
        for line in plan.lines():
            out.line(f"  {line}")


def show_compression(out: Output, report: Mapping[str, Any], depth: int) -> None:
    """Sizes before and after, fidelity, a verdict, warnings; every map's error with ``-v``."""
    kept = depth - report["removed_blocks"]
    sizes = [("blocks", str(depth), str(kept), share(kept, depth))]
    for name, key in (("parameters", "parameters"), ("FLOPs per image", "flops")):
        before, after = report[f"{key}_before"], report[f"{key}_after"]
        sizes.append((name, amount(before), amount(after), share(after, before)))
    out.table(BEFORE_AFTER, sizes)
    if out.verbose:
        _show_maps(out, report["maps"])
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
    out.line(f"on {held_out['images']} held-out images, which chose the plan: {', '.join(words)}")
    show_final(out, report)
    out.line(f"verdict: {verdict(report)}")
    out.warn(report["warnings"])


def verdict(report: Mapping[str, Any]) -> str:
    """Whether the small model can be used as it is, and what its maps are worth, in one line."""
    from blockfit.search.session import SAFE_LOSS
    from blockfit.search.sweep import loss_of

    loss = loss_of(dict(report))
    name = "KL" if report["held_out"]["kl"] is not None else "feature error"
    close = (
        f"close to the original ({name} {loss:.3f}, at most {SAFE_LOSS} is)"
        if loss <= SAFE_LOSS
        else f"not close to the original ({name} {loss:.3f}, above {SAFE_LOSS})"
    )
    worst = max(report["maps"], key=lambda entry: entry["error"], default=None)
    if worst is None or not worst["identity_error"]:
        return close
    left = share(worst["error"], worst["identity_error"])
    return f"{close}; the weakest map, of {worst['span']}, leaves {left} of the error without it"


def _show_maps(out: Output, maps: Iterable[Mapping[str, Any]]) -> None:
    """The held-out error of every map beside identity's."""
    header = ["span", "map"]
    for name in ("error", "prefix", "patch"):
        header += [name, "identity"]
    keys = ("error", "identity_error", "prefix", "identity_prefix", "patch", "identity_patch")
    out.table(
        header,
        [(m["span"], m["map"], *(number(m[key]) for key in keys)) for m in maps],
        "Held-out error of each map, beside identity's: all tokens, prefix, patch",
    )


def show_final(out: Output, report: Mapping[str, Any]) -> None:
    """How a budget of loss was judged, and the figures of images that decided nothing."""
    if (judged := report.get("judged")) is not None:
        out.line(
            f"{report['budget']}: {judged['value']:.3g} on {judged['images']} images, and no more "
            f"than {judged['bound']:.3g} in all ({judged['confidence']:.0%}, one-sided)"
        )
    final = report.get("final")
    if final is None:
        return
    rows = _figures(final)
    title = f"Final figures, on images that decided nothing: {final['source']}"
    out.table(("", "value", f"{final['confidence']:.0%} interval", "images"), rows, title)


def _figures(figures: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, value, interval and number of images of every figure that has an interval."""
    return [
        (
            name,
            shown(figure["value"]),
            f"{shown(figure['low'])} to {shown(figure['high'])}",
            str(figures.get(on, "")),
        )
        for name, key, shown, on in (
            ("top-1 of the original", "top1_before", percent, "labelled"),
            ("top-1", "top1_after", percent, "labelled"),
            ("points of top-1 lost", "drop", lambda value: f"{value:.2f}", "labelled"),
            ("agreement", "agreement", percent, "images"),
            ("KL", "kl", number, "images"),
            ("feature error", "feature_error", number, "images"),
        )
        if (figure := figures.get(key)) is not None
    ]


def show_evaluation(out: Output, worth: Mapping[str, Any]) -> None:
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
    out.table(header, rows, f"On {worth['images']} images{some}")
    if figures := _figures(worth.get("intervals") or {}):
        ends = ", ".join(f"{name} {ends}" for name, _, ends, _ in figures)
        out.line(f"{worth['intervals']['confidence']:.0%} intervals: {ends}")


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


def show_analysis(out: Output, tables: Tables, warnings: Iterable[str]) -> None:
    """The input of every block beside its output."""
    out.table(
        ("block", *tables.values),
        [
            (str(start), *(_digits(tables.at(metric, start, stop)) for metric in tables.values))
            for start, stop in zip(tables.boundaries, tables.boundaries[1:], strict=False)
        ],
        "Input and output of each block, all tokens",
    )
    out.warn(warnings)


def show_frontier(
    out: Output, points: Iterable[Mapping[str, Any]], original: Mapping[str, Any]
) -> None:
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
    out.table(tuple(columns), rows, title)


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _bytes(value: float | None) -> str:
    return amount(value, "B")


def _rate(value: float | None) -> str:
    return number(value, 1)


def _timing(value: Mapping[str, float] | None) -> str:
    return "–" if value is None else f"{value['median']:.2f} ± {value['spread'] / 2:.2f}"
