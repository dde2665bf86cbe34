"""Two models on the same images: errors, predictions and components against direct computations."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import saved
from families import FAMILIES
from pictures import folder_of
from PIL import Image
from small import PREFIX, small_blocks, small_images, small_pictures, small_vit
from torch import nn

import blockfit
from blockfit.data.images import images as open_images
from blockfit.errors import BlockfitError
from blockfit.evaluation.side_by_side import SHOWN, Sample, SideBySide, side_by_side
from blockfit.fit.plan import Plan
from blockfit.models.blocks import record
from blockfit.models.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, blockfit.Result]:
    original = small_vit()
    return original, blockfit.compress(original, small_images(40), spans=["1:3", "4:5"])


@pytest.fixture(scope="module")
def side(pair: tuple[nn.Module, blockfit.Result]) -> SideBySide:
    original, result = pair
    return side_by_side(original, result.model, result.blocks, small_images(20, seed=3))


def number(sample: Sample) -> int:
    """The position that stands in the name of a tensor's image."""
    return int(sample.name.rpartition("[")[2].rstrip("]"))


def states(model: nn.Module, drop: tuple[int, ...] = ()) -> list[torch.Tensor]:
    blocks = small_blocks(small_vit())
    batches = []
    handles = [
        model.blocks[i].register_forward_hook(lambda module, args, out: args[0])  # type: ignore[index,union-attr]
        for i in drop
    ]
    with torch.no_grad(), record(model, blocks) as seen:
        for batch in small_images(20, seed=3):
            model(batch)
            batches.append([state.double() for state in seen])
    for handle in handles:
        handle.remove()
    return batches  # type: ignore[return-value]


def test_errors_are_those_of_the_hidden_states_beside_dropped_spans(
    pair: tuple[nn.Module, blockfit.Result], side: SideBySide
) -> None:
    original, result = pair
    whole, small = states(original), states(result.model)
    dropped = states(original, (1, 2, 4))
    for found, other in ((side.errors, small), (side.identity, dropped)):
        for kind, tokens in (("prefix", slice(0, PREFIX)), ("patch", slice(PREFIX, None))):
            for level in range(7):
                gap = spread = 0.0
                for one, two in zip(whole, other, strict=True):
                    target = one[level]
                    gap += float((two[level] - target)[:, tokens].square().sum())
                    centred = target - target.mean((0, 1))
                    spread += float(centred[:, tokens].square().sum())
                assert found[kind][level] == pytest.approx(gap / spread, rel=1e-6, abs=1e-12)
    assert side.errors["patch"][1] == 0 < side.errors["patch"][3] < side.identity["patch"][3]


def test_narrowed_blocks_are_compared_in_place_and_with_nothing_dropped(tmp_path: Path) -> None:
    family = FAMILIES["timm-vit"]
    original, small = family.build(), saved(tmp_path / "small", "timm-vit", Plan(()), share=0.5)
    pictures = open_images(family.images(9, seed=3), batch_size=4)
    found = side_by_side(original, small.model, small.blocks, pictures)
    assert found.plan == small.plan
    assert found.identity == {}
    assert {len(errors) for errors in found.errors.values()} == {small.blocks.depth + 1}
    with torch.no_grad():
        gaps = [(a - b).abs().max() for a, b in zip(
            original.forward_intermediates(family.images(9, seed=3), norm=False)[1],  # type: ignore[operator]
            small.model.forward_intermediates(family.images(9, seed=3), norm=False)[1],  # type: ignore[operator]
            strict=True,
        )]  # fmt: skip
    assert found.errors["patch"][0] == 0
    assert all((error > 0) == (gap > 0) for error, gap in zip(
        found.errors["patch"][1:], gaps, strict=True
    ))  # fmt: skip


def test_predictions_and_differences_are_the_models_own(
    pair: tuple[nn.Module, blockfit.Result], side: SideBySide
) -> None:
    original, result = pair
    pictures = small_pictures(20, seed=3)
    with torch.no_grad():
        before, after = original(pictures), result.model(pictures)
    differ = before.argmax(1) != after.argmax(1)
    assert side.differing == int(differ.sum())
    assert side.images == 20
    assert len(side.samples) == SHOWN
    assert sum(sample.differs for sample in side.samples) == min(int(differ.sum()), SHOWN // 2)
    for sample in side.samples:
        row = number(sample)
        assert sample.original is not None
        assert sample.compressed is not None
        assert sample.original.classes[0] == f"class {int(before[row].argmax())}"
        assert sample.compressed.classes[0] == f"class {int(after[row].argmax())}"
        assert sample.compressed.probabilities[0] == pytest.approx(
            float(after[row].softmax(0).max()), rel=1e-5
        )
        assert sample.label is None


def test_components_are_those_of_an_independent_decomposition(
    pair: tuple[nn.Module, blockfit.Result], side: SideBySide
) -> None:
    original, _ = pair
    final = torch.cat([batch[-1][:, PREFIX:] for batch in states(original)])
    rows = [number(sample) for sample in side.samples]
    tokens = final[rows].flatten(0, 1)
    centred = (tokens - tokens.mean(0)).numpy()
    values = np.linalg.svd(centred, compute_uv=False) ** 2
    assert side.explained == pytest.approx(values[:3].sum() / values.sum(), rel=1e-6)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    projected = centred @ directions[0]
    low, high = np.quantile(projected, (0.02, 0.98))
    wanted = np.clip((projected - low) / (high - low), 0, 1).reshape(len(rows), 9)
    for sample, expected in zip(side.samples, wanted, strict=True):
        assert sample.components is not None
        picture = np.asarray(Image.open(io.BytesIO(sample.components[0]))) / 255
        step = picture.shape[0] // 3
        red = picture[::step, ::step, 0].reshape(9)
        assert np.allclose(red, expected, atol=0.01) or np.allclose(red, 1 - expected, atol=0.01)


def test_pictures_show_the_inputs(side: SideBySide) -> None:
    pictures = small_pictures(20, seed=3)[[number(sample) for sample in side.samples]]
    low, high = float(pictures.min()), float(pictures.max())
    for sample, picture in zip(side.samples, pictures, strict=True):
        shown = np.asarray(Image.open(io.BytesIO(sample.picture)), dtype=float)
        step = shown.shape[0] // 12
        expected = ((picture - low) / (high - low) * 255).permute(1, 2, 0).numpy()
        assert np.abs(shown[::step, ::step] - expected).max() <= 1


def test_normalised_inputs_are_shown_as_the_pictures_they_were(tmp_path: Path) -> None:
    own = Preprocessing.plain(12)
    images = blockfit.images(folder_of(tmp_path, 10), preprocessing=own)
    original = small_vit()
    small = blockfit.compress(original, images, spans=["1:2"])
    found = side_by_side(original, small.model, small.blocks, images)
    for sample in found.samples:
        source = Image.open(sample.name).convert("RGB").resize((12, 12), Image.Resampling.BICUBIC)
        shown = np.asarray(Image.open(io.BytesIO(sample.picture)), dtype=int)
        step = shown.shape[0] // 12
        assert np.abs(shown[::step, ::step] - np.asarray(source, dtype=int)).max() <= 2


def test_models_that_do_not_belong_together_are_refused(
    pair: tuple[nn.Module, blockfit.Result],
) -> None:
    original, result = pair
    images = small_images(8)
    with pytest.raises(BlockfitError, match="second model is not compressed"):
        side_by_side(original, small_vit(), result.blocks, images)
    with pytest.raises(BlockfitError, match="first model is no original"):
        side_by_side(result.model, result.model, result.blocks, images)
    assert not any(module._forward_hooks for module in original.modules())
