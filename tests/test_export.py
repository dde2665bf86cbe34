"""Plain checkpoints: read by their own library where blockfit cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import blockfit_command
from families import FAMILIES
from families import one_thread as one_thread
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blockfit.blocks import find_blocks
from blockfit.data import images as open_images
from blockfit.errors import BlockfitError
from blockfit.export import export_plain, plain_model
from blockfit.head import primary_output
from blockfit.models import source_of
from blockfit.originals import Originals
from blockfit.preprocess import Preprocessing
from blockfit.probe import call
from blockfit.repair import Options, solve
from blockfit.spans import Plan, Replacement, Span
from blockfit.store import Saved, load_saved, save

PLAN = Plan((Replacement(Span(0, 1), "identity"), Replacement(Span(2, 3), "folded")))

LOADERS = {
    "transformers": "transformers.{cls}.from_pretrained(folder)",
    "timm": "timm.create_model('local-dir:' + folder, pretrained=True)",
}
ALONE = """
import sys
sys.modules["blockfit"] = None  # importing it now fails
import {library}, torch
from safetensors.torch import load_file, save_file
folder, traffic = sys.argv[1:]
model = {loader}.eval()
with torch.no_grad():
    out = model(load_file(traffic + "/in.safetensors")["images"])
out = out if isinstance(out, torch.Tensor) else out.logits if "logits" in out else out[0]
save_file({{"out": out.contiguous()}}, traffic + "/out.safetensors")
"""


def saved(
    folder: Path, name: str, plan: Plan = PLAN, preprocessing: Preprocessing | None = None
) -> Saved:
    """A tiny model, solved with ``plan`` and saved."""
    family = FAMILIES[name]
    model = family.build()
    pictures = family.images(12)
    blocks = find_blocks(model, pictures)
    source = source_of(model)
    if preprocessing is not None:
        object.__setattr__(source, "preprocessing", preprocessing)
    originals = Originals(model, blocks, open_images(pictures, batch_size=6))
    solve(originals, plan, Options(repair="mlp")).apply(model, blocks)
    save(folder, model, blocks, plan, source=source, report={})
    return load_saved(folder)


def output(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return primary_output(call(model, images))


def plain(size: int) -> Preprocessing:
    half = [0.5, 0.5, 0.5]
    return Preprocessing.plain(size, channels=3, mean=half, std=half, interpolation="bicubic")


@pytest.mark.parametrize("name", ["dinov2-classifier", "vit", "deit-teacher", "timm-vit"])
def test_the_library_alone_reads_it_and_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    small = saved(tmp_path / "small", name, preprocessing=plain(family.image))
    done = export_plain(small, tmp_path / "plain")
    assert done.blocks == 2
    assert done.error is not None
    assert done.error < 1e-5
    assert done.parameters == sum(p.numel() for p in small.model.parameters())
    pictures = family.images(4, seed=9)
    save_file({"images": pictures}, tmp_path / "in.safetensors")
    loader = LOADERS[done.library].format(cls=type(small.model).__name__)
    code = ALONE.format(library=done.library, loader=loader)
    subprocess.run(
        [sys.executable, "-c", code, str(done.folder), str(tmp_path)], check=True, timeout=300
    )
    found = load_file(tmp_path / "out.safetensors")["out"]
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
    small = saved(tmp_path / "small", "dinov2-backbone", preprocessing=plain(32))
    with pytest.raises(BlockfitError, match="keep the folder that blockfit saved"):
        export_plain(small, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_checkpoint_that_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = saved(tmp_path / "small", "timm-vit", preprocessing=plain(32))
    wrong = FAMILIES["timm-vit"].build(seed=7)
    monkeypatch.setattr("blockfit.export.load_model", lambda folder: wrong)
    with pytest.raises(BlockfitError, match="output differs"):
        export_plain(small, tmp_path / "plain")
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_the_command_tells_what_it_wrote_and_keeps_what_is_there(tmp_path: Path) -> None:
    saved(tmp_path / "small", "timm-vit", preprocessing=plain(32))
    command = ("export", tmp_path / "small", "-o", tmp_path / "plain")
    told: dict[str, Any] = blockfit_command(*command, "--plain", "--json").json
    assert (told["form"], told["library"], told["blocks"]) == ("plain", "timm", 2)
    assert told["max_abs_error"] < 1e-5
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["model_args"]["depth"] == 2
    assert "--overwrite" in blockfit_command(*command, "--plain").error
    assert blockfit_command(*command, "--plain", "--overwrite").code == 0
    assert "say in which form" in blockfit_command(*command).error
    wrong = blockfit_command("export", tmp_path, "-o", tmp_path / "x", "--plain").error
    assert "no folder that blockfit saved" in wrong
