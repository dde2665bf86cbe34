"""What each library needs: load by name, tell where a model came from, rebuild it without weights.

timm, transformers and torchvision are imported only inside the functions that need them, and
their own functions, caches and offline switches do the loading. Every ``sources`` function yields
what may have built a model, and nothing for other libraries' models; every ``build`` function is
called under ``torch.device("meta")`` by ``models.skeleton``.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import inspect
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from blockfit.errors import BlockfitError, first_line, need
from blockfit.files import SAVED
from blockfit.models import hub
from blockfit.models.preprocessing import (
    Preprocessing,
    timm_preprocessing,
    torchvision_preprocessing,
    transformers_preprocessing,
)
from blockfit.models.source import (
    Source,
    attention_of,
    check_attention,
    check_config,
    check_original,
    check_timm,
    licence_of,
    without_loading,
)
from blockfit.untrusted import read_json


class Loaded(NamedTuple):
    """A model with its weights, and what its library says about the checkpoint."""

    model: nn.Module
    name: str
    licence: str | None
    preprocessing: Preprocessing | None


# -- transformers -------------------------------------------------------------------------------


def load_folder(
    folder: Path, trust_remote_code: bool, dtype: torch.dtype, options: dict[str, Any]
) -> Loaded:
    if (folder / SAVED).is_file():
        raise BlockfitError(f"{folder} was saved by blockfit; load it with blockfit.load")
    config = folder / "config.json"
    if not config.is_file():
        raise BlockfitError(
            f"{folder} is no model folder: it has no config.json; give a folder that "
            "transformers or timm saved"
        )
    values = read_json(config, exact=False)
    if isinstance(values, dict) and "architecture" in values:
        return load_timm(f"local-dir:{folder}", options)
    if not isinstance(values, dict) or not {"model_type", "auto_map"} & values.keys():
        raise BlockfitError(
            f"{config} names neither a model_type (transformers) nor an "
            "architecture (timm); give a folder that one of them saved"
        )
    if not trust_remote_code:
        check_original(values)
    return load_transformers(str(folder), trust_remote_code, dtype, options)


def load_transformers(
    name: str, trust_remote_code: bool, dtype: torch.dtype, options: dict[str, Any]
) -> Loaded:
    transformers = need("transformers", "transformers")
    remote = {"trust_remote_code": trust_remote_code}
    options = {**options, **({} if Path(name).is_dir() else hub.only_cached(options))}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **remote, **options)
        model_class = _transformers_class(config, name, trust_remote_code)
        if not model_class.__module__.startswith("transformers.models.auto."):
            remote = {}
        model, info = model_class.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **remote, **options
        )
    except BlockfitError:
        raise
    except Exception as error:  # a folder's files may make the library raise nearly anything
        raise BlockfitError(_cannot_load(name, error)) from error
    if missing := sorted(info["missing_keys"]):
        raise BlockfitError(
            f"{name} does not hold the weights of {type(model).__name__}: {len(missing)} are "
            f"missing, the first is {missing[0]}; give a folder or id whose weights are complete"
        )
    keys = ("revision", "cache_dir", "token", "local_files_only")
    files = {key: options[key] for key in keys if key in options}
    own = transformers_preprocessing(name, **files)
    return Loaded(model, name, licence_of(Path(name)), own)


def _transformers_class(config: Any, name: str, trust_remote_code: bool) -> Any:
    transformers = need("transformers", "transformers")
    architectures = getattr(config, "architectures", None) or []
    found = getattr(transformers, architectures[0], None) if architectures else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    remote = getattr(config, "auto_map", None) or {}
    if not architectures and not remote:
        return transformers.AutoModel
    if not trust_remote_code or not remote:
        raise BlockfitError(
            f"{name} needs the class {(architectures or ['of its own'])[0]}, which the installed "
            "transformers does not have; update transformers, or allow the checkpoint's own code "
            "with trust_remote_code=True if you trust its author"
        )
    autos = [key for key in remote if key.startswith("AutoModel") and hasattr(transformers, key)]
    return getattr(transformers, autos[0] if autos else "AutoModel")


def transformers_sources(model: nn.Module) -> Iterator[Source]:
    cls, config = type(model), getattr(model, "config", None)
    if not cls.__module__.startswith("transformers.models.") or not hasattr(config, "to_dict"):
        return
    if getattr(importlib.import_module("transformers"), cls.__name__, None) is not cls:
        return
    values = _json(without_loading(cast(Any, config).to_dict()))
    if values is None:
        return
    name = values.pop("_name_or_path", "") or cls.__name__
    arguments = {"class": cls.__name__, "config": values}
    if (attention := attention_of(config)) is not None:
        arguments["attention"] = attention
    for options in _switches(cls):
        yield Source(
            "transformers", name, {**arguments, "options": options}, licence_of(Path(name))
        )


def refreshed_transformers(source: Source, model: nn.Module) -> Source:
    config = getattr(model, "config", None)
    values = _json(without_loading(cast(Any, config).to_dict())) if config is not None else None
    if values is None:
        return source
    values.pop("_name_or_path", None)
    return replace(source, arguments={**source.arguments, "config": values})


def _switches(cls: type) -> Iterator[dict[str, bool]]:
    """Every setting of the switches that a class takes beside its config, defaults first.

    They add or leave out parts, as ``add_pooling_layer=False`` does; nothing in the model records
    them, so the caller looks which setting gives the model's tensors.
    """
    parameters = inspect.signature(cls).parameters.values()
    switches = {p.name: p.default for p in parameters if isinstance(p.default, bool)}
    for flips in itertools.product((False, True), repeat=len(switches)):
        flipped = dict(zip(switches, flips, strict=True))
        yield {name: not switches[name] for name, flip in flipped.items() if flip}


def build_transformers(arguments: Mapping[str, Any]) -> nn.Module:
    transformers = need("transformers", "transformers")
    values, name = copy.deepcopy(dict(arguments["config"])), arguments["class"]
    model_class = getattr(transformers, name, None)
    if not (
        isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    ):
        raise BlockfitError(f"{name!r} is no model class of the installed transformers; update it")
    check_config(values)
    attention, options = arguments.get("attention"), arguments.get("options", {})
    check_attention(attention)
    parameters = inspect.signature(model_class).parameters
    if unknown := [
        k for k in options if type(getattr(parameters.get(k), "default", k)) is not bool
    ]:
        raise BlockfitError(f"{name} has no switch {unknown[0]!r}; a saved folder may set no other")
    config_class = transformers.CONFIG_MAPPING[values["model_type"]]
    config = config_class.from_dict(
        values, **({"attn_implementation": attention} if attention else {})
    )
    return cast(nn.Module, cast(Any, model_class)(config, **options))


def _cannot_load(name: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"{name} comes with code of its own; allow it with trust_remote_code=True "
            "if you trust its author"
        )
    if Path(name).is_dir():
        return f"transformers cannot load the folder {name}: {first_line(error)}"
    return (
        f"there is no folder {name}, and the Hub does not give it either ({first_line(error)}); "
        f"where there is no network, download it elsewhere (hf download {name} --local-dir FOLDER) "
        "and give FOLDER"
    )


# -- timm ---------------------------------------------------------------------------------------


def is_timm_name(name: str) -> bool:
    try:
        import timm
    except ImportError:
        return False
    return bool(timm.is_model(name.partition(".")[0]))


def load_timm(name: str, options: dict[str, Any]) -> Loaded:
    timm = need("timm", "timm")
    architecture = name.partition(".")[0]
    if ":" not in name and not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
        raise BlockfitError(f"timm has no model {architecture!r}; {hint}")
    config, hub_id = None, f"timm/{name}"
    try:
        if ":" not in name and options.get("pretrained", True):
            config = timm.models.get_pretrained_cfg(name)
            hub_id = config.hf_hub_id or hub_id
            hub.need(config, options)
        model = timm.create_model(name, **{"pretrained": True, **options})
        own = timm_preprocessing(model)
    except BlockfitError:
        raise
    except Exception as error:  # a folder's files may make the library raise nearly anything
        hint = (
            f"; where there is no network, download it elsewhere (hf download {hub_id} "
            "--local-dir FOLDER) and give FOLDER"
        )
        raise BlockfitError(
            f"timm cannot load {name}: {first_line(error)}"
            + (hint if isinstance(error, OSError) and config is not None else "")
        ) from error
    licence = model.pretrained_cfg.get("license")
    return Loaded(model, name.removeprefix("local-dir:"), licence, own)


def timm_sources(model: nn.Module) -> Iterator[Source]:
    config = getattr(model, "pretrained_cfg", None)
    if not type(model).__module__.startswith("timm.models.") or not isinstance(config, dict):
        return
    architecture, tag = config.get("architecture"), config.get("tag")
    kept = {k: v for k, v in config.items() if k not in _NOT_ARCHITECTURE}
    options = need("timm.models", "timm").get_model_args(model)
    arguments = _json({"architecture": architecture, "config": kept, "options": options})
    if arguments is not None:
        name = f"{architecture}.{tag}" if tag else str(architecture)
        yield Source("timm", name, arguments, config.get("license"))


def refreshed_timm(source: Source, model: nn.Module) -> Source:
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping):
        return source
    values = _json({k: v for k, v in config.items() if k not in _NOT_ARCHITECTURE})
    return (
        source
        if values is None
        else replace(source, arguments={**source.arguments, "config": values})
    )


_NOT_ARCHITECTURE = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")


def build_timm(arguments: Mapping[str, Any]) -> nn.Module:
    timm = need("timm", "timm")
    check_timm(arguments["architecture"], {**arguments["config"], **arguments["options"]})
    if not timm.is_model(arguments["architecture"]):
        raise BlockfitError(
            f"the installed timm has no model {arguments['architecture']!r}; update it"
        )
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments["options"].items()}
    return cast(
        nn.Module,
        timm.create_model(
            arguments["architecture"],
            pretrained=False,
            pretrained_cfg=dict(arguments["config"]),
            **options,
        ),
    )


# -- torchvision --------------------------------------------------------------------------------


def load_torchvision(name: str, options: dict[str, Any]) -> Loaded:
    models = need("torchvision.models", "timm")
    builder, _, tag = name.partition(".")
    if builder not in models.list_models():
        near = difflib.get_close_matches(builder, models.list_models(), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see torchvision.models"
        raise BlockfitError(f"torchvision has no model {builder!r}; {hint}")
    try:
        known = models.get_model_weights(builder)
        weights = options.pop("weights", tag or "DEFAULT")
        weights = known[weights] if isinstance(weights, str) else weights
        model = models.get_model(builder, weights=weights, **options)
    except KeyError as error:
        raise BlockfitError(
            f"torchvision has no weights {error} for {builder}; "
            f"choose one of {', '.join(known.__members__)}"
        ) from error
    except OSError as error:  # urllib's errors are among them
        raise BlockfitError(
            f"torchvision cannot load {name}: {first_line(error)}; where there is no network, "
            f"download {weights.url} elsewhere and put it into {torch.hub.get_dir()}/checkpoints"
        ) from error
    except (RuntimeError, ValueError, TypeError) as error:
        raise BlockfitError(f"torchvision cannot load {name}: {first_line(error)}") from error
    own = None if weights is None else torchvision_preprocessing(weights)
    licence = None if weights is None else weights.meta.get("license")
    return Loaded(model, f"torchvision/{name}", licence, own)


_TORCHVISION_CLASS = "torchvision.models.vision_transformer.VisionTransformer"
_TORCHVISION_VALUES = (
    "image_size",
    "patch_size",
    "hidden_dim",
    "mlp_dim",
    "num_classes",
    "representation_size",
    "dropout",
    "attention_dropout",
)


def torchvision_sources(model: nn.Module) -> Iterator[Source]:
    cls = type(model)
    if f"{cls.__module__}.{cls.__name__}" != _TORCHVISION_CLASS:
        return
    vit = cast(Any, model)
    norm = vit.norm_layer
    plain_norm = isinstance(norm, functools.partial) and norm.func is nn.LayerNorm
    if not plain_norm or set(norm.keywords) != {"eps"} or not isinstance(vit.conv_proj, nn.Conv2d):
        return
    arguments = {key: getattr(vit, key) for key in _TORCHVISION_VALUES}
    arguments["num_layers"] = len(vit.encoder.layers)
    arguments["num_heads"] = vit.encoder.layers[0].num_heads
    arguments["norm_eps"] = norm.keywords["eps"]
    yield Source("torchvision", "torchvision/VisionTransformer", arguments)


def build_torchvision(arguments: Mapping[str, Any]) -> nn.Module:
    module = need("torchvision.models.vision_transformer", "timm")
    values = dict(arguments)
    known = (*_TORCHVISION_VALUES, "num_layers", "num_heads", "norm_eps")
    if unknown := [key for key in values if key not in known]:
        raise BlockfitError(f"a torchvision model is not rebuilt from {unknown[0]!r}")
    norm = functools.partial(nn.LayerNorm, eps=values.pop("norm_eps"))
    return cast(nn.Module, module.VisionTransformer(norm_layer=norm, **values))


# -- the shipped demo ---------------------------------------------------------------------------


def load_demo() -> Loaded:
    from blockfit.models import demo

    own = Preprocessing.plain(8, channels=1, mean=[0.5], std=[0.5], interpolation="box")
    return Loaded(demo.load_demo(), "demo", "MIT", own)


def demo_sources(model: nn.Module) -> Iterator[Source]:
    from blockfit.models.demo import DigitsViT, demo_arguments

    if type(model) is DigitsViT:
        yield Source("demo", "demo", demo_arguments(), "MIT")


def build_demo(arguments: Mapping[str, Any]) -> nn.Module:
    from blockfit.models.demo import DigitsViT

    return DigitsViT(**arguments)


def _json(values: Any) -> dict[str, Any] | None:
    """The values as JSON holds them; ``None`` where a function or a class is among them."""
    try:
        return cast(dict[str, Any], json.loads(json.dumps(values)))
    except TypeError:
        return None
