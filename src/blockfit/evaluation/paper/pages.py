"""The rows of experiments as CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]

WORDS = {
    "removed": "blocks replaced",
    "spans": "span",
    "top1": "top-1",
    "change": "points",
    "kl": "KL",
    "mse": "MSE in → out",
    "feature_error": "feature error",
    "fit_mse": "MSE of the fit",
    "top1_sd": "± (top-1)",
    "change_sd": "± (points)",
    "each": "each seed",
    "images": "images",
    "per": "one map per",
    "source": "fitted on",
    "chosen": "smallest MSE",
    "token_type": "tokens",
}
FRACTIONS = {"top1", "top1_sd", "agreement"}
SIGNED = {"change"}


def as_csv(rows: Rows) -> str:
    """One line per row, numbers in full; nothing is written where there is no value."""
    file = io.StringIO()
    columns = list(rows[0]) if rows else []
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if value is None else value for key, value in row.items()})
    return file.getvalue()


def as_table(rows: Rows) -> str:
    """A Markdown table; columns without any value are left out."""
    columns = [c for c in (rows[0] if rows else ()) if any(row[c] is not None for row in rows)]
    lines = [
        "| " + " | ".join(WORDS.get(column, column) for column in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = (_cell(column, row[column]) for column in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def similarity_table(rows: Rows) -> str:
    """The input of every block beside its output: a part of all pairs that fits on a page."""
    columns = list(dict.fromkeys((row["metric"], row["token_type"]) for row in rows))
    values = {(r["metric"], r["token_type"], r["start"], r["stop"]): r["value"] for r in rows}
    last = max(row["stop"] for row in rows)
    table = [
        {"block": start}
        | {f"{metric}, {tokens}": values.get((metric, tokens, start, start + 1))
           for metric, tokens in columns}
        for start in range(last)
    ]  # fmt: skip
    return as_table(table)


def _cell(column: str, value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if column in FRACTIONS:
        return f"{value:.2%}"
    if column in SIGNED:
        return f"{value:+.2f}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if column == "parameters" else str(value)
