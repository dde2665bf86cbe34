"""From a data set's labels to the numbers of the model's own classes: by name or by number.

What fits nowhere has no number: it is named and not counted, never guessed by its position.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from torch import nn

from blockfit.models.load import label_names

SHOWN = 3
"""Names that a line shows of many."""

_NUMBERED = re.compile(r"(?:(?:class|label|cls|category|target)[\s_-]*)?(\d{1,9})", re.IGNORECASE)


@dataclass(frozen=True)
class Matching:
    """How the labels of a data set became the model's classes.

    Args:
        by: ``name``, ``number``, ``number from 1``, ``WordNet id``, ``order``; ``nothing`` where no
            label is one of the model's; ``None`` where nothing is known of the model's classes.
        names: of the classes in the order of the new numbers, where known.
        number: from the data set's labels to the model's; all others fit nowhere. They stay as they
            are where it is ``None``.
        classes: how many classes the model has, where known.
        own: the data set's names of its labels.
        used: the labels that occur, where they are known.
        unit: what carries a label, such as ``folders``.
    """

    by: str | None = None
    names: list[str] | None = None
    number: Mapping[int, int] | None = None
    classes: int | None = None
    own: Sequence[str] | None = None
    used: Collection[int] | None = None
    unit: str = "classes"

    def of(self, label: int | None) -> int | None:
        """The model's number of a label; ``None`` where it is missing or fits nowhere."""
        if label is None or label < 0:
            return None
        if self.number is not None:
            return self.number.get(label)
        return label if self.classes is None or label < self.classes else None

    def call(self, label: int | None) -> str:
        """What to call the label of an image that is not counted."""
        if label is None or label < 0:
            return ""
        named = self.own is not None and label < len(self.own)
        return f'"{self.own[label]}"' if named and self.own is not None else f"label {label}"

    def fits(self, classes: int) -> bool:
        """Whether the labels may be those of a head: matched, or as many as it has classes."""
        if self.by in (None, "order") and self.own is not None:
            return self.names is None or len(self.names) == classes
        return self.by != "nothing"

    @property
    def fits_most(self) -> bool:
        """Whether at least half of the names that occur are the model's."""
        known, there = self._matched()
        return 2 * len(known) >= len(there)

    def _matched(self) -> tuple[list[str], list[str]]:
        """Names that are the model's, of all that occur."""
        there = {i: n for i, n in enumerate(self.own or ()) if self.used is None or i in self.used}
        return [n for i, n in there.items() if self.of(i) is not None], [*there.values()]

    def line(self, missing: Mapping[str, int]) -> str:
        """One line for people; ``missing`` says how many images of what are not counted."""
        known, there = self._matched()
        if self.by == "nothing" and not there:
            head = f"labels: most are no numbers of the model's {self.classes} classes"
        elif self.by == "nothing":
            said = f"has {_few(self.names)}" if self.names else "does not name its"
            said += "" if self.names else f" {self.classes} classes"
            head = (
                f"labels: none of {len(there)} {self.unit} ({_few(there)}) is counted, the model "
            )
            head += said
        elif self.by is None:
            head = "labels as they come" + (f": {len(there)} {self.unit}" if there else "")
        else:
            head = f"labels by {self.by}"
            if self.by == "order" or (there and self.by != "number"):
                head += f": {len(known)} of {len(there)} {self.unit}"
            if self.by == "order":
                head += f" ({_few(self.names or [])}), the model does not name its classes"
        parts = [_not_counted(name, count) for name, count in missing.items()]
        if len(parts) > SHOWN:
            rest = sum([*missing.values()][SHOWN:])
            parts = [*parts[:SHOWN], f"{rest} of {len(missing) - SHOWN} others"]
        return f"{head}; {', '.join(parts)} not counted" if parts else head


def _not_counted(name: str, count: int) -> str:
    images = f"{count} image{'s' if count > 1 else ''}"
    return f"{images} of {name}" if name else f"{images} without a label"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def match(
    names: list[str] | None,
    model: nn.Module | None,
    used: Collection[int] | None = None,
    counted_by_set: bool = True,
    unit: str = "classes",
) -> Matching:
    """How the labels of a data set are numbered for a model.

    Names go before numbers, numbers before order. Names are compared as they are, then without
    regard to case, signs and Unicode's forms, then with each of the model's comma-separated names;
    one that fits two classes fits none. WordNet ids go by their place among ImageNet-1k's where
    the model has 1,000 classes. Folders that are called by numbers (``007``, ``class_7``) go by
    them. Other names have an order only where the model does not name its classes and there are as
    many: natural order (2 before 10, regardless of case) for timm's models, as timm's reader has
    it, and Python's for others, as torchvision and ``datasets`` have it.

    Args:
        names: of the data set's labels, in their order; ``None`` where labels are numbers only.
        model: whose classes they are to become.
        used: the labels that occur, where they are known.
        counted_by_set: whether the numbers are the data set's own, not those of sorted names.
    """
    if model is None:
        return Matching(names=names, own=names, used=used, unit=unit)
    known, count = _known_classes(model)
    made: dict[str, Any] = {"classes": count, "own": names, "used": used, "unit": unit}
    there = set(range(len(names or []))) if used is None else set(used)
    if names is None:
        return _plain_numbers(known, count, there, made)
    found = None if known is None else by_name(names, known)
    if found:
        return Matching("name", known, found, **made)
    ids = _wordnet(names) if count == 1000 else {}
    if ids:
        return Matching("WordNet id", known or imagenet_wnids(), ids, **made)
    numbers = {i: n for i, name in enumerate(names) if (n := _number(name)) is not None}
    if 2 * len(numbers) < len(names) * (2 if counted_by_set else 1):
        numbers = {}  # names, with a number among them
    inside = {i: n for i, n in numbers.items() if count is None or n < count}
    if (
        numbers
        and count is not None
        and {numbers[i] for i in numbers if i in there} == {*range(1, count + 1)}
    ):
        titles = known or [str(n) for n in range(1, count + 1)]
        return Matching("number from 1", titles, {i: n - 1 for i, n in numbers.items()}, **made)
    if inside:
        size = count or 1 + max(inside.values())
        return Matching("number", known or [str(n) for n in range(size)], inside, **made)
    if known is not None:
        return Matching("nothing", known, {}, **made)
    if counted_by_set:
        kept = [i for i in there if count is None or i < count]
        if 2 * len(kept) < len(there):
            return Matching("nothing", None, {}, **made)
        return Matching("number" if count else None, names, None, **made)
    return _by_order(names, model, count, there, made)


def _known_classes(model: nn.Module) -> tuple[list[str] | None, int | None]:
    """Names and number of the model's classes; names that only number them are none."""
    known, count = label_names(model), class_count(model)
    if known is not None:
        count = len(known)
        if all(_number(name) == i for i, name in enumerate(known)):
            known = None
    return known, count


def _plain_numbers(
    known: list[str] | None, count: int | None, there: set[int], made: dict[str, Any]
) -> Matching:
    if count is None:
        return Matching("number", known, None, **made)
    if there == {*range(1, count + 1)}:
        return Matching("number from 1", known, {n: n - 1 for n in there}, **made)
    if 2 * sum(n < count for n in there) < len(there):
        return Matching("nothing", known, {}, **made)
    return Matching("number", known, None, **made)


def by_name(names: Sequence[str], known: Sequence[str]) -> dict[int, int]:
    """The place among ``known`` of each of ``names`` that has one there; see ``match``."""
    levels = (
        _numbers(known, lambda name: [_composed(name)]),
        _numbers(known, lambda name: [_plain(name)]),
        _numbers(known, lambda name: [_plain(part) for part in name.split(",")]),
    )
    found = {}
    for i, name in enumerate(names):
        for table, form in zip(levels, (_composed, _plain, _plain), strict=True):
            if form(name) in table:
                found[i] = table[form(name)]
                break
    if [_plain(name) for name in names] == [_plain(name) for name in known]:
        return {i: i if found[i] < 0 else found[i] for i in range(len(names))}
    return {i: n for i, n in found.items() if n >= 0}


def _by_order(
    names: list[str], model: nn.Module, count: int | None, there: set[int], made: dict[str, Any]
) -> Matching:
    """The rank of each name; of those with images, or of all where that makes as many as classes.

    No name has a rank where neither does.
    """
    key = _natural if _from_timm(model) else str
    for chosen in (sorted(there), range(len(names))):
        ranked = sorted(chosen, key=lambda i: key(names[i]))
        if count in (None, len(ranked)):
            titles = [names[i] for i in ranked]
            return Matching("order", titles, {i: n for n, i in enumerate(ranked)}, **made)
    return Matching("nothing", None, {}, **made)


def _wordnet(names: Sequence[str]) -> dict[int, int]:
    place = {wnid: i for i, wnid in enumerate(imagenet_wnids())}
    return {i: place[name] for i, name in enumerate(names) if name in place}


def _numbers(known: Sequence[str], aliases: Callable[[str], list[str]]) -> dict[str, int]:
    """The model's number of each name; −1 for names that two classes share."""
    pairs = {(alias, i) for i, name in enumerate(known) for alias in aliases(name)}
    shared = {name for name, count in Counter(name for name, _ in pairs).items() if count > 1}
    return {name: -1 if name in shared else i for name, i in pairs}


def _number(name: str) -> int | None:
    found = _NUMBERED.fullmatch(name.strip())
    return int(found[1]) if found else None


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())


def _plain(name: str) -> str:
    """Without case, signs (``_``, ``-``, ``/``), Unicode's forms, and zeros before a number."""
    words = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()
    return str(int(words)) if re.fullmatch(r"[0-9]{1,9}", words) else words or name.strip()


def _natural(name: str) -> Any:
    """timm's ``natural_key``."""
    return [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", name.lower())]


def _from_timm(model: nn.Module) -> bool:
    made_by = type(model).__module__.partition(".")[0]
    return made_by == "timm" or isinstance(getattr(model, "pretrained_cfg", None), dict)


def imagenet_wnids() -> list[str]:
    """The WordNet ids of ImageNet-1k's classes, sorted: the order in which models number them."""
    return files("blockfit.data").joinpath("imagenet_wnids.txt").read_text("ascii").split()


def class_count(model: nn.Module) -> int | None:
    """The number of classes of the model's head; ``None`` where it says none or has no such head.

    transformers' configs say 2 where nobody has said anything: some linear layer must have as many.
    """
    said = getattr(model, "num_classes", None)
    if isinstance(said, int):
        return said or None
    count = getattr(getattr(model, "config", None), "num_labels", None)
    sizes = {m.out_features for m in model.modules() if isinstance(m, nn.Linear)}
    return count if isinstance(count, int) and count in sizes else None
