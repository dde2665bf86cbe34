"""JSON values: dataclasses written and read back, and files read key by key.

A saved folder may come from somebody else: nothing in it is taken for what it claims to be.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from blockfit.errors import BlockfitError
from blockfit.untrusted import read_json

T = TypeVar("T")

LATER: Mapping[str, Any] = {"later": True}
"""``metadata`` of a field with a default that files of earlier versions lack."""

LEFT_OUT: Mapping[str, Any] = {"later": True, "left out": True}
"""``metadata`` of a field that is not written where it has its default."""

_KINDS: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    dict: "an object",
}


class Values:
    """An object of a JSON file; every read names the file and the key where it fails.

    Args:
        where: the file and the keys that led here, for messages.

    Raises:
        BlockfitError: where ``value`` is no object.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            raise BlockfitError(f"{where} must hold an object, got {type(value).__name__}")
        self._values: Mapping[str, Any] = value
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def raw(self, key: str) -> Any:
        """The value as it stands in the file; ``None`` where there is none."""
        return self._values.get(key)

    def number(self, key: str) -> float | None:
        """A finite number."""
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number", value)
        if not math.isfinite(value):
            raise self._wrong(key, "a finite number", value)
        return value

    def whole(self, key: str) -> int | None:
        """A whole number, 0 or more."""
        value = self.number(key)
        if value is not None and (not isinstance(value, int) or value < 0):
            raise self._wrong(key, "a whole number from 0 on", value)
        return value

    def text(self, key: str) -> str | None:
        """A text."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "a text", value)
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        values = self._list(key)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(key, "a list of texts", values)
        return tuple(values)

    def wholes(self, key: str) -> tuple[int, ...] | None:
        """A list of whole numbers, 0 or more."""
        if key not in self:
            return None
        values = self._list(key)
        if not all(type(value) is int and value >= 0 for value in values):
            raise self._wrong(key, "a list of whole numbers", values)
        return tuple(values)

    def inner(self, key: str) -> Values:
        """An object; an empty one where there is none."""
        value = self._values.get(key)
        return Values({} if value is None else value, f"{self.where}: {key}")

    def several(self, key: str) -> list[Values]:
        """A list of objects."""
        return [
            Values(value, f"{self.where}: {key}[{number}]")
            for number, value in enumerate(self._list(key))
        ]

    def keys(self) -> tuple[str, ...]:
        """All keys, in the file's order."""
        return tuple(map(str, self._values))

    def _list(self, key: str) -> list[Any]:
        value = self._values.get(key)
        if value is not None and not isinstance(value, list):
            raise self._wrong(key, "a list", value)
        return value or []

    def _wrong(self, key: str, wanted: str, value: object) -> BlockfitError:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "…"
        return BlockfitError(f"{self.where}: {key} must be {wanted}, got {shown}")


def read_values(path: Path) -> Values:
    """The object in a JSON file.

    Raises:
        BlockfitError: where it cannot be read or holds no object.
    """
    return Values(read_json(path), str(path))


def object_of(value: Any, where: str) -> dict[str, Any]:
    """``value``, where it is a JSON object.

    Raises:
        BlockfitError: where it is none.
    """
    if not isinstance(value, dict):
        raise BlockfitError(f"{where} must hold an object, got {type(value).__name__}")
    return value


def check_keys(values: Mapping[str, Any], expected: Any, where: str) -> None:
    """Refuse unknown and missing keys by name."""
    if unknown := [name for name in values if name not in expected]:
        raise BlockfitError(f"{where}: unknown key {unknown[0]!r}")
    if missing := [name for name in expected if name not in values]:
        raise BlockfitError(f"{where}: key {missing[0]!r} is missing")


def written(value: Any) -> Any:
    """Plain JSON values of dataclasses, tuples and mappings, which ``read`` takes back.

    What has a ``to_json`` of its own is written by it; fields marked ``LEFT_OUT`` are not written
    where they have their default.
    """
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return fields_written(value)
    if isinstance(value, Mapping):
        return {name: written(one) for name, one in value.items()}
    return [written(one) for one in value] if isinstance(value, list | tuple) else value


def fields_written(value: Any) -> dict[str, Any]:
    """The fields of one dataclass as ``written`` writes them; for the ``to_json`` of classes."""
    return {
        field.name: written(getattr(value, field.name))
        for field in dataclasses.fields(value)
        if "left out" not in field.metadata or getattr(value, field.name) != field.default
    }


def read(kind: type[T], value: object, where: str) -> T:
    """A frozen dataclass from the JSON object that ``written`` or ``asdict`` made of it.

    Every field has to be there unless it is marked ``LATER`` or ``LEFT_OUT``, nothing else may be,
    and each has to be of its annotated type. A field whose type has a ``from_json`` of its own is
    read by it.

    Args:
        where: the file and the keys that led here, for messages.

    Raises:
        BlockfitError: names the place and the key.
    """
    values = object_of(value, where)
    known = dataclasses.fields(typing.cast(Any, kind))
    lacking = {f.name for f in known if "later" in f.metadata and f.name not in values}
    names = [field.name for field in known if field.name not in lacking]
    check_keys(values, names, where)
    hints = typing.get_type_hints(kind)
    made = {name: typed(hints[name], values[name], f"{where}: {name}") for name in names}
    try:
        return kind(**made)
    except BlockfitError as error:
        raise BlockfitError(f"{where}: {error}") from error


def typed(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as the annotation ``kind`` takes it: lists become tuples where it says so.

    Raises:
        BlockfitError: where it is of another type; names the place.
    """
    if kind is Any or (
        dataclasses.is_dataclass(kind) and isinstance(value, typing.cast(Any, kind))
    ):
        return value
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (one,) = (part for part in inner if part is not type(None))  # "or nothing" is all there is
        return None if value is None else typed(one, value, where)
    if hasattr(kind, "from_json"):
        return kind.from_json(value, where)
    if dataclasses.is_dataclass(kind):
        return read(typing.cast(Any, kind), value, where)
    json_kind: Any = {tuple: list, float: (int, float)}.get(origin, origin)
    fits = isinstance(value, json_kind) and (origin is bool or not isinstance(value, bool))
    if not fits or value != value:  # NaN is not equal to itself
        raise BlockfitError(f"{where} must be {_KINDS[origin]}, got {value!r:.60}")
    if origin in (list, tuple):
        return origin(typed(inner[0], one, f"{where}[{i}]") for i, one in enumerate(value))
    if origin is dict:
        return {name: typed(inner[1], one, f"{where}: {name}") for name, one in value.items()}
    return value
