"""Values of somebody else's JSON: what is missing is unknown, what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockfit.errors import BlockfitError
from blockfit.fields import Values, read_values


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
