"""Plain checkpoints: read by their own library where blockfit cannot be imported."""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import blockfit_command
from exporting import alone, elsewhere, environment, output, prepared, saved, uniform
from families import EXPORTED, FAMILIES, POOLED_BY_AN_MLP
from families import one_thread as one_thread
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.fit.plan import Narrowing, Plan, Replacement, Span
from blockfit.formats.folder import Saved
from blockfit.formats.plain import export_plain, plain_model
from blockfit.models.blocks import find_chain
from blockfit.models.head import primary_output
from blockfit.models.load import source_of
from blockfit.models.preprocessing import Preprocessing
from blockfit.models.stock import Stock
from blockfit.provenance import installed_versions


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment without blockfit."""
    return environment(tmp_path_factory.mktemp("environment"))


@pytest.mark.parametrize("name", ["dinov2-classifier", "timm-vit"])
def test_the_library_alone_reads_it_and_gives_the_same_outputs(
    name: str, tmp_path: Path, python: Path
) -> None:
    family = FAMILIES[name]
    small = saved(tmp_path / "small", name, preprocessing=prepared(family.image))
    done = export_plain(small, tmp_path / "plain")
    assert done.blocks == 2
    assert done.parity.images == 16
    assert done.parity.max_abs_error < 1e-5
    assert done.parameters == sum(p.numel() for p in small.model.parameters())
    pictures = family.images(4, seed=9)
    found = elsewhere(python, done.folder, pictures, tmp_path)
    assert torch.allclose(found, output(small.model, pictures), atol=1e-5)


def test_the_file_is_as_small_as_the_saved_one(tmp_path: Path) -> None:
    small = saved(tmp_path / "small", "dinov2-classifier")
    export_plain(small, tmp_path / "plain")
    sizes = [(tmp_path / part / "model.safetensors").stat().st_size for part in ("small", "plain")]
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0] + 4096
    values = load_file(tmp_path / "plain" / "model.safetensors")
    assert {name.split(".")[3] for name in values if ".layer." in name} == {"0", "1"}


def test_lists_with_an_entry_per_block_lose_those_of_the_removed_ones(tmp_path: Path) -> None:
    small = saved(tmp_path / "small", "dinov2-classifier")
    small.source.arguments["config"]["per_block"] = ["a", "b", "c", "d"]
    small.source.arguments["config"]["another"] = 4  # a number that equals the depth by chance
    _, source = plain_model(small)
    assert source.arguments["config"]["per_block"] == ["b", "d"]
    assert source.arguments["config"]["num_hidden_layers"] == 2
    assert source.arguments["config"]["another"] == 4


def test_maps_that_need_a_module_are_refused_by_name(tmp_path: Path) -> None:
    plan = Plan((Replacement(Span(1, 2), "identity"), Replacement(Span(3, 4), "affine")))
    small = saved(tmp_path / "small", "dinov2-classifier", plan)
    with pytest.raises(BlockfitError, match=r"the affine map of span 3:4 .*--plain"):
        export_plain(small, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_models_without_a_checkpoint_format_are_refused(tmp_path: Path) -> None:
    family = FAMILIES["plain"]
    model = family.build()
    whole = Saved(model, find_chain(model), Plan(), {}, source_of(model), installed_versions())
    with pytest.raises(BlockfitError, match="has no checkpoint format of its own"):
        export_plain(whole, tmp_path / "plain")


def test_a_backbone_whose_outputs_count_blocks_is_refused(tmp_path: Path) -> None:
    small = saved(tmp_path / "small", "dinov2-backbone", preprocessing=prepared(32))
    with pytest.raises(BlockfitError, match="keep the folder that blockfit saved"):
        export_plain(small, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_checkpoint_that_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = saved(tmp_path / "small", "timm-vit", preprocessing=prepared(32))
    wrong = FAMILIES["timm-vit"].build(seed=7)
    monkeypatch.setattr("blockfit.formats.plain.load_model", lambda folder: wrong)
    with pytest.raises(BlockfitError, match="outputs differ"):
        export_plain(small, tmp_path / "plain")
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_the_command_tells_what_it_wrote_and_keeps_what_is_there(tmp_path: Path) -> None:
    saved(tmp_path / "small", "timm-vit", preprocessing=prepared(32))
    command = ("export", tmp_path / "small", "-o", tmp_path / "plain")
    told: dict[str, Any] = blockfit_command(*command, "--plain", "--json").json
    assert (told["form"], told["library"], told["blocks"]) == ("plain", "timm", 2)
    assert told["max_abs_error"] < 1e-5
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["model_args"]["depth"] == 2
    assert "--overwrite" in blockfit_command(*command, "--plain").error
    assert blockfit_command(*command, "--plain", "--overwrite").code == 0
    assert "no form was given" in blockfit_command(*command).error
    wrong = blockfit_command("export", tmp_path, "-o", tmp_path / "x", "--plain").error
    assert "no folder that blockfit saved" in wrong


def stock(folder: Path, saved: Saved) -> nn.Module:
    """What the library alone makes of an exported folder, weights loaded strictly."""
    library = saved.source.library
    if library == "transformers":
        cls = getattr(pytest.importorskip("transformers"), saved.source.arguments["class"])
        model, told = cls.from_pretrained(folder, output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
    elif library == "timm":
        timm = pytest.importorskip("timm")
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    elif library == "open_clip":
        model = pytest.importorskip("open_clip").create_model(f"local-dir:{folder}")
    else:
        arguments = json.loads((folder / "config.json").read_text())
        model = pytest.importorskip("torchvision").models.VisionTransformer(**arguments)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def told(name: str, model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return primary_output(FAMILIES[name].run(model, images))


@pytest.mark.parametrize("name", EXPORTED["stock"])
def test_one_width_for_all_mlps_is_a_stock_checkpoint(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    small = uniform(name, 0.5, (), prepared(family.image))
    done = export_plain(small, tmp_path / "plain")
    again, images = stock(tmp_path / "plain", small), family.images(3, seed=9)
    assert type(again) is type(small.model)
    assert done.parameters == sum(p.numel() for p in again.parameters())
    assert done.parameters < sum(p.numel() for p in family.build().parameters())
    torch.testing.assert_close(
        told(name, again, images), told(name, small.model, images), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["timm-vit", "dinov2-classifier", "torchvision-vit", "open_clip"])
def test_fewer_blocks_and_narrower_mlps_at_a_time(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    small = uniform(name, 0.75, (1, 2), prepared(family.image))
    assert export_plain(small, tmp_path / "plain").blocks == 2
    again, images = stock(tmp_path / "plain", small), family.images(3, seed=9)
    torch.testing.assert_close(
        told(name, again, images), told(name, small.model, images), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["vit-classifier", "torchvision-vit", "open_clip"])
def test_a_narrower_model_loads_where_blockfit_is_not(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    small = uniform(name, 0.5, (), prepared(family.image))
    done = export_plain(small, tmp_path / "plain")
    pictures = family.images(4, seed=9)
    found = alone(done.folder, pictures, tmp_path)
    torch.testing.assert_close(found, told(name, small.model, pictures), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(POOLED_BY_AN_MLP))
def test_a_config_that_cannot_say_the_width_is_refused(name: str, tmp_path: Path) -> None:
    small = uniform(name, 0.5, (), prepared(FAMILIES[name].image))
    with pytest.raises(BlockfitError, match=r"cannot be built with 4 blocks and \d+ neurons"):
        export_plain(small, tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


def test_a_ratio_that_must_be_whole_is_refused_where_it_is_not(tmp_path: Path) -> None:
    """Of DINOv2 transformers takes whole ratios only; 80 of 128 neurons would be 2.5."""
    small = uniform("dinov2-classifier", 0.625, (), prepared(32))
    says = Stock(FAMILIES["dinov2-classifier"].build(), small.blocks, small.source).says
    expected = _builds_with_ratio(2.5)
    assert says(small.plan) is expected
    assert says(uniform("dinov2-classifier", 0.5).plan)


def _builds_with_ratio(ratio: float) -> bool:
    config = pytest.importorskip("transformers").Dinov2Config
    try:
        return bool(config(mlp_ratio=ratio).mlp_ratio == ratio)
    except TypeError:
        return False
    except Exception as error:
        return "mlp_ratio" not in str(error)


def test_several_widths_are_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    small = uniform("timm-vit", 0.5, (), prepared(32))
    cuts = small.plan.narrowings
    other = replace(small, report={"parameters_before": 1000, "parameters_after": 631})
    for plan, why in (
        (Plan((), cuts[1:]), "block 0 keeps all and block 1 keeps 64 of its MLP's neurons"),
        (Plan((), (replace(cuts[0], kept=32), *cuts[1:])), "block 0 keeps 32 and block 1 keeps 64"),
        (
            Plan((), (*cuts, Narrowing(2, "values", 8, 16, 2))),
            "block 2 keeps 8 of 16 dimensions of every head's values",
        ),
    ):
        with pytest.raises(BlockfitError, match=why) as error:
            export_plain(replace(other, plan=plan), tmp_path / "plain")
        assert "blockfit compress timm/vit_tiny_patch16_224" in str(error.value)
        assert "--params 64% --plain" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("vit-classifier", torch.float16),
        ("timm-vit", torch.bfloat16),
        ("torchvision-vit", torch.bfloat16),
        ("open_clip", torch.float16),
    ],
)
def test_weights_in_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family = FAMILIES[name]
    small = uniform(name, 0.5, (), prepared(family.image))
    export_plain(small, tmp_path / "whole")
    export_plain(small, tmp_path / "half", dtype=str(dtype).removeprefix("torch."))
    (whole,), (half,) = (
        list((tmp_path / form).glob("*.safetensors")) for form in ("whole", "half")
    )
    assert {value.dtype for value in load_file(half).values() if value.is_floating_point()} == {
        dtype
    }
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    model, images = stock(tmp_path / "half", small).float(), family.images(3, seed=9)
    rounded = copy.deepcopy(small.model).to(dtype).float()
    torch.testing.assert_close(
        told(name, model, images), told(name, rounded, images), rtol=1e-5, atol=1e-5
    )


def test_pictures_are_prepared_the_same() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    timm = Preprocessing(
        "timm",
        {
            "input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.3, 0.4], "crop_pct": 1.0, "crop_mode": "center",
        },
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        export_plain(uniform("open_clip", preprocessing=timm), Path(folder) / "plain")
        library = pytest.importorskip("open_clip")
        made = library.create_model_and_transforms(f"local-dir:{folder}/plain")
        torch.testing.assert_close(made[2](picture), timm(picture), rtol=0, atol=1e-6)
    settings = pytest.importorskip("transformers").ViTImageProcessor(size=32).to_dict()
    own = Preprocessing("transformers", settings)
    with tempfile.TemporaryDirectory() as folder:
        export_plain(uniform("vit-classifier", preprocessing=own), Path(folder) / "plain")
        processor = pytest.importorskip("transformers").AutoImageProcessor
        again = processor.from_pretrained(f"{folder}/plain")
        found = again(picture, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(found, own(picture), rtol=0, atol=1e-6)
