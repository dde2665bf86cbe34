"""Tiny models of open_clip: the image tower of a model of images and texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from family import DEPTH, WIDTH, Family, one
from torch import Tensor, nn

TEXT: dict[str, Any] = {
    "context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": DEPTH + 1,
}  # fmt: skip
VISION: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "width": WIDTH, "layers": DEPTH, "head_width": 16,
}  # fmt: skip


def config(**options: Any) -> dict[str, Any]:
    """What open_clip_config.json holds; ``custom_text`` keeps the text tower apart."""
    values = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    return {**values, **options}


def _make(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = pytest.importorskip("open_clip")
        values = config(**options)
        custom = values.pop("custom_text", False)
        model = (library.CustomTextCLIP if custom else library.CLIP)(**values)
        model.open_clip_source = config(**options)  # as blockfit.load leaves it
        return model

    return make


def _states(model: Any, images: Tensor) -> list[Tensor]:
    out = model.visual.forward_intermediates(
        images, output_fmt="NLC", output_extra_tokens=True, intermediates_only=True
    )
    parts = zip(out["image_intermediates_prefix"], out["image_intermediates"], strict=True)
    return [torch.cat(pair, 1) for pair in parts]


def _family(**options: Any) -> Family:
    return Family(
        make=_make(**options), path="visual.transformer.resblocks", prefix_tokens=one,
        intermediates=_states,
        states=lambda model, images: [torch.empty(0), *_states(model, images)][:DEPTH],
        run=lambda model, images: model.encode_image(images),
    )  # fmt: skip


OPENCLIP: dict[str, Family] = {
    "open_clip": _family(),
    "open_clip-custom-text": _family(
        custom_text=True, vision_cfg={**VISION, "ls_init_value": 0.5, "pool_type": "avg"}
    ),
}
