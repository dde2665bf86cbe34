"""The types of what users hand in, checked against a function's annotations before any work."""

from __future__ import annotations

import functools
import inspect
import numbers
import operator
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from blockfit.errors import BlockfitError

P = ParamSpec("P")
R = TypeVar("R")

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    Path: "a path",
}
_SEVERAL: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}
_EXAMPLES = {int: "[3, 6]", float: "[0.5, 0.7]", str: '["2:4", "9:11"]'}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check what ``function`` is called with against its annotations, and name what does not fit.

    Numbers of NumPy become Python's, iterators become tuples; all else is handed on as it is.

    Raises:
        BlockfitError: from the function that comes back, for the first argument that does not fit.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            plain = signature.parameters[name].kind not in (
                inspect.Parameter.VAR_KEYWORD,
                inspect.Parameter.VAR_POSITIONAL,
            )
            if plain and name in (wanted := _hints(function)):
                bound.arguments[name] = fitted(value, wanted[name], name)
        with _outside_inference():
            return function(*bound.args, **bound.kwargs)

    return call


def _outside_inference() -> AbstractContextManager[Any]:
    """What is made under ``torch.inference_mode`` could never be trained: only gradients are off.

    Nothing else imports torch here: where it is not there yet, no mode of it is on.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_inference_mode_enabled():
        return nullcontext()
    both = ExitStack()
    both.enter_context(torch.inference_mode(False))
    both.enter_context(torch.no_grad())
    return both


def check_fields(values: Any) -> None:
    """``checked`` for the fields of a frozen dataclass; to be called by its ``__post_init__``."""
    hints = _hints(cast(Any, type(values)))
    for field in fields(values):
        value = fitted(getattr(values, field.name), hints[field.name], field.name)
        object.__setattr__(values, field.name, value)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def at_least(least: int, **given: float | None) -> None:
    """Refuse numbers below ``least``, by the names of their parameters; ``None`` is no number."""
    for name, value in given.items():
        if value is not None and not value >= least:
            raise BlockfitError(f"{name} must be at least {least}, got {value}")


def one_of(what: str, value: Any, known: Iterable[str]) -> None:
    """Refuse what is none of the names that there are."""
    if value not in known:
        raise BlockfitError(f"unknown {what} {value!r}; choose one of {', '.join(known)}")


class _Wrong(Exception):
    """A value does not fit."""


def fitted(value: Any, wanted: Any, name: str) -> Any:
    """``value`` as an argument annotated ``wanted`` takes it.

    Raises:
        BlockfitError: where it does not fit; the sentence names the argument.
    """
    try:
        return _fit(value, wanted, name)
    except _Wrong:
        got = "None" if value is None else f"{value!r:.60} ({type(value).__name__})"
        raise BlockfitError(f"{name} must be {_words(wanted)}, got {got}") from None


def _fit(value: Any, wanted: Any, name: str) -> Any:
    origin = typing.get_origin(wanted)
    if wanted is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _fit_one_of(value, typing.get_args(wanted), name)
    if origin is not None:
        return _fit_several(value, origin, typing.get_args(wanted), name)
    if wanted is int:
        return _whole(value)
    if wanted is float:
        return _number(value)
    if wanted is bool:
        return _flag(value)
    if wanted is Path and isinstance(value, os.PathLike):
        return Path(value)
    if not isinstance(value, wanted):
        raise _Wrong
    return value


def _fit_one_of(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    for kind in kinds:
        try:
            return _fit(value, kind, name)
        except _Wrong:
            continue
    raise _Wrong


def _fit_several(value: Any, origin: Any, inner: tuple[Any, ...], name: str) -> Any:
    if origin is not Callable and issubclass(origin, Iterable) and not issubclass(origin, Mapping):
        return _fit_items(value, origin, inner, name)
    if not isinstance(value, origin):
        raise _Wrong
    return value


def _fit_items(value: Any, origin: Any, inner: tuple[Any, ...], name: str) -> Any:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise _Wrong
    if isinstance(value, range) and origin is tuple and ... not in inner:
        raise _Wrong  # range(2, 4) is no pair (2, 3)
    try:
        kept = tuple(value) if origin is tuple or not hasattr(value, "__len__") else value
        iter(kept)
    except TypeError:  # a tensor without dimensions
        raise _Wrong from None
    if not inner or inner[0] is Any:
        return kept
    items = []
    for item in kept:
        try:
            items.append(_fit(item, inner[0], name))
        except _Wrong:
            raise BlockfitError(
                f"{name} must hold {_several(inner[0])}, but holds {item!r:.60} "
                f"({type(item).__name__})"
            ) from None
    return tuple(items)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise _Wrong
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # tensors have an index only where they are whole numbers
        raise _Wrong from None


def _number(value: Any) -> float:
    if type(value) in (int, float):
        return cast(float, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _Wrong
    return _whole(value) if isinstance(value, numbers.Integral) else float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise _Wrong
    return bool(value)


def _words(wanted: Any) -> str:
    """What an annotation asks for, in words."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        told = [_words(kind) for kind in inner]
        return ", ".join(told[:-1]) + " or " + told[-1]
    if wanted is type(None):
        return "None"
    if origin is Callable:
        return "a function"
    if origin is not None and issubclass(origin, Mapping):
        return "a mapping"
    if origin is not None:
        kind = inner[0] if inner else Any
        if kind is Any:
            return "a list"
        example = _example(kind)
        return f"a list of {_several(kind)}" + (f", such as {example}" if example else "")
    return _WORDS.get(wanted) or f"a {wanted.__name__} of {wanted.__module__.split('.')[0]}"


def _several(wanted: Any) -> str:
    kinds = typing.get_args(wanted) or (wanted,)
    told = [_SEVERAL.get(kind) or f"{getattr(kind, '__name__', 'thing')}s" for kind in kinds]
    return " or ".join(told)


def _example(wanted: Any) -> str | None:
    kinds = typing.get_args(wanted) or (wanted,)
    return next((_EXAMPLES[kind] for kind in kinds if kind in _EXAMPLES), None)
