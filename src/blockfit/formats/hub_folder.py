"""Hub folders: small models in a transformers checkpoint with a little code of its own.

The code names the stock class that it starts from, puts the maps where blocks were, so that the
list of blocks keeps its length, and smaller layers where parts were narrowed. It needs transformers
and torch, not blockfit.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from blockfit.arguments import checked
from blockfit.data.images import Images
from blockfit.errors import BlockfitError
from blockfit.files import check_target, new_folder, write_text
from blockfit.formats import hub_code
from blockfit.formats.card import Origin, model_card
from blockfit.formats.exported_folder import (
    CARD,
    CODE,
    CONFIG,
    FORM,
    ExportedFolder,
    check_complete,
    compared,
    kept_blocks,
    write_preprocessor,
)
from blockfit.formats.folder import WEIGHTS, Saved
from blockfit.formats.int8 import check_no_int8
from blockfit.formats.manifest import dumps
from blockfit.models.blocks import block_modules
from blockfit.models.narrowed import HeadColumns, HeadRows
from blockfit.models.tensors import storable, stored_dtype, tied
from blockfit.provenance import installed_versions

MADE = "Compressed"
"""Begins the names of the classes in the folder's code, and their ``model_type``."""

_HEAD = '''"""{stock}, made smaller by blockfit {version}.

Needs torch and transformers alone. ``config.json`` says under ``blockfit`` which blocks were
replaced, and by which maps, and which layers keep fewer dimensions. The weights of a map are
called as its block was, and then ``.map.``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import {config}, {stock}

'''

_TAIL = """

class {made}Config({config}):
    model_type = "blockfit_{model_type}"


class {made}{stock}({stock}):
    config_class = {made}Config

    def __init__(self, config, *args, **kwargs):
        told = config.blockfit
        super().__init__(config, *args, **{{**told["options"], **kwargs}})
        for path, how in told["replaced"].items():
            parent, _, name = path.rpartition(".")
            holder = self.get_submodule(parent)._modules
            new = make_map(how, told["width"], told["prefix_tokens"])
            holder[name] = stand_in(holder[name], new, told["input_name"], told["output_items"])
        for path, how in told["narrowed"].items():
            parent, _, name = path.rpartition(".")
            holder = self.get_submodule(parent)._modules
            holder[name] = narrowed_layer(holder[name], how)
"""


@checked
def export_hub(
    saved: Saved,
    folder: str | Path,
    *,
    images: Images | None = None,
    base_model: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> ExportedFolder:
    """``blockfit.export_hub`` of a ``Saved``.

    ``AutoModel….from_pretrained(FOLDER, trust_remote_code=True)`` reads it where blockfit is not
    installed: ``config.json``, ``model.safetensors``, ``modeling_blockfit.py``, the image processor
    and a model card. Blocks keep their positions. The folder is read back and compared with the
    small model before it takes its name.

    Raises:
        BlockfitError: for a model of another library, where the outputs differ, or the folder is
            taken. Nothing is left behind then.
    """
    origin = Origin(base_model, license)
    target = check_target(folder, FORM, overwrite)
    check_no_int8(saved.model, "exported")
    if saved.source.library != "transformers":
        raise BlockfitError(
            f"{saved.source.name} is no transformers model, and only transformers loads a folder's "
            "own code; use export_onnx or export_program, or compress it by the recipe "
            "plain and write it with export_plain"
        )
    check_complete(saved.source)
    auto = _auto_class(saved)
    # AutoBackbone reads folders from the Hub alone (transformers 5.24), AutoModel from anywhere.
    loader = "AutoModel" if auto == "AutoBackbone" else auto
    load = f'transformers.{loader}.from_pretrained("{{}}", trust_remote_code=True)'
    with new_folder(folder, FORM, overwrite) as partial:
        text = dumps(_config(saved, auto), "the config")
        write_text(partial / CONFIG, text)
        write_text(partial / CODE, _code(saved))
        save_file(_weights(saved.model), partial / WEIGHTS, metadata={"format": "pt"})
        write_preprocessor(saved.source, partial)
        parity = compared(saved, _read_back(saved, partial), images, "Hub folder")
        card = model_card(saved, parity, load.format("OWNER/NAME"), True, origin)
        write_text(partial / CARD, card)
    count = sum(parameter.numel() for parameter in saved.model.parameters())
    return ExportedFolder(
        target, "transformers", kept_blocks(saved), count, parity, load.format(folder)
    )


def _config_class(saved: Saved) -> Any:
    model: Any = saved.model
    return type(model.config)


def _made(saved: Saved) -> str:
    return f"{MADE}{saved.source.arguments['class']}"


def _auto_class(saved: Saved) -> str:
    """The Auto class by which transformers loads the stock class."""
    from transformers.models.auto import modeling_auto

    config, stock = _config_class(saved), saved.source.arguments["class"]
    for name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if name.startswith("Auto") and mapping is not None and config in mapping:
            found = mapping[config]
            classes = found if isinstance(found, (tuple, list)) else [found]
            if stock in [cls.__name__ for cls in classes]:
                return name
    return "AutoModel"


def _config(saved: Saved, auto: str) -> dict[str, Any]:
    """The stock config under a type of its own, so that no stock class takes it for its own."""
    values = dict(saved.source.arguments["config"])
    dtype = next(p.dtype for p in saved.model.parameters() if p.is_floating_point())
    module = Path(CODE).stem
    return {
        **values,
        "model_type": f"blockfit_{values['model_type']}",
        "architectures": [_made(saved)],
        "auto_map": {
            "AutoConfig": f"{module}.{MADE}Config",
            **dict.fromkeys({auto, "AutoModel"}, f"{module}.{_made(saved)}"),
        },
        "dtype": str(dtype).removeprefix("torch."),
        "blockfit": {
            "base_model_type": values["model_type"],
            "options": saved.source.arguments.get("options", {}),
            "plan": saved.plan.to_json(),
            "width": saved.blocks.width,
            "prefix_tokens": saved.blocks.prefix_tokens,
            "input_name": saved.blocks.input_name,
            "output_items": saved.blocks.output_items,
            "replaced": _replaced(saved),
            "narrowed": _narrowed(saved),
        },
    }


def _replaced(saved: Saved) -> dict[str, dict[str, Any]]:
    """Path of every removed block → the map that stands there, under each name it is held by."""
    stock: Mapping[str, Any] = {"map": "identity", "rank": None, "per_token_type": False}
    paths = {id(module): name for name, module in saved.model.named_modules()}
    at = [paths[id(module)] for module in block_modules(saved.model, saved.blocks)]
    out = {}
    for entry in saved.plan:
        for index in entry.span.blocks:
            last = index == entry.span.stop - 1
            own = {"map": entry.map, "rank": entry.rank, "per_token_type": entry.per_token_type}
            out[at[index]] = own if last else dict(stock)
    return out


def _narrowed(saved: Saved) -> dict[str, dict[str, Any]]:
    """Path of every narrowed layer → its shape, or the dimensions that it keeps of heads."""
    out: dict[str, dict[str, Any]] = {}
    paths = {id(module): name for name, module in saved.model.named_modules()}
    modules = block_modules(saved.model, saved.blocks)
    for cut in saved.plan.narrowings:
        block = modules[cut.block]
        names = [rows.layer for rows in cut.rows] + ([cut.reader] if cut.reader else [])
        for name in names:
            layer = block.get_submodule(name)
            if isinstance(layer, HeadRows):
                how: dict[str, Any] = {"rows": [list(segment) for segment in layer.segments]}
            elif isinstance(layer, HeadColumns):
                how = {"columns": list(layer.segment)}
            elif isinstance(layer, nn.Conv2d):
                how = {"channels": layer.out_channels}
            else:
                assert isinstance(layer, nn.Linear)
                how = {"shape": list(layer.weight.shape)}
            out[paths[id(layer)]] = how
    return out


def _code(saved: Saved) -> str:
    """The text of ``modeling_blockfit.py``: pieces of blockfit's source, and two classes."""
    config = _config_class(saved)
    names = {
        "stock": saved.source.arguments["class"],
        "config": config.__name__,
        "model_type": config.model_type,
        "made": MADE,
        "version": installed_versions()["blockfit"],
    }
    bodies = "\n\n".join(inspect.getsource(one) for one in hub_code.PIECES)
    return f"{_HEAD.format(**names)}\n{bodies}{_TAIL.format(**names)}"


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, shared tensors once, in half precision where that loses not one bit."""
    storable(model)
    values = model.state_dict()
    shared = tied(values)
    return {
        name: value.detach().to(stored_dtype(value)).cpu().contiguous().clone()
        for name, value in values.items()
        if name not in shared
    }


class _Loader(SourceFileLoader):
    """Writes no ``__pycache__`` into the folder that it reads."""

    def set_data(self, *_: Any, **__: Any) -> None:
        pass


def _read_back(saved: Saved, folder: Path) -> nn.Module:
    """The model as the folder's own code makes it, without transformers' cache of foreign code."""
    loader = _Loader("blockfit_read_back", str(folder / CODE))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module: Any = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    model, info = getattr(module, _made(saved)).from_pretrained(folder, output_loading_info=True)
    if wrong := sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]):
        raise BlockfitError(
            f"transformers does not find {wrong[0]} in the Hub folder that was written; keep the "
            "folder that blockfit saved, or use export_onnx or "
            "export_program"
        )
    return model
