"""What was saved is what loads: parts that are no tensors, foreign loaders, saving again."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from exporting import MAPS
from families import FAMILIES, one_thread  # noqa: F401
from safetensors.torch import save_file
from stored import PLAN, output, saved, small_model
from torch import nn

import blockfit
from blockfit.errors import BlockfitError
from blockfit.evaluation.stages import quantize
from blockfit.formats import folder as store
from blockfit.formats.manifest import read_manifest
from blockfit.models.attributes import first_difference
from blockfit.models.load import source_of

TIMM, VIT, TORCHVISION = "timm-vit", "vit-classifier", "torchvision-vit"


def save(folder: Path, name: str, change: Callable[[Any], Any]) -> tuple[nn.Module, list[str]]:
    """Save a compressed model that was changed; what was warned of."""
    model, blocks, source, _ = small_model(name)
    change(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store.save(folder, model, blocks, PLAN, source=source, report={})
    return model, [str(one.message) for one in caught if "class of your own" in str(one.message)]


def _set(path: str, name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model.get_submodule(path), name, value)


CHANGES: dict[str, tuple[str, Callable[[nn.Module], Any], str]] = {
    "activation": (TIMM, _set("blocks.1.mlp", "act", nn.ReLU()), r"blocks\.1\.mlp\.act is ReLU"),
    "norm's eps": (TIMM, _set("norm", "eps", 1e-3), r"norm\.eps is 0\.001, rebuilt 1e-06"),
    "attention's scale": (TIMM, _set("blocks.1.attn", "scale", 0.9), r"attn\.scale is 0\.9"),
    "activation, transformers": (
        VIT, _set("vit.layers.1.mlp", "activation_fn", nn.ReLU()), "activation_fn is ReLU"
    ),
    "norm, torchvision": (TORCHVISION, _set("encoder.ln", "eps", 0.1), r"encoder\.ln\.eps is 0\.1"),
    "a function": (TIMM, _set("", "forward_head", lambda x: x.sum((1, 2))), "forward_head is"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_part_makes_the_model_the_users_own_and_is_named(
    name: str, tmp_path: Path
) -> None:
    """Case 3."""
    family, change, cause = CHANGES[name]
    model, warned = save(tmp_path / "small", family, change)
    assert len(warned) == 1
    with pytest.raises(BlockfitError, match=f"class of your own.*{cause}.*model="):
        blockfit.load(tmp_path / "small")
    again = FAMILIES[family].build(seed=5)
    change(again)
    images = FAMILIES[family].images()
    back = blockfit.load(tmp_path / "small", model=again)
    assert torch.equal(output(back, images), output(model, images))


def test_what_the_users_code_built_is_told_apart_before_it_is_compressed() -> None:
    """Case 3: exports of such a model are refused, too, for its library is not asked for it."""
    model = FAMILIES[TIMM].build()
    assert source_of(model).library == "timm"
    model.blocks[2].norm1.eps = 0.5  # type: ignore[union-attr,index]
    assert source_of(model).library == "module"


HEADS = {TIMM: "head", VIT: "classifier", TORCHVISION: "heads"}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_without_its_head_is_its_librarys_still(
    name: str, when: str, tmp_path: Path
) -> None:
    """``model.head = nn.Identity()`` is how features are had of a classifier."""

    def headless(model: nn.Module) -> nn.Module:
        setattr(model, HEADS[name], nn.Identity())
        return model

    family = FAMILIES[name]
    images = family.images()
    if when == "before":
        small = blockfit.compress(
            headless(family.build()), images.repeat(4, 1, 1, 1), remove=1
        ).model
        blockfit.save(small, tmp_path / "small")
    else:
        small, warned = save(tmp_path / "small", name, headless)
        assert warned == []
    back = blockfit.load(tmp_path / "small")
    assert torch.equal(output(back, images), output(small, images))
    assert back.blockfit_source.passed_on == (HEADS[name],)
    with pytest.raises(BlockfitError, match=f"{HEADS[name]} is nn.Identity in this model"):
        blockfit.export_plain(tmp_path / "small", tmp_path / "plain")
    values = json.loads((tmp_path / "small" / "blockfit.json").read_text())
    for wrong, why in (("nowhere", "has no attribute `nowhere`"), ("", "must name modules")):
        values["base"]["passed_on"] = [wrong]
        (tmp_path / "small" / "blockfit.json").write_text(json.dumps(values))
        with pytest.raises(BlockfitError, match=why):
            blockfit.load(tmp_path / "small")


def test_dropout_and_other_things_of_training_do_not_matter(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model.blocks[1].mlp.drop1 = nn.Dropout(0.5)
        model.train()
        model.note = "mine"

    _, warned = save(tmp_path / "small", TIMM, change)
    assert warned == []
    blockfit.load(tmp_path / "small")


def test_a_hook_that_changes_outputs_stops_the_save(tmp_path: Path) -> None:
    """Case 3: outputs are compared on one batch before anything is written."""
    with pytest.raises(BlockfitError, match="has other outputs; norm has a forward hook"):
        save(
            tmp_path / "small", TIMM,
            lambda model: model.norm.register_forward_hook(lambda module, args, out: 2 * out),
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_models_on_several_devices_are_compared_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = {torch.device("cpu"), torch.device("meta")}
    monkeypatch.setattr("blockfit.formats.rebuild._devices", lambda tensors: devices)
    save(tmp_path / "whole", TIMM, lambda model: None)
    blockfit.load(tmp_path / "whole")
    with pytest.raises(BlockfitError, match="has other outputs; norm has a forward hook"):
        save(
            tmp_path / "small", TIMM,
            lambda model: model.norm.register_forward_hook(lambda module, args, out: 2 * out),
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["weight-only", "dynamic"])
def test_models_in_int8_are_compared_as_well(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("torchao")
    model, blocks, source, _ = small_model(VIT)
    whole = store.Saved(model, blocks, PLAN, {}, source, {})
    tiny = quantize(whole, kind)
    store.save(tmp_path / "tiny", tiny.model, blocks, PLAN, source=tiny.source, report=tiny.report)
    blockfit.load(tmp_path / "tiny")
    last = [module for module in tiny.model.modules() if isinstance(module, torch.nn.LayerNorm)][-1]
    last.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(BlockfitError, match="has other outputs"):
        store.save(tmp_path / "wrong", tiny.model, blocks, PLAN, source=tiny.source, report={})
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


# -- saving again -------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    model, blocks, source, _ = small_model(VIT)
    store.save(tmp_path / "first", model, blocks, PLAN, source=source, report={})
    return tmp_path / "first"


def _trained(model: nn.Module) -> None:
    model.train()
    for parameter in model.parameters():
        parameter.data += 0.05


def _labels(model: Any) -> None:
    names = [f"animal {index}" for index in range(5)]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}


def _new_head(model: Any) -> None:
    model.classifier = nn.Linear(32, 7)


@pytest.mark.parametrize("change", [lambda model: None, _trained, _labels, _new_head])
def test_a_loaded_model_is_saved_again_whatever_was_done_with_it(
    change: Callable[[nn.Module], None], small: Path, tmp_path: Path
) -> None:
    """Case 5."""
    model: Any = blockfit.load(small)
    change(model)
    blockfit.save(copy.deepcopy(model), tmp_path / "again")
    back: Any = blockfit.load(tmp_path / "again")
    images = FAMILIES[VIT].images()
    assert torch.equal(output(back, images), output(model.eval(), images))
    if change is not _new_head:
        assert back.config.id2label == model.config.id2label
    assert read_manifest(tmp_path / "again" / "blockfit.json").plan == PLAN


def test_new_heads_of_other_libraries_are_saved_again(tmp_path: Path) -> None:
    """Case 5."""
    for name, change in (
        (TIMM, lambda model: model.reset_classifier(9)),
        (TORCHVISION, lambda model: setattr(model.heads, "head", nn.Linear(32, 3))),
    ):
        saved(tmp_path / name, name)
        model = blockfit.load(tmp_path / name)
        change(model)
        blockfit.save(model, tmp_path / f"{name} again")
        back, images = blockfit.load(tmp_path / f"{name} again"), FAMILIES[name].images()
        assert torch.equal(output(back, images), output(model, images))


def test_compiled_models_are_saved_and_whole_ones_are_refused(tmp_path: Path, small: Path) -> None:
    blockfit.save(torch.compile(blockfit.load(small)), tmp_path / "compiled")
    blockfit.load(tmp_path / "compiled")
    with pytest.raises(BlockfitError, match="nothing was taken out of this"):
        blockfit.save(FAMILIES[VIT].build(), tmp_path / "whole")


# -- foreign loaders ----------------------------------------------------------------------------


def test_foreign_loaders_refuse_a_saved_folder(small: Path, tmp_path: Path) -> None:
    """Case 4."""
    transformers: Any = pytest.importorskip("transformers")
    for cls in ("AutoModel", "AutoModelForImageClassification", "ViTForImageClassification"):
        with pytest.raises(Exception, match="blockfit"):
            getattr(transformers, cls).from_pretrained(small)
    with pytest.raises(Exception, match="blockfit"):
        transformers.pipeline("image-classification", model=str(small))
    timm: Any = pytest.importorskip("timm")
    with pytest.raises((RuntimeError, KeyError, OSError)):
        timm.create_model(f"local-dir:{small}", pretrained=True)


def test_what_timm_saves_of_a_compressed_model_does_not_load(tmp_path: Path) -> None:
    """Case 4: timm reads strictly, and misses the blocks."""
    timm: Any = pytest.importorskip("timm")
    saved(tmp_path / "small", TIMM)
    timm.models.save_for_hf(blockfit.load(tmp_path / "small"), tmp_path / "timm")
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)


def test_save_pretrained_writes_the_hub_form_beside_what_a_training_run_keeps(
    small: Path, tmp_path: Path
) -> None:
    """Case 4: as ``Trainer.save_model`` calls it."""
    transformers: Any = pytest.importorskip("transformers")
    model: Any = blockfit.load(small)
    _labels(model)
    (tmp_path / "out").mkdir()
    for name in ("training_args.bin", "README.md"):
        (tmp_path / "out" / name).write_text("mine")
    for _ in range(2):  # every epoch
        model.save_pretrained(tmp_path / "out", state_dict=model.state_dict())
    auto = transformers.AutoModelForImageClassification
    back = auto.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    images = FAMILIES[VIT].images()
    assert torch.allclose(output(back, images), output(model, images), atol=1e-5)
    assert back.config.id2label == model.config.id2label
    for name in ("training_args.bin", "README.md"):
        assert (tmp_path / "out" / name).read_text() == "mine"
    FAMILIES[VIT].build().save_pretrained(tmp_path / "other")
    with pytest.raises(BlockfitError, match=r"which is of another checkpoint"):
        model.save_pretrained(tmp_path / "other")


def test_methods_that_cannot_write_a_right_form_say_what_can() -> None:
    model, _, _, _ = small_model(VIT, MAPS)
    with pytest.raises(BlockfitError, match="does not upload; use"):
        model.save_pretrained("x", push_to_hub=True)  # type: ignore[operator]


# -- folders of earlier versions ----------------------------------------------------------------


def test_a_folder_as_version_0_1_wrote_it_still_loads(tmp_path: Path) -> None:
    """Formats 1 had a stock config and weights that call themselves torch's."""
    model = saved(tmp_path / "small", "demo")
    values = json.loads((tmp_path / "small" / "blockfit.json").read_text("utf-8"))
    old = tmp_path / "old"
    old.mkdir()
    plan = [
        {"start": 0, "stop": 1, "map": "low-rank", "rank": 3, "per_token_type": False},
        {"start": 2, "stop": 4, "map": "affine", "rank": None, "per_token_type": False},
    ]
    text = {
        "format": 1,
        "versions": {"blockfit": "0.1.0", "torch": "2.9.0", "timm": None, "transformers": None,
                     "torchvision": None},
        "base": {"library": "demo", "name": "demo", "arguments": values["base"]["arguments"],
                 "licence": "MIT", "preprocessing": None},
        "blocks": {key: values["blocks"][key] for key in ("path", "depth", "width",
                   "prefix_tokens", "input_name", "output_items")},
        "plan": plan,
        "dtype": "float32",
        "other_dtypes": {},
        "tied": {},
        "layout": values["layout"],
        "report": {"seed": 0},
    }  # fmt: skip
    (old / "blockfit.json").write_text(json.dumps(text, indent=2), "utf-8")
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(output(blockfit.load(old), images), output(model, images))


# -- every family -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_loads_as_it_was_saved_and_one_change_at_random_is_noticed(
    name: str, tmp_path: Path
) -> None:
    model, blocks, source, images = small_model(name)
    run = FAMILIES[name].run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store.save(tmp_path / "small", model, blocks, PLAN, source=source, report={})
        own = FAMILIES[name].build() if source.library == "module" else None
        back = blockfit.load(tmp_path / "small", model=own)
    assert source.library == "module" or first_difference(model, back) is None
    with torch.no_grad():
        for one, other in zip(_flat(run(model, images)), _flat(run(back, images)), strict=True):
            assert torch.equal(one, other)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    if not norms or source.library == "module":
        return
    norms[sum(name.encode()) % len(norms)].eps *= 3
    assert "eps is" in str(first_difference(model, back))


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return (
        [tensor for item in items for tensor in _flat(item)]
        if isinstance(value, (dict, list, tuple))
        else []
    )


FRESH = """
import sys, torch, blockfit
from safetensors.torch import load_file
images, expected = (load_file(sys.argv[1] + "/traffic")[key] for key in ("images", "out"))
model = blockfit.load(sys.argv[1] + "/small")
torch.set_num_threads(1)
with torch.no_grad():
    out = model(images)
out = out if isinstance(out, torch.Tensor) else out[0]
assert torch.equal(out, expected)
"""


@pytest.mark.parametrize("name", [TIMM, VIT, TORCHVISION])
def test_a_fresh_process_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    model, images = saved(tmp_path / "small", name), FAMILIES[name].images()
    save_file({"images": images, "out": output(model, images)}, tmp_path / "traffic")
    fresh.python("-c", FRESH, tmp_path)


@pytest.mark.parametrize("budget", [{"spans": ["1:2"]}, {"params": 0.8}], ids=str)
def test_a_trainer_goes_on_from_its_own_checkpoint(budget: dict[str, Any], tmp_path: Path) -> None:
    """What ``Trainer`` saves of a compressed model on its way is enough to go on, bit for bit."""
    transformers: Any = pytest.importorskip("transformers")
    images = FAMILIES[VIT].images(16)
    rows = [{"pixel_values": one, "labels": number % 5} for number, one in enumerate(images)]

    def trainer(model: nn.Module) -> Any:
        how = {"learning_rate": 1e-3, "max_steps": 4, "save_steps": 2, "report_to": "none"}
        quiet = {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4}
        arguments = transformers.TrainingArguments(str(tmp_path / "runs"), **how, **quiet)
        return transformers.Trainer(model, arguments, train_dataset=rows)

    small = blockfit.compress(FAMILIES[VIT].build(), images, **budget, final=0)
    blockfit.save(small, tmp_path / "small")
    whole, again = blockfit.load(tmp_path / "small"), blockfit.load(tmp_path / "small")
    trainer(whole).train()
    trainer(again).train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-2"))
    first = blockfit.load(tmp_path / "small").state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert any(not torch.equal(value, first[name]) for name, value in whole.state_dict().items())


def test_options_of_a_library_are_refused_for_a_saved_folder(small: Path) -> None:
    with pytest.raises(BlockfitError, match=r"device= and dtype= alone; leave num_labels= out"):
        blockfit.load(small, num_labels=3)
