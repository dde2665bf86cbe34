"""Values of somebody else's JSON: what is missing is unknown, what is wrong is named."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from blockfit.errors import BlockfitError
from blockfit.fields import LATER, LEFT_OUT, Values, read, read_values, written


def test_missing_and_null_values_are_unknown() -> None:
    values = Values({"a": None}, "file")
    assert values.number("a") is values.whole("b") is values.text("c") is values.wholes("d") is None
    assert values.texts("a") == ()
    assert values.several("a") == []
    assert values.inner("a").inner("b").number("c") is None
    assert "a" not in values


@pytest.mark.parametrize(
    ("read", "value", "wanted"),
    [
        ("number", "7", "a number"),
        ("number", True, "a number"),
        ("number", float("nan"), "a finite number"),
        ("number", float("inf"), "a finite number"),
        ("whole", 1.5, "a whole number"),
        ("whole", -1, "a whole number"),
        ("text", 3, "a text"),
        ("texts", ["a", 3], "a list of texts"),
        ("texts", "abc", "a list"),
        ("wholes", [1, True], "a list of whole numbers"),
        ("several", {}, "a list"),
    ],
)
def test_a_wrong_value_is_named_with_its_file_and_key(
    read: str, value: object, wanted: str
) -> None:
    values = Values({"outer": {"key": value}}, "run.json").inner("outer")
    with pytest.raises(BlockfitError, match=f"^run.json: outer: key must be {wanted}"):
        getattr(values, read)("key")


def test_what_is_no_object_is_refused_at_any_depth() -> None:
    with pytest.raises(BlockfitError, match="x must hold an object, got list"):
        Values([], "x")
    with pytest.raises(BlockfitError, match=r"x: rows\[1\] must hold an object, got int"):
        Values({"rows": [{}, 3]}, "x").several("rows")


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(BlockfitError) as caught:
        Values({"key": "x" * 10_000}, "file").number("key")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 100_000])
def test_a_file_that_holds_no_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BlockfitError, match=r"run\.json"):
        read_values(path)
    with pytest.raises(BlockfitError, match="cannot read"):
        read_values(tmp_path / "missing.json")


@dataclass(frozen=True)
class Leaf:
    size: int

    def __post_init__(self) -> None:
        if self.size > 9:
            raise BlockfitError("size is too large")


@dataclass(frozen=True)
class Tree:
    name: str
    part: float
    tall: bool
    leaves: tuple[Leaf, ...]
    note: str | None
    paths: dict[str, list[int]]
    free: Any


TREE = Tree("oak", 1, True, (Leaf(1), Leaf(2)), None, {"a": [1, 2]}, {"x": [None]})


def test_a_dataclass_is_read_back_from_what_asdict_wrote() -> None:
    value = json.loads(json.dumps(asdict(TREE)))
    assert read(Tree, value, "file") == TREE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "file: name must be a text, got 3"),
        ({"part": "1"}, "file: part must be a number, got '1'"),
        ({"part": True}, "file: part must be a number, got True"),
        ({"part": float("nan")}, "file: part must be a number, got nan"),
        ({"tall": 1}, "file: tall must be true or false, got 1"),
        ({"note": 1}, "file: note must be a text, got 1"),
        ({"leaves": {}}, "file: leaves must be a list, got {}"),
        ({"leaves": [3]}, "file: leaves[0] must hold an object, got int"),
        ({"leaves": [{"size": 1.0}]}, "file: leaves[0]: size must be a whole number, got 1.0"),
        ({"leaves": [{"size": 10}]}, "file: leaves[0]: size is too large"),
        ({"leaves": [{}]}, "file: leaves[0]: key 'size' is missing"),
        ({"paths": {"a": [True]}}, "file: paths: a[0] must be a whole number, got True"),
        ({"colour": 1}, "file: unknown key 'colour'"),
    ],
)
def test_what_does_not_fit_a_dataclass_is_named_by_its_place(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BlockfitError) as caught:
        read(Tree, {**json.loads(json.dumps(asdict(TREE))), **change}, "file")
    assert str(caught.value) == message


@dataclass(frozen=True)
class Grown:
    leaf: Leaf
    newer: int = field(default=1, metadata=LATER)
    rare: int | None = field(default=None, metadata=LEFT_OUT)


def test_what_may_be_missing_is_read_at_its_default() -> None:
    old = {"leaf": {"size": 3}}
    assert read(Grown, old, "file") == Grown(Leaf(3))
    assert written(Grown(Leaf(3))) == {**old, "newer": 1}
    both = [Grown(Leaf(3), 2, 5)]
    assert written(both) == [{**old, "newer": 2, "rare": 5}]
    assert read(Grown, written(both)[0], "file") == both[0]
    with pytest.raises(BlockfitError, match="file: key 'leaf' is missing"):
        read(Grown, {"newer": 1}, "file")
