"""Tiny models whose blocks are no one chain, hierarchical and hybrid ones: they can be narrowed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from family import CLASSES, Family, none
from torch import nn

ALL = frozenset({"mlp", "values", "keys"})
MLP = frozenset({"mlp"})


@dataclass(frozen=True)
class Staged:
    """What a test knows of one kind of model.

    Args:
        family: how it is built and given images.
        parts: kinds of parts that are found in some of its blocks.
        depth: blocks that are found.
        stages: in how many runs.
        kept: part of the parameters that a compression is asked to leave.
    """

    family: Family
    parts: frozenset[str]
    depth: int
    stages: int
    kept: float = 0.7


def _timm(name: str, image: int = 32, **options: Any) -> Family:
    def make() -> nn.Module:
        timm = pytest.importorskip("timm")
        model: nn.Module = timm.create_model(name, num_classes=CLASSES, **options)
        return model

    return Family(make, "", none, image=image)


def _transformers(name: str, image: int = 32, **options: Any) -> Family:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        model_class = getattr(transformers, name)
        return model_class(model_class.config_class(num_labels=CLASSES, **options))

    return Family(make, "", none, image=image)


def _by_hand(module: str, build: Callable[[Any], nn.Module], image: int = 32) -> Family:
    """A model that a library's own classes make, without its registry."""

    def make() -> nn.Module:
        pytest.importorskip(module.partition(".")[0])
        return build(importlib.import_module(module))

    return Family(make, "", none, image=image)


def _detr_config() -> Any:
    """A detection transformer with a convolutional trunk."""
    import transformers

    trunk = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    return transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=trunk, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, num_queries=5, num_labels=CLASSES,
    )  # fmt: skip


def _detr(library: Any) -> nn.Module:
    model: nn.Module = library.DetrForObjectDetection(_detr_config())
    return model


def _swin_trunk(library: Any) -> Any:
    return library.SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


def _maskformer(library: Any) -> nn.Module:
    config = library.MaskFormerConfig(
        backbone_config=_swin_trunk(library), decoder_config=_detr_config(),
        fpn_feature_size=32, mask_feature_size=32,
    )  # fmt: skip
    model: nn.Module = library.MaskFormerForInstanceSegmentation(config)
    return model


def _mask2former(library: Any) -> nn.Module:
    config = library.Mask2FormerConfig(
        backbone_config=_swin_trunk(library), feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=64, encoder_layers=2, decoder_layers=3, num_attention_heads=2,
        dim_feedforward=64, num_queries=5, num_labels=CLASSES,
    )  # fmt: skip
    model: nn.Module = library.Mask2FormerForUniversalSegmentation(config)
    return model


def _mvit(library: Any) -> nn.Module:
    config = library.MultiScaleVitCfg(depths=(1, 2, 1), embed_dim=(16, 32, 64), num_heads=1)
    model: nn.Module = library.MultiScaleVit(config, img_size=32, num_classes=CLASSES)
    return model


def _convnext(library: Any) -> nn.Module:
    setting = [library.CNBlockConfig(16, 32, 2), library.CNBlockConfig(32, None, 2)]
    model: nn.Module = library.ConvNeXt(setting, num_classes=CLASSES)
    return model


def _swin(library: Any) -> nn.Module:
    model: nn.Module = library.SwinTransformer(
        [2, 2], 16, [2, 2], [1, 2], [4, 4], num_classes=CLASSES
    )
    return model


def _swin_v2(library: Any) -> nn.Module:
    model: nn.Module = library.SwinTransformer(
        [2, 2], 16, [2, 2], [1, 2], [4, 4], num_classes=CLASSES,
        block=library.SwinTransformerBlockV2, downsample_layer=library.PatchMergingV2,
    )  # fmt: skip
    return model


def _nest(library: Any) -> nn.Module:
    model: nn.Module = library.Nest(
        img_size=64, embed_dims=(16, 32, 64), num_heads=(1, 2, 4), depths=(2, 2, 2),
        num_classes=CLASSES,
    )  # fmt: skip
    return model


def _maxvit(library: Any) -> nn.Module:
    model: nn.Module = library.MaxVit(
        (64, 64), 16, 4, [16, 32], [1, 1], 8, stochastic_depth_prob=0.0, num_classes=CLASSES
    )
    return model


_SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)}
_HF_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
            "num_heads": [1, 2], "window_size": 4}  # fmt: skip
_MIXED = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 2, 1],
          "num_attention_heads": [1, 2, 2, 4], "image_size": 64}  # fmt: skip
_SAM2 = {"hidden_size": 16, "image_size": [64, 64], "num_attention_heads": 1,
         "blocks_per_stage": [1, 2, 2, 1], "embed_dim_per_stage": [16, 32, 64, 128],
         "num_attention_heads_per_stage": [1, 2, 4, 8], "global_attention_blocks": [4],
         "window_size_per_stage": [8, 4, 4, 2]}  # fmt: skip

STAGED: dict[str, Staged] = {
    "timm-swin": Staged(
        _timm(
            "swin_tiny_patch4_window7_224", img_size=32, patch_size=2, window_size=4, **_SWIN
        ), ALL, 4, 2,
    ),
    "timm-swin-padded": Staged(  # 12 × 12 tokens in windows of 5
        _timm(
            "swin_tiny_patch4_window7_224", 24, img_size=24, patch_size=2, window_size=5, **_SWIN
        ), ALL, 4, 2,
    ),
    "timm-swin-v2": Staged(
        _timm("swinv2_tiny_window8_256", img_size=32, patch_size=2, window_size=4, **_SWIN),
        MLP, 4, 2, 0.8,
    ),
    "timm-convnext": Staged(
        _timm("convnext_atto", depths=(1, 1, 2, 1), dims=(16, 16, 32, 32), conv_mlp=False),
        MLP, 5, 4, 0.75,
    ),
    "timm-hiera": Staged(
        _timm("hiera_tiny_224", img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 2, 2, 1),
              image=64), ALL, 6, 3,
    ),
    "timm-pvt-v2": Staged(
        _timm("pvt_v2_b0", embed_dims=(16, 16, 32, 32), depths=(1, 1, 2, 1),
              num_heads=(1, 2, 2, 4), image=64), ALL, 5, 4,
    ),
    "timm-mvit-v2": Staged(_by_hand("timm.models.mvitv2", _mvit), MLP, 4, 2, 0.8),
    "timm-twins": Staged(
        _timm("twins_svt_small", img_size=64, embed_dims=(16, 32, 32, 64), num_heads=(1, 2, 2, 4),
              depths=(1, 1, 2, 1), image=64), ALL, 5, 5,
    ),
    "timm-maxvit": Staged(
        _timm("maxvit_tiny_tf_224", 64, img_size=64, embed_dim=(32, 64), depths=(1, 1)), ALL, 4, 2,
        0.9,
    ),
    "timm-nest": Staged(_by_hand("timm.models.nest", _nest, 64), ALL, 6, 3),
    "timm-tiny-vit": Staged(
        _timm("tiny_vit_5m_224", 64, embed_dims=(16, 32, 32, 64), num_heads=(1, 2, 2, 4),
              depths=(1, 1, 2, 1), window_sizes=(4, 4, 4, 4)), MLP, 4, 3, 0.8,
    ),
    "timm-davit": Staged(
        _timm("davit_tiny", 64, embed_dims=(16, 32, 32, 64), num_heads=(1, 2, 2, 4),
              depths=(1, 1, 1, 1)), ALL, 8, 4,
    ),
    "swin": Staged(_transformers("SwinForImageClassification", **_HF_SWIN), ALL, 4, 2),
    "swin-bare": Staged(_transformers("SwinModel", **_HF_SWIN), ALL, 4, 2),
    "swin-v2": Staged(_transformers("Swinv2ForImageClassification", **_HF_SWIN), ALL, 4, 2),
    "convnext": Staged(
        _transformers("ConvNextForImageClassification", num_stages=2, hidden_sizes=[16, 32],
                      depths=[2, 2]), MLP, 4, 2,
    ),
    "hiera": Staged(
        _transformers("HieraForImageClassification", 64, image_size=[64, 64], embed_dim=16,
                      depths=[1, 2, 2, 1], num_heads=[1, 2, 4, 8]), ALL, 6, 3,
    ),
    "pvt-v2": Staged(
        _transformers("PvtV2ForImageClassification", 64, **_MIXED),
        ALL, 5, 4,
    ),
    "segformer": Staged(
        _transformers("SegformerForImageClassification", 64, **_MIXED),
        ALL, 5, 4,
    ),
    "segformer-dense": Staged(
        _transformers("SegformerForSemanticSegmentation", 64, decoder_hidden_size=16, **_MIXED),
        ALL, 5, 4,
    ),
    "focalnet": Staged(
        _transformers("FocalNetForImageClassification", 64, image_size=64, embed_dim=16,
                      depths=[1, 1, 2, 1]), MLP, 5, 4, 0.8,
    ),
    "sam2-trunk": Staged(
        _transformers("Sam2HieraDetModel", 64, **_SAM2), ALL, 6, 3
    ),
    "detr": Staged(_by_hand("transformers", _detr, 64), ALL, 2, 1, 0.9),
    "maskformer": Staged(_by_hand("transformers", _maskformer, 64), ALL, 4, 4, 0.85),
    "mask2former": Staged(_by_hand("transformers", _mask2former, 64), ALL, 6, 5, 0.85),
    "torchvision-maxvit": Staged(
        _by_hand("torchvision.models.maxvit", _maxvit, 64), ALL, 4, 2, 0.9
    ),
    "torchvision-swin": Staged(
        _by_hand("torchvision.models.swin_transformer", _swin), MLP, 4, 2, 0.8
    ),
    "torchvision-swin-v2": Staged(
        _by_hand("torchvision.models.swin_transformer", _swin_v2), MLP, 4, 2, 0.8
    ),
    "torchvision-convnext": Staged(
        _by_hand("torchvision.models.convnext", _convnext), MLP, 4, 2, 0.7
    ),
}  # fmt: skip
