"""What the rows of an experiment say, in a sentence made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Rows = Sequence[Row]

NEAR = 0.005
"""Half a point of top-1: no difference to speak of."""


def finding(name: str, rows: Rows) -> str:
    """One or two sentences on the rows of the experiment ``name``."""
    return _FINDINGS[name](rows)


def _similarity(rows: Rows) -> str:
    said = []
    for tokens in dict.fromkeys(row["token_type"] for row in rows):
        steps = [
            (row["value"], row["start"])
            for row in rows
            if row["metric"] == "cosine"
            and row["token_type"] == tokens
            and row["stop"] == row["start"] + 1
            and row["value"] is not None
        ]
        (most, block), (least, other) = max(steps), min(steps)
        said.append(
            f"{tokens} tokens are turned least by block {block} (cosine {most:.3f}) "
            f"and most by block {other} ({least:.3f})"
        )
    return _sentence("; ".join(said))


def _spans(rows: Rows) -> str:
    said = []
    for removed, here in _by(rows, "removed"):
        best = max(here, key=_top1)
        chosen = next(row for row in here if row["chosen"])
        part = f"{_blocks(removed)}: {_percent(best)} at {best['spans']}"
        if chosen is not best:
            part += f" (the smallest MSE chooses {chosen['spans']}: {_percent(chosen)})"
        said.append(part)
    return f"Original {_percent(_original(rows))}. Best spans, {'; '.join(said)}."


def _several(rows: Rows) -> str:
    said = []
    for removed, here in _by(rows, "removed"):
        one = [row for row in here if "," not in row["spans"]]
        many = {way: _best(here, way) for way in ("apart", "in turn")}
        parts = [f"one span {_percent(max(one, key=_top1))}"]
        parts += [
            f"separate spans fitted {way} {_percent(row)}" for way, row in many.items() if row
        ]
        said.append(f"{_blocks(removed)}: {', '.join(parts)}")
    return _sentence("; ".join(said))


def _best(rows: Iterable[Row], way: str) -> Row | None:
    many = [row for row in rows if "," in row["spans"] and row["fitted"] == way]
    return max(many, key=_top1, default=None)


def _translators(rows: Rows) -> str:
    said = []
    for span, here in _by(rows, "spans"):
        found = {row["map"]: row for row in here}
        trained = max((row for row in here if row["trained"]), key=_top1)
        said.append(
            f"blocks {span}: linear {_percent(found['linear'])}, "
            f"identity {_percent(found['identity'])}, "
            f"best trained {_percent(trained)} ({trained['map']})"
        )
    return _sentence("; ".join(said))


def _samples(rows: Rows) -> str:
    said = []
    for span, here in _by(rows, "spans"):
        most = here[-1]
        enough = next(row for row in here if row["top1"] >= most["top1"] - NEAR)
        said.append(
            f"blocks {span}: {enough['images']} images come within {100 * NEAR:g} points of the "
            f"{_percent(most)} of {most['images']}"
        )
    return _sentence("; ".join(said))


def _positions(rows: Rows) -> str:
    said = []
    for span, here in _by(rows, "spans"):
        most = max(row["images"] for row in here)
        parts = [f"{row['per']} {_percent(row)}" for row in here if row["images"] == most]
        said.append(f"blocks {span} with {most} images, one map per {', '.join(parts)}")
    return _sentence("; ".join(said))


def _transfer(rows: Rows) -> str:
    said = []
    for span, here in _by(rows, "spans"):
        fitted = [f"{row['source']} {_percent(row)}" for row in here if row["images"]]
        bare = next(row for row in here if not row["images"])
        said.append(
            f"blocks {span} fitted on {', on '.join(fitted)}, without a map {_percent(bare)}"
        )
    return _sentence("; ".join(said))


def _seeds(rows: Rows) -> str:
    said = []
    for row in rows:
        spread = "" if row["top1_sd"] is None else f" ± {100 * row['top1_sd']:.2f}"
        what = f"{row['removed']} ({row['spans']})" if row["removed"] else "original"
        said.append(f"{what} {100 * row['top1']:.2f}{spread}%")
    return _sentence("; ".join(said))


_FINDINGS: dict[str, Callable[[Rows], str]] = {
    "similarity": _similarity,
    "spans": _spans,
    "several": _several,
    "translators": _translators,
    "samples": _samples,
    "positions": _positions,
    "transfer": _transfer,
    "seeds": _seeds,
}


def _by(rows: Rows, column: str) -> list[tuple[Any, list[Row]]]:
    """The rows by the values of a column, without the original's."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        if row["removed"]:
            groups.setdefault(row[column], []).append(row)
    return list(groups.items())


def _original(rows: Rows) -> Row:
    return next(row for row in rows if not row["removed"])


def _top1(row: Row) -> float:
    return float(row["top1"])


def _percent(row: Row) -> str:
    return f"{row['top1']:.1%}"


def _blocks(number: int) -> str:
    return "1 block" if number == 1 else f"{number} blocks"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
