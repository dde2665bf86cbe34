"""Tiny models of transformers, by the names of its classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from family import CLASSES, DEPTH, WIDTH, Family, none, one
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "intermediate_size": 2 * WIDTH,
}
IMAGES: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
TEXTS: dict[str, Any] = {**SIZES, "vocab_size": 20, "max_position_embeddings": 8}


def _make(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        model_class = getattr(transformers, name)
        config = model_class.config_class(**{**IMAGES, "num_labels": CLASSES, **options})
        return model_class(config)

    return make


def _hidden_states(model: Any, images: Tensor) -> list[Tensor]:
    return list(model(images, output_hidden_states=True).hidden_states)


def _feature_maps(model: Any, images: Tensor) -> list[Tensor]:
    output = model(images, output_hidden_states=True)
    return [*model(images).feature_maps, *output.feature_maps, *output.hidden_states]


def _family(
    name: str, path: str, prefix: Callable[[Any], int], heads: int = 0, **options: Any
) -> Family:
    backbone = name.endswith("Backbone")
    return Family(
        make=_make(name, **options), path=path, prefix_tokens=prefix, heads=heads,
        intermediates=_feature_maps if backbone else _hidden_states,
        states=lambda model, images: _hidden_states(model, images)[:DEPTH],
    )  # fmt: skip


def _registers(model: Any) -> int:
    return 1 + model.config.num_register_tokens


def _class_and_distillation(model: Any) -> int:
    embeddings = model.base_model.embeddings
    return embeddings.cls_token.shape[1] + embeddings.distillation_token.shape[1]


def _towers(name: str, prefix: Callable[[Any], int], **options: Any) -> Family:
    """A model of images and texts, given images alone."""

    def states(model: Any, images: Tensor) -> list[Tensor]:
        return _hidden_states(model.vision_model, images)

    return Family(
        make=_make(name, text_config=TEXTS, vision_config=IMAGES, **options),
        path="vision_model.encoder.layers", prefix_tokens=prefix, intermediates=states,
        states=lambda model, images: states(model, images)[:DEPTH],
        run=lambda model, images: model.get_image_features(pixel_values=images),
    )  # fmt: skip


def _masked(name: str, path: str) -> Family:
    """A masked autoencoder: every forward draws the patches that it hides."""

    def run(model: Any, images: Tensor, **options: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of all draws the ones that blockfit makes
            out = model(images, **options)
        return {k: v for k, v in out.items() if k not in ("mask", "ids_restore", "loss")}

    def states(model: Any, images: Tensor) -> list[Tensor]:
        return list(run(model, images, output_hidden_states=True)["hidden_states"])

    options: dict[str, Any] = {
        "decoder_hidden_size": 16, "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32, "mask_ratio": 0.5,
    }  # fmt: skip
    return Family(
        make=_make(name, **options), path=path, prefix_tokens=one, intermediates=states,
        states=lambda model, images: states(model, images)[:DEPTH], run=run,
    )  # fmt: skip


def _config(name: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, name)(**{**IMAGES, **options})


def _dense(name: str, path: str, config: str | None, out: dict[str, Any], **options: Any) -> Family:
    """A dense head that reads intermediate layers, on a backbone or on blocks of its own."""

    def make() -> nn.Module:
        small = {**options, "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
        backbone = None if config is None else _config(config, **out)
        return _make(name, backbone_config=backbone, **small)()

    return Family(
        make=make, path=path, prefix_tokens=one, intermediates=_hidden_states,
        states=lambda model, images: _hidden_states(model, images)[:DEPTH],
    )  # fmt: skip


def _auto_backbone(config: str, path: str, prefix: Callable[[Any], int], **out: Any) -> Family:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        return transformers.AutoBackbone.from_config(_config(config, **out))

    return Family(
        make=make, path=path, prefix_tokens=prefix, intermediates=_feature_maps,
        states=lambda model, images: _hidden_states(model, images)[:DEPTH],
    )  # fmt: skip


_EVERY_STAGE: dict[str, Any] = {"out_features": [f"stage{i}" for i in range(1, DEPTH + 1)]}
_BEIT: dict[str, Any] = {
    "drop_path_rate": 0.0, "use_relative_position_bias": True, "use_mean_pooling": False,
}  # fmt: skip
_UPERNET: dict[str, Any] = {"auxiliary_in_channels": WIDTH, "auxiliary_channels": 8}

# Where the blocks are, in transformers from 5.24 on and before.
LAYERS = "layers|encoder.layer"
VIT, DEIT = "vit.layers|vit.encoder.layer", "deit.layers|deit.encoder.layer"
BEIT = "beit.layers|beit.encoder.layer|encoder.layer"
TOWER = "encoder.layers|vision_model.encoder.layers"
DINOV3 = "model.layer|layer"

TRANSFORMERS: dict[str, Family] = {
    "vit": _family("ViTModel", LAYERS, one, pooler_output_size=WIDTH),
    "vit-classifier": _family("ViTForImageClassification", VIT, one, 1),
    "vit-mae": _masked("ViTMAEModel", LAYERS),
    "vit-mae-pretraining": _masked("ViTMAEForPreTraining", VIT),
    "deit": _family("DeiTModel", LAYERS, _class_and_distillation),
    "deit-classifier": _family(
        "DeiTForImageClassification", DEIT, _class_and_distillation, 1
    ),
    "deit-teacher": _family(
        "DeiTForImageClassificationWithTeacher", DEIT, _class_and_distillation, 2
    ),
    "beit": _family("BeitModel", LAYERS, one, **_BEIT),
    "beit-classifier": _family("BeitForImageClassification", BEIT, one, 1, **_BEIT),
    "dinov2": _family("Dinov2Model", "encoder.layer", one),
    "dinov2-classifier": _family(
        "Dinov2ForImageClassification", "dinov2.encoder.layer", one, 1
    ),
    "dinov2-backbone": _family("Dinov2Backbone", "encoder.layer", one, out_indices=[1, 2, 4]),
    "dinov2-registers": _family(
        "Dinov2WithRegistersModel", "encoder.layer", _registers, num_register_tokens=3
    ),
    "dinov2-registers-classifier": _family(
        "Dinov2WithRegistersForImageClassification", "dinov2_with_registers.encoder.layer",
        _registers, 1,
    ),
    "dinov3": _family("DINOv3ViTModel", DINOV3, _registers, num_register_tokens=4),
    "dinov3-backbone": _auto_backbone(
        "DINOv3ViTConfig", DINOV3, _registers, out_indices=[1, 3, 4]
    ),
    "beit-backbone": _auto_backbone("BeitConfig", BEIT, one, out_indices=[2, 4], **_BEIT),
    "clip-vision": _family("CLIPVisionModel", TOWER, one),
    "clip-vision-projection": _family(
        "CLIPVisionModelWithProjection", "vision_model.encoder.layers", one, projection_dim=16
    ),
    "clip-two-towers": _towers("CLIPModel", one, projection_dim=16),
    "siglip-vision": _family("SiglipVisionModel", TOWER, none),
    "siglip-two-towers": _towers("SiglipModel", none),
    "dpt-segmentation": _dense(
        "DPTForSemanticSegmentation", "dpt.encoder.layer", None, {},
        backbone_out_indices=[0, 1, 2, 3],
    ),
    "dpt-depth-dinov2": _dense(
        "DPTForDepthEstimation", "backbone.encoder.layer", "Dinov2Config",
        {**_EVERY_STAGE, "reshape_hidden_states": False},
    ),
    "upernet-dinov2": _dense(
        "UperNetForSemanticSegmentation", "backbone.encoder.layer", "Dinov2Config",
        _EVERY_STAGE, **_UPERNET,
    ),
    "upernet-beit": _dense(
        "UperNetForSemanticSegmentation", "backbone.beit.layers", "BeitConfig",
        {**_EVERY_STAGE, **_BEIT}, **_UPERNET,
    ),
}  # fmt: skip
