"""The two parts of a labelled data set: images to learn from, and images to be judged on."""

from __future__ import annotations

from pathlib import Path

from blockfit.data.paths import from_path
from blockfit.data.ready import READY
from blockfit.data.records import UNNAMED, Columns
from blockfit.errors import BlockfitError

TEST_NAMES = ("test", "validation", "val", "valid")

Source = str | list[str]


def train_and_test(data: str, asked: Columns = UNNAMED) -> tuple[Source, Source]:
    """Where the training and the test images of a data set are, as ``images`` takes them.

    Args:
        data: ``digits``, a name of the paper's data sets, a folder with ``train*.parquet`` and
            ``test*.parquet`` (also in ``data/``), or anything that has splits by name.

    Raises:
        BlockfitError: where one of the two is not found.
    """
    if data == "digits":
        return "digits", "digits:test"
    if data in READY and not Path(data).exists():
        splits = READY[data].splits
        return f"{data}:train", f"{data}:{'validation' if 'validation' in splits else 'test'}"
    for folder in (Path(data).expanduser(), Path(data).expanduser() / "data"):
        train = _tables(folder, "train")
        found = [_tables(folder, name) for name in TEST_NAMES]
        test = next((part for part in found if part), None)
        if train and test:
            return train, test
    fault: BlockfitError | None = None
    for name in TEST_NAMES:
        try:
            for part in (f"{data}:train", f"{data}:{name}"):
                from_path(part, asked)
            return f"{data}:train", f"{data}:{name}"
        except BlockfitError as error:
            fault = fault or error
    raise BlockfitError(
        f"{data} has no training and test part that could be found ({fault}); "
        "name them with train= and test="
    )


def _tables(folder: Path, name: str) -> Source | None:
    """The parquet files of a split: ``test.parquet``, ``test-00000-of-00001.parquet``."""
    if not folder.is_dir():
        return None
    found = sorted(
        str(file)
        for file in folder.glob("*.parquet")
        if file.stem == name or file.stem.startswith((f"{name}-", f"{name}_"))
    )
    return found[0] if len(found) == 1 else found or None
