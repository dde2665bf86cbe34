"""Models by name, and their architecture again without weights."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockfit.errors import BlockfitError, first_line
from blockfit.files import expanded
from blockfit.models import from_open_clip as openclip
from blockfit.models import libraries
from blockfit.models.attributes import first_difference, replaced_by_identity
from blockfit.models.preprocessing import Preprocessing, own_preprocessing
from blockfit.models.source import LIBRARIES, Source, attach, bounded

__all__ = [
    "LIBRARIES",
    "Source",
    "attach",
    "label_names",
    "load_model",
    "read_dtype",
    "skeleton",
    "source_of",
]


def load_model(
    name: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> nn.Module:
    """Load a pretrained model by name, in eval mode, its source attached.

    Args:
        name: ``timm/NAME`` or a timm name; ``torchvision/NAME`` or ``torchvision/NAME.WEIGHTS``;
            ``open_clip/NAME.WEIGHTS``; a transformers, timm or open_clip folder; a Hub id; or
            ``demo``.
        device: where to put it; the CPU by default.
        dtype: of its weights, such as ``"float16"``; float32 by default, whatever the file holds.
        trust_remote_code: run code that comes with a Hub checkpoint; never without this.
        options: passed on to the library, such as ``revision=`` or timm's ``img_size=``.

    Raises:
        BlockfitError: where nothing of that name can be loaded; it says what to do.
    """
    text = str(name)
    wanted = read_dtype(dtype)
    if text == "demo":
        loaded = libraries.load_demo()
    elif (folder := expanded(text)).is_dir():
        if (folder / openclip.CONFIG_FILE).is_file() and not (folder / "config.json").is_file():
            how: dict[str, Any] = {"device": device, "dtype": dtype, **options}
            return load_model(f"open_clip/local-dir:{folder}", **how)
        with bounded():
            loaded = libraries.load_folder(folder, trust_remote_code, wanted, options)
    elif folder.is_file():
        raise BlockfitError(
            f"{text} is a file; give the folder of a model that transformers, timm, open_clip or "
            "blockfit wrote"
        )
    elif text.startswith("torchvision/"):
        loaded = libraries.load_torchvision(text.removeprefix("torchvision/"), options)
    elif text.startswith("open_clip/"):
        with bounded():
            loaded = openclip.load_open_clip(text.removeprefix("open_clip/"), options)
    elif text.startswith("timm/") or ("/" not in text and libraries.is_timm_name(text)):
        loaded = libraries.load_timm(text.removeprefix("timm/"), options)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and not text.startswith("."):
        loaded = libraries.load_transformers(text, trust_remote_code, wanted, options)
    else:
        raise BlockfitError(
            f"there is no folder {text}; give a model folder, a Hub id (owner/name), timm/NAME, "
            "torchvision/NAME, open_clip/NAME.WEIGHTS or demo"
        )
    model, told_name, licence, preprocessing = loaded
    source = replace(
        _worked_out(model), name=told_name, licence=licence, preprocessing=preprocessing
    )
    attach(model, source)
    return model.to(device=device, dtype=wanted).eval()


def source_of(model: nn.Module) -> Source:
    """Where the model came from: what ``load_model`` attached, or what the model itself tells.

    A source worked out here rebuilds exactly the model's parameters and buffers (names and
    shapes) and all else that its outputs depend on; where that cannot be had, the library is
    ``module`` and only the user can rebuild it.
    """
    attached = getattr(model, "blockfit_source", None)
    if isinstance(attached, Source):
        return attached
    return replace(_worked_out(model), preprocessing=own_preprocessing(model))


def source_with(model: nn.Module, prepared: object) -> Source:
    """The source with the preprocessing that its images had, where that can be written down."""
    source = source_of(model)
    if isinstance(prepared, Preprocessing):
        return replace(source, preprocessing=prepared)
    return source


def _worked_out(model: nn.Module) -> Source:
    shapes = _shapes(model)
    for sources in (
        libraries.transformers_sources,
        libraries.timm_sources,
        libraries.torchvision_sources,
        openclip.open_clip_sources,
        libraries.demo_sources,
    ):
        for source in sources(model):
            try:
                rebuilt = skeleton(source)
            except BlockfitError:  # arguments that its library refuses are not its own
                continue
            if gone := replaced_by_identity(model, rebuilt):
                source = replace(source, passed_on=gone)
                rebuilt = skeleton(source)
            if _shapes(rebuilt) == shapes and first_difference(model, rebuilt) is None:
                return source
    cls = type(model)
    return Source("module", f"{cls.__module__}.{cls.__qualname__}", {})


def refreshed(source: Source, model: nn.Module) -> Source:
    """The source with the config that the model has now: labels may have changed, or a head."""
    if source.library == "transformers":
        return libraries.refreshed_transformers(source, model)
    if source.library == "timm":
        return libraries.refreshed_timm(source, model)
    return source


def with_classes(source: Source, classes: int) -> Source:
    """The source of the same architecture with a head of so many classes."""
    arguments = dict(source.arguments)
    if source.library == "transformers":
        names = {str(index): f"LABEL_{index}" for index in range(classes)}
        config = {k: v for k, v in arguments["config"].items() if k != "num_labels"}
        numbers = {name: index for index, name in enumerate(names.values())}
        arguments["config"] = {**config, "id2label": names, "label2id": numbers}
    elif source.library == "timm":
        arguments["options"] = {**arguments["options"], "num_classes": classes}
    elif source.library == "torchvision":
        arguments["num_classes"] = classes
    return replace(source, arguments=arguments)


def skeleton(source: Source) -> nn.Module:
    """The architecture on the meta device, in eval mode: shapes only, nothing initialised.

    Buffers that are not in the state dict are on the meta device, too; whoever fills the
    parameters must fill them as well.

    Raises:
        BlockfitError: for a user's own module, a class that the library does not have, or
            arguments that it refuses.
    """
    arguments = source.arguments
    builders = {
        "transformers": libraries.build_transformers,
        "timm": libraries.build_timm,
        "torchvision": libraries.build_torchvision,
        "open_clip": openclip.build_open_clip,
        "demo": libraries.build_demo,
    }
    if source.library not in builders:
        raise BlockfitError(
            f"{source.name} is a class of your own, which blockfit cannot rebuild; "
            "build it yourself and give it as model="
        )
    try:
        with bounded(), torch.device("meta"), _linspace_with_values():
            model = builders[source.library](arguments).eval()
        for name in source.passed_on:
            model.get_submodule(name)  # refuses what is not there
            around, _, own = name.rpartition(".")
            setattr(model.get_submodule(around), own, nn.Identity())
        return model
    except BlockfitError:
        raise
    except Exception as error:  # unfit arguments make the libraries raise nearly anything
        raise BlockfitError(
            f"cannot rebuild {source.name} with the installed {source.library}: "
            f"{type(error).__name__}: {first_line(error)}; "
            "install the version that it was saved with"
        ) from error


def label_names(model: nn.Module) -> list[str] | None:
    """The names of the model's classes in the order of its logits, where it knows them."""
    table = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(table, Mapping) and table:
        names = [str(table[key]) for key in sorted(table, key=int)]
        return None if all(re.fullmatch(r"LABEL_\d+", n) for n in names) else names
    own = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if isinstance(own, list | tuple) and len(own) == getattr(model, "num_classes", None):
        return [str(name) for name in own]
    return None


@contextmanager
def _linspace_with_values() -> Iterator[None]:
    """Stochastic-depth schedules read values out of ``torch.linspace``, which meta tensors lack."""
    original = torch.linspace
    torch.linspace = functools.partial(original, device="cpu")
    try:
        yield
    finally:
        torch.linspace = original


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def read_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A floating dtype by name; float32 for ``None``.

    Raises:
        BlockfitError: where it is none.
    """
    if dtype is None:
        return torch.float32
    found: Any = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise BlockfitError(f"unknown dtype {dtype!r}; choose float32, float16 or bfloat16")
    return found
