"""What a result says of itself: lines and tables for terminals, notebooks, and pandas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from itertools import groupby
from typing import Any

from blockfit.errors import need

WIDE = 10_000
"""Characters of a line of text: no table is broken or cut."""


@dataclass(frozen=True)
class Table:
    """A table of texts, whose first column is words and whose others are numbers.

    Args:
        title: above it; empty for none.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""

    @classmethod
    def of(cls, header: Iterable[str], rows: Iterable[Iterable[str]], title: str = "") -> Table:
        """The same from lists or generators."""
        return cls(tuple(header), tuple(tuple(row) for row in rows), title)

    def rich(self, **look: Any) -> Any:
        """As a ``rich.table.Table``, without the title, which may be wider.

        Args:
            look: what else it takes, such as ``box``.
        """
        from rich.table import Table as RichTable

        table = RichTable(**look)
        for place, name in enumerate(self.header):
            table.add_column(name, justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def text(self) -> str:
        """In columns, the first one flush left, without colours."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Console

        page = StringIO()
        plain: dict[str, Any] = {"color_system": None, "markup": False, "emoji": False}
        console = Console(file=page, width=WIDE, force_jupyter=False, **plain)
        console.print(self.rich(box=SIMPLE_HEAD, show_edge=False, pad_edge=False))
        lines = [self.title] if self.title else []
        return "\n".join(line.rstrip() for line in (*lines, *page.getvalue().splitlines()))

    def html(self) -> str:
        """As an HTML table; all texts are escaped."""
        title = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.header)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


Part = Table | str


@dataclass(frozen=True, repr=False)
class Summary:
    """Lines and tables; text where it is printed, tables where a notebook shows it."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, *parts: Part | Iterable[Part], warnings: Iterable[str] = ()) -> Summary:
        """One of parts, of several of them, and of what the user should know."""
        every: list[Part] = []
        for part in parts:
            every += [part] if isinstance(part, Table | str) else [*part]
        return cls((*every, *(f"warning: {line}" for line in warnings)))

    def __str__(self) -> str:
        return "\n".join(part if isinstance(part, str) else part.text() for part in self.parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        shown = []
        for columns, parts in groupby(self.parts, lambda p: isinstance(p, str) and p[:1] == " "):
            if columns:
                text = "\n".join(map(str, parts))
                shown.append(f'<pre style="line-height:1.3">{escape(text)}</pre>')
                continue
            shown += [
                f"<div>{escape(part)}</div>" if isinstance(part, str) else part.html()
                for part in parts
            ]
        return "\n".join(shown)


def frame(rows: Iterable[Mapping[str, Any]], index: Sequence[str] = ()) -> Any:
    """Rows as a ``pandas.DataFrame``.

    Args:
        index: columns that name the rows.
    """
    pandas = need("pandas", "notebook", "to_frame()")
    made = pandas.DataFrame.from_records([dict(row) for row in rows])
    return made.set_index(list(index)) if index else made
