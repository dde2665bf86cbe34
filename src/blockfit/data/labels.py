"""From a data set's labels to the numbers of the model's own classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from importlib.resources import files

from torch import nn

from blockfit.models.load import label_names


def model_labels(
    names: list[str] | None, model: nn.Module | None
) -> tuple[list[str] | None, dict[int, int] | None]:
    """Class names in the model's order, and the model's number for each label of the data set.

    Where every class of the data set has a namesake among the model's, labels go by name;
    otherwise by position. Classes that are WordNet ids go by their place among ImageNet-1k's where
    the model has 1,000 classes; an id that is none of them has no label.
    """
    known = label_names(model) if model is not None else None
    if names is None or model is None:
        return names, None
    if known is not None:
        if [_plain(name) for name in names] == [_plain(name) for name in known]:
            return known, None
        number = _numbers(known, lambda name: [name])
        number = {**_numbers(known, lambda name: name.split(",")), **number}
        if all(_plain(name) in number for name in names):
            return known, {i: number[_plain(name)] for i, name in enumerate(names)}
    order = imagenet_wnids()
    if class_count(model) == len(order) and all(re.fullmatch(r"n\d{8}", name) for name in names):
        number = {wnid: i for i, wnid in enumerate(order)}
        return known or order, {i: number[n] for i, n in enumerate(names) if n in number}
    return names, None


def _numbers(known: list[str], aliases: Callable[[str], list[str]]) -> dict[str, int]:
    """The model's number of each name; names that two classes share are left out."""
    pairs = [(_plain(alias), i) for i, name in enumerate(known) for alias in aliases(name)]
    shared = {name for name, count in Counter(name for name, _ in pairs).items() if count > 1}
    return {name: i for name, i in pairs if name not in shared}


def _plain(name: str) -> str:
    return name.strip().casefold().replace("_", " ")


def imagenet_wnids() -> list[str]:
    """The WordNet ids of ImageNet-1k's classes, sorted: the order in which models number them."""
    return files("blockfit.data").joinpath("imagenet_wnids.txt").read_text("ascii").split()


def class_count(model: nn.Module) -> int | None:
    """The number of classes that the model says it has, or ``None``."""
    config = getattr(model, "config", None)
    for owner, name in ((config, "num_labels"), (model, "num_classes")):
        count = getattr(owner, name, None)
        if isinstance(count, int):
            return count
    return None
