"""Whatever comes beside the pixels reaches every call, and images of every size are used whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import SmallViT, small_pictures, small_vit
from tiny_models import tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader

from blockfit import api
from blockfit.data.images import images
from blockfit.evaluation.evaluate import evaluate
from blockfit.fit.plan import Span
from blockfit.models.blocks import find_chain
from blockfit.models.cost import flops
from blockfit.models.forward import first_images, image_count, two_different
from blockfit.search.calibrate import calibrate
from blockfit.search.states import TracedImages


class Batches:
    """A re-iterable of batches, as a user writes one."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class Told(nn.Module):
    """Works only where it is called with everything that came with the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.model: SmallViT = small_vit()

    def forward(
        self,
        pixel_values: Tensor,
        task: str | None = None,
        scale: Tensor | None = None,
        fraction: float = 0.0,
        upright: bool = False,
    ) -> Tensor:
        assert (task, fraction, upright) == ("classify", 0.5, True)
        assert scale is not None
        assert scale.ndim == 0
        return self.model(pixel_values * scale)


FLAGS: dict[str, Any] = {
    "upright": True,
    "task": "classify",
    "fraction": 0.5,
    "scale": torch.tensor(2.0),
}


@pytest.mark.parametrize(
    ("form", "first"), [("batches", "flags"), ("single images", "pixels"), ("loader", "flags")]
)
def test_case_13_flags_and_scalars_reach_every_call(form: str, first: str) -> None:
    pictures, labels = small_pictures(24), torch.arange(24) % 4
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(pictures, labels, strict=True)]
    parts = zip(pictures.split(8), labels.split(8), strict=True)
    if form == "batches":
        rows = [{"pixel_values": x, "labels": y} for x, y in parts]
    whole = [{**FLAGS, **row} if first == "flags" else {**row, **FLAGS} for row in rows]
    if form == "loader":

        def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
            return {**FLAGS, "pixel_values": torch.stack([s["pixel_values"] for s in samples])}

        data = images(DataLoader(whole, batch_size=8, collate_fn=collate), batch_size=8)  # type: ignore[arg-type]
    else:
        data = images(Batches(*whole), batch_size=8)
    model = Told().eval()
    result = api.compress(model, data, spans=["2:4"])
    found = evaluate(result.model, data, against=model, measure=False)
    plain = images(2 * pictures, batch_size=8)
    expected = api.compress(model.model, plain, spans=["2:4"])
    assert found.fidelity is not None
    worth = evaluate(expected.model, plain, against=model.model, measure=False).fidelity
    assert worth is not None
    assert found.fidelity.kl == pytest.approx(worth.kl, rel=1e-4)


def test_case_13_interpolated_positions_are_those_of_the_asked_resolution() -> None:
    """transformers' ViT of 32 pixels on 64: without the flag it refuses them."""
    model = tiny("ViTForImageClassification", num_hidden_layers=4, num_labels=5)
    pictures = torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batches = [{"pixel_values": x, "interpolate_pos_encoding": True} for x in pictures.split(8)]
    data = images(Batches(*batches), model, limit=20, batch_size=8)
    assert len(data) == 20
    assert all(batch["interpolate_pos_encoding"] is True for batch in data)  # type: ignore[index]
    blocks = find_chain(model, next(iter(data)))
    originals = TracedImages.of(model, blocks, data)
    with torch.no_grad():
        right = model.vit.embeddings(pictures[:2], interpolate_pos_encoding=True)
    assert originals.traces[0].states[0].shape[1] == 65 == right.shape[1]
    assert api.compress(model, data, spans=["1:2"]).report["removed_blocks"] == 1


def test_a_batch_is_cut_where_it_has_rows_and_nowhere_else() -> None:
    batch: dict[str, Any] = {
        "sizes": torch.tensor([[3, 4], [5, 6], [7, 8]]),
        "positions": torch.arange(5)[None],
        "pixel_values": torch.zeros(3, 3, 4, 4),
        "names": ["a", "b", "c"],
        **FLAGS,
    }
    assert image_count(batch) == 3
    two = first_images(batch, 2)
    assert isinstance(two, dict)
    assert two["sizes"].tolist() == [[3, 4], [5, 6]]
    assert two["names"] == ["a", "b"]
    assert two["positions"] is batch["positions"]
    assert {key: two[key] for key in FLAGS} == FLAGS
    again = two_different(small_vit(), first_images(batch, 1))
    assert isinstance(again, dict)
    assert again["pixel_values"].shape[0] == 2 == len(again["sizes"])
    assert two_different(small_vit(), batch)["positions"].shape == (1, 5)  # type: ignore[call-overload, index]


SIZES = [(12, 12), (16, 12), (8, 20), (20, 20)]


def mixed(count: int, group: int) -> list[Tensor]:
    """Single pictures of several resolutions and aspect ratios, ``group`` neighbours of a size."""
    generator = torch.Generator().manual_seed(5)
    sizes = [SIZES[i // group % len(SIZES)] for i in range(count)]
    return [torch.randn(3, *size, generator=generator) for size in sizes]


@pytest.mark.parametrize("form", ["list", "re-iterable", "loader of one", "batches"])
def test_case_15_pictures_of_several_sizes_are_compressed_and_judged(form: str) -> None:
    model, pictures = small_vit(), mixed(48, 3)
    source: Any = pictures
    if form == "re-iterable":
        source = Batches(*pictures)
    elif form == "loader of one":
        source = DataLoader(pictures, batch_size=1)  # type: ignore[arg-type]
    elif form == "batches":
        source = Batches(*[torch.stack(pictures[i : i + 3]) for i in range(0, 48, 3)])
    data = images(source, batch_size=8)
    assert len(data) == 48
    assert sum(image_count(batch) for batch in data) == 48
    how: dict[str, Any] = {"remove": 2} if form == "list" else {"spans": ["2:4"]}
    result = api.compress(model, data, **how)
    found = evaluate(result.model, data, against=model, measure=False)
    assert found.images == 48
    with torch.no_grad():  # by hand, one picture at a time
        pairs = [(model(p[None]), result.model(p[None])) for p in pictures]
    same = sum(int(a.argmax()) == int(b.argmax()) for a, b in pairs) / 48
    assert found.fidelity is not None
    assert found.fidelity.agreement == pytest.approx(same)


def test_case_15_moments_of_several_sizes_are_those_of_each_picture_alone() -> None:
    model, pictures = small_vit(), mixed(16, 2)
    blocks = find_chain(model, pictures[0][None])
    span = Span(1, 3)
    whole = calibrate(model, blocks, images(pictures, batch_size=5), [span])
    alone = calibrate(model, blocks, images(pictures, batch_size=1), [span])
    for one, other in ((whole.regression(span), alone.regression(span)),):
        assert one.count == other.count == sum(1 + p[0].numel() // 16 for p in pictures)
        torch.testing.assert_close(one.xy, other.xy, rtol=1e-6, atol=1e-6)


def test_flops_of_a_batch_with_flags_before_the_pixels_are_counted() -> None:
    batch = {**FLAGS, "pixel_values": small_pictures(3)}
    assert flops(Told().eval(), batch) == flops(small_vit(), small_pictures(1))
