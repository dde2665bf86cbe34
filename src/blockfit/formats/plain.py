"""Plain checkpoints: models whose plan adds no module, written as their own library writes models.

Where every map of a plan is ``identity`` or ``folded``, what is left is an ordinary model with
fewer blocks. It needs a config that says so and weights that are numbered anew, and then loads
without blockfit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from blockfit.arguments import checked
from blockfit.data.images import Images
from blockfit.errors import BlockfitError
from blockfit.files import check_target, new_folder
from blockfit.formats.card import model_card
from blockfit.formats.exported_folder import (
    CARD,
    FORM,
    ExportedFolder,
    compared,
    kept_blocks,
    narrow,
    write_preprocessor,
)
from blockfit.formats.folder import WEIGHTS, Saved
from blockfit.formats.int8 import check_no_int8
from blockfit.models.blocks import Blocks, named_blocks
from blockfit.models.load import load_model, skeleton
from blockfit.models.source import Source
from blockfit.models.tensors import fill, named_tensors, storable

_OF_STAGES = ("stage_names", "out_features", "out_indices")
"""Keys by which a transformers config numbers the blocks for use as a backbone."""


@checked
def export_plain(
    saved: Saved, folder: str | Path, *, images: Images | None = None, overwrite: bool = False
) -> ExportedFolder:
    """Write a compressed model as an ordinary checkpoint of its library, with fewer blocks.

    A transformers model becomes a folder for ``from_pretrained``, a timm model one for
    ``timm.create_model("local-dir:FOLDER", pretrained=True)``. The folder is read back and compared
    with the small model before it takes its name.

    Args:
        saved: from ``store.load_saved``.
        folder: new or empty.
        images: to compare on; see ``parity.Pictures``.
        overwrite: replace a checkpoint that lies there.

    Raises:
        BlockfitError: where the plan has maps that need a module, the library has no checkpoint
            format, its config cannot say how many blocks are left, the outputs differ, or the
            folder is taken.
    """
    target = check_target(folder, FORM, overwrite)
    check_no_int8(saved.model, "exported")
    model, source = plain_model(saved)
    local, online = f"local-dir:{folder}", "hf-hub:OWNER/NAME"
    load = 'timm.create_model("{}", pretrained=True)'
    if source.library == "transformers":
        local, online = str(folder), "OWNER/NAME"
        load = f'transformers.{type(model).__name__}.from_pretrained("{{}}")'
    with new_folder(folder, FORM, overwrite) as partial:
        if source.library == "transformers":
            _write_transformers(model, source, partial)
        else:
            _write_timm(model, source, partial)
        narrow(partial / WEIGHTS)
        parity = compared(saved, load_model(partial), images, "plain checkpoint")
        (partial / CARD).write_text(
            model_card(saved, parity, load.format(online)), encoding="utf-8"
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    return ExportedFolder(
        target, source.library, kept_blocks(saved), count, parity, load.format(local)
    )


def plain_model(saved: Saved) -> tuple[nn.Module, Source]:
    """An ordinary model with as many blocks as are left, and what it is rebuilt from.

    How a config counts blocks is found by trying: every number in it that equals the depth is
    changed, one at a time, until the library builds exactly the tensors that are left.

    Raises:
        BlockfitError: as ``export_plain``.
    """
    needing = [entry for entry in saved.plan if entry.map not in ("identity", "folded")]
    if needing:
        raise BlockfitError(
            f"the {needing[0].map} map of span {needing[0].span} needs a module that no stock "
            "checkpoint has; compress with --plain (identity and folded maps only), or export with "
            "--hub, --onnx or --pt2"
        )
    if saved.source.library not in ("transformers", "timm"):
        raise BlockfitError(
            f"a model of {saved.source.name} has no checkpoint format of its own; only "
            "transformers and timm models can be written as plain checkpoints"
        )
    arguments = saved.source.arguments
    if str(arguments.get("class")).endswith("Backbone") or "backbone_config" in arguments.get(
        "config", {}
    ):
        raise BlockfitError(
            f"{saved.source.name} names its feature maps by the numbers of blocks, which change "
            "when some are gone for good; keep the folder that blockfit saved"
        )
    values = _renumbered(saved)
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    for source in _shorter(saved.source, saved.blocks, saved.plan.removed_blocks):
        try:
            bare = skeleton(source)
        except BlockfitError:  # not the number that counts blocks
            continue
        if {name: tuple(value.shape) for name, value in named_tensors(bare).items()} == shapes:
            fill(bare, values)
            return bare.eval(), source
    raise BlockfitError(
        f"{saved.source.name} cannot be built with {kept_blocks(saved)} blocks by changing one "
        "number of its config; keep the folder that blockfit saved"
    )


def _renumbered(saved: Saved) -> dict[str, Tensor]:
    """All tensors of the small model, the blocks that are left numbered without gaps."""
    names = list(named_blocks(saved.model, saved.blocks))
    gone = set(saved.plan.removed_blocks)
    left = [name for index, name in enumerate(names) if index not in gone]
    moved = {
        f"{saved.blocks.path}.{old}." if saved.blocks.path else f"{old}.": new
        for old, new in zip(left, names, strict=False)
    }
    out = {}
    for name, value in storable(saved.model).items():
        prefix = next((p for p in moved if name.startswith(p)), None)
        if prefix is not None:
            inside = f"{saved.blocks.path}." if saved.blocks.path else ""
            name = f"{inside}{moved[prefix]}.{name[len(prefix) :]}"
        out[name] = value
    return out


def _shorter(source: Source, blocks: Blocks, removed: tuple[int, ...]) -> Iterator[Source]:
    """The source with one number that equals the depth changed; lists with an entry per block are
    cut in each."""
    depth, left = blocks.depth, blocks.depth - len(removed)

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(inner) for key, inner in value.items() if key not in _OF_STAGES}
        if isinstance(value, list) and len(value) == depth:
            return [entry for index, entry in enumerate(value) if index not in removed]
        return value

    base = cut(source.arguments)
    for path in _numbers(base, depth):
        arguments = copy.deepcopy(base)
        inner = arguments
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = left
        yield replace(source, arguments=arguments)
    if source.library == "timm":  # whose architectures know their depth without being told
        yield replace(source, arguments={**base, "options": {**base["options"], "depth": left}})


def _numbers(value: Any, wanted: int, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where in nested mappings the number ``wanted`` stands."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, wanted, (*path, key))
    elif type(value) is int and value == wanted:
        yield path


def _write_transformers(model: Any, source: Source, folder: Path) -> None:
    model.config.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    write_preprocessor(source, folder)


def _write_timm(model: Any, source: Source, folder: Path) -> None:
    from timm.models import save_for_hf

    options = source.arguments["options"]
    save_for_hf(model, str(folder), model_args=options, safe_serialization=True)
