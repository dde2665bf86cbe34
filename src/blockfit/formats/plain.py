"""Plain checkpoints: models whose plan adds no module, written as their own library writes models.

Where every map of a plan is ``identity`` or ``folded``, and the MLPs of all blocks have one width,
what is left is an ordinary model with fewer blocks or narrower MLPs. It needs a config that says so
and weights that are numbered again, and then loads without blockfit.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from blockfit.arguments import checked
from blockfit.data.images import Images
from blockfit.errors import BlockfitError
from blockfit.files import check_target, new_folder, write_text
from blockfit.formats.card import Origin, model_card
from blockfit.formats.exported_folder import (
    CARD,
    CONFIG,
    FORM,
    OPEN_CLIP_WEIGHTS,
    PREPROCESSOR,
    ExportedFolder,
    check_complete,
    compared,
    kept_blocks,
    narrow,
    write_json,
    write_preprocessor,
)
from blockfit.formats.folder import WEIGHTS, Saved
from blockfit.formats.int8 import check_no_int8
from blockfit.models.from_open_clip import CONFIG_FILE, preprocess_cfg
from blockfit.models.load import load_model, read_dtype
from blockfit.models.source import Source
from blockfit.models.stock import CONFIGURED, names_stages, renumbered, stock_model
from blockfit.models.tensors import fill, storable

_NORM_EPS = 1e-6
"""Of torchvision's norms, which no argument says that a file can hold."""


@checked
def export_plain(
    saved: Saved,
    folder: str | Path,
    *,
    images: Images | None = None,
    dtype: torch.dtype | str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> ExportedFolder:
    """``blockfit.export_plain`` of a ``Saved``; ``dtype`` may be torch's.

    A transformers model becomes a folder for ``from_pretrained``, a timm or open_clip model one for
    ``create_model("local-dir:FOLDER")``, a torchvision model a state dict and the arguments of
    its class. The folder is read back by the library and compared with the small model before it
    takes its name.

    Without ``dtype`` the weights are held in half precision where that loses nothing.

    Raises:
        BlockfitError: where the plan needs a module or several widths, the library has no
            checkpoint format, its config cannot say what is left, the outputs differ, or the
            folder is taken.
    """
    origin = Origin(base_model, license)
    wanted = None if dtype is None else read_dtype(dtype)
    target = check_target(folder, FORM, overwrite)
    check_no_int8(saved.model, "exported")
    model, source = plain_model(saved)
    model.to(wanted)
    form = _FORMS[source.library]
    load = form.load.replace("{cls}", type(model).__name__)
    with new_folder(folder, FORM, overwrite) as partial:
        form.write(model, source, partial)
        narrow(partial / form.weights)
        held = next(p.dtype for p in model.parameters() if p.is_floating_point())
        parity = compared(saved, form.read(partial), images, "plain checkpoint", held)
        card = model_card(saved, parity, load.replace("{name}", form.online), origin=origin)
        write_text(partial / CARD, card)
    count = sum(parameter.numel() for parameter in model.parameters())
    local = form.local.replace("{folder}", str(folder))
    return ExportedFolder(
        target, source.library, kept_blocks(saved), count, parity, load.replace("{name}", local)
    )


def plain_model(saved: Saved) -> tuple[nn.Module, Source]:
    """An ordinary model of the size that is left, and what it is rebuilt from.

    How a config counts blocks and neurons is found by trying; see ``stock.stock_model``.
    """
    depth = saved.blocks.depth
    if saved.source.library not in CONFIGURED:
        raise BlockfitError(
            f"a model of {saved.source.name} has no checkpoint format of its own; only "
            f"{', '.join(CONFIGURED)} models can be written as plain checkpoints; "
            "export_onnx or export_program write this one"
        )
    check_complete(saved.source)
    if (why := saved.plan.not_plain(depth)) is not None:
        raise BlockfitError(
            f"{why}; {_again(saved)}, or export this one with export_hub, export_onnx or "
            "export_program"
        )
    if saved.plan.removed_blocks and names_stages(saved.source):
        raise BlockfitError(
            f"{saved.source.name} names its feature maps by the numbers of blocks, which change "
            "when some are gone for good; keep the folder that blockfit saved"
        )
    values = renumbered(storable(saved.model), saved.model, saved.blocks, saved.plan)
    found = stock_model(saved.source, saved.blocks, saved.plan, values)
    if found is None:
        widths = saved.plan.mlp_width(depth)
        narrower = "" if widths is None else f" and {widths[1]} neurons in each MLP"
        raise BlockfitError(
            f"{saved.source.name} cannot be built with {kept_blocks(saved)} blocks{narrower} by "
            "changing numbers of its config; keep the folder that blockfit saved"
        )
    bare, source = found
    packed = {id(value): value.contiguous() for value in values.values()}  # as files hold them
    fill(bare, {name: packed[id(value)] for name, value in values.items()})
    return bare.eval(), source


def _again(saved: Saved) -> str:
    """The command that makes a plain plan of the same size."""
    before, after = (saved.report.get(f"parameters_{when}") for when in ("before", "after"))
    size = f"--params {math.ceil(100 * after / before)}%" if before and after else "--params SIZE"
    model = saved.source.loads_as or "MODEL"
    return (
        "make one that can be with "
        f"`blockfit compress {shlex.quote(model)} --images PHOTOS {size} --plain -o SMALL`"
    )


def _write_transformers(model: Any, source: Source, folder: Path) -> None:
    model.config.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    write_preprocessor(source, folder)


def _write_timm(model: Any, source: Source, folder: Path) -> None:
    from timm.models import save_for_hf

    options, own = source.arguments["options"], source.preprocessing
    prepared = own.settings if own is not None and own.kind == "timm" else None
    save_for_hf(
        model, str(folder), model_args=options, safe_serialization=True, data_config=prepared
    )


def _write_torchvision(model: nn.Module, source: Source, folder: Path) -> None:
    arguments = dict(source.arguments)
    if (eps := arguments.pop("norm_eps")) != _NORM_EPS:
        raise BlockfitError(
            f"the norms of {source.name} have eps {eps:g}, which no argument that a file can hold "
            f"says (torchvision's own is {_NORM_EPS:g}); keep the folder that blockfit saved"
        )
    write_json(arguments, folder / CONFIG)
    if source.preprocessing is not None:
        write_json(source.preprocessing.settings, folder / PREPROCESSOR)
    save_file(model.state_dict(), folder / WEIGHTS)


def _read_torchvision(folder: Path) -> nn.Module:
    """As the line does that ``how_to_load`` gives."""
    from torchvision.models import VisionTransformer

    model = VisionTransformer(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    model.load_state_dict(load_file(folder / WEIGHTS))
    return cast(nn.Module, model)


def _write_open_clip(model: nn.Module, source: Source, folder: Path) -> None:
    write_json(
        {
            "model_cfg": source.arguments["config"],
            "preprocess_cfg": preprocess_cfg(source.preprocessing),
        },
        folder / CONFIG_FILE,
    )
    save_file(model.state_dict(), folder / OPEN_CLIP_WEIGHTS)


@dataclass(frozen=True)
class _Form:
    """How a library's own checkpoint is written and read.

    Args:
        write: model, source, folder.
        read: the folder, by the library itself.
        weights: the file's name.
        load: Python that gives a model, with the folder's or the repository's name in it.
        local: that name, of a folder.
        online: of a repository.
    """

    write: Callable[[Any, Source, Path], None]
    read: Callable[[Path], nn.Module]
    weights: str
    load: str
    local: str
    online: str


_FORMS = {
    "transformers": _Form(
        _write_transformers,
        lambda folder: load_model(folder),
        WEIGHTS,
        'transformers.{cls}.from_pretrained("{name}")',
        "{folder}",
        "OWNER/NAME",
    ),
    "timm": _Form(
        _write_timm,
        lambda folder: load_model(folder),
        WEIGHTS,
        'timm.create_model("{name}", pretrained=True)',
        "local-dir:{folder}",
        "hf-hub:OWNER/NAME",
    ),
    "torchvision": _Form(
        _write_torchvision,
        _read_torchvision,
        WEIGHTS,
        'torchvision.models.VisionTransformer(**json.load(open("{name}/config.json")))\n'
        'model.load_state_dict(safetensors.torch.load_file("{name}/model.safetensors"))',
        "{folder}",
        "FOLDER",
    ),
    "open_clip": _Form(
        _write_open_clip,
        lambda folder: load_model(folder),
        OPEN_CLIP_WEIGHTS,
        'open_clip.create_model("{name}")',
        "local-dir:{folder}",
        "hf-hub:OWNER/NAME",
    ),
}
