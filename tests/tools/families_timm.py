"""Tiny models of timm, by the names of its architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from family import CLASSES, DEPTH, WIDTH, Family, none
from torch import Tensor, nn


def _make(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        timm = pytest.importorskip("timm")
        if not timm.is_model(name):
            pytest.skip(f"timm {timm.__version__} has no {name}")
        small = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "num_classes": CLASSES}
        return timm.create_model(name, pretrained=False, **{**small, **options})

    return make


def _states(model: Any, images: Tensor) -> list[Tensor]:
    out = model.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=True)[1]
    return [torch.cat(part[::-1], 1) if isinstance(part, tuple) else part for part in out]


def _patch_states(model: Any, images: Tensor) -> list[Tensor]:
    return model.forward_intermediates(images, output_fmt="NLC")[1]


def _intermediates(model: Any, images: Tensor) -> list[Tensor]:
    final, maps = model.forward_intermediates(images, norm=True)
    more = getattr(model, "get_intermediate_layers", None)
    return [final, *maps, *(more(images, n=[0, DEPTH - 1]) if more else [])]


_blank = torch.empty(0)
"""Stands for the state before block 0, which timm's models do not offer."""


def _family(
    name: str,
    heads: int = 1,
    image: int = 32,
    prefix_tokens: Callable[[Any], int] = lambda model: model.num_prefix_tokens,
    states: Callable[[Any, Tensor], list[Tensor]] = _states,
    **options: Any,
) -> Family:
    return Family(
        make=_make(name, img_size=image, **options), image=image, path="blocks",
        prefix_tokens=prefix_tokens, intermediates=_intermediates,
        states=lambda model, images: [_blank, *states(model, images)][:DEPTH],
        heads=heads,
    )  # fmt: skip


TIMM: dict[str, Family] = {
    "timm-vit": _family("vit_tiny_patch16_224", patch_size=8),
    "timm-vit-bare": _family("vit_tiny_patch16_224", heads=0, patch_size=8, num_classes=0),
    "timm-vit-average": _family(
        "vit_base_patch16_224", patch_size=8, global_pool="avg", class_token=False
    ),
    "timm-deit-distilled": _family("deit_tiny_distilled_patch16_224", heads=2, patch_size=8),
    "timm-deit3": _family("deit3_small_patch16_224", patch_size=8),
    "timm-dinov2": _family("vit_small_patch14_dinov2", image=28, num_classes=CLASSES),
    "timm-dinov2-bare": _family("vit_small_patch14_dinov2", heads=0, image=28, num_classes=0),
    "timm-dinov2-reg4": _family("vit_small_patch14_reg4_dinov2", image=28),
    "timm-dinov3": _family("vit_small_patch16_dinov3", patch_size=8),
    "timm-eva02": _family("eva02_base_patch14_448", image=28),
    "timm-beit": _family("beit_base_patch16_224", patch_size=8),
    "timm-beitv2-bare": _family("beitv2_base_patch16_224", heads=0, patch_size=8, num_classes=0),
    "timm-clip": _family("vit_base_patch16_clip_224", patch_size=8),
    "timm-siglip": _family("vit_base_patch16_siglip_224", patch_size=8),
    "timm-siglip-bare": _family(
        "vit_base_patch16_siglip_224", heads=0, patch_size=8, num_classes=0
    ),
    # Images of any size, pooled by attention with a learned query.
    "timm-naflex-map": Family(
        make=_make("naflexvit_base_patch16_siglip"), image=32, path="blocks", prefix_tokens=none,
        heads=1,
    ),
    "timm-pe-core": _family("vit_pe_core_base_patch16_224", patch_size=8),
    # Its class token enters behind the blocks.
    "timm-cait": _family(
        "cait_xxs24_224", prefix_tokens=none, states=_patch_states, patch_size=8
    ),
}  # fmt: skip
