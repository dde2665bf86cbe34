"""One calibration, any number of budgets; what Python users hand to ``compress``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_images, small_pictures, small_vit

import blockfit
from blockfit.search.states import TracedImages


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return small_vit(depth=4)


@pytest.fixture(scope="module")
def calibration(model: torch.nn.Module) -> blockfit.Calibration:
    return blockfit.calibrate(model, small_images(40), final=8)


HOW: list[dict[str, Any]] = [
    {"params": "80%"},
    {"flops": 0.7},
    {"params": "80%", "recipe": "corp"},
    {"remove": 1},
    {"spans": [(1, 2)]},
    {"params": 0.8, "cuts": "mlp"},
    {"params": "80%"},
]


def test_every_budget_gives_what_compress_gives_from_the_same_images(
    calibration: blockfit.Calibration, model: torch.nn.Module
) -> None:
    for how in HOW:
        one = calibration.compress(**how)
        other = blockfit.compress(model, small_images(40), final=8, **how)
        assert one.plan == other.plan, how
        assert same(one.model, other.model), how
        ours, theirs = ({**r.report, "seconds": 0, "made": 0} for r in (one, other))
        assert ours == theirs, how


def test_the_original_is_run_once_for_all_budgets(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    start = TracedImages.__init__

    def counted(self: Any, *args: Any, **more: Any) -> None:
        made.append(self)
        start(self, *args, **more)

    monkeypatch.setattr(TracedImages, "__init__", counted)
    calibration = blockfit.calibrate(model, small_images(24), final=0)
    once = len(made)
    for share in (0.9, 0.8):
        calibration.compress(params=share)
        calibration.compress(params=share, recipe="plain")
    assert len(made) == once > 0
    assert "24 images, recipe default" in repr(calibration)


def test_what_a_calibration_cannot_do_is_said_and_leaves_it_usable(
    calibration: blockfit.Calibration, model: torch.nn.Module
) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for how, words in (
        ({}, "say what to remove"),
        ({"params": 0.8, "remove": 1}, "not both"),
        ({"max_kl": 0.5}, "judge=True"),
        ({"params": 0.8, "protect": [1]}, "unknown option 'protect'"),
        ({"params": 1e-6}, "did you mean 0.0001 or 0.01%"),
        ({"params": 0.011, "cuts": "keys"}, "cannot be reached|with all gone"),
        ({"spans": [(1, 9)]}, "leaves the model"),
    ):
        with pytest.raises(blockfit.BlockfitError, match=words):
            calibration.compress(**how)
    assert calibration.compress(remove=1).plan.removed_blocks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_budget_of_loss_needs_images_that_were_set_apart(model: torch.nn.Module) -> None:
    calibration = blockfit.calibrate(model, small_images(80), judge=True, cuts="blocks")
    found = calibration.compress(max_kl=50.0).report
    assert found["judged"]["images"] == 16
    assert found["judged"]["bound"] <= 50.0


def test_pillow_images_come_alone_in_lists_and_with_labels() -> None:
    model = blockfit.load("demo")
    pixels = np.random.default_rng(0).integers(0, 255, (9, 8, 8), dtype=np.uint8)
    pictures = [Image.fromarray(one) for one in pixels]
    whole = next(iter(blockfit.images(pixels, model)))
    assert torch.equal(next(iter(blockfit.images(pictures, model))), whole)
    assert torch.equal(next(iter(blockfit.images(pictures[0], model))), whole[:1])
    labels = np.arange(9)
    for source in (
        (pictures, labels),
        (pictures, labels.tolist()),
        list(zip(pictures, labels, strict=True)),
    ):
        batch = next(blockfit.images(source, model).batches())
        assert torch.equal(batch.inputs, whole)
        assert batch.labels is not None
        assert batch.labels.tolist() == labels.tolist()
    with pytest.raises(blockfit.BlockfitError, match="9 images, but 3 labels"):
        blockfit.images((pictures, [1, 2, 3]), model)
    result = blockfit.compress(model, pictures, spans=[(3, 5)], final=0)
    assert result.plan.spans == (blockfit.Span(3, 5),)


def test_a_function_prepares_images_for_a_model_that_does_not_say_how() -> None:
    model = small_vit(depth=4)
    pictures = [Image.new("RGB", (12, 12), (7 * i, 255 - 9 * i, 3 * i)) for i in range(16)]

    def prepare(picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1) / 255

    made = torch.stack([prepare(picture) for picture in pictures])
    how: dict[str, Any] = {"spans": [(1, 2)], "final": 0}
    one = blockfit.compress(model, pictures, preprocessing=prepare, **how)
    assert same(one.model, blockfit.compress(model, made, **how).model)
    told = one.evaluate(pictures, preprocessing=prepare, measure=False)
    assert told.images == 16
    with pytest.raises(blockfit.BlockfitError, match="have their preprocessing already"):
        blockfit.compress(model, small_images(16), preprocessing=prepare, **how)
    with pytest.raises(blockfit.BlockfitError, match="prepared already"):
        blockfit.compress(model, small_pictures(16), preprocessing=prepare, **how)


def test_sweeps_and_analyses_take_a_function_that_prepares_images(tmp_path: Path) -> None:
    model = small_vit(depth=4)
    pictures = [Image.new("RGB", (12, 12), (7 * i, 9, 0)) for i in range(16)]

    def prepare(picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1) / 255

    made = torch.stack([prepare(picture) for picture in pictures])
    how: dict[str, Any] = {"points": [0.8], "final": 0}
    one = blockfit.sweep(model, pictures, tmp_path / "one", preprocessing=prepare, **how)
    other = blockfit.sweep(model, made, tmp_path / "other", **how)
    assert one.entries[0].plan == other.entries[0].plan
    assert one.entries[0].held_out == other.entries[0].held_out
    tables = blockfit.analyze(model, pictures, preprocessing=prepare).tables
    assert tables == blockfit.analyze(model, made).tables
    with pytest.raises(blockfit.BlockfitError, match="have their preprocessing already"):
        blockfit.analyze(model, small_images(16), preprocessing=prepare)
    with pytest.raises(blockfit.BlockfitError, match="have their preprocessing already"):
        blockfit.sweep(model, small_images(16), tmp_path / "third", preprocessing=prepare, **how)


def test_a_model_in_training_is_compressed_as_in_eval_mode() -> None:
    """timm and training leave models so: what a dropout hides looked like what can be cut."""
    model = small_vit(depth=3)
    for block in model.blocks:
        block.mlp.wide = torch.nn.Sequential(torch.nn.Dropout(0.5), block.mlp.wide)
        block.attention.out = torch.nn.Sequential(block.attention.out, torch.nn.Dropout(0.5))
    how = {"params": 0.9, "final": 0}
    expected = blockfit.compress(model, small_images(24), **how)
    trained = blockfit.compress(model.train(), small_images(24), **how)
    assert model.training
    assert trained.model.training
    assert trained.plan == expected.plan
    assert expected.plan.narrowings
    assert same(trained.model, expected.model)


def test_what_is_made_in_inference_mode_can_be_trained() -> None:
    model = small_vit(depth=3)
    with torch.inference_mode():
        pictures = small_pictures(24)
        small = blockfit.compress(model, pictures, params=0.9, final=0).model
        assert torch.is_inference_mode_enabled()
    expected = blockfit.compress(model, small_images(24), params=0.9, final=0).model
    assert same(small, expected)
    small(small_pictures(2)).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
