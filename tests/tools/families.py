"""Tiny random models of every supported family, and what each says of itself.

``FAMILIES[name].build(seed)`` gives a model in eval mode with random weights that matter: no
parameter is left at zero, no LayerScale near it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families_openclip import OPENCLIP
from families_plain import PLAIN, InPlaceBlock, NestedBlock, PlainBlock, PlainViT
from families_timm import TIMM
from families_transformers import TRANSFORMERS
from family import CLASSES, DEPTH, WIDTH, Family, one
from torch import nn

__all__ = [
    "CLASSES",
    "DEPTH",
    "EXPORTED",
    "FAMILIES",
    "NARROWABLE",
    "POOLED_BY_AN_MLP",
    "WIDTH",
    "Family",
    "InPlaceBlock",
    "NestedBlock",
    "PlainBlock",
    "PlainViT",
    "one_thread",
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models run on one thread: on a busy machine, waiting for a second takes milliseconds.

    Works in every test module that imports it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _torchvision(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = pytest.importorskip("torchvision").models
        return models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=DEPTH, num_heads=2, hidden_dim=WIDTH,
            mlp_dim=2 * WIDTH, num_classes=CLASSES, **options,
        )  # fmt: skip

    return make


TORCHVISION: dict[str, Family] = {
    "torchvision-vit": Family(_torchvision(), "encoder.layers", one, heads=1),
    "torchvision-vit-representation": Family(
        _torchvision(representation_size=16), "encoder.layers", one, heads=1
    ),
}

FAMILIES: dict[str, Family] = {**TIMM, **TRANSFORMERS, **TORCHVISION, **OPENCLIP, **PLAIN}

POOLED_BY_AN_MLP = {
    "siglip-vision", "siglip-two-towers", "timm-siglip", "timm-siglip-bare", "timm-naflex-map",
}  # fmt: skip
"""Their config has one width for the blocks and for the MLP that pools, which is not narrowed."""

NARROWABLE = tuple(name for name in FAMILIES if name not in {*PLAIN, "timm-eva02"})
"""Those of a library whose MLPs can be narrowed: EVA-02's have a norm inside."""

EXPORTED: dict[str, tuple[str, ...]] = {
    "stock": tuple(name for name in NARROWABLE if name not in POOLED_BY_AN_MLP),
    "Hub": tuple(TRANSFORMERS),
    "ONNX": tuple(name for name in FAMILIES if not name.startswith("vit-mae")),
    "torch.export": tuple(FAMILIES),
    "int8": tuple(FAMILIES),
}  # fmt: skip
"""By form, the families whose exports the tests run; no runtime draws as masked autoencoders do."""
