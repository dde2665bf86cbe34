"""torch.export programs: read where blockfit is not, by torch alone."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import blockfit_command
from exporting import MAPS, alone, elsewhere, environment, nearly_empty, output, prepared, saved
from families import EXPORTED, FAMILIES
from families import one_thread as one_thread
from families_plain import PLAIN, PlainViT
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.formats.program import export_program
from blockfit.formats.traced import Bare, Resolution, by_name, run, trace


def test_it_runs_where_blockfit_is_not(tmp_path: Path) -> None:
    small = saved(tmp_path / "small", "torchvision-vit", MAPS)
    done = export_program(small, tmp_path / "small.pt2")
    assert (done.blocks, done.size, done.batch, done.outputs) == (2, (32, 32), None, ("output",))
    assert done.parity.images == 16
    assert done.parity.agreement == 1
    images = FAMILIES["torchvision-vit"].images(5, seed=9)
    found = elsewhere(environment(tmp_path / "env"), done.path, images, tmp_path)
    assert torch.allclose(found, output(small.model, images), atol=1e-5)


@pytest.mark.parametrize("name", EXPORTED["torch.export"])
def test_every_family_is_one_graph(name: str) -> None:
    """Traced with two images, run on three; hand-written models that count theirs, on two."""
    small, family = nearly_empty(name), FAMILIES[name]
    counted = name in PLAIN
    bare = Bare(small.model)
    program: Any = trace(bare, family.images(2), any_batch=not counted).module()
    images = family.images(2 if counted else 3, seed=9)
    torch.manual_seed(0)  # masked autoencoders draw: the graph draws as the model does
    expected = run(bare, images)
    torch.manual_seed(0)
    with torch.no_grad():
        found = by_name(program(images))
    assert found.keys() == expected.keys()
    for output_name, value in expected.items():
        torch.testing.assert_close(found[output_name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["timm-vit", "torchvision-vit"])
def test_narrowed_blocks_run_where_blockfit_is_not(name: str, tmp_path: Path) -> None:
    small = saved(tmp_path / "small", name, MAPS, share=0.5)
    assert small.plan.narrowings
    done = export_program(small, tmp_path / "small.pt2")
    images = FAMILIES[name].images(5, seed=9)
    found = alone(done.path, images, tmp_path)
    assert torch.allclose(found, output(small.model, images), atol=1e-5)


def test_the_program_knows_nothing_of_blockfit_and_of_this_machine(tmp_path: Path) -> None:
    small = saved(tmp_path / "small", "dinov2-classifier", MAPS)
    done = export_program(small, tmp_path / "small.pt2")
    with zipfile.ZipFile(done.path) as archive:
        names = [name for name in archive.namelist() if "/extra/" not in name]
        held = {name: archive.read(name) for name in names}
    for word in (b"blockfit", str(Path(__file__).parents[2]).encode(), b"site-packages"):
        assert [name for name, content in held.items() if word in content] == []
    told = {"blockfit.plan": "", "blockfit.preprocessing": ""}
    torch.export.load(done.path, extra_files=told)
    assert '"low-rank"' in told["blockfit.plan"]


def test_the_parts_of_an_output_keep_their_names(tmp_path: Path) -> None:
    small = saved(tmp_path / "small", "clip-vision", MAPS)
    done = export_program(small, tmp_path / "small.pt2")
    assert done.outputs == ("last_hidden_state", "pooler_output")
    assert done.parity.agreement is None


def test_a_model_that_counts_its_images_is_told_of_and_exported_for_a_fixed_number() -> None:
    bare = Bare(PlainViT().eval())
    images = torch.randn(3, 3, 32, 32)
    with pytest.raises(BlockfitError, match=r"len\(images\).*batch=N"):
        trace(bare, images)
    program: Any = trace(bare, images, any_batch=False).module()
    with torch.no_grad():
        assert torch.allclose(program(images), bare(images), atol=1e-6)


class Unfollowable(PlainViT):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * float(images.sum())


def test_a_model_that_cannot_be_followed_is_named() -> None:
    with pytest.raises(BlockfitError, match=r"torch\.export cannot follow Unfollowable"):
        trace(Bare(Unfollowable().eval()), torch.randn(2, 3, 32, 32), any_batch=False)


def test_a_program_that_differs_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = saved(tmp_path / "small", "timm-vit", MAPS, prepared(32))
    wrong = trace(Bare(FAMILIES["timm-vit"].build(seed=7)), torch.randn(2, 3, 32, 32))
    monkeypatch.setattr("blockfit.formats.program.trace", lambda *a, **k: wrong)
    with pytest.raises(BlockfitError, match="program was not kept: its outputs differ"):
        export_program(small, tmp_path / "small.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("text", ["0", "12x", "x12", "1.5", "big", ""])
def test_a_resolution_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(BlockfitError, match="cannot read the resolution"):
        Resolution.parse(text)


def test_resolutions_are_height_first() -> None:
    assert Resolution.parse("224").size == (224, 224)
    assert Resolution.parse("224x320").size == (224, 320)
    assert Resolution.parse("dynamic").size is None


def test_the_command_exports_at_another_resolution_and_says_how_to_run_it(tmp_path: Path) -> None:
    saved(tmp_path / "small", "timm-vit", MAPS, prepared(32))
    command = ("export", tmp_path / "small", "-o", tmp_path / "small.pt2")
    done = blockfit_command(*command, "--pt2", "--resolution", "40x48")
    assert done.code == 0, done.err
    assert "for any number of images of 40 × 48 pixels" in done.out
    assert "torch.export.load(" in done.out
    program: Any = torch.export.load(tmp_path / "small.pt2").module()
    assert program(torch.zeros(3, 3, 40, 48)).shape == (3, 5)
    assert "is there already" in blockfit_command(*command, "--pt2").error


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--pt2", "--resolution", "33"], "no multiple of the model's patches of 8 × 8"),
        (["--pt2", "--resolution", "dynamic"], "one resolution"),
        (["--pt2", "--onnx"], "--onnx and --pt2 are two forms"),
        (["--pt2", "--opset", "18"], "--opset goes with --onnx only"),
        (["--pt2", "--fixed-batch", "0"], "at least 1 image"),
        (["--plain", "--resolution", "40"], "--resolution has no use with --plain"),
        (["--plain"], "the affine map of span 0:1 needs a module"),
        (["--onnx"], "must end in .onnx"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(
    words: list[str], sentence: str, refusing: Path, tmp_path: Path
) -> None:
    told = blockfit_command("export", refusing, "-o", tmp_path / "new.pt2", *words)
    assert sentence in told.error
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusing") / "small"
    saved(folder, "timm-vit", MAPS, prepared(32))
    return folder


def test_bare_gives_the_tensors_in_lists_under_numbers() -> None:
    class Lists(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Any]:
            return {"maps": (images, 2 * images), "loss": None}

    assert list(Bare(Lists())(torch.ones(1))) == ["maps_0", "maps_1"]
