"""From a picture to what the model was trained on: declarative, printable, saved with the model.

The checkpoint decides. transformers, timm and torchvision are called with their own settings and
their own code, so that the result is theirs to the last bit; ``plain`` needs Pillow and torch only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from blockfit.arguments import one_of
from blockfit.errors import BlockfitError, first_line, need
from blockfit.files import SAVED
from blockfit.models.described import describe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

LONGEST_SIDE = 4096
"""Pixels of the largest image that a model may be given."""

_KEYS: dict[str, frozenset[str] | None] = {
    "transformers": None,  # whatever the processor's class takes
    "timm": frozenset({"input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"}),
    "torchvision": frozenset({"crop_size", "resize_size", "mean", "std", "interpolation"}),
    "plain": frozenset({"size", "channels", "mean", "std", "interpolation", "crop"}),
}
NEEDS_IT = "the model's preprocessing"
_RESAMPLING = {r.name.lower(): r for r in Image.Resampling}


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the model's input: the library whose code does it, and its settings.

    Call it with a Pillow image of any mode; it returns a float32 tensor (channels, height, width).

    Args:
        kind: ``transformers`` (an image processor's dictionary), ``timm`` (a data config),
            ``torchvision`` (the preset of a weights entry) or ``plain`` (Pillow and torch).
        settings: JSON values; which ones depends on the kind.

    Raises:
        BlockfitError: for an unknown kind, an unknown or missing setting, or (at the first call)
            where the library is not installed.
    """

    kind: str
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        one_of("kind of preprocessing", self.kind, _KEYS)
        object.__setattr__(self, "settings", _plain_values(self.settings))
        _check_sides(self.settings)
        known = _KEYS[self.kind]
        if known is None:
            if not isinstance(self.settings.get("image_processor_type"), str):
                raise BlockfitError("preprocessing: image_processor_type is missing")
            return
        unknown = sorted(self.settings.keys() - known)
        missing = sorted(known - self.settings.keys())
        if unknown:
            raise BlockfitError(f"{self.kind} preprocessing: unknown key {unknown[0]!r}")
        if missing:
            raise BlockfitError(f"{self.kind} preprocessing: key {missing[0]!r} is missing")
        if self.kind == "plain":
            _check_plain(self.settings)

    def __reduce__(self) -> tuple[type[Preprocessing], tuple[str, dict[str, Any]]]:
        return type(self), (self.kind, self.settings)  # workers rebuild the library's object

    def __call__(self, image: Image.Image) -> Tensor:
        try:
            mode = "L" if self.channels == 1 else "RGB"
            return self._transform(image if image.mode == mode else image.convert(mode))
        except BlockfitError:
            raise
        except Exception as error:  # values that nobody has tried yet
            raise BlockfitError(
                f"the preprocessing cannot prepare an image of {image.width} × {image.height} "
                f"({type(error).__name__}: {first_line(error)}); give another with preprocessing="
            ) from error

    @property
    def channels(self) -> int:
        """The number of channels of the model's input: 1 or 3."""
        if self.kind == "timm":
            return int(self.settings["input_size"][0])
        if self.kind == "plain":
            return int(self.settings["channels"])
        mean = self.settings.get("image_mean")
        return 1 if isinstance(mean, list) and len(mean) == 1 else 3

    @cached_property
    def _transform(self) -> Callable[[Image.Image], Tensor]:
        builders = {
            "transformers": _transformers_transform,
            "timm": _timm_transform,
            "torchvision": _torchvision_transform,
            "plain": _plain_transform,
        }
        return builders[self.kind](self.settings)

    def describe(self) -> str:
        """One line for people, such as ``resize to 98 × 98, bicubic, mean …, std … (timm)``."""
        return describe(self.kind, self.settings)

    def to_json(self) -> dict[str, Any]:
        """The preprocessing as plain JSON values."""
        return {"kind": self.kind, "settings": _plain_values(self.settings)}

    @classmethod
    def from_json(cls, value: object, where: str = "preprocessing") -> Preprocessing:
        """Read what ``to_json`` wrote; ``where`` names the place in messages."""
        if not isinstance(value, Mapping) or set(value) != {"kind", "settings"}:
            raise BlockfitError(
                f"{where}: expected an object with kind and settings, got {value!r}"
            )
        if not isinstance(value["kind"], str) or not isinstance(value["settings"], Mapping):
            raise BlockfitError(f"{where}: kind must be a text and settings an object")
        try:
            return cls(value["kind"], dict(value["settings"]))
        except BlockfitError as error:
            raise BlockfitError(f"{where}: {error}") from error

    @classmethod
    def plain(
        cls,
        size: int | tuple[int, int],
        *,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str = "bicubic",
        crop: bool = False,
    ) -> Preprocessing:
        """Pillow and torch only: resize, scale to [0, 1], normalise.

        Args:
            size: height and width in pixels, or one number for both.
            channels: 1 (greyscale) or 3 (RGB).
            mean: one value per channel; ImageNet's by default, their mean for one channel.
            std: likewise.
            interpolation: nearest, box, bilinear, hamming, bicubic or lanczos.
            crop: resize the shorter side and cut out the centre, instead of squashing.
        """
        height, width = (size, size) if isinstance(size, int) else size
        grey = channels == 1
        return cls(
            "plain",
            {
                "size": [height, width],
                "channels": channels,
                "mean": list(mean or ([float(np.mean(IMAGENET_MEAN))] if grey else IMAGENET_MEAN)),
                "std": list(std or ([float(np.mean(IMAGENET_STD))] if grey else IMAGENET_STD)),
                "interpolation": interpolation,
                "crop": crop,
            },
        )


Prepare = Callable[[Image.Image], Tensor]
"""From a Pillow image to a tensor (channels, height, width)."""

Given = Preprocessing | Prepare | str | int
"""What users may give: settings, a function, or what ``read_preprocessing`` reads."""


def read_preprocessing(given: str | int) -> Preprocessing:
    """A preprocessing in few words.

    Args:
        given: a size in pixels, ``224`` or ``"224x160"`` (height, width), for
            ``Preprocessing.plain``; a ``preprocessor_config.json`` or what ``to_json`` wrote; or
            a model that says, by the name of its folder, its Hub id or ``timm/NAME``.

    Raises:
        BlockfitError: where it cannot be read.
    """
    text = str(given).strip()
    if size := re.fullmatch(r"(\d+)(?:\s*[x×]\s*(\d+))?", text):
        return Preprocessing.plain((int(size[1]), int(size[2] or size[1])))
    file = Path(text).expanduser()
    if file.is_file():
        return _in_file(file)
    if (own := file / SAVED).is_file():
        try:
            told = json.loads(own.read_text())["base"]["preprocessing"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise BlockfitError(f"{own} says no preprocessing ({first_line(error)})") from error
        return Preprocessing.from_json(told, f"{own}: preprocessing")
    named = _of_timm(text[5:]) if text.startswith("timm/") else transformers_preprocessing(text)
    if named is None:
        raise BlockfitError(
            f"preprocessing={text!r} is no size such as 224 or 224x160, no file, and no model that "
            "says how its images are prepared"
        )
    return named


def _in_file(file: Path) -> Preprocessing:
    try:
        told = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BlockfitError(f"{file} cannot be read as JSON ({first_line(error)})") from error
    if isinstance(told, dict) and "image_processor_type" in told:
        return Preprocessing("transformers", told)
    if not isinstance(told, dict) or "settings" not in told:
        raise BlockfitError(f"{file} says no preprocessing; give a preprocessor_config.json")
    return Preprocessing.from_json(told, str(file))


def _of_timm(name: str) -> Preprocessing | None:
    timm = need("timm", "timm", NEEDS_IT)
    found = timm.get_pretrained_cfg(name)
    if found is None:
        return None
    config = need("timm.data", "timm", NEEDS_IT).resolve_data_config(pretrained_cfg=found.to_dict())
    return Preprocessing("timm", {key: config[key] for key in cast(frozenset[str], _KEYS["timm"])})


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """The preprocessing that belongs to a model: the one it was loaded with, or its checkpoint's.

    Raises:
        BlockfitError: where the model does not say; give one then.
    """
    source = getattr(model, "blockfit_source", None)
    found: Preprocessing | None = getattr(source, "preprocessing", None)
    if found is None:  # a folder's config may name any place on the Hub: nobody has given that name
        found = own_preprocessing(model, look_up=source is None)
    if found is None:
        raise BlockfitError(
            f"{type(model).__name__} does not say how its images are prepared; give for example "
            "preprocessing=224 (resized to 224 × 224, ImageNet's mean and deviation), a "
            "preprocessor_config.json, or the name of a model that says"
        )
    return found


def channels_taken(model: nn.Module) -> int | None:
    """How many channels a model's images have, where its config or patch embedding says so."""
    config = getattr(model, "config", None)
    projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    for owner, name in (
        (config, "num_channels"),
        (getattr(config, "vision_config", None), "num_channels"),
        (projection, "in_channels"),
    ):
        count = getattr(owner, name, None)
        if isinstance(count, int) and count > 0:
            return count
    return None


def own_preprocessing(model: nn.Module, look_up: bool = True) -> Preprocessing | None:
    """What timm's ``pretrained_cfg`` or transformers' checkpoint says, or ``None``.

    Args:
        look_up: read the checkpoint that transformers' config names, in its folder or on the Hub.
    """
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    if isinstance(name, str) and name and type(model).__module__.startswith("transformers."):
        return transformers_preprocessing(name) if look_up else None
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        return timm_preprocessing(model)
    return None


def transformers_preprocessing(name: str, **options: Any) -> Preprocessing | None:
    """The image processor of a Hub id or folder; ``None`` where it has none."""
    local = os.path.isdir(name)
    if local:
        names = ("preprocessor_config.json", "processor_config.json")
        if not any(os.path.isfile(os.path.join(name, n)) for n in names):
            return None
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name, **options)
    except Exception as error:  # broken files make transformers raise nearly anything
        if local and "trust_remote_code" not in str(error):
            raise BlockfitError(
                f"{name}: its image processor cannot be read ({first_line(error)}); repair "
                "preprocessor_config.json, or delete it and give preprocessing="
            ) from error
        return None
    if not type(processor).__module__.startswith("transformers."):
        return None  # remote code cannot be rebuilt from values
    return Preprocessing("transformers", processor.to_dict())


def timm_preprocessing(model: nn.Module) -> Preprocessing:
    """timm's evaluation transform for this model, at the image size it was built for."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    embed = getattr(model, "patch_embed", None)
    if isinstance(built := getattr(embed, "img_size", None), tuple):
        height, width = built
    channels = getattr(getattr(embed, "proj", None), "in_channels", channels)
    if channels != len(config["mean"]):
        for key in ("mean", "std"):
            config[key] = (float(np.mean(config[key])),) * channels
    config["input_size"] = (channels, height, width)
    return Preprocessing("timm", {key: config[key] for key in cast(frozenset[str], _KEYS["timm"])})


def torchvision_preprocessing(weights: Any) -> Preprocessing:
    """The preset of a torchvision weights entry, such as ``ViT_B_16_Weights.DEFAULT``."""
    preset = weights.transforms()
    return Preprocessing(
        "torchvision",
        {
            "crop_size": list(preset.crop_size),
            "resize_size": list(preset.resize_size),
            "mean": list(preset.mean),
            "std": list(preset.std),
            "interpolation": preset.interpolation.value,
        },
    )


def _plain_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(json.dumps(dict(settings))))
    except (TypeError, ValueError) as error:
        raise BlockfitError(f"the preprocessing cannot be written as JSON: {error}") from error


def _check_sides(settings: Mapping[str, Any]) -> None:
    """Refuse sizes that no model takes, and that would fill the memory."""
    for key, value in settings.items():
        if key == "size" or key.endswith("_size"):
            inner = value.values() if isinstance(value, dict) else value
            for side in inner if isinstance(inner, Iterable) else [inner]:
                if isinstance(side, int | float) and not 0 <= side <= LONGEST_SIDE:
                    raise BlockfitError(
                        f"preprocessing: {key} is {side}, beyond {LONGEST_SIDE} pixels"
                    )


def _check_plain(settings: Mapping[str, Any]) -> None:
    size, channels, interpolation = (settings[k] for k in ("size", "channels", "interpolation"))
    pair = isinstance(size, list) and len(size) == 2
    if not pair or not all(type(side) is int and side > 0 for side in size):
        raise BlockfitError(f"plain preprocessing: size must be [height, width], got {size!r}")
    if type(channels) is not int or channels not in (1, 3):
        raise BlockfitError(f"plain preprocessing: channels must be 1 or 3, got {channels!r}")
    for key in ("mean", "std"):
        values = settings[key]
        many = isinstance(values, list) and len(values) == channels
        if not many or not all(type(value) in (int, float) for value in values):
            raise BlockfitError(
                f"plain preprocessing: {key} needs one number per channel ({channels}), "
                f"got {values!r}"
            )
    if not isinstance(interpolation, str) or interpolation not in _RESAMPLING:
        raise BlockfitError(
            f"plain preprocessing: unknown interpolation {interpolation!r}; "
            f"choose one of {', '.join(_RESAMPLING)}"
        )
    if type(settings["crop"]) is not bool:
        raise BlockfitError(
            f"plain preprocessing: crop must be true or false, got {settings['crop']!r}"
        )


def _plain_transform(settings: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    height, width = settings["size"]
    resampling = _RESAMPLING[settings["interpolation"]]
    mean = torch.tensor(settings["mean"]).view(-1, 1, 1)
    std = torch.tensor(settings["std"]).view(-1, 1, 1)

    def transform(image: Image.Image) -> Tensor:
        box = (0.0, 0.0, float(image.width), float(image.height))
        if settings["crop"]:
            scale = min(image.width / width, image.height / height)
            left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
            box = (left, top, left + width * scale, top + height * scale)
        array = np.array(image.resize((width, height), resampling, box=box))
        pixels = torch.from_numpy(array.reshape(height, width, -1)).permute(2, 0, 1)
        return (pixels.to(torch.float32) / 255 - mean) / std

    return transform


def _timm_transform(settings: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    data = need("timm.data", "timm", NEEDS_IT)
    return cast(Callable[[Image.Image], Tensor], data.create_transform(**settings))


def _torchvision_transform(settings: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    presets = need("torchvision.transforms._presets", "timm", NEEDS_IT)
    modes = need("torchvision.transforms", "timm", NEEDS_IT).InterpolationMode
    values = {**settings, "interpolation": modes(settings["interpolation"])}
    for key in ("crop_size", "resize_size"):
        (values[key],) = settings[key]
    return cast(Callable[[Image.Image], Tensor], presets.ImageClassification(**values))


def _transformers_transform(settings: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    name = settings["image_processor_type"]
    base = need("transformers.image_processing_utils", "transformers", NEEDS_IT).BaseImageProcessor
    processor_class = getattr(need("transformers", "transformers", NEEDS_IT), name, None)
    if not (isinstance(processor_class, type) and issubclass(processor_class, base)):
        raise BlockfitError(f"preprocessing: {name!r} is no image processor of this transformers")
    if processor_class.__name__ != name:
        raise BlockfitError(
            f"preprocessing: {name} needs torchvision, its stand-in {processor_class.__name__} "
            'gives other pixels; pip install "blockfit[transformers]"'
        )
    processor = cast(Any, processor_class)(
        **{k: v for k, v in settings.items() if k != "image_processor_type"}
    )

    def transform(image: Image.Image) -> Tensor:
        out = processor(image, return_tensors="pt")
        if set(out) != {"pixel_values"}:
            raise BlockfitError(
                f"{name} returns {', '.join(out)}, and only pixel_values can be passed on; "
                "give the images as an iterable of dictionaries of tensors"
            )
        return cast(Tensor, out["pixel_values"][0])

    return transform
