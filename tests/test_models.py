"""Models by name, where they came from, and their architecture again without weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockfit.demo import WEIGHTS, DigitsViT, demo_arguments
from blockfit.errors import BlockfitError
from blockfit.models import Source, label_names, load_model, skeleton, source_of
from blockfit.preprocess import Preprocessing

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


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_a_user_built_is_rebuilt_from_its_source_alone(name: str) -> None:
    model = MODELS[name]()
    source = source_of(model)
    assert source.library != "module"
    rebuilt = skeleton(Source.from_json(json.loads(json.dumps(source.to_json()))))
    assert type(rebuilt) is type(model)
    assert not rebuilt.training
    assert all(t.is_meta for t in [*rebuilt.parameters(), *rebuilt.buffers()])
    assert tensors(rebuilt) == tensors(model)
    assert torch.equal(output(filled(rebuilt, model)), output(model))


def test_building_a_skeleton_leaves_the_random_state_and_torch_alone() -> None:
    source, linspace = source_of(tiny("Dinov2Model")), torch.linspace
    before = torch.get_rng_state()
    skeleton(source)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.linspace is linspace
    assert torch.get_default_device() == torch.device("cpu")


def test_eager_attention_stays_eager() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_config(
        transformers.ViTConfig(**TINY), attn_implementation="eager"
    )
    rebuilt: Any = skeleton(source_of(model))
    assert rebuilt.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(2, 2),
        lambda: timm_model("vit_tiny_patch16_224", norm_layer=nn.LayerNorm),
        lambda: torchvision_vit(norm_layer=nn.RMSNorm),
    ],
    ids=["own class", "timm with a class among its options", "torchvision with another norm"],
)
def test_what_cannot_be_written_as_values_is_a_module_of_the_users(
    build: Callable[[], nn.Module],
) -> None:
    source = source_of(build())
    assert source.library == "module"
    with pytest.raises(BlockfitError, match="a class of your own"):
        skeleton(source)


def test_a_model_that_was_changed_by_hand_is_not_taken_for_what_its_config_says() -> None:
    model: Any = tiny("ViTForImageClassification", num_labels=5)
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 5))
    assert source_of(model).library == "module"
    subclass: Any = type("Mine", (type(tiny("ViTModel")),), {})
    assert source_of(subclass(model.config)).library == "module"


def test_timm_heads_that_were_reset_later_are_seen() -> None:
    model: Any = timm_model("vit_tiny_patch16_224")
    model.reset_classifier(4, "avg")
    rebuilt = skeleton(source_of(model))
    assert tensors(rebuilt) == tensors(model)


def test_a_source_comes_back_from_json_and_refuses_what_it_does_not_know() -> None:
    source = Source("timm", "vit", {"a": [1, 2]}, "mit", Preprocessing.plain(8))
    value = json.loads(json.dumps(source.to_json()))
    assert Source.from_json(value) == source
    with pytest.raises(BlockfitError, match=r"file: unknown key 'license'"):
        Source.from_json({**value, "license": "mit"}, "file")
    with pytest.raises(BlockfitError, match="key 'name' is missing"):
        Source.from_json({key: v for key, v in value.items() if key != "name"})
    with pytest.raises(BlockfitError, match="unknown library 'keras'"):
        Source.from_json({**value, "library": "keras"})
    with pytest.raises(BlockfitError, match="arguments must be an object"):
        Source.from_json({**value, "arguments": []})


@pytest.mark.parametrize("name", ["pipeline", "AutoModel", "Trainer", "NoSuchModel"])
def test_only_transformers_own_models_are_rebuilt(name: str) -> None:
    pytest.importorskip("transformers")
    arguments = {"class": name, "config": {"model_type": "vit"}}
    with pytest.raises(BlockfitError, match="no model class of the installed transformers"):
        skeleton(Source("transformers", "x", arguments))


def test_arguments_that_the_library_refuses_are_one_sentence() -> None:
    pytest.importorskip("timm")
    arguments = {"architecture": "vit_tiny_patch16_224", "config": {}, "options": {"dept": 3}}
    with pytest.raises(BlockfitError, match=r"cannot rebuild x .*timm: TypeError: .*dept"):
        skeleton(Source("timm", "x", arguments))


VIT_ARGUMENTS = {"architecture": "vit_tiny_patch16_224", "config": {}, "options": {"depth": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "hf-hub:someone/model"}, "not the bare name of a timm architecture"),
        ({"architecture": "local-dir:/tmp/model"}, "not the bare name of a timm architecture"),
        ({"architecture": "vit_tiny_patch16_224.x:/y"}, "not the bare name"),
        ({"architecture": 3}, "not the bare name"),
        ({"architecture": "vit_none"}, "timm has no model 'vit_none'"),
        ({"config": {"url": "http://x"}}, "timm's option 'url'"),
        ({"config": {"hf_hub_id": "a/b"}}, "timm's option 'hf_hub_id'"),
        *(
            ({"options": {key: "x"}}, f"timm's option '{key}'")
            for key in (
                "checkpoint_path",
                "cache_dir",
                "pretrained",
                "pretrained_cfg",
                "pretrained_cfg_overlay",
                "pretrained_strict",
            )
        ),
    ],
)
def test_somebody_elses_timm_arguments_load_nothing(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was asked"))
    with pytest.raises(BlockfitError, match=message) as raised:
        skeleton(Source("timm", "x", {**VIT_ARGUMENTS, **change}))
    assert "\n" not in str(raised.value)


KERNEL = "someone/kernel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": KERNEL}, "unknown attention 'someone/kernel'; choose eager or sdpa"),
        ({"attention": "flash_attention_2"}, "unknown attention"),
        ({"options": {"pretrained": True}}, "no switch 'pretrained'"),
        ({"options": {"config": {}}}, "no switch 'config'"),
        *(
            ({"config": {"model_type": "vit", **TINY, **config}}, f"'{key}' could fetch or run")
            for key, config in (
                ("attn_implementation", {"attn_implementation": KERNEL}),
                ("_attn_implementation", {"_attn_implementation": KERNEL}),
                (
                    "_attn_implementation_internal",
                    {"vision_config": {"_attn_implementation_internal": KERNEL}},
                ),
                ("experts_implementation", {"experts_implementation": KERNEL}),
                ("auto_map", {"parts": [{"auto_map": {"AutoModel": "a/b--c.D"}}]}),
                ("trust_remote_code", {"trust_remote_code": True}),
                ("use_kernels", {"use_kernels": True}),
                ("kernel_config", {"kernel_config": {"RMSNorm": KERNEL}}),
                ("use_pretrained_backbone", {"use_pretrained_backbone": True}),
            )
        ),
        (
            {"config": {"model_type": "timm_wrapper", "architecture": "hf-hub:a/b"}},
            "not the bare name of a timm architecture",
        ),
        (
            {"config": {"model_type": "timm_wrapper", "model_args": {"checkpoint_path": "x"}}},
            "timm's option 'checkpoint_path'",
        ),
    ],
)
def test_somebody_elses_transformers_config_loads_nothing(
    change: dict[str, Any], message: str
) -> None:
    pytest.importorskip("transformers")
    arguments = {"class": "ViTModel", "config": {"model_type": "vit", **TINY}, **change}
    with pytest.raises(BlockfitError, match=message) as raised:
        skeleton(Source("transformers", "x", arguments))
    assert "\n" not in str(raised.value)


def test_a_config_that_names_code_is_saved_without_the_name() -> None:
    model: Any = tiny("ViTModel")
    model.config.auto_map = {"AutoModel": "someone/code--m.M"}
    model.config.parts = [{"_attn_implementation_autoset": True, "kernel_size": 3}]
    source = source_of(model)
    assert source.library == "transformers"
    assert "auto_map" not in source.arguments["config"]
    assert source.arguments["config"]["parts"] == [{"kernel_size": 3}]
    skeleton(source)


def test_a_torchvision_model_is_rebuilt_from_known_arguments_only() -> None:
    source = source_of(torchvision_vit())
    arguments = {**source.arguments, "conv_stem_configs": []}
    with pytest.raises(BlockfitError, match="not rebuilt from 'conv_stem_configs'"):
        skeleton(Source("torchvision", "x", arguments))


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
