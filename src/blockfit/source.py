"""Where a model came from, as a value that is printed, saved and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from blockfit.errors import BlockfitError
from blockfit.preprocess import Preprocessing

LIBRARIES = ("timm", "transformers", "torchvision", "demo", "module")
"""Where an architecture can come from; ``module`` is a user's own class."""


@dataclass(frozen=True)
class Source:
    """Where a model came from.

    Args:
        library: one of ``LIBRARIES``.
        name: the name it was loaded by; for ``module`` the qualified name of its class.
        arguments: JSON values that rebuild the architecture (see ``skeleton``).
        licence: of the weights, where the checkpoint says.
        preprocessing: its own, where known.
    """

    library: str
    name: str
    arguments: dict[str, Any]
    licence: str | None = None
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        if self.library not in LIBRARIES:
            raise BlockfitError(
                f"unknown library {self.library!r}; choose one of {', '.join(LIBRARIES)}"
            )

    def to_json(self) -> dict[str, Any]:
        """The source as plain JSON values."""
        return {
            "library": self.library,
            "name": self.name,
            "arguments": self.arguments,
            "licence": self.licence,
            "preprocessing": self.preprocessing.to_json() if self.preprocessing else None,
        }

    @classmethod
    def from_json(cls, value: object, where: str = "base") -> Source:
        """Read what ``to_json`` wrote; ``where`` names the place in messages."""
        keys = ("library", "name", "arguments", "licence", "preprocessing")
        if not isinstance(value, Mapping):
            raise BlockfitError(f"{where}: expected an object, got {value!r}")
        if unknown := sorted(set(map(str, value)) - set(keys)):
            raise BlockfitError(f"{where}: unknown key {unknown[0]!r}")
        if missing := [key for key in keys if key not in value]:
            raise BlockfitError(f"{where}: key {missing[0]!r} is missing")
        if not isinstance(value["library"], str) or not isinstance(value["name"], str):
            raise BlockfitError(f"{where}: library and name must be texts")
        if not isinstance(value["arguments"], Mapping):
            raise BlockfitError(f"{where}: arguments must be an object")
        if not isinstance(value["licence"], str | None):
            raise BlockfitError(f"{where}: licence must be a text or null")
        own = value["preprocessing"]
        prepared = None if own is None else Preprocessing.from_json(own, f"{where}: preprocessing")
        arguments = dict(value["arguments"])
        return cls(value["library"], value["name"], arguments, value["licence"], prepared)


def attach(model: nn.Module, source: Source) -> None:
    """Remember ``source`` on the model; it survives ``deepcopy`` and is not in the state dict."""
    model.blockfit_source = source  # type: ignore[assignment]
