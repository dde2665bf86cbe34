"""Plain checkpoints: read by their own library where blockfit cannot be imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import blockfit_command
from exporting import elsewhere, environment, output, prepared, saved
from families import EXPORTED, FAMILIES
from families import one_thread as one_thread
from safetensors.torch import load_file

from blockfit.errors import BlockfitError
from blockfit.fit.plan import Plan, Replacement, Span
from blockfit.formats.plain import export_plain, plain_model


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment without blockfit."""
    return environment(tmp_path_factory.mktemp("environment"))


@pytest.mark.parametrize("name", EXPORTED["plain"])
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
    small = saved(tmp_path / "small", "torchvision-vit")
    with pytest.raises(BlockfitError, match="has no checkpoint format of its own"):
        export_plain(small, tmp_path / "plain")


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
