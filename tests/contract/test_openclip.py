"""open_clip by name and by folder, against open_clip's own functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from families import one_thread as one_thread
from families_openclip import config
from PIL import Image
from safetensors.torch import save_file

import blockfit
from blockfit.errors import BlockfitError
from blockfit.models.from_open_clip import build_open_clip, open_clip_preprocessing
from blockfit.models.load import source_of

open_clip = pytest.importorskip("open_clip")


def folder(here: Path, **options: Any) -> Path:
    """A folder as open_clip's ``push_to_hf_hub`` writes it."""
    model = FAMILIES["open_clip"].build()
    values = {"model_cfg": config(**options), "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    here.mkdir()
    (here / "open_clip_config.json").write_text(json.dumps(values))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, here / "open_clip_model.safetensors")
    return here


def test_a_folder_loads_as_open_clip_loads_it(tmp_path: Path) -> None:
    here = folder(tmp_path / "tiny")
    images = FAMILIES["open_clip"].images()
    own, _, transform = open_clip.create_model_and_transforms(f"local-dir:{here}")
    for name in (str(here), f"open_clip/local-dir:{here}"):
        model: Any = blockfit.load(name)
        with torch.no_grad():
            assert torch.equal(model.encode_image(images), own.eval().encode_image(images))
    source = source_of(model)
    assert (source.library, source.name) == ("open_clip", str(here))
    assert source.preprocessing is not None
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    assert torch.equal(source.preprocessing(picture), transform(picture))


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_the_preprocessing_is_open_clips_or_none(tmp_path: Path, mode: str) -> None:
    model, _, transform = open_clip.create_model_and_transforms(
        f"local-dir:{folder(tmp_path / 'tiny')}",
        image_resize_mode=mode,
        image_interpolation="bilinear",
    )
    found = open_clip_preprocessing(model)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 50, 3), np.uint8))
    if mode == "longest":
        assert found is None
    else:
        assert found is not None
        assert torch.equal(found(picture), transform(picture))


def test_the_image_tower_is_compressed_saved_and_loaded(tmp_path: Path) -> None:
    here = folder(tmp_path / "tiny")
    model: Any = blockfit.load(here)
    pictures = np.random.default_rng(0).integers(0, 255, (24, 32, 32, 3), np.uint8)
    result = blockfit.compress(model, blockfit.images(pictures, model), spans=["1:3"])
    blockfit.save(result, tmp_path / "small")
    back: Any = blockfit.load(tmp_path / "small")
    images = FAMILIES["open_clip"].images()
    words = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 19]])
    with torch.no_grad():
        assert torch.equal(back.encode_image(images), result.model.encode_image(images))
        assert not torch.equal(back.encode_image(images), model.encode_image(images))
        assert torch.equal(back.encode_text(words), model.encode_text(words))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-99", "open_clip has no model 'ViT-B-99'; did you mean"),
        ("ViT-B-32", r"several weights for ViT-B-32; choose one: open_clip/ViT-B-32\.openai"),
        ("ViT-B-32.nothing", "no weights 'nothing' for ViT-B-32; choose one"),
        ("local-dir:/nowhere", "a folder needs open_clip_config.json"),
    ],
)
def test_wrong_names_say_what_there_is(name: str, message: str) -> None:
    with pytest.raises(BlockfitError, match=message):
        blockfit.load(f"open_clip/{name}")


def test_weights_that_cannot_be_had_say_what_to_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockfit.models.hub.silent", lambda: True)
    with pytest.raises(BlockfitError, match=r"hf download laion/CLIP.* open_clip/local-dir:FOLDER"):
        blockfit.load("open_clip/ViT-B-32.laion2b_s34b_b79k")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    here = folder(tmp_path / "tiny")
    (here / "open_clip_model.safetensors").unlink()
    with pytest.raises(BlockfitError, match="could not be loaded"):
        blockfit.load(here)


def test_a_saved_configuration_loads_nothing_from_elsewhere() -> None:
    values = config()
    bad: list[tuple[dict[str, Any], str]] = [
        ({**values, "text_cfg": {"hf_model_name": "some/model"}}, "hf_model_name would load"),
        ({**values, "vision_cfg": {"pretrained": "x"}}, r"unknown key vision_cfg\.pretrained"),
        ({**values, "vision_cfg": {"timm_model_name": "hf-hub:a/b"}}, "not the bare name"),
    ]
    for wrong, message in bad:
        with pytest.raises(BlockfitError, match=message):
            build_open_clip({"config": wrong})
    # Left to itself timm would fetch this model's weights.
    vision = {
        "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": True,
        "image_size": 32, "timm_pool": "", "timm_proj": "linear",
    }  # fmt: skip
    with torch.device("meta"):
        built = build_open_clip({"config": {**values, "custom_text": True, "vision_cfg": vision}})
    assert {p.device.type for p in built.parameters()} == {"meta"}
