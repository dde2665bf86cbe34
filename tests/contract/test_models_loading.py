"""Models by name and from folders."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MODELS, filled, output, tensors, timm_model, tiny
from torch import nn

from blockfit.errors import BlockfitError
from blockfit.models.demo import WEIGHTS
from blockfit.models.load import label_names, load_model, skeleton, source_of


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "DeiT with teacher", "Dinov2Model", "Dinov2Backbone"]
)
def test_a_transformers_folder_is_loaded_as_the_class_that_was_saved(
    name: str, tmp_path: Path
) -> None:
    model = MODELS[name]()
    (tmp_path / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# Card\n")
    loaded = load_model(saved(model, tmp_path))
    source = source_of(loaded)
    assert type(loaded) is type(model)
    assert torch.equal(output(loaded), output(model))
    assert (source.library, source.name) == ("transformers", str(tmp_path))
    assert source.licence == "apache-2.0"
    assert source.preprocessing is None


def test_half_precision_files_are_loaded_as_float32_unless_asked_otherwise(tmp_path: Path) -> None:
    model = tiny("ViTModel").half()
    folder = saved(model, tmp_path)
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(folder, dtype="float16").parameters()} == {torch.float16}
    with pytest.raises(BlockfitError, match="unknown dtype 'int8'"):
        load_model(folder, dtype="int8")


def test_the_source_travels_with_the_model_but_not_in_its_state_dict(tmp_path: Path) -> None:
    model = load_model(saved(tiny("ViTModel"), tmp_path))
    keys = set(tiny("ViTModel").state_dict())
    assert set(model.state_dict()) == keys
    assert source_of(copy.deepcopy(model)) == source_of(model)


def test_a_timm_folder_is_loaded_by_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm_model("vit_tiny_patch16_224", num_classes=3, embed_dim=48, num_heads=3)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = load_model(tmp_path)
    assert torch.equal(output(loaded), output(model))
    source = source_of(loaded)
    assert (source.library, source.name, source.licence) == ("timm", str(tmp_path), "apache-2.0")
    assert source.loads_as is not None
    assert torch.equal(output(load_model(source.loads_as)), output(model))
    assert source.preprocessing is not None
    assert tensors(skeleton(source)) == tensors(model)


def test_names_choose_the_library_and_options_reach_it() -> None:
    pytest.importorskip("timm")
    bare = load_model("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=1)
    named = load_model("timm/vit_tiny_patch16_224", pretrained=False, img_size=32, depth=1)
    assert source_of(bare) == source_of(named)
    other = load_model("torchvision/vit_b_32", weights=None, image_size=64, num_classes=2)
    assert source_of(other).library == "torchvision"
    assert source_of(other).arguments["image_size"] == 64


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the demo's weights are not trained yet")
def test_the_demo_is_loaded_with_its_preprocessing() -> None:
    model = load_model("demo")
    source = source_of(model)
    assert source.preprocessing is not None
    assert source.preprocessing.channels == 1
    assert torch.equal(output(filled(skeleton(source), model)), output(model))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/vit_tinny_patch16_224", r"timm has no model .* did you mean vit_tiny_patch16_224"),
        ("torchvision/vit_b_17", r"torchvision has no model .* did you mean"),
        ("torchvision/vit_b_16.IMAGENET", r"no weights 'IMAGENET' .* choose one of IMAGENET1K_V1"),
        ("./nowhere", r"there is no folder ./nowhere; give a model folder, a Hub id"),
        (__file__, r"test_models_loading.py is a file; give the folder of a model"),
        (
            "nobody/nothing",
            r"there is no folder nobody/nothing, .*hf download nobody/nothing --local-dir FOLDER",
        ),
    ],
)
def test_a_name_that_gives_nothing_says_what_to_do(name: str, message: str) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    with pytest.raises(BlockfitError, match=message) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_an_unreachable_timm_checkpoint_says_what_to_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    match = r"hf download timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k --local-dir FOLDER"
    with pytest.raises(BlockfitError, match=match):
        load_model("timm/vit_tiny_patch16_224", cache_dir=tmp_path)


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no model folder: it has no config.json"),
        ({"config": "{"}, "config.json is not valid JSON"),
        ({"config": "{}"}, "names neither a model_type"),
        ({"config": '{"model_type": "vit"}'}, "transformers cannot load the folder"),
        ({"config": '{"model_type": "nonsense"}'}, "transformers cannot load the folder"),
        ({"config": "{}", "blockfit": "{}"}, "load it with blockfit.load"),
        (
            {"config": '{"model_type": "vit", "architectures": ["MyViT"]}'},
            "needs the class MyViT.*trust_remote_code",
        ),
        (
            {"config": '{"model_type": "vit", "architectures": ["pipeline"]}'},
            "needs the class pipeline",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_said_to_be_none(
    files: dict[str, str], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(BlockfitError, match=message):
        load_model(write(tmp_path, **files))


def test_weights_that_are_missing_or_broken_are_refused(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    folder = saved(tiny("ViTModel"), tmp_path)
    file = folder / "model.safetensors"
    whole = safetensors.load_file(file)
    first = sorted(whole)[0]
    safetensors.save_file(
        {name: t for name, t in whole.items() if name != first}, file, {"format": "pt"}
    )
    with pytest.raises(
        BlockfitError, match=r"does not hold the weights of ViTModel: 1 are missing"
    ):
        load_model(folder)
    file.write_bytes(b"not safetensors")
    with pytest.raises(BlockfitError, match="transformers cannot load the folder"):
        load_model(folder)


def test_a_checkpoints_own_code_runs_only_when_it_is_trusted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {
        "model_type": "mine",
        "architectures": ["Mine"],
        "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModel": "mine.Mine"},
    }
    (tmp_path / "mine.py").write_text("raise RuntimeError('this code ran')")
    folder = write(tmp_path, config=json.dumps(config))
    with pytest.raises(BlockfitError, match="trust_remote_code"):
        load_model(folder)
    with pytest.raises(BlockfitError, match="this code ran"):
        load_model(folder, trust_remote_code=True)


def test_class_names_come_in_the_order_of_the_logits() -> None:
    names = {"10": "k", "2": "c", "0": "a"}
    model: Any = nn.Linear(2, 2)
    model.config = type("Config", (), {"id2label": names})
    assert label_names(model) == ["a", "c", "k"]
    assert label_names(tiny("ViTForImageClassification", num_labels=5)) is None
    assert label_names(nn.Linear(2, 2)) is None


@pytest.mark.shared
def test_the_real_model_is_loaded_in_float32_and_rebuilt(shared_model: Path) -> None:
    model = load_model(shared_model)
    source = source_of(model)
    assert type(model).__name__ == "Dinov2ForImageClassification"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert source.preprocessing is not None
    assert tensors(skeleton(source)) == tensors(model)
    assert (label_names(model) or [])[:2] == ["airplane", "automobile"]
