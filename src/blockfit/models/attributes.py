"""What of a model is no tensor: whether a rebuilt one computes with the same parts and numbers."""

from __future__ import annotations

import functools
import hashlib
import math
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blockfit.models.forward import block_class
from blockfit.models.source import without_loading

_STANDARD = frozenset(nn.Module().__dict__)

_UNUSED = re.compile(
    r".*drop.*|.*checkpoint.*|blockfit_.*|_(blockfit|hf|is_hf|old_forward|compiled|no_split|tied).*"
    r"|save_pretrained|push_to_hub|num_classes|num_labels|pretrained_(cfg|model_args)|default_cfg|loss_.*"
    r"|_model_args|name_or_path|_keys_to_ignore.*|_auto_class|_loss_function|extra_repr"
)
"""Attributes that outputs in eval mode do not depend on, or that are compared by other means."""

_UNSAID = ("use_pretrained_backbone", "use_timm_backbone")
"""Where they are false, a config that leaves them out says the same."""

_CONFIG_NOISE = re.compile(
    "_name_or_path|architectures|(torch_)?dtype|transformers_version|_commit_hash|id2label|label2id"
    "|num_labels|.*dropout.*|.*drop_path.*|return_dict|output_(attentions|hidden_states)|use_cache"
    "|_attn_implementation.*|_experts_implementation.*"
)

_IDLE = ("Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "DropPath")
"""Classes of modules that pass their input on in eval mode."""

_DEEPEST = 4


def replaced_by_identity(model: nn.Module, rebuilt: nn.Module) -> tuple[str, ...]:
    """The modules of a rebuilt model in whose place ``model`` has an ``nn.Identity``."""
    own = dict(rebuilt.named_modules())
    return tuple(
        name
        for name, module in model.named_modules()
        if type(module) is nn.Identity and name in own and _name(own[name]) not in _IDLE
    )


def first_difference(model: nn.Module, rebuilt: nn.Module) -> str | None:
    """The first part of a model that is no tensor and that the rebuilt one lacks or has otherwise.

    Compared are the class of every module and its attributes: numbers, texts, functions, lists and
    objects of them. What only training uses is left out.

    Returns:
        ``"blocks.3.mlp.act is ReLU, rebuilt GELU"``; ``None`` where all is the same.
    """
    return next(_differences(model, rebuilt, "", set()), None)


def _differences(
    model: nn.Module, rebuilt: nn.Module, path: str, seen: set[tuple[int, int]]
) -> Iterator[str]:
    pair = (id(model), id(rebuilt))
    if pair in seen:
        return
    seen.add(pair)
    if _name(model) in _IDLE and _name(rebuilt) in _IDLE:
        return
    if block_class(model) is not block_class(rebuilt) or (
        (type(model) is block_class(model)) != (type(rebuilt) is block_class(rebuilt))
    ):
        yield f"{path or 'the model'} is {_name(model)}, rebuilt {_name(rebuilt)}"
        return
    inside = f"{path}." if path else ""
    for name in dict.fromkeys((*_attributes(model), *_attributes(rebuilt))):
        if not _same_attribute(model, rebuilt, name):
            values = (_shown(_value(one, name)) for one in (model, rebuilt))
            yield f"{inside}{name} is {', rebuilt '.join(values)}"
    for name in dict.fromkeys((*model._modules, *rebuilt._modules)):
        one, other = model._modules.get(name), rebuilt._modules.get(name)
        if one is not None and other is not None:
            yield from _differences(one, other, f"{inside}{name}", seen)
        elif (one is None) != (other is None):
            yield f"{inside}{name} is {_shown(one)}, rebuilt {_shown(other)}"


def _attributes(module: nn.Module) -> list[str]:
    hooked = "_hf_hook" in module.__dict__  # accelerate's, which bring tensors to their device
    return [
        name
        for name in module.__dict__
        if name not in _STANDARD
        and not _UNUSED.fullmatch(name)
        and not (hooked and name == "forward")
    ]


def _same_attribute(model: nn.Module, rebuilt: nn.Module, name: str) -> bool:
    if name in model.__dict__ and name not in rebuilt.__dict__:
        # What no code of the class reads changes nothing; what hides the class's own does.
        inherited = getattr(type(rebuilt), name, _ABSENT)
        return inherited is _ABSENT or _same(model.__dict__[name], inherited, 0)
    if name not in model.__dict__:
        lost = getattr(type(model), name, _ABSENT)
        return name.startswith("_") or _same(rebuilt.__dict__[name], lost, 0)
    return _same(model.__dict__[name], rebuilt.__dict__[name], 0)


_ABSENT = object()


def _value(module: nn.Module, name: str) -> Any:
    return module.__dict__.get(name, getattr(type(module), name, _ABSENT))


def _same(one: Any, other: Any, depth: int) -> bool:
    if one is other or depth > _DEEPEST or isinstance(one, torch.device):
        return True
    if isinstance(one, nn.Module) or isinstance(other, nn.Module):
        return type(one) is type(other)
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return _same_tensor(one, other)
    if isinstance(one, (bool, int, float, str, bytes, complex, type(None), type)):
        return _same_plain(one, other)
    if callable(one) and (function := _function(one)) is not None:
        return _same_function(function, _function(other), depth)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(
            _same(value, other[key], depth + 1) for key, value in one.items()
        )
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(
            _same(left, right, depth + 1) for left, right in zip(one, other, strict=True)
        )
    return type(one) is type(other) and _same_object(one, other, depth)


def _same_plain(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _same_tensor(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    if one.shape != other.shape:
        return False
    return one.is_meta or other.is_meta or torch.equal(one.cpu(), other.cpu().to(one.dtype))


def _function(value: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """A function's code and all values that it was made with; ``None`` for other objects."""
    if isinstance(value, types.MethodType):
        return _function(value.__func__)
    if isinstance(value, functools.partial):
        return functools.partial, (value.func, value.args, value.keywords)
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__code__, (value.__defaults__, value.__kwdefaults__, cells)
    if isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
        return value.__qualname__, (value.__module__,)
    return None


def _same_function(one: tuple[Any, tuple[Any, ...]], other: Any, depth: int) -> bool:
    return other is not None and one[0] == other[0] and _same(one[1], other[1], depth + 1)


def _same_object(one: Any, other: Any, depth: int) -> bool:
    if hasattr(one, "to_dict"):
        left, right = (_config(value.to_dict()) for value in (one, other))
        return _same(left, right, depth + 1)
    held = getattr(one, "__dict__", None)
    if held:
        return _same(held, vars(other), depth + 1)
    try:
        return bool(one == other) or not hasattr(type(one), "__dict__")
    except (RuntimeError, TypeError, ValueError):  # arrays do not say whether they are equal
        return str(one) == str(other)


def _config(values: Any) -> Any:
    """The values of a transformers config that outputs may depend on, as JSON holds them."""
    if isinstance(values, Mapping):
        return {
            str(key): _config(value)
            for key, value in without_loading(values).items()
            if not _CONFIG_NOISE.fullmatch(str(key)) and (value or key not in _UNSAID)
        }
    return [_config(value) for value in values] if isinstance(values, (list, tuple)) else values


def recorded(model: nn.Module) -> list[dict[str, Any]]:
    """What of a model is no tensor, as JSON values: classes and attributes of its modules.

    Returns:
        An entry for all modules that are alike: ``class``, ``attributes`` (name → text), ``paths``.
    """
    alike: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = {}
    for path, module in model.named_modules():
        alike.setdefault((_name(module), tuple(_texts(module).items())), []).append(path)
    return [
        {"class": name, "attributes": dict(texts), "paths": paths}
        for (name, texts), paths in alike.items()
    ]


def first_unlike(record: object, model: nn.Module) -> str | None:
    """The first class or attribute that a model has otherwise than ``recorded`` told.

    What one of both lacks is left out: libraries add attributes with time.

    Returns:
        ``"blocks.3.norm1.eps is 1e-06, saved 0.001"``; ``None`` where nothing differs.
    """
    modules = dict(model.named_modules())
    for entry in record if isinstance(record, list) else []:
        told = entry if isinstance(entry, dict) else {}
        paths, texts, name = told.get("paths"), told.get("attributes"), told.get("class")
        for path in paths if isinstance(paths, list) else []:
            if not isinstance(path, str) or (module := modules.get(path)) is None:
                continue
            inside = f"{path}." if path else ""
            if _name(module) != name and not (_name(module) in _IDLE and name in _IDLE):
                return f"{path or 'the model'} is {_name(module)}, saved {name}"
            now = _texts(module)
            for key, text in texts.items() if isinstance(texts, dict) else []:
                if key in now and now[key] != text:
                    return f"{inside}{key} is {now[key]}, saved {text}"
    return None


def _texts(module: nn.Module) -> dict[str, str]:
    """Attributes of one module as short texts; those that no text can tell are left out."""
    out = {}
    for name in _attributes(module):
        value = module.__dict__[name]
        parts = {name: value}
        if hasattr(value, "to_dict") and not isinstance(value, type):
            parts = {f"{name}.{key}": part for key, part in _config(value.to_dict()).items()}
        for key, part in parts.items():
            if (text := _text(part, 0)) is not None:
                digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
                out[key] = text if len(text) <= 80 else f"of SHA-256 {digest[:16]}"
    return out


def _text(value: Any, depth: int) -> str | None:
    if depth > _DEEPEST or isinstance(value, (nn.Module, Tensor, torch.device)):
        return None
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        return repr(value)
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, Mapping):
        texts = {str(key): _text(part, depth + 1) for key, part in value.items()}
        return None if None in texts.values() else repr(sorted(texts.items()))
    if isinstance(value, (list, tuple)):
        items = [_text(part, depth + 1) for part in value]
        return None if None in items else f"[{', '.join(str(item) for item in items)}]"
    if isinstance(value, functools.partial):
        return _text((value.func, value.args, value.keywords), depth + 1)
    return getattr(value, "__qualname__", None) if callable(value) else None


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _shown(value: Any) -> str:
    if value is _ABSENT or value is None:
        return "not there" if value is _ABSENT else "None"
    if isinstance(value, nn.Module):
        return _name(value)
    return f"{getattr(value, '__qualname__', None) or repr(value):.60}"
