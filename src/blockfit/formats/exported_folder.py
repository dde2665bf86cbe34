"""What plain and Hub folders have in common: their files, their check, what is told of them."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from blockfit.arguments import checked
from blockfit.data.images import Images
from blockfit.errors import BlockfitError, first_line, need
from blockfit.files import SAVED, FolderForm, expanded, write_text
from blockfit.formats.card import Origin, with_origin
from blockfit.formats.folder import WEIGHTS, Saved
from blockfit.formats.manifest import read_manifest
from blockfit.formats.parity import Parity, Pictures, compare
from blockfit.formats.traced import Bare, primary, run
from blockfit.models.from_open_clip import CONFIG_FILE
from blockfit.models.head import observe
from blockfit.models.source import Source
from blockfit.models.tensors import stored_dtype

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
CARD, CODE = "README.md", "modeling_blockfit.py"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
FILES = (CONFIG, WEIGHTS, PREPROCESSOR, CARD, CODE, CONFIG_FILE, OPEN_CLIP_WEIGHTS)
"""All that such a folder may hold."""

FORM = FolderForm(CARD, "Made with blockfit", FILES)


@dataclass(frozen=True)
class ExportedFolder:
    """A folder that was written."""

    folder: Path
    library: str
    blocks: int
    parameters: int
    parity: Parity
    how_to_load: str

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "library": self.library,
            "blocks": self.blocks,
            "parameters": self.parameters,
            "max_abs_error": self.parity.max_abs_error,
            "parity": self.parity.to_json(),
            "how_to_load": self.how_to_load,
        }


def kept_blocks(saved: Saved) -> int:
    """How many blocks are left."""
    return saved.blocks.depth - len(saved.plan.removed_blocks)


def write_preprocessor(source: Source, folder: Path) -> None:
    """The image processor of a transformers model, where it is known."""
    own = source.preprocessing
    if own is not None and own.kind == "transformers":
        write_json(own.settings, folder / PREPROCESSOR)


def write_json(values: Any, path: Path) -> None:
    """Write values that people may want to read."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def narrow(weights: Path) -> None:
    """Hold values in half precision where none of them changes by that."""
    values = {name: value.to(stored_dtype(value)) for name, value in load_file(weights).items()}
    save_file(values, weights, metadata={"format": "pt"})


def compared(
    saved: Saved,
    again: nn.Module,
    images: Images | None,
    what: str,
    dtype: torch.dtype | None = None,
) -> Parity:
    """Compare a model that was read back with the small one.

    Args:
        what: was written, for the message.
        dtype: that its weights were brought to; by default the small model's.
    """
    first = next(saved.model.parameters())
    pictures = Pictures.of(saved.model, saved.source, images)
    small, other = Bare(saved.model), Bare(again.to(first).eval())
    one = next(pictures.portions())
    classes = None
    if observe(saved.model, saved.blocks, one).logits is not None:
        classes = primary(run(small, one))
    parity = compare(
        lambda batch: run(small, batch),
        lambda batch: run(other, batch),
        pictures.portions(),
        pictures.source,
        classes,
    )
    parity.check(what, dtype or first.dtype)
    return parity


@checked
def push_folder(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    overwrite: bool = False,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """Upload what ``export_plain`` or ``export_hub`` wrote; nothing else of the folder goes along.

    huggingface_hub does it, with its own endpoint, token and offline switch.

    Arguments and what is returned are those of ``blockfit.push_to_hub``; where ``base_model`` and
    ``license`` are not given, the folder's card says them. The folder stays as it is.

    Raises:
        BlockfitError: where the folder is no exported one, the base model or the licence is none,
            or the Hub refuses or is out of reach.
    """
    origin = Origin(base_model, license)
    folder = expanded(folder)
    if not folder.is_dir():
        raise BlockfitError(f"there is no folder {folder}; check the path")
    if (folder / SAVED).is_file():
        raise BlockfitError(f"{folder} is in blockfit's own form, which {_instead(folder)}")
    wanted = (CONFIG, WEIGHTS, CARD)
    if (folder / CONFIG_FILE).is_file():
        wanted = (CONFIG_FILE, OPEN_CLIP_WEIGHTS, CARD)
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise BlockfitError(
            f"{folder} has no {missing[0]}; push a folder that was exported as a plain "
            "checkpoint or for the Hub"
        )
    need("huggingface_hub", "transformers")
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError

    files = {name: folder / name for name in FILES if (folder / name).is_file()}
    card = with_origin(files[CARD].read_text(encoding="utf-8"), origin).encode()
    contents: dict[str, Path | bytes] = {**files, CARD: card}
    try:
        api = HfApi()
        url = api.create_repo(repository, private=private, exist_ok=overwrite)
        api.create_commit(
            repo_id=repository,
            operations=[CommitOperationAdd(*entry) for entry in contents.items()],
            commit_message="Upload a model that blockfit made smaller",
        )
    except (OSError, HFValidationError) as error:
        raise BlockfitError(
            f"cannot push to {repository}: {first_line(error)}; log in with hf auth login, and "
            "give overwrite=True where the repository is yours and there already"
        ) from error
    return str(url)


def check_complete(source: Source) -> None:
    """Refuse a model of whose library's parts some are left out, which no config can say.

    Raises:
        BlockfitError: names the first.
    """
    if source.passed_on:
        raise BlockfitError(
            f"{source.passed_on[0]} is nn.Identity in this model, which no config of its library "
            "can say; put the library's own part back, or use export_onnx or export_program"
        )


def _instead(folder: Path) -> str:
    """What to do with a folder in blockfit's own form that is to be pushed."""
    with suppress(BlockfitError):
        if read_manifest(folder / SAVED).int8:
            return (
                "other tools cannot load, and its weights are in int8, for which the Hub's forms "
                "have no place; export and push the model before that step"
            )
    return (
        "other tools cannot load; export it for the Hub first "
        f"(`blockfit export {shlex.quote(str(folder))}`, or export_hub) and push that"
    )
