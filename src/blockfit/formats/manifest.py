"""``blockfit.json``: what a saved folder says of itself, written and read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockfit.errors import BlockfitError
from blockfit.fields import check_keys, object_of, typed
from blockfit.fit.plan import Plan
from blockfit.models.blocks import Blocks
from blockfit.models.source import Source
from blockfit.models.tensors import DTYPES, INT8_KINDS
from blockfit.untrusted import read_json

FORMAT = 4
"""The newest version of the folder's format that this blockfit reads. A folder is written in the
oldest that can say what it holds: 1, 2 where weights are in int8, 3 where parts of blocks are
narrowed, 4 where embeddings are stored in int8."""


FLOATING = {
    str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values() if dtype.is_floating_point
}
"""Names of floating dtypes as ``blockfit.json`` writes them."""


@dataclass(frozen=True)
class Manifest:
    """What ``blockfit.json`` holds.

    Args:
        report: JSON values about the run: seed, calibration images, figures.
        dtype: of the floating tensors in the model; ``tensors.NARROWER`` names those that the
            file may hold float32 in, to be brought back to it.
        other_dtypes: of floating tensors that differ from ``dtype``, by name.
        tied: names of tensors that are another one's → that one's name.
        layout: for tensors that lie in memory in another order than that of their dimensions:
            the dimensions from the slowest to the fastest. Sums come out the same to the last
            bit only in the same layout.
        versions: of the libraries that were installed when the folder was written.
        int8: names of the weights in int8, whose factors stand in the file under their name and
            ``.scale``.
        int8_kind: how they compute, one of ``int8.KINDS``; ``None`` where there are none.
        int8_stored: names of ordinary tensors that the file holds in the same form.
    """

    source: Source
    blocks: Blocks
    plan: Plan
    report: dict[str, Any]
    dtype: str
    other_dtypes: dict[str, str]
    tied: dict[str, str]
    layout: dict[str, list[int]]
    versions: dict[str, str | None]
    int8: tuple[str, ...] = ()
    int8_kind: str | None = None
    int8_stored: tuple[str, ...] = ()

    def dumps(self) -> str:
        """The text of the file.

        Raises:
            BlockfitError: where the report or the source holds what JSON cannot.
        """
        values: dict[str, Any] = {
            "format": 1,
            "versions": self.versions,
            "base": self.source.to_json(),
            "blocks": self.blocks.to_json(),
            "plan": self.plan.to_json(),
            "dtype": self.dtype,
            "other_dtypes": self.other_dtypes,
            "tied": self.tied,
            "layout": self.layout,
            "report": self.report,
        }
        if self.int8:
            values |= {"format": 2, "int8": {"kind": self.int8_kind, "weights": list(self.int8)}}
        if self.plan.narrowings:
            values |= {"format": 3, "int8": values.get("int8")}
        if self.int8_stored:
            values |= {"format": 4, "int8": {**values["int8"], "stored": list(self.int8_stored)}}
        return dumps(values, "the report")


def dumps(values: Any, what: str) -> str:
    """JSON text of plain values; ``what`` names them in the message where they are none."""
    try:
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise BlockfitError(
            f"{what} cannot be written as JSON: {error}; use numbers, texts, lists, objects, null"
        ) from error


def read_manifest(path: Path) -> Manifest:
    """Read ``blockfit.json``, refusing whatever it should not hold.

    Raises:
        BlockfitError: names the file and the key.
    """
    where = str(path)
    values = object_of(read_json(path), where)
    version = values.get("format")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise BlockfitError(f"{where}: format must be a whole number from 1 on, got {version!r}")
    if version > FORMAT:
        raise BlockfitError(
            f"{where}: format {version} is newer than {FORMAT}, the newest that this blockfit "
            "reads; update it (pip install -U blockfit)"
        )
    names = ("versions", "base", "blocks", "plan", "dtype", "other_dtypes", "tied", "layout")
    newer = ("int8",) if version > 1 else ()
    check_keys(values, ("format", *names, *newer, "report"), where)
    in_int8 = version in (2, 4) or values.get("int8") is not None
    blocks = Blocks.from_json(values["blocks"], f"{where}: blocks")
    plan = _within(where, lambda: Plan.from_json(values["plan"], "plan"))
    if plan.narrowings and version < 3:
        raise BlockfitError(f"{where}: format {version} knows no narrowed parts; save it again")
    _within(f"{where}: plan", lambda: plan.check(blocks.depth))
    versions = typed(dict[str, str | None], values["versions"], f"{where}: versions")
    other = typed(dict[str, str], values["other_dtypes"], f"{where}: other_dtypes")
    tied = typed(dict[str, str], values["tied"], f"{where}: tied")
    layout = typed(dict[str, list[int]], values["layout"], f"{where}: layout")
    for name, value in {"dtype": values["dtype"], **other}.items():
        if not isinstance(value, str) or value not in FLOATING:
            raise BlockfitError(f"{where}: {name}: unknown dtype {value!r}")
    for name, value in tied.items():
        if value in tied:
            raise BlockfitError(f"{where}: tied: {name} must name a tensor, got {value!r}")
    for name, value in layout.items():
        if sorted(value) != list(range(len(value))):
            raise BlockfitError(f"{where}: layout: {name} must order dimensions, got {value!r}")
    return Manifest(
        source=_within(where, lambda: Source.from_json(values["base"], "base")),
        blocks=blocks,
        plan=plan,
        report=object_of(values["report"], f"{where}: report"),
        dtype=values["dtype"],
        other_dtypes=other,
        tied=tied,
        layout=layout,
        versions=versions,
        **(_int8(values["int8"], f"{where}: int8", version) if in_int8 else {}),
    )


def _int8(value: Any, where: str, version: int) -> dict[str, Any]:
    entries = object_of(value, where)
    lists = ("weights", "stored") if version > 3 else ("weights",)
    check_keys(entries, ("kind", *lists), where)
    if entries["kind"] not in INT8_KINDS:
        raise BlockfitError(f"{where}: unknown kind {entries['kind']!r}")
    seen: list[Any] = []
    for key in lists:
        names = entries[key]
        whole = isinstance(names, list) and all(isinstance(name, str) for name in names)
        seen += names if whole else []
        if not whole or not names or len(set(seen)) < len(seen):
            raise BlockfitError(f"{where}: {key} must list names of tensors, each once")
    found = {key: tuple(entries[key]) for key in lists}
    return {
        "int8": found["weights"],
        "int8_kind": entries["kind"],
        "int8_stored": found.get("stored", ()),
    }


def _within(where: str, read: Callable[[], Any]) -> Any:
    """``read()``, with the file named in front of what it finds wrong."""
    try:
        return read()
    except BlockfitError as error:
        raise BlockfitError(f"{where}: {error}") from error
