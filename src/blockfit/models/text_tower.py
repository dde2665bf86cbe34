"""Texts for models of images and texts: the checkpoint's own tokenizer, and its text tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError, first_line, need
from blockfit.models import hub
from blockfit.models.forward import evaluating, placed, text_tower
from blockfit.models.from_open_clip import CONFIG_FILE
from blockfit.models.source import Source

Tokenize = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Texts → what the text tower is called with, by keyword."""

TEXTS_AT_ONCE = 256

NO_LIMIT = 1 << 24
"""Tokens of a text beyond which a limit is none: tokenizers without one say 10³⁰."""


def tokenizer(model: nn.Module, source: Source) -> Tokenize:
    """The tokenizer that belongs to a checkpoint, from the folder or name that it was loaded by.

    Raises:
        BlockfitError: where there is none; it says where it was looked for.
    """
    if source.library in ("open_clip", "transformers"):
        return tokenizer_of(model, source)
    raise BlockfitError(
        f"{source.name} comes without a tokenizer; zero-shot needs a model of images and texts "
        "from transformers or open_clip, loaded by name or from a folder"
    )


def tokenizer_of(model: nn.Module, source: Source) -> Tokenize:
    """``tokenizer`` of any model of texts."""
    try:
        if source.library == "open_clip":
            return _open_clip_tokenizer(source.name)
        if source.library == "transformers":
            return _transformers_tokenizer(model, source.name)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise BlockfitError(
            f"the tokenizer of {source.name} cannot be loaded ({first_line(error)}); put its "
            "files into the original's folder, or name a tokenizer with tokenizer="
        ) from error
    raise BlockfitError(
        f"{source.name} comes without a tokenizer; name one with tokenizer=: a tokenizer of "
        "transformers, or in Python a function from a list of texts to a mapping of tensors"
    )


def named_tokenizer(model: nn.Module, name: str) -> Tokenize:
    """A tokenizer of transformers by its folder or Hub id, for a model that comes without one.

    Raises:
        BlockfitError: where there is none.
    """
    try:
        return _transformers_tokenizer(model, name)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise BlockfitError(
            f"there is no tokenizer {name} ({first_line(error)}); give a folder with a tokenizer's "
            "files in it, or a Hub id"
        ) from error


def _transformers_tokenizer(model: nn.Module, name: str) -> Tokenize:
    transformers = need("transformers", "transformers")
    files = {} if Path(name).is_dir() else hub.only_cached({})
    own = transformers.AutoTokenizer.from_pretrained(name, **files)
    if own.pad_token is None:  # decoders; padding is masked, whatever it is
        own.pad_token = own.eos_token
    whole = getattr(model, "config", None)
    config = getattr(whole, "text_config", whole)
    limits = getattr(config, "max_position_embeddings", None), own.model_max_length
    longest = min((n for n in limits if isinstance(n, int) and n < NO_LIMIT), default=None)
    # SigLIP was trained on padded texts only, and reads its last token.
    padded = "siglip" in str(getattr(config, "model_type", ""))

    def tokenize(texts: Sequence[str]) -> Mapping[str, Tensor]:
        out = own(
            list(texts),
            padding="max_length" if padded else True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        return dict(out)

    return tokenize


def _open_clip_tokenizer(name: str) -> Tokenize:
    library = need("open_clip", "open-clip")
    where = name.removeprefix("open_clip/")
    if (Path(where) / CONFIG_FILE).is_file():
        where = f"local-dir:{where}"
    elif ":" not in where:
        where = where.partition(".")[0]
    own = library.get_tokenizer(where)
    return lambda texts: {"text": own(list(texts))}


def embed_texts(model: nn.Module, tokenize: Tokenize, texts: Sequence[str]) -> Tensor:
    """Embeddings of texts, float32 of length 1, shape (texts, F).

    Raises:
        BlockfitError: where the model has no text tower.
    """
    tower = text_tower(model)
    if tower is None:
        raise BlockfitError(
            f"{type(model).__name__} has no text tower; zero-shot needs a model of images and texts"
        )
    rows = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            tokens = placed(model, tokenize(texts[start : start + TEXTS_AT_ONCE]))
            assert not isinstance(tokens, Tensor)
            out = tower(**tokens)
            found: Tensor = getattr(out, "pooler_output", out)
            rows.append(found.float().cpu())
    return nn.functional.normalize(torch.cat(rows), dim=-1)
