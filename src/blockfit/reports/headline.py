"""The figures at the top of a report: the model before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blockfit.fit.intervals import CONFIDENCE
from blockfit.reports.content import Candidate, Evaluated
from blockfit.search.final import Final
from blockfit.units import amount, number, percent, share

View = dict[str, Any]


def headline(chosen: Candidate | None, evaluation: Evaluated | None) -> list[View]:
    """One card per figure: its name, before, after and a note."""
    if chosen is None:
        return []
    kept = chosen.depth - chosen.removed
    before, after = chosen.before, chosen.after
    note = share(kept, chosen.depth) + " remain"
    if narrowed := len(chosen.plan.narrowed_blocks):
        note += f", {narrowed} of them narrowed"
    cards = [_card("Blocks", chosen.depth, kept, note)]
    for name, key in (("Parameters", "parameters"), ("FLOPs per image", "flops")):
        if after.get(key) is not None:
            note = share(after[key], before.get(key)) + " remain" if before.get(key) else ""
            cards.append(_card(name, _or_none(amount, before.get(key)), amount(after[key]), note))
    if evaluation is not None:
        cards += _measured(evaluation)
    elif after.get("size_bytes") is not None:
        cards.append(_card("Weights file", None, amount(after["size_bytes"], "B")))
    fidelity, on = chosen.fidelity, "held-out images"
    if evaluation is None:
        cards += _of_the_run(chosen)
    if evaluation is None and chosen.final is not None:
        return cards + _of_nothing_else(chosen.final)
    if evaluation is not None and evaluation.fidelity.get("feature_cosine") is not None:
        fidelity, on = {**evaluation.fidelity, "images": evaluation.images}, "test images"
    images = fidelity.get("images")
    on = f"on {images:.0f} {on}" if images is not None else f"on {on}"
    for name, key, shown in (
        ("KL from the original", "kl", number),
        ("Top-1 agreement", "agreement", percent),
        ("Relative feature error", "feature_relative_error", number),
    ):
        if (value := fidelity.get(key)) is not None:
            cards.append(_card(name, None, shown(value), on))
    return cards


def _of_the_run(chosen: Candidate) -> list[View]:
    """Top-1 and latency as the run found them, where nothing was measured on test images."""
    cards, images = [], chosen.fidelity.get("images")
    old, new = chosen.top1
    if old is not None and new is not None and chosen.final is None:
        on = "held-out images" if images is None else f"{images:.0f} held-out images"
        note = f"{100 * (new - old):+.2f} points, on {on}"
        cards.append(_card("Top-1", percent(old), percent(new), note))
    if (part := chosen.share("latency")) is not None:
        cards.append(_card("Latency", None, share(part, 1.0), "of the original's"))
    return cards


def _of_nothing_else(final: Final) -> list[View]:
    """Figures of images that decided nothing, with their intervals."""
    cards = []
    before, after, drop = final.top1_before, final.top1_after, final.drop
    if before is not None and after is not None and drop is not None:
        note = f"{drop.value:.2f} points lost ({drop.low:.2f} to {drop.high:.2f}), on "
        note += f"{final.labelled} images that decided nothing"
        cards.append(_card("Top-1", percent(before.value), percent(after.value), note))
    for name, figure, shown in (
        ("KL from the original", final.kl, number),
        ("Top-1 agreement", final.agreement, percent),
        ("Relative feature error", final.feature_error, number),
    ):
        if figure is not None:
            note = f"{shown(figure.low)} to {shown(figure.high)} ({CONFIDENCE:.0%}), on "
            note += f"{final.images} images that decided nothing"
            cards.append(_card(name, None, shown(figure.value), note))
    return cards


def _measured(evaluation: Evaluated) -> list[View]:
    """Accuracy, speed, file and memory, where they were measured."""
    new, old, cards = evaluation.compressed, evaluation.original, []
    if new.top1 is not None:
        change = ""
        if old is not None and old.top1 is not None:
            change = f"{100 * (new.top1 - old.top1):+.2f} points, "
        note = f"{change}on {evaluation.images} test images"
        cards.append(_card("Top-1", old and _or_none(percent, old.top1), percent(new.top1), note))
    rows: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("Images per second", "images_per_second", lambda v: f"{v:.1f}"),
        ("Latency of one image", "latency_ms", lambda v: f"{v:.1f} ms"),
        ("Weights file", "size_bytes", lambda v: amount(v, "B")),
        ("Peak memory", "peak_memory_bytes", lambda v: amount(v, "B")),
    )
    for name, key, shown in rows:
        value, earlier = getattr(new, key), getattr(old, key, None)
        if value is None:
            continue
        note = share(value, earlier) + " of the original's" if earlier else ""
        if key == "images_per_second" and evaluation.speedup is not None:
            note = f"{evaluation.speedup:.2f}× as fast"
        cards.append(_card(name, _or_none(shown, earlier), shown(value), note))
    return cards


def headline_note(chosen: Candidate | None, measured: Evaluated | None, swept: bool) -> str:
    """Which plan of a sweep the figures are of."""
    if chosen is None or not swept:
        return ""
    told = "held-out loss" if chosen.final is None else "loss on images that decided nothing"
    why = "measured" if measured is not None else f"that is smallest at a small {told}"
    return f"Of the plan {why}: {chosen.plan.brief}. The frontier below has the others."


def _card(name: str, before: Any, after: Any, note: str = "") -> View:
    return {"name": name, "before": before, "after": after, "note": note}


def _or_none(shown: Callable[[float], str], value: float | None) -> str | None:
    return None if value is None else shown(value)
