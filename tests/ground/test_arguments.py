"""What users hand in is checked against the annotations of what they call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blockfit.arguments import at_least, check_fields, checked
from blockfit.errors import BlockfitError


@checked
def called(
    count: int = 1,
    part: float | str = 0.5,
    *,
    name: str | None = None,
    flag: bool = False,
    folder: str | Path = "x",
    blocks: Iterable[int] = (),
    spans: Iterable[str | tuple[int, int]] | None = None,
    table: Mapping[str, int] | None = None,
    say: Callable[[str], None] | None = None,
    tensor: torch.Tensor | None = None,
    anything: Any = None,
    **options: Any,
) -> dict[str, Any]:
    return locals()


@pytest.mark.parametrize(
    ("given", "stands"),
    [
        ({"count": 3}, {"count": 3}),
        ({"count": np.int64(3)}, {"count": 3}),
        ({"count": torch.tensor(3)}, {"count": 3}),
        ({"part": 1}, {"part": 1}),
        ({"part": np.float32(0.25)}, {"part": 0.25}),
        ({"part": np.int32(1)}, {"part": 1}),
        ({"part": "62%"}, {"part": "62%"}),
        ({"flag": np.True_}, {"flag": True}),
        ({"folder": Path("y")}, {"folder": Path("y")}),
        ({"blocks": [3, 6]}, {"blocks": (3, 6)}),
        ({"blocks": range(3)}, {"blocks": (0, 1, 2)}),
        ({"blocks": {5}}, {"blocks": (5,)}),
        ({"blocks": np.array([3, 6])}, {"blocks": (3, 6)}),
        ({"blocks": (number for number in (3, 6))}, {"blocks": (3, 6)}),
        ({"spans": ["2:4", (3, 5), [6, 7]]}, {"spans": ("2:4", (3, 5), (6, 7))}),
        ({"table": {"a": 1}, "say": print}, {"table": {"a": 1}, "say": print}),
        ({"anything": object, "more": 5}, {"anything": object, "options": {"more": 5}}),
    ],
)
def test_what_fits_is_handed_on_as_plain_values(given: Any, stands: Any) -> None:
    found = called(**given)
    for name, value in stands.items():
        assert found[name] == value
        assert type(found[name]) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": "a"}, "count must be a whole number, got 'a' (str)"),
        ({"count": 2.5}, "count must be a whole number, got 2.5 (float)"),
        ({"count": True}, "count must be a whole number, got True (bool)"),
        ({"count": None}, "count must be a whole number, got None"),
        ({"count": torch.ones(2)}, "count must be a whole number, got tensor([1., 1.]) (Tensor)"),
        ({"part": None}, "part must be a number or a text, got None"),
        ({"part": 2j}, "part must be a number or a text, got 2j (complex)"),
        ({"name": 5}, "name must be a text or None, got 5 (int)"),
        ({"flag": "yes"}, "flag must be True or False, got 'yes' (str)"),
        ({"flag": 1}, "flag must be True or False, got 1 (int)"),
        ({"folder": b"x"}, "folder must be a text or a path, got b'x' (bytes)"),
        (
            {"blocks": "3,6"},
            "blocks must be a list of whole numbers, such as [3, 6], got '3,6' (str)",
        ),
        ({"blocks": 3}, "blocks must be a list of whole numbers, such as [3, 6], got 3 (int)"),
        (
            {"blocks": torch.tensor(3)},
            "blocks must be a list of whole numbers, such as [3, 6], got tensor(3) (Tensor)",
        ),
        ({"blocks": ["3"]}, "blocks must hold whole numbers, but holds '3' (str)"),
        ({"spans": [3, 5]}, "spans must hold texts or tuples, but holds 3 (int)"),
        ({"spans": [("a", 5)]}, "spans must hold whole numbers, but holds 'a' (str)"),
        ({"table": [1]}, "table must be a mapping or None, got [1] (list)"),
        ({"say": "print"}, "say must be a function or None, got 'print' (str)"),
        ({"tensor": [1.0]}, "tensor must be a Tensor of torch or None, got [1.0] (list)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(given: Any, message: str) -> None:
    with pytest.raises(BlockfitError) as refused:
        called(**given)
    assert str(refused.value) == message


def test_positions_are_checked_and_pythons_own_errors_stay() -> None:
    with pytest.raises(BlockfitError, match="part must be"):
        called(1, [])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="too many positional"):
        called(1, 0.5, 3)  # type: ignore[misc]


def test_a_checked_function_is_the_same_to_those_who_look() -> None:
    assert called.__name__ == "called"
    assert functools.WRAPPER_ASSIGNMENTS[0] == "__module__"
    assert "blocks" in called.__wrapped__.__annotations__  # type: ignore[attr-defined]


def test_fields_of_values_are_checked_like_arguments() -> None:
    @dataclass(frozen=True)
    class Pair:
        left: int
        right: tuple[str, ...] = ()

        def __post_init__(self) -> None:
            check_fields(self)

    assert Pair(np.int64(3), ["a"]) == Pair(3, ("a",))  # type: ignore[arg-type]
    with pytest.raises(BlockfitError, match=r"right must be a list of texts.*got 'a' \(str\)"):
        Pair(3, "a")  # type: ignore[arg-type]


def test_numbers_below_the_least_are_refused_by_name() -> None:
    at_least(1, limit=None, batch_size=1)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(BlockfitError, match="limit must be at least 1, got"):
            at_least(1, batch_size=1, limit=wrong)
