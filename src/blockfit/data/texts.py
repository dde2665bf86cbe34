"""Texts for calibration and evaluation: lines of a file, a column of a table, or a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from blockfit.arguments import checked
from blockfit.data.images import Beside, Images, images
from blockfit.data.loaders import Stream
from blockfit.data.records import unboxed
from blockfit.data.tables import load_dataset, one_split
from blockfit.errors import BlockfitError, first_line, need
from blockfit.models.forward import image_name, takes_texts
from blockfit.models.load import source_of
from blockfit.models.text_tower import Tokenize, tokenizer_of
from blockfit.untrusted import read_text

TABLES = {
    ".parquet": "from_parquet", ".arrow": "from_file", ".csv": "from_csv", ".tsv": "from_csv",
    ".jsonl": "from_json",
}  # fmt: skip
"""Endings of files that are tables, and how ``datasets.Dataset`` reads them."""

COLUMNS = ("text", "sentence", "content", "caption")
"""Names that a column of texts usually has."""

Texts = tuple[list[str], str, list[tuple[str, str]]]
"""Texts, what they are for people, and what was left out with the reason."""


@checked
def texts(
    source: Any,
    tokenizer: Any,
    *,
    column: str | None = None,
    split: str | None = None,
    limit: int | str | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> Images:
    """Texts from anywhere, as batches of tokens for a text encoder or a decoder.

    Every batch is padded to its longest text; by its ``attention_mask`` padding counts in nothing.
    Every verb takes the result where it takes images.

    Args:
        source: a text file with a text per line; a table (parquet, arrow, csv, tsv or jsonl); a
            folder or Hub id of ``datasets``, ``:SPLIT`` after it chooses one of its splits; a
            ``datasets.Dataset``; or a sequence of texts. Empty ones are left out, and named in
            ``description()["left_out"]``.
        tokenizer: of transformers; a function from a list of texts to a mapping of tensors that
            the model is called with; or a model that was loaded by name or from a folder with its
            tokenizer in it.
        column: of a table; the only one of texts, or one of the usual names, by default.
        split: of a data set with several.
        limit: how many texts to draw with the seed over the whole set; as for images.
        seed: of the draw.
        batch_size: texts per batch.

    Raises:
        BlockfitError: where there are no texts, no such column, or no tokenizer.
    """
    if isinstance(tokenizer, nn.Module):
        check_takes_texts(tokenizer)
    found, name, empty = _read(source, column, split)
    if not found:
        raise BlockfitError(f"{name} holds no texts; give some")
    tokenize = _tokenize(tokenizer)
    _check(tokenize, found[:2])
    loader = DataLoader(_Held(found), collate_fn=_Collate(tokenize))
    made = images(loader, limit=limit, seed=seed, batch_size=batch_size)
    assert isinstance(made.records, Stream)
    return replace(made, records=replace(made.records, source=name, left_out=empty, kind="texts"))


def check_takes_texts(model: nn.Module) -> None:
    """Refuse texts for a model that takes none."""
    if not takes_texts(model):
        raise BlockfitError(
            f"{type(model).__name__} takes no texts: it has no text tower, and its forward no "
            "input_ids; give images alone"
        )


def check_two_towers(model: nn.Module) -> str:
    """By which name the image tower of a model of images and texts takes images.

    Raises:
        BlockfitError: for any other model.
    """
    name = image_name(model)
    if name is None:
        check_takes_texts(model)
        raise BlockfitError(
            f"{type(model).__name__} is no model of an image tower and a text tower; give images "
            "or texts, not both"
        )
    return name


_read_texts = texts


@checked
def pairs(
    images: Images, texts: Any, model: nn.Module, tokenizer: Any = None, **options: Any
) -> Images:
    """Images and texts as batches of both, for both towers of a model.

    As many texts as images go with them in their order: image–text pairs. Fewer are taken in turn;
    of more some are drawn with the seed of the images. Which text goes with which image matters
    little: a batch is judged by the similarities of all its images to all its texts.

    Args:
        images: their labels are not used.
        texts: what ``blockfit.texts`` takes, or returned.
        model: of images and texts.
        tokenizer: as in ``texts``; the model's own by default.
        options: of ``texts``: ``column`` and ``split``.

    Raises:
        BlockfitError: for a model without two towers, and where there are fewer than two texts, or
            images in a batch.
    """
    name = check_two_towers(model)
    if images.batch_size < 2:
        raise BlockfitError(
            "an image is judged by its similarities to the texts of its batch, and a batch of one "
            "has one text; give images with batch_size=2 or more"
        )
    written = texts
    if not isinstance(texts, Images):
        written = _read_texts(texts, model if tokenizer is None else tokenizer, **options)
    held = _held(written)
    if len({*held.texts}) < 2:
        raise BlockfitError(
            f"{written.records.source} holds one text; similarities need two different ones or more"
        )
    count, given = images.records.size, len(held.texts)
    order = np.arange(given)
    if given > count:
        order = np.random.default_rng(images.seed).permutation(given)
    assert isinstance(written.records, Stream)
    left_out = written.records.left_out
    beside = Beside(written.records.source, held.texts, held.tokenize, name, order, left_out)
    return replace(images, texts=beside)


@dataclass(frozen=True)
class _Written:
    texts: Sequence[str]
    tokenize: Tokenize


def _held(written: Images) -> _Written:
    """The texts that ``texts`` holds, and their tokenizer."""
    items = written.records.items if isinstance(written.records, Stream) else None
    if not isinstance(items, DataLoader) or not isinstance(items.dataset, _Held):
        raise BlockfitError("give texts as blockfit.texts returns them, a file, a table or a list")
    chosen = [items.dataset[int(p)].text for p in written.positions]
    assert isinstance(items.collate_fn, _Collate)
    return _Written(chosen, items.collate_fn.tokenize)


@dataclass(frozen=True)
class _Text:
    text: str


class _Held(Dataset[_Text]):
    """Texts by their positions."""

    def __init__(self, found: Sequence[str]) -> None:
        self._found = found

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, position: int) -> _Text:
        return _Text(self._found[position])


@dataclass(frozen=True)
class _Collate:
    tokenize: Tokenize

    def __call__(self, samples: Sequence[_Text]) -> dict[str, Tensor]:
        return dict(self.tokenize([sample.text for sample in samples]))


def _tokenize(given: Any) -> Tokenize:
    if isinstance(given, nn.Module):
        source = source_of(given)
        return tokenizer_of(given, source)
    if hasattr(given, "pad_token") and callable(given):  # a tokenizer of transformers
        if given.pad_token is None:
            raise BlockfitError(
                "the tokenizer has no padding token; set one, such as "
                "tokenizer.pad_token = tokenizer.eos_token (padding counts in nothing)"
            )
        return lambda some: given(list(some), padding=True, truncation=True, return_tensors="pt")
    if callable(given):
        return given
    raise BlockfitError(
        f"a tokenizer is one of transformers, a function of a list of texts, or a model, "
        f"not {type(given).__name__}"
    )


def _check(tokenize: Tokenize, few: Sequence[str]) -> None:
    """Refuse before any work a tokenizer that does not give a row per text."""
    out = tokenize(few)
    rows = [v for v in out.values() if isinstance(v, Tensor)] if isinstance(out, Mapping) else []
    whole = [v for v in rows if v.ndim == 2 and v.dtype in (torch.int64, torch.int32)]
    if not whole or any(len(value) != len(few) for value in whole):
        raise BlockfitError(
            "the tokenizer must return a mapping of whole-number tensors (texts, tokens), such as "
            f"input_ids and attention_mask; it returned {type(out).__name__} for {len(few)} texts"
        )


def _read(source: Any, column: str | None, split: str | None) -> Texts:
    source = unboxed(source)
    if isinstance(source, str | Path):
        file = Path(source).expanduser()
        if file.is_file() and file.suffix.lower() not in TABLES:
            if column is not None or split is not None:
                raise BlockfitError(f"{file} is a text file, without column= or split=")
            return _sorted_out(_lines(file), str(file), "line")
        name, _, own = str(source).rpartition(":")
        if split is None and name and not file.exists():  # written as for images, NAME:SPLIT
            file, split = Path(name).expanduser(), own
        return _of_dataset(*one_split(_dataset(file), str(file), split), column)
    if hasattr(source, "column_names") and hasattr(source, "features"):
        return _of_dataset(source, type(source).__name__, column)
    if isinstance(source, Sequence) and all(isinstance(one, str) for one in source):
        if column is not None or split is not None:
            raise BlockfitError("a list of texts has no column= and no split=; leave them out")
        return _sorted_out(source, f"a {type(source).__name__} of texts", "text")
    raise BlockfitError(
        f"a {type(source).__name__} is no source of texts; give a text file, a table or data set, "
        "or a list of texts"
    )


def _lines(file: Path) -> list[str]:
    try:
        return read_text(file).rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BlockfitError(f"cannot read the texts {file}: {first_line(error)}") from error


def _dataset(path: Path) -> Any:
    library = need("datasets", "datasets")
    try:
        kind = path.suffix.lower()
        if kind in TABLES and path.is_file():
            options = {"sep": "\t"} if kind == ".tsv" else {}
            return getattr(library.Dataset, TABLES[kind])(str(path), **options)
        saved = ("state.json", "dataset_dict.json")
        if any((path / name).is_file() for name in saved):
            return library.load_from_disk(str(path))
        return load_dataset(str(path))
    except BlockfitError:
        raise
    except Exception as error:  # datasets, pyarrow and the Hub's client share no base class
        raise BlockfitError(
            f"cannot read texts from {path} ({first_line(error)}); give a text file with a text "
            "per line, a parquet file, or a folder or Hub id of datasets"
        ) from error


def _of_dataset(dataset: Any, name: str, column: str | None) -> Texts:
    kinds = {n: getattr(f, "dtype", "") for n, f in dataset.features.items()}
    written = [n for n, kind in kinds.items() if kind in ("string", "large_string")]
    usual = [n for n in COLUMNS if n in written]
    chosen = column or next(iter(written if len(written) == 1 else usual), None)
    if chosen not in written:
        said = "say which column holds texts" if column is None else f"{column!r} holds no texts"
        raise BlockfitError(
            f"{name}: {said}, with column=; those of texts are {', '.join(written) or 'none'}"
        )
    cells = dataset.with_format(None).select_columns([chosen])[:][chosen]
    return _sorted_out(cells, f"{name}, column {chosen}", "row")


def _sorted_out(given: Sequence[str | None], name: str, unit: str) -> Texts:
    good = [text for text in given if text is not None and text.strip()]
    empty = [
        (f"{unit} {number}", "empty")
        for number, text in enumerate(given, 1)
        if text is None or not text.strip()
    ]
    return good, name, empty
