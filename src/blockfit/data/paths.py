"""A text that names pictures: a file, a folder, a pattern, a list, shards, a data set's name."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from blockfit.data.decode import is_picture, why_left_out
from blockfit.data.layouts import from_layout
from blockfit.data.lists import from_list, from_numpy
from blockfit.data.ready import READY, from_ready
from blockfit.data.records import UNNAMED, Columns, Records, from_pictures, split_in
from blockfit.data.tables import from_hub, from_saved, from_tables
from blockfit.data.tar_shards import from_shards, is_shard
from blockfit.errors import BlockfitError

_ALONE = frozenset((".parquet", ".arrow", ".npy", ".npz", ".txt", ".tsv", ".csv", ".lst"))
_TRAIN_AND_TEST = frozenset(("train", "val", "test"))
_ALIKE = {
    **dict.fromkeys(("training", "trainval"), "train"),
    **dict.fromkeys(("valid", "validation", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("testing", "tests"), "test"),
}
_BESIDE_SPLITS = "unlabelled|unlabeled|unsup|unsupervised|extra|holdout|held[ _-]?out"
_SPLIT = re.compile(
    rf"(trainval|train|training|val|valid|validation|dev|eval|evaluation|test|testing|tests"
    rf"|{_BESIDE_SPLITS})(?:[ _-]?(?:set|images|imgs|data|split|\d+))?",
    re.IGNORECASE,
)
BESIDE_CLASSES = "beside the class folders"
_MOST_FILES = 100_000  # that braces may stand for

HUB_NAME = r"[\w-][\w.-]*(/[\w.-]+)?"
"""What a data set of the Hub may be called."""


def from_path(source: str, asked: Columns = UNNAMED) -> Records:
    """A file, a folder, a pattern, a data set on disk, a ready name or a Hub data set id."""
    path = Path(source).expanduser()
    if not path.exists() and asked.split is None and re.search(r"[^:/\\]:[\w.-]+$", source):
        source, _, split = source.rpartition(":")
        asked = asked._replace(split=split)
        path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path, asked)
    if path.is_file():
        return from_files([path], asked)
    if any(sign in source for sign in "*?[{"):
        return from_files(_matching(str(path)), asked)
    if source in READY:
        return from_ready(source, asked)
    if re.fullmatch(HUB_NAME, source):
        return from_hub(source, asked)
    raise BlockfitError(f"there is no file or folder {source}; check the path")


def check_there(source: str) -> None:
    """Refuse at once a text that can only be a path and leads nowhere; nothing is opened."""
    path = Path(source).expanduser()
    name = source.rpartition(":")[0] if re.search(r"[^:/\\\\]:[\w.-]+$", source) else source
    known = path.exists() or Path(name).expanduser().exists() or name in READY
    if path.is_dir() and next(path.iterdir(), None) is None:
        raise BlockfitError(f"the folder {source} is empty; give one that holds images")
    if known or source.startswith("digits") or any(sign in source for sign in "*?[{"):
        return
    if not re.fullmatch(HUB_NAME, name):
        raise BlockfitError(f"there is no file or folder {source}; check the path")


def from_files(paths: Sequence[str | Path], asked: Columns = UNNAMED) -> Records:
    """Image files, parquet or arrow files or tar shards in their order, one list or NumPy file."""
    files = [Path(p).expanduser() for p in paths]
    source = str(files[0]) if len(files) == 1 else f"{files[0]} … ({len(files)} files)"
    suffixes = {file.suffix.lower() for file in files}
    if suffixes & _ALONE or any(is_shard(file) for file in files):
        for file in files:  # a pipe or a device would be waited for, or read for ever
            if file.exists() and not file.is_file():
                raise BlockfitError(f"{file} is no regular file; give files that lie on a disk")
    if len(files) == 1 and suffixes <= {".npy", ".npz"}:
        return from_numpy(files[0], asked)
    if asked.split is not None:
        raise BlockfitError(f"{source}: files have no splits; leave {asked.split!r} out")
    if suffixes <= {".parquet", ".arrow"} and len(suffixes) == 1:
        return from_tables(files, source, asked)
    if all(is_shard(file) for file in files):
        return from_shards(files, source, asked)
    if len(files) == 1 and suffixes <= {".txt", ".tsv", ".csv", ".lst"}:
        return from_list(files[0], asked)
    if asked.named:
        raise BlockfitError(
            f"{source}: image files have neither columns nor splits; leave both out"
        )
    _one_kind(files, source)
    return from_pictures(files, source)


def _one_kind(files: Sequence[Path], source: str) -> None:
    """Refuse tables, shards, arrays and lists among other files; what else ends oddly is tried."""
    for file in files:
        if file.is_dir():
            raise BlockfitError(
                f"{file} is a folder; give one folder by itself, or a list of files"
            )
        if file.suffix.lower() == ".zip":
            raise BlockfitError(f"{file} is an archive that is not read; unpack it, or make a .tar")
        if is_shard(file) or file.suffix.lower() in _ALONE:
            raise BlockfitError(
                f"{source}: {file} is no image; give {file.suffix} files by themselves"
            )


def _from_folder(folder: Path, asked: Columns) -> Records:
    split = asked.split
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return from_saved(folder, asked)
    known = from_layout(folder, asked)
    if known is not None:
        return known
    if split is not None and (folder / split).is_dir():
        return _from_folder(folder / split, asked._replace(split=None))
    found = _files_in(folder)
    pictures = [path for path in found if is_picture(path)]
    left_out = [(str(path), why) for path in found if (why := why_left_out(path)) is not None]
    if not pictures:
        return _other_files(folder, found, asked, left_out)
    if asked.named:
        raise BlockfitError(f"{folder}: a folder of images has no columns; leave them out")
    inside = [path for path in pictures if path.parent != folder]
    classes = sorted({path.relative_to(folder).parts[0] for path in inside})
    stray = len(pictures) - len(inside)
    if are_splits(classes) and stray <= len(inside):
        said = "give one of them" if split is None else f"there is no {split!r}; give one of them"
        raise BlockfitError(
            f"{folder} holds the splits {', '.join(classes)}; {said}, as in {folder}:{classes[0]}"
        )
    if split is not None:
        raise BlockfitError(f"{folder}: a folder of images has no splits; leave {split!r} out")
    if stray == 0 and len(classes) == 1 and _split_word(classes[0]) in _TRAIN_AND_TEST:
        only = _from_folder(folder / classes[0], asked)
        return replace(only, left_out=[*only.left_out, *left_out])
    if len(classes) < 2 or stray > len(inside):
        return replace(from_pictures(pictures, str(folder)), left_out=left_out)
    beside = [(str(path), BESIDE_CLASSES) for path in pictures if path.parent == folder]
    labels = [path.relative_to(folder).parts[0] for path in inside]
    names = [path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    made = from_pictures(inside, str(folder), labels, names)
    return replace(made, left_out=left_out + beside, unit="folders")


def are_splits(folders: Sequence[str]) -> bool:
    """Whether folders are splits: all are called so, or two of them ``train`` and ``test``.

    A class may be called ``train``, too; not beside one called ``test``.
    """
    words = [_split_word(name) for name in folders]
    main = {word for word in words if word in _TRAIN_AND_TEST}
    return len(folders) > 1 and bool(main) and (None not in words or len(main) > 1)


def _split_word(name: str) -> str | None:
    """``train`` of ``Train``, ``train2017``, ``training_set``; ``None`` of what is no split."""
    found = _SPLIT.fullmatch(name)
    return None if found is None else _ALIKE.get(word := found[1].lower(), word)


def _other_files(
    folder: Path, found: Sequence[Path], asked: Columns, left_out: Sequence[tuple[str, str]]
) -> Records:
    """A folder without pictures: of tables, or of shards."""
    split = asked.split
    if any(path.suffix.lower() in (".parquet", ".arrow") for path in found):
        return from_hub(str(folder), asked)
    shards = [path for path in found if is_shard(path)]
    if not shards and left_out:
        name, why = left_out[0]
        raise BlockfitError(
            f"{folder} holds {len(left_out)} pictures, and none that can be read ({name}: {why}); "
            "convert them to JPEG or PNG, or for HEIC pip install pillow-heif"
        )
    if not shards:
        raise BlockfitError(
            f"{folder} holds no images and no parquet or arrow files or shards; give a folder that "
            "holds some"
        )
    splits = {path: split_in(str(path.relative_to(folder))) for path in shards}
    names = sorted({name for name in splits.values() if name})
    if split is None and len(set(splits.values())) > 1 and names:
        raise BlockfitError(
            f"{folder} holds shards of the splits {', '.join(names)}; give one, as in "
            f"{folder}:{names[0]}"
        )
    chosen = [path for path in shards if split is None or splits[path] == split]
    if not chosen:
        raise BlockfitError(
            f"{folder} holds no shards of the split {split!r}; choose one of {', '.join(names)}"
        )
    source = str(folder) if split is None else f"{folder}:{split}"
    return from_shards(chosen, source, asked)


def _files_in(folder: Path) -> list[Path]:
    """All files below, sorted; hidden ones left out, links followed, circles cut."""
    found, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        shown = sorted(f for f in folders if not f.startswith("."))  # of two ways the first
        folders[:] = [] if real in seen else shown
        if real not in seen:
            found += [Path(root, file) for file in files if not file.startswith(".")]
        seen.add(real)
    return sorted(found)


def _matching(pattern: str) -> list[Path]:
    """The files of a pattern, with shell braces: ``{000..003}``, ``{a,b}``, ``*``, ``?``, ``[ab]``.

    Each part that braces make must be there.
    """
    found: list[Path] = []
    for part in _braces(pattern):
        here = sorted(Path(p) for p in glob.glob(part, recursive=True))
        if not here:
            more = f" (of {pattern})" if part != pattern else ""
            raise BlockfitError(f"no file matches {part}{more}; check the pattern")
        found += here
    return found


def _braces(pattern: str) -> Iterable[str]:
    pieces = re.split(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", pattern)
    choices = [[piece] if i % 2 == 0 else _choices(piece) for i, piece in enumerate(pieces)]
    if math.prod(len(choice) for choice in choices) > _MOST_FILES:
        raise BlockfitError(f"{pattern} means more than {_MOST_FILES:,} files; use a * instead")
    return ("".join(parts) for parts in product(*choices))


def _choices(inside: str) -> list[str]:
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if not bounds:
        return inside.split(",")
    start, stop = int(bounds[1]), int(bounds[2])
    if not 0 <= stop - start < _MOST_FILES:
        raise BlockfitError(
            f"the range {{{inside}}} must go upwards, over {_MOST_FILES:,} files at most; "
            "write the smaller number first, or use a *"
        )
    width = len(bounds[1]) if bounds[1].startswith("0") else 0
    return [str(number).zfill(width) for number in range(start, stop + 1)]
