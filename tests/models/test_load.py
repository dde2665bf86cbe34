"""Where models came from, and their architecture again without weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import MODELS, TINY, filled, output, tensors, timm_model, tiny, torchvision_vit
from torch import nn

from blockfit.errors import BlockfitError
from blockfit.models.load import Source, skeleton, source_of
from blockfit.models.preprocessing import Preprocessing


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
