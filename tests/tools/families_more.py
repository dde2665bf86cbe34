"""More families, which ``round_trips.py`` saves and loads, beside those of the contract test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from families_timm import _make as timm_make
from families_transformers import IMAGES
from families_transformers import _make as transformers_make
from family import CLASSES, DEPTH, Family, none
from torch import nn


def _timm(name: str, image: int = 32, **options: Any) -> Family:
    small = {"img_size": image, "patch_size": 8, **options}
    return Family(timm_make(name, **small), "blocks", none, image)


def _transformers(name: str, **options: Any) -> Family:
    return Family(transformers_make(name, **options), "", none)


def _wrapped() -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers: Any = pytest.importorskip("transformers")
        small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": DEPTH}
        config = transformers.TimmWrapperConfig(
            architecture="vit_tiny_patch16_224", model_args=small, num_labels=CLASSES
        )
        return transformers.TimmWrapperForImageClassification(config)

    return make


MORE: dict[str, Family] = {
    "timm-relpos": _timm("vit_relpos_small_patch16_224"),
    "timm-relpos-class-token": _timm("vit_relpos_base_patch16_clsgap_224"),
    "timm-relpos-post-norm": _timm("vit_relpos_base_patch16_rpn_224"),
    "timm-shared-relpos": _timm("vit_srelpos_small_patch16_224"),
    "timm-parallel-blocks": _timm("vit_small_patch16_18x2_224"),
    "timm-parallel-scaling": _timm("vit_pwee_patch16_reg1_gap_256"),
    "timm-differential": _timm("vit_dwee_patch16_reg1_gap_256"),
    "timm-differential-parallel": _timm("vit_dpwee_patch16_reg1_gap_256"),
    "timm-rope": _timm("vit_small_patch16_rope_224"),
    "timm-rope-mixed": _timm("vit_small_patch16_rope_mixed_224"),
    "timm-rope-mixed-position": _timm("vit_small_patch16_rope_mixed_ape_224"),
    "timm-rope-registers": _timm("vit_medium_patch16_rope_reg1_gap_256"),
    "timm-flexivit": _timm("flexivit_small"),
    "timm-beit3": _timm("beit3_base_patch16_224"),
    "timm-aimv2": _timm("aimv2_large_patch14_224"),
    "timm-eva": _timm("eva_large_patch14_196"),
    "timm-intern": _timm("vit_intern300m_patch14_448"),
    "timm-shape-optimised": _timm("vit_so150m_patch16_reg4_map_256"),
    "timm-medium-registers": _timm("vit_mediumd_patch16_reg4_gap_256"),
    "timm-siglip-average": _timm("vit_base_patch16_siglip_gap_224"),
    "timm-convit": _timm("convit_tiny"),
    "timm-xcit": _timm("xcit_nano_12_p8_224", eta=1.0),
    "timm-naflex-average": Family(timm_make("naflexvit_base_patch16_gap"), "blocks", none),
    "timm-naflex-parallel": Family(timm_make("naflexvit_base_patch16_par_gap"), "blocks", none),
    "timm-in-transformers": Family(_wrapped(), "", none),
    "data2vec": _transformers("Data2VecVisionModel"),
    "data2vec-classifier": _transformers("Data2VecVisionForImageClassification"),
    "vit-msn": _transformers("ViTMSNModel"),
    "vit-msn-classifier": _transformers("ViTMSNForImageClassification"),
    "ijepa": _transformers("IJepaModel"),
    "ijepa-classifier": _transformers("IJepaForImageClassification"),
    "vit-masked-image": _transformers("ViTForMaskedImageModeling", encoder_stride=8),
    "blip-vision": _transformers("BlipVisionModel"),
    "blip2-vision": _transformers("Blip2VisionModel"),
    "instructblip-vision": _transformers("InstructBlipVisionModel"),
    "chinese-clip-vision": _transformers("ChineseCLIPVisionModel"),
    "alt-clip-vision": _transformers("AltCLIPVisionModel"),
    "clipseg-vision": _transformers("CLIPSegVisionModel"),
    "owl-vision": _transformers("OwlViTVisionModel"),
    "owl2-vision": _transformers("Owlv2VisionModel"),
    "metaclip2-vision": _transformers("MetaClip2VisionModel"),
    "aimv2-vision": _transformers("Aimv2VisionModel"),
    "mlcd-vision": _transformers("MLCDVisionModel"),
    "intern-vision": _transformers("InternVLVisionModel", image_size=[32, 32], patch_size=[8, 8]),
    "clip-classifier": _transformers("CLIPForImageClassification", vision_config=IMAGES),
    "siglip-classifier": _transformers("SiglipForImageClassification", vision_config=IMAGES),
    "dinov2-registers-backbone": _transformers("Dinov2WithRegistersBackbone"),
    "vit-pose-backbone": _transformers("VitPoseBackbone"),
}  # fmt: skip
"""Every one is taken by ``blockfit.compress``; ``prefix_tokens`` and ``path`` are not theirs."""
