"""Tiny models of timm, transformers and torchvision as a user would build them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockfit.models.demo import DigitsViT, demo_arguments

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def tiny(class_name: str, _options: dict[str, Any] | None = None, **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, class_name)
    return cls(cls.config_class(**{**TINY, **config}), **(_options or {})).eval()


def timm_model(name: str, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, **{"depth": 2, "img_size": 32, **options}).eval()


def torchvision_vit(**options: Any) -> nn.Module:
    transformer = pytest.importorskip("torchvision.models.vision_transformer")
    return transformer.VisionTransformer(32, 8, 2, 2, 32, 64, **options).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ViTForImageClassification": lambda: tiny("ViTForImageClassification", num_labels=5),
    "ViTModel without pooler": lambda: tiny("ViTModel", {"add_pooling_layer": False}),
    "ViTModel with mask token": lambda: tiny("ViTModel", {"use_mask_token": True}),
    "DeiT with teacher": lambda: tiny("DeiTForImageClassificationWithTeacher"),
    "Dinov2Model": lambda: tiny("Dinov2Model"),
    "Dinov2Backbone": lambda: tiny("Dinov2Backbone", out_indices=[1, 2]),
    "Dinov2 with registers": lambda: tiny("Dinov2WithRegistersForImageClassification"),
    "CLIPVisionModel": lambda: tiny("CLIPVisionModel"),
    "DINOv3ViTModel": lambda: tiny("DINOv3ViTModel"),
    "timm vit": lambda: timm_model(
        "vit_tiny_patch16_224", num_classes=3, embed_dim=48, num_heads=3
    ),
    "timm vit without head": lambda: timm_model("vit_tiny_patch16_224", num_classes=0),
    "timm average pooling": lambda: timm_model("vit_tiny_patch16_224", global_pool="avg"),
    "timm deit distilled": lambda: timm_model("deit_tiny_distilled_patch16_224"),
    "timm registers": lambda: timm_model("vit_small_patch14_reg4_dinov2", img_size=28),
    "timm eva02": lambda: timm_model("eva02_tiny_patch14_224", img_size=28),
    "torchvision": lambda: torchvision_vit(num_classes=7),
    "torchvision with representation": lambda: torchvision_vit(representation_size=16),
    "demo": lambda: DigitsViT(**demo_arguments()).eval(),
}


def tensors(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in named}


def filled(empty: nn.Module, model: nn.Module) -> nn.Module:
    """The skeleton with the model's tensors, buffers outside the state dict included."""
    empty.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():
        owner, _, key = name.rpartition(".")
        empty.get_submodule(owner)._buffers[key] = buffer
    return empty


def output(model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    config = getattr(model, "pretrained_cfg", None)
    size = 28 if config is not None and "14" in str(config["architecture"]) else 32
    grey = isinstance(model, DigitsViT)
    with torch.inference_mode():
        out = model(torch.randn(2, 1, 8, 8) if grey else torch.randn(2, 3, size, size))
    return out if isinstance(out, Tensor) else out[0][0] if isinstance(out[0], tuple) else out[0]
