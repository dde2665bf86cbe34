"""``save_pretrained`` and ``push_to_hub`` of a compressed model: the Hub form, or refused."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from blockfit.errors import BlockfitError
from blockfit.files import check_kept, kept_file
from blockfit.formats.exported_folder import CARD, CONFIG, FILES, FORM, push_folder
from blockfit.formats.folder import saved_of
from blockfit.formats.hub_folder import export_hub

MADE = '"blockfit_'
"""What the config of a Hub folder holds, in the name of its type."""


def save_pretrained(
    model: nn.Module, save_directory: str | Path, is_main_process: bool = True, **options: Any
) -> None:
    """Write the Hub form into a folder, beside whatever else a training run keeps there.

    Args:
        save_directory: new, or with other files; a checkpoint that blockfit did not write is never
            replaced.
        is_main_process: nothing is written otherwise.
        options: of transformers' method; what would upload is refused.

    Raises:
        BlockfitError: where the Hub form cannot hold the model, or the folder holds a checkpoint.
    """
    if options.get("push_to_hub"):
        raise BlockfitError(
            "save_pretrained of a compressed model does not upload; use "
            "model.push_to_hub(OWNER/NAME), or blockfit push FOLDER OWNER/NAME"
        )
    if not is_main_process:
        return
    target = check_kept(save_directory)
    config = target / CONFIG
    own = config.is_file() and MADE in config.read_text("utf-8", errors="replace")
    taken = [name for name in FILES if (target / name).exists() and name != CARD]
    if taken and not own:
        raise BlockfitError(
            f"{save_directory} holds {taken[0]}, which is of another checkpoint; choose another "
            "folder"
        )
    with tempfile.TemporaryDirectory() as made:
        hub = Path(made) / "hub"
        export_hub(saved_of(model), hub)
        for path in sorted(hub.iterdir(), key=lambda path: path.name == CONFIG):
            there = target / path.name
            if path.name == CARD and there.exists() and FORM.sign not in there.read_text("utf-8"):
                continue  # a training run's own card
            with kept_file(there) as partial:
                shutil.copyfile(path, partial)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    base_model: str | None = None,
    license: str | None = None,
    **options: Any,
) -> str:
    """Upload the Hub form; returns the address of the repository.

    Args:
        model: compressed.
        repo_id: ``owner/name``.
        private: where the repository is new.
        base_model: as in ``export_hub``, for the model card.
        license: as in ``export_hub``, for the model card.
        options: of transformers' method; they have no use here.

    Raises:
        BlockfitError: where the Hub form cannot hold the model, or the Hub refuses.
    """
    with tempfile.TemporaryDirectory() as made:
        hub = Path(made) / "hub"
        export_hub(saved_of(model), hub, base_model=base_model, license=license)
        return push_folder(hub, repo_id, private=bool(private), overwrite=True)


WRITERS: dict[str, Callable[..., Any]] = {
    "save_pretrained": save_pretrained,
    "push_to_hub": push_to_hub,
}
"""What stands in for the methods of a compressed model, by their names."""
