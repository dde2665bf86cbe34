"""The settings of a preprocessing in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image


def describe(kind: str, settings: Mapping[str, Any]) -> str:
    """One line for people, such as ``resize to 98 × 98, bicubic, mean …, std … (timm)``."""
    try:
        return _described(kind, settings)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return f"as {kind} reads its settings"  # values that say nothing to people


def _described(kind: str, settings: Mapping[str, Any]) -> str:
    if kind == "plain":
        resize = (
            f"{'resize and crop' if settings['crop'] else 'resize'} to {_size(settings['size'])}"
        )
        parts = [resize, settings["interpolation"]]
    elif kind == "timm":
        size = _size(settings["input_size"][1:])
        cut = f"{settings['crop_mode']} crop {settings['crop_pct']:g}"
        parts = [f"resize to {size}", cut, settings["interpolation"]]
    elif kind == "torchvision":
        resize, crop = settings["resize_size"][0], settings["crop_size"]
        parts = [f"resize to {resize}", f"crop to {_size(crop)}", settings["interpolation"]]
    else:
        parts = _transformers_steps(settings)
    mean, std = (settings.get("mean"), settings.get("std"))
    if kind == "transformers" and settings.get("do_normalize"):
        mean, std = settings.get("image_mean"), settings.get("image_std")
    if mean is not None and std is not None:
        parts += [f"mean {_numbers(mean)}", f"std {_numbers(std)}"]
    name = settings["image_processor_type"] if kind == "transformers" else kind
    return f"{', '.join(parts)} ({name})"


def _transformers_steps(settings: Mapping[str, Any]) -> list[str]:
    parts = []
    if settings.get("do_resize") and settings.get("size"):
        parts.append(f"resize to {_size(settings['size'])}")
        resample = settings.get("resample")
        if isinstance(resample, int):
            parts.append(Image.Resampling(resample).name.lower())
    if settings.get("do_center_crop") and settings.get("crop_size"):
        parts.append(f"crop to {_size(settings['crop_size'])}")
    return parts


def _size(value: Any) -> str:
    if isinstance(value, Mapping):
        if {"height", "width"} <= value.keys():
            return f"{value['height']} × {value['width']}"
        return ", ".join(f"{key.replace('_', ' ')} {v}" for key, v in value.items())
    numbers = list(value)
    return " × ".join(str(n) for n in (numbers if len(numbers) > 1 else numbers * 2))


def _numbers(values: Any) -> str:
    values = values if isinstance(values, list) else [values]
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"
