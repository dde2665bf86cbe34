"""open_clip: load by name or folder, tell where a model came from, rebuild it without weights.

open_clip's models do not remember the configuration that they were built from; ``load_open_clip``
attaches it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from blockfit.errors import BlockfitError, first_line, need
from blockfit.models import hub
from blockfit.models.libraries import Loaded
from blockfit.models.preprocessing import Preprocessing
from blockfit.models.source import Source, check_timm

CONFIG_FILE = "open_clip_config.json"

_FORCED = {
    "force_image_size": ("vision_cfg", "image_size"),
    "force_patch_dropout": ("vision_cfg", "patch_dropout"),
    "force_context_length": ("text_cfg", "context_length"),
}
"""Options of open_clip that change the architecture, and where they stand in its configuration."""

_OPTIONS = {*_FORCED, "force_quick_gelu", "pretrained", "cache_dir"}


def load_open_clip(name: str, options: dict[str, Any]) -> Loaded:
    """Load ``NAME.WEIGHTS``, ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER`` with open_clip itself.

    Raises:
        BlockfitError: where there is no such model, or its weights cannot be had.
    """
    library = need("open_clip", "open-clip")
    if unknown := sorted(options.keys() - _OPTIONS):
        raise BlockfitError(
            f"unknown option {unknown[0]!r} for an open_clip model; "
            f"choose one of {', '.join(sorted(_OPTIONS))}"
        )
    architecture, options = _weights(library, name, dict(options))
    try:
        config = _config(library, architecture, options)
        model = library.create_model(architecture, require_pretrained=True, **options)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise BlockfitError(_cannot_load(name, error)) from error
    model.open_clip_source = config
    shown = name.removeprefix("local-dir:")
    told = shown if shown != name else f"open_clip/{name}"
    return Loaded(model, told, None, open_clip_preprocessing(model))


def _weights(library: Any, name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What open_clip calls the model, and its options with the weights to load.

    Raises:
        BlockfitError: for unknown names and weights, or a Hub that does not answer.
    """
    if name.startswith("local-dir:"):
        return name, options
    if name.startswith("hf-hub:"):
        _need(name.removeprefix("hf-hub:"), options)
        return name, options
    architecture, _, tag = name.partition(".")
    if architecture not in library.list_models():
        near = [m for m in library.list_models() if m.startswith(architecture[:6])][:3]
        hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
        raise BlockfitError(f"open_clip has no model {architecture!r}; {hint}")
    tags = library.list_pretrained_tags_by_model(architecture)
    given = options.setdefault("pretrained", tag or None)
    if given not in tags and not (given and Path(given).is_file()):
        which = f"has no weights {given!r} for" if given else "has several weights for"
        listed = ", ".join(f"open_clip/{architecture}.{tag}" for tag in tags) or "none"
        raise BlockfitError(f"open_clip {which} {architecture}; choose one: {listed}")
    if given in tags:
        known = library.get_pretrained_cfg(architecture, given)
        if known.get("hf_hub"):
            _need(known["hf_hub"].rstrip("/"), options)
    return architecture, options


def _need(repository: str, options: Mapping[str, Any]) -> None:
    """Refuse where open_clip would wait in vain for a Hub that does not answer."""
    from huggingface_hub import try_to_load_from_cache

    files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    cache = options.get("cache_dir")
    cached = (try_to_load_from_cache(repository, file, cache_dir=cache) for file in files)
    if not any(isinstance(path, str) for path in cached) and hub.silent():
        raise BlockfitError(
            f"open_clip's weights {repository} are not on this machine, and the Hugging Face Hub "
            f"does not answer; download them elsewhere (hf download {repository} --local-dir "
            "FOLDER) and give open_clip/local-dir:FOLDER"
        )


def _cannot_load(name: str, error: Exception) -> str:
    return (
        f"open_clip cannot load {name}: {first_line(error)}; a folder needs {CONFIG_FILE} and the "
        "weights beside it, and is given as open_clip/local-dir:FOLDER"
    )


def _config(library: Any, architecture: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that open_clip builds the model from, with its options in it."""
    if architecture.startswith("local-dir:"):
        file = Path(architecture.removeprefix("local-dir:")) / CONFIG_FILE
        values = json.loads(file.read_text("utf-8"))["model_cfg"]
    else:
        values = copy.deepcopy(library.get_model_config(architecture))
    for option, (part, key) in _FORCED.items():
        if options.get(option) is not None:
            values[part][key] = options[option]
    if options.get("force_quick_gelu"):
        values["quick_gelu"] = True
    return cast(dict[str, Any], values)


def open_clip_sources(model: nn.Module) -> Iterator[Source]:
    """What ``load_open_clip`` attached, where the rebuilding needs no network."""
    config = getattr(model, "open_clip_source", None)
    if not type(model).__module__.startswith("open_clip.") or not isinstance(config, dict):
        return
    if not config["text_cfg"].get("hf_model_name"):
        yield Source("open_clip", f"open_clip/{type(model).__name__}", {"config": config})


def build_open_clip(arguments: Mapping[str, Any]) -> nn.Module:
    """The architecture that a configuration describes.

    Raises:
        BlockfitError: for what would read files or the network, and unknown keys.
    """
    library = need("open_clip", "open-clip")
    values = copy.deepcopy(dict(arguments["config"]))
    fields = {
        part: {field.name for field in dataclasses.fields(getattr(library, name))}
        for part, name in (("vision_cfg", "CLIPVisionCfg"), ("text_cfg", "CLIPTextCfg"))
    }
    for part, known in fields.items():
        if unknown := sorted(values[part].keys() - known):
            raise BlockfitError(f"config: unknown key {part}.{unknown[0]}")
    vision, text = values["vision_cfg"], values["text_cfg"]
    if text.get("hf_model_name"):
        raise BlockfitError(
            "config: text_cfg.hf_model_name would load from the network; build the model yourself "
            "and give it as model="
        )
    if vision.get("timm_model_name"):
        check_timm(vision["timm_model_name"], {})
        vision["timm_model_pretrained"] = False
    custom = values.pop("custom_text", False)
    name = ("CoCa" if "multimodal_cfg" in values else "CustomTextCLIP") if custom else "CLIP"
    return cast(nn.Module, getattr(library, name)(**values))


def open_clip_preprocessing(model: nn.Module) -> Preprocessing | None:
    """open_clip's evaluation transform, which is timm's with the same settings.

    ``None`` where it pads pictures to a square, which timm does in another way.
    """
    config = getattr(getattr(model, "visual", None), "preprocess_cfg", None)
    modes = {"shortest": "center", "squash": "squash"}
    if not isinstance(config, Mapping) or config.get("resize_mode") not in modes:
        return None
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return Preprocessing(
        "timm",
        {
            "input_size": [3, height, width],
            "interpolation": config["interpolation"],
            "mean": list(config["mean"]),
            "std": list(config["std"]),
            "crop_pct": 1.0,
            "crop_mode": modes[config["resize_mode"]],
        },
    )


def with_usual_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose image tower has every number that open_clip would fill in."""
    fields = dataclasses.fields(need("open_clip", "open-clip").CLIPVisionCfg)
    usual = {f.name: f.default for f in fields if type(f.default) in (int, float)}
    return {**config, "vision_cfg": {**usual, **config["vision_cfg"]}}


def preprocess_cfg(own: Preprocessing | None) -> dict[str, Any]:
    """What ``open_clip_config.json`` says of the preprocessing; nothing where it is not known."""
    if own is None or own.kind != "timm":
        return {}
    values = own.settings
    return {
        "size": list(values["input_size"][1:]),
        "mode": "RGB",
        "mean": values["mean"],
        "std": values["std"],
        "interpolation": values["interpolation"],
        "resize_mode": "squash" if values["crop_mode"] == "squash" else "shortest",
    }
