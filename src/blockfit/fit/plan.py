"""Spans of blocks and plans made of them: frozen values, their checks and their JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from blockfit import drawing
from blockfit.arguments import check_fields, fitted, one_of
from blockfit.errors import BlockfitError
from blockfit.fields import LEFT_OUT, fields_written, object_of, read, written
from blockfit.files import FileForm, expanded, new_file, write_text
from blockfit.summary import Summary, frame
from blockfit.untrusted import read_json

MAP_KINDS = ("identity", "scale", "orthogonal", "linear", "affine", "low-rank", "folded")
"""The kinds of map that can stand where a span stood, from nothing to most (``maps.py``)."""


def _whole(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BlockfitError(f"{name} must be a whole number, got {value!r}")
    return value


@dataclass(frozen=True, order=True)
class Span:
    """Blocks ``start`` … ``stop - 1`` of a model, numbered from 0.

    The span reads the hidden state ``h[start]`` and must produce ``h[stop]``. The paper's code
    writes ``Span(2, 5)`` as the skip (1, 4).

    Raises:
        BlockfitError: where ``0 <= start < stop`` does not hold.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        _whole(self.start, "the start of a span")
        _whole(self.stop, "the stop of a span")
        if not 0 <= self.start < self.stop:
            raise BlockfitError(
                f"span {self.start}:{self.stop} is empty or negative; write start:stop with "
                "0 <= start < stop, where stop is the first block that is kept again"
            )

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    @property
    def blocks(self) -> range:
        """The numbers of the blocks that the span removes."""
        return range(self.start, self.stop)

    @classmethod
    def parse(cls, text: str) -> Span:
        """Read ``"9:11"``."""
        parts = text.split(":")
        if len(parts) != 2 or not all(p.strip().isdigit() and p.isascii() for p in parts):
            raise BlockfitError(f"cannot read {text!r} as a span; write start:stop, as in 9:11")
        return cls(int(parts[0]), int(parts[1]))

    @classmethod
    def read(cls, value: str | tuple[int, int]) -> Span:
        """A span from ``"9:11"`` or ``(9, 11)``."""
        if isinstance(value, str):
            return cls.parse(value)
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise BlockfitError(f"a span is written as '9:11' or (9, 11), got {value!r:.60}")
        return cls(*(fitted(bound, int, "a bound of a span") for bound in value))


def spans_up_to(depth: int, longest: int, protected: Iterable[int] = ()) -> list[Span]:
    """Every span of a model of ``depth`` blocks with 1 … ``longest`` blocks, in order.

    ``protected`` blocks are in none of them.
    """
    kept = set(protected)
    for block in kept:
        if not 0 <= block < depth:
            raise BlockfitError(
                f"protected block {block} does not exist; the model has blocks 0–{depth - 1}"
            )
    return [
        Span(start, stop)
        for start in range(depth)
        for stop in range(start + 1, min(start + longest, depth) + 1)
        if kept.isdisjoint(range(start, stop))
    ]


def runs_of(removed: Iterable[int]) -> tuple[Span, ...]:
    """The spans that remove exactly these blocks: neighbours make one span."""
    spans: list[Span] = []
    for block in sorted(removed):
        if spans and spans[-1].stop == block:
            spans[-1] = Span(spans[-1].start, block + 1)
        else:
            spans.append(Span(block, block + 1))
    return tuple(spans)


@dataclass(frozen=True, order=True)
class Replacement:
    """One span and the kind of the map that replaces it.

    Args:
        span: the blocks that go.
        map: one of ``MAP_KINDS``.
        rank: the rank of a ``low-rank`` map; ``None`` for every other kind.
        per_token_type: one map for prefix tokens and another for patch tokens.
    """

    span: Span
    map: str
    rank: int | None = field(default=None, metadata=LEFT_OUT)
    per_token_type: bool = field(default=False, metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        one_of("map", self.map, MAP_KINDS)
        if self.map == "low-rank":
            if self.rank is None or _whole(self.rank, "the rank of a low-rank map") < 1:
                raise BlockfitError(
                    f"the low-rank map of span {self.span} needs a rank of 1 or more"
                )
        elif self.rank is not None:
            raise BlockfitError(f"only low-rank maps have a rank; span {self.span} is {self.map}")
        if self.map == "folded" and self.span.start == 0:
            raise BlockfitError(
                f"span {self.span} cannot be folded: no kept block stands before it; "
                "start the span at block 1 or later, or choose another map"
            )
        if self.map in ("identity", "folded") and self.per_token_type:
            raise BlockfitError(f"{self.map} maps have no parameters to split by token type")

    def __str__(self) -> str:
        rank = f"({self.rank})" if self.rank is not None else ""
        split = "/token type" if self.per_token_type else ""
        return f"{self.span} {self.map}{rank}{split}"

    def to_json(self) -> dict[str, Any]:
        """The replacement as plain JSON values; options at their defaults are left out."""
        values = fields_written(self)
        return {**values.pop("span"), **values}

    @classmethod
    def from_json(cls, value: object, where: str = "plan") -> Replacement:
        """Read what ``to_json`` wrote; ``where`` names the place in messages."""
        values = object_of(value, where)
        bounds = {name: values[name] for name in ("start", "stop") if name in values}
        others = {name: one for name, one in values.items() if name not in bounds}
        return read(cls, {"span": read(Span, bounds, where), **others}, where)


PARTS = ("mlp", "values", "keys")
"""What can be narrowed in a block: its MLP's neurons, the dimensions of its heads' values (V/O),
and those of their queries and keys (Q/K)."""


@dataclass(frozen=True, order=True)
class Rows:
    """A run of output rows of a linear layer that belong to a part.

    Args:
        layer: dotted path inside the block.
        start: the first row.
    """

    layer: str
    start: int = 0

    def to_json(self) -> list[Any]:
        """The run as ``[layer, first row]``."""
        return [self.layer, self.start]

    @classmethod
    def from_json(cls, value: object, where: str = "rows") -> Rows:
        """Read what ``to_json`` wrote; ``where`` names the place in messages."""
        layer, start = value if isinstance(value, list) and len(value) == 2 else (None, None)
        if not isinstance(layer, str) or type(start) is not int or start < 0:
            raise BlockfitError(f"{where}: expected [layer, first row], got {value!r:.60}")
        return cls(layer, start)


@dataclass(frozen=True, order=True)
class Narrowing:
    """One part of one block that keeps fewer dimensions.

    Args:
        block: the number of the block.
        part: one of ``PARTS``.
        kept: dimensions that stay, of each head where the part has heads.
        size: how many there were.
        heads: heads of the attention; 1 for an MLP.
        rows: what produces the part's dimensions: ``heads · size`` rows each.
        reader: the linear layer that reads them, dotted path inside the block; empty for keys.

    Raises:
        BlockfitError: for an unknown part or sizes that are impossible.
    """

    block: int
    part: str
    kept: int
    size: int
    heads: int = 1
    rows: tuple[Rows, ...] = ()
    reader: str = ""

    def __post_init__(self) -> None:
        one_of("part", self.part, PARTS)
        for name, least in (("block", 0), ("kept", 1), ("size", 1), ("heads", 1)):
            if _whole(getattr(self, name), f"{name} of a narrowing") < least:
                raise BlockfitError(f"{name} of a narrowing must be at least {least}")
        if self.kept > self.size:
            raise BlockfitError(
                f"block {self.block}: {self.part} cannot keep {self.kept} of {self.size} dimensions"
            )

    def __str__(self) -> str:
        return f"{self.block} {self.part} {self.kept}/{self.size}"

    def check_layers(self) -> None:
        """Refuse layers that cannot belong to the part.

        Raises:
            BlockfitError: for rows or a reader too many or too few, or rows that overlap.
        """
        where = f"{self.part} of block {self.block}"
        runs = {"mlp": "one run or more", "values": "one run", "keys": "two runs"}[self.part]
        fits = len(self.rows) == {"mlp": max(1, len(self.rows)), "values": 1, "keys": 2}[self.part]
        if not fits:
            raise BlockfitError(f"{where} need {runs} of rows, got {len(self.rows)}")
        if bool(self.reader) == (self.part == "keys"):
            told = "is read by no linear layer" if self.reader else "needs the layer that reads it"
            raise BlockfitError(f"{where} {told}; reader is {self.reader!r:.60}")
        if self.part == "mlp" and self.heads != 1:
            raise BlockfitError(f"{where} has no heads; heads must be 1, got {self.heads}")
        if any(rows.layer in ("", self.reader) for rows in self.rows):
            raise BlockfitError(f"{where}: rows must name layers other than the reader")
        for one, other in pairwise(sorted(self.rows)):
            if one.layer == other.layer and one.start + self.heads * self.size > other.start:
                raise BlockfitError(f"{where}: its rows of {one.layer!r:.60} overlap")

    @classmethod
    def from_json(cls, value: object, where: str = "plan") -> Narrowing:
        """Read what ``written`` made of it; ``where`` names the place in messages."""
        cut = read(cls, value, where)
        cut.check_layers()
        return cut


PLAN_KEY = "blockfit_plan"
PLAN_FORM = FileForm(".json", f'"{PLAN_KEY}":')


@dataclass(frozen=True, repr=False)
class Plan:
    """What a compressed model left out: spans with the kinds of their maps, and narrowed parts.

    Replacements are kept in the order of their spans and narrowings in that of their blocks,
    whatever the order they are given in. Iteration and ``len`` are over the replacements.

    Raises:
        BlockfitError: where two spans share a block, a part is narrowed twice or in a block that
            a span removes.
    """

    replacements: tuple[Replacement, ...] = ()
    narrowings: tuple[Narrowing, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        ordered = tuple(sorted(self.replacements, key=lambda r: r.span))
        object.__setattr__(self, "replacements", ordered)
        for left, right in pairwise(ordered):
            if left.span.stop > right.span.start:
                raise BlockfitError(
                    f"spans {left.span} and {right.span} overlap; "
                    "spans of a plan must not share a block"
                )
            if right.map == "folded" and left.span.stop == right.span.start:
                raise BlockfitError(
                    f"span {right.span} cannot be folded: the block before it is removed by span "
                    f"{left.span}; join the two spans or choose another map"
                )
        cuts = tuple(sorted(self.narrowings, key=lambda n: (n.block, PARTS.index(n.part))))
        object.__setattr__(self, "narrowings", cuts)
        removed = set(self.removed_blocks)
        for one, other in pairwise(cuts):
            if (one.block, one.part) == (other.block, other.part):
                raise BlockfitError(f"{one.part} of block {one.block} is narrowed twice")
        for cut in cuts:
            if cut.block in removed:
                raise BlockfitError(
                    f"block {cut.block} is removed, so {cut.part} cannot be narrowed"
                )

    def __bool__(self) -> bool:
        return bool(self.replacements or self.narrowings)

    def __iter__(self) -> Iterator[Replacement]:
        return iter(self.replacements)

    def __len__(self) -> int:
        return len(self.replacements)

    def __str__(self) -> str:
        narrowed = [
            f"{block}: " + " ".join(f"{cut.part} {cut.kept}/{cut.size}" for cut in cuts)
            for block, cuts in groupby(self.narrowings, key=lambda cut: cut.block)
        ]
        return ", ".join([*map(str, self.replacements), *narrowed]) or "nothing removed"

    @classmethod
    def of(cls, spans: Iterable[Span | str | tuple[int, int]], map: str, **options: Any) -> Plan:
        """One kind of map for all ``spans``; spans may be written as ``"9:11"`` or ``(9, 11)``."""
        parsed = [s if isinstance(s, Span) else Span.read(s) for s in spans]
        return cls(tuple(Replacement(span, map, **options) for span in parsed))

    @classmethod
    def of_cuts(cls, cuts: Iterable[Replacement | Narrowing]) -> Plan:
        """A plan of cuts of both kinds, in any order."""
        both = tuple(cuts)
        spans = tuple(cut for cut in both if isinstance(cut, Replacement))
        return cls(spans, tuple(cut for cut in both if isinstance(cut, Narrowing)))

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans in order."""
        return tuple(r.span for r in self.replacements)

    @property
    def removed_blocks(self) -> tuple[int, ...]:
        """The numbers of all blocks that go, in order."""
        return tuple(block for r in self.replacements for block in r.span.blocks)

    @property
    def narrowed_blocks(self) -> tuple[int, ...]:
        """The numbers of all blocks of which a part keeps fewer dimensions, in order."""
        return tuple(dict.fromkeys(cut.block for cut in self.narrowings))

    @property
    def brief(self) -> str:
        """In few words: its spans, and what is left of narrowed parts in how many blocks."""
        words = [str(entry) for entry in self.replacements]
        for part in PARTS:
            cuts = [cut for cut in self.narrowings if cut.part == part]
            if cuts:
                left = sum(cut.kept for cut in cuts) / sum(cut.size for cut in cuts)
                words.append(f"{part} {left:.0%} in {len(cuts)}")
        return ", ".join(words) or "nothing removed"

    def changed(self, depth: int) -> str:
        """How many of the model's blocks are replaced and narrowed, as in "2 of 12 replaced"."""
        counts = {"replaced": self.removed_blocks, "narrowed": self.narrowed_blocks}
        some = [f"{len(blocks)} {word}" for word, blocks in counts.items() if blocks]
        return f"of {depth} blocks, {' and '.join(some) or 'none changed'}"

    def lines(self) -> list[str]:
        """One line per block or span that is cut, in order, in columns.

        ``block 3      mlp 960/1536  values 48/64  keys 32/64``: dimensions that stay, of those that
        there were; of values and keys, of each head.
        """
        rows: dict[int, tuple[str, list[str]]] = {}
        for entry in self.replacements:
            first, last = entry.span.start, entry.span.stop - 1
            name = f"blocks {first}–{last}" if last > first else f"block {first}"
            rows[first] = name, [f"→ {str(entry).partition(' ')[2]}"]
        for block in self.narrowed_blocks:
            cuts = self.at(block)
            cells = [
                f"{part} {cuts[part].kept}/{cuts[part].size}" if part in cuts else ""
                for part in PARTS
            ]
            rows[block] = f"block {block}", cells
        left = max((len(name) for name, _ in rows.values()), default=0)
        columns = zip(*(row for _, row in rows.values() if len(row) > 1), strict=True)
        widths = [max(map(len, column)) for column in columns] or [0]
        return [
            "   ".join(
                [name.ljust(left), *(one.ljust(w) for one, w in zip(row, widths, strict=False))]
            ).rstrip()
            for _, (name, row) in sorted(rows.items())
        ]

    def mlp_width(self, depth: int) -> tuple[int, int] | None:
        """Old and new width where all blocks that are left keep equally many neurons."""
        left = depth - len(self.removed_blocks)
        widths = {(cut.size, cut.kept) for cut in self.narrowings if cut.part == "mlp"}
        count = sum(cut.part == "mlp" for cut in self.narrowings)
        return widths.pop() if len(widths) == 1 and count == left else None

    def not_plain(self, depth: int) -> str | None:
        """Why no stock config can say what is left of a model of ``depth`` blocks.

        ``None`` where one might: maps are identity or folded, and all blocks that are left have
        MLPs of one width.
        """
        for entry in self.replacements:
            if entry.map not in ("identity", "folded"):
                return (
                    f"the {entry.map} map of span {entry.span} needs a module that no stock "
                    "checkpoint has"
                )
        for cut in self.narrowings:
            if cut.part != "mlp":
                return (
                    f"block {cut.block} keeps {cut.kept} of {cut.size} dimensions of every head's "
                    f"{cut.part}, which no stock config can say"
                )
        if self.narrowings and self.mlp_width(depth) is None:
            kept = {cut.block: cut.kept for cut in self.narrowings}
            left = [i for i in range(depth) if i not in set(self.removed_blocks)]
            other = next(i for i in left if kept.get(i) != kept.get(left[0]))
            told = [f"block {i} keeps {kept.get(i, 'all')}" for i in (left[0], other)]
            return (
                f"{' and '.join(told)} of its MLP's neurons, and a stock config has one width for "
                "all blocks"
            )
        return None

    def check(self, depth: int, protected: Iterable[int] = ()) -> None:
        """Refuse a plan that does not fit a model of ``depth`` blocks.

        Raises:
            BlockfitError: where a span leaves the model, removes a protected block, or nothing
                of the model would be kept.
        """
        kept = set(protected)
        for r in self.replacements:
            if r.span.stop > depth:
                raise BlockfitError(
                    f"span {r.span} leaves the model, which has blocks 0–{depth - 1}; "
                    f"stop may be at most {depth}"
                )
            hit = sorted(kept.intersection(r.span.blocks))
            if hit:
                raise BlockfitError(f"span {r.span} removes block {hit[0]}, which is protected")
        for cut in self.narrowings:
            if cut.block >= depth:
                raise BlockfitError(
                    f"block {cut.block} does not exist; the model has blocks 0–{depth - 1}"
                )
        if len(self.removed_blocks) >= depth:
            raise BlockfitError(f"the plan removes all {depth} blocks; keep at least one")

    def to_json(self) -> list[dict[str, Any]]:
        """The plan as plain JSON values."""
        return [written(cut) for cut in (*self.replacements, *self.narrowings)]

    @classmethod
    def from_json(cls, value: object, where: str = "plan") -> Plan:
        """Read what ``to_json`` wrote. Unknown keys are refused."""
        if not isinstance(value, list):
            raise BlockfitError(f"{where}: expected a list of cuts, got {value!r:.60}")
        cuts: list[Replacement | Narrowing] = []
        for number, cut in enumerate(value):
            kind = Narrowing if isinstance(cut, Mapping) and "part" in cut else Replacement
            cuts.append(kind.from_json(cut, f"{where}[{number}]"))
        return cls.of_cuts(cuts)

    def at(self, block: int) -> dict[str, Narrowing]:
        """The narrowings of one block, by their part."""
        return {cut.part: cut for cut in self.narrowings if cut.block == block}

    def __repr__(self) -> str:
        return f"Plan({self.brief})"

    def summary(self) -> Summary:
        """A line per block or span that is cut."""
        return Summary.of([f"  {line}" for line in self.lines()] or ["nothing removed"])

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def to_frame(self) -> Any:
        """A ``pandas.DataFrame`` with a row per span and per narrowed part.

        Columns: ``first`` and ``last`` block, ``cut`` (``blocks`` or one of ``PARTS``), the ``map``
        of a span, the dimensions ``kept`` of ``size`` (of each head) of a part.

        Raises:
            BlockfitError: where pandas is not installed.
        """
        rows: list[tuple[Any, ...]] = [
            (r.span.start, r.span.stop - 1, "blocks", str(r).partition(" ")[2], None, None)
            for r in self.replacements
        ]
        rows += [(n.block, n.block, n.part, None, n.kept, n.size) for n in self.narrowings]
        names = ("first", "last", "cut", "map", "kept", "size")
        return frame(dict(zip(names, row, strict=True)) for row in sorted(rows, key=lambda r: r[0]))

    def plot(self, depth: int | None = None, ax: Any = None) -> Any:
        """Draw what is left of every block.

        Args:
            depth: blocks of the model; up to the last one that is cut by default.
            ax: matplotlib's axes; a new figure by default.

        Returns:
            The axes.

        Raises:
            BlockfitError: where matplotlib is not installed.
        """
        cut = (*self.removed_blocks, *self.narrowed_blocks)
        axis = drawing.axes_of(ax, 6.4, 2.6)
        left = {
            part: {n.block: n.kept / n.size for n in self.narrowings if n.part == part}
            for part in PARTS
            if any(n.part == part for n in self.narrowings)
        }
        gone = {(r.span.start, r.span.stop - 1): r.map for r in self.replacements}
        drawing.blocks(axis, depth or max(cut, default=0) + 1, left, gone)
        return axis

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the plan to a JSON file, which ``Plan.load`` reads.

        Args:
            path: ends in ``.json``.
            overwrite: replace a plan that lies there.

        Raises:
            BlockfitError: where the file is taken or cannot be written.
        """
        with new_file(path, PLAN_FORM, overwrite) as partial:
            text = json.dumps({PLAN_KEY: self.to_json()}, indent=1)
            write_text(partial, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a file that ``save`` wrote.

        Raises:
            BlockfitError: where it is none.
        """
        data = read_json(expanded(path))
        if not isinstance(data, Mapping) or set(data) != {PLAN_KEY}:
            raise BlockfitError(f"{path} holds no plan; give a file that Plan.save wrote")
        return cls.from_json(data[PLAN_KEY], str(path))
