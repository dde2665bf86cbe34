"""Names for the data sets of the paper, which ``datasets`` loads from the Hub or its cache."""

from __future__ import annotations

from dataclasses import dataclass

from blockfit.data.records import Columns, Records
from blockfit.data.tables import from_dataset, load_dataset, one_split
from blockfit.errors import BlockfitError, first_line


@dataclass(frozen=True)
class Ready:
    """A data set of the Hub.

    Args:
        label_column: where it has several.
        large: whether only the files of the wanted split are to be fetched.
    """

    hub: str
    splits: tuple[str, ...] = ("train", "test")
    label_column: str | None = None
    large: bool = False


READY: dict[str, Ready] = {
    "mnist": Ready("ylecun/mnist"),
    "fashion-mnist": Ready("zalando-datasets/fashion_mnist"),
    "cifar10": Ready("uoft-cs/cifar10"),
    "cifar100-fine": Ready("uoft-cs/cifar100", label_column="fine_label"),
    "cifar100-coarse": Ready("uoft-cs/cifar100", label_column="coarse_label"),
    "imagenet-1k": Ready("ILSVRC/imagenet-1k", ("train", "validation", "test"), large=True),
}


def from_ready(name: str, asked: Columns) -> Records:
    """One split of a data set in ``READY``.

    Raises:
        BlockfitError: where the split is not said, or the Hub cannot be reached and the cache of
            ``datasets`` does not hold it.
    """
    ready, split = READY[name], asked.split
    if split not in ready.splits:
        said = "say which" if split is None else f"there is no {split!r}"
        raise BlockfitError(
            f"{name} has the splits {', '.join(ready.splits)}; {said}, as in "
            f"{name}:{ready.splits[1]}"
        )
    try:
        if ready.large:  # the sizes on the set's card are those of all splits together
            files = {split: f"data/{split}-*"}
            loaded = load_dataset(ready.hub, data_files=files, verification_mode="no_checks")
        else:
            loaded = load_dataset(ready.hub)
    except BlockfitError:
        raise
    except Exception as error:  # datasets and the Hub's client share no base class of errors
        raise BlockfitError(_how_to_get(name, ready, split, first_line(error))) from error
    columns = asked._replace(label=asked.label or ready.label_column)
    return from_dataset(*one_split(loaded, name, split), columns)


def _how_to_get(name: str, ready: Ready, split: str, why: str) -> str:
    only, give = "", f"FOLDER:{split}"
    if ready.large:
        only, give = f"--include 'data/{split}-*' ", f"'FOLDER/data/{split}-*.parquet'"
    if ready.label_column:
        give += f" with the label column {ready.label_column}"
    terms = "accept its terms on the Hub, " if ready.large else ""
    return (
        f"{name} is {ready.hub} on the Hub, which cannot be read ({why}); where there is no "
        f"network, {terms}download it elsewhere (hf download {ready.hub} --repo-type dataset "
        f"{only}--local-dir FOLDER) and give {give}"
    )
