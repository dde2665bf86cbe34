"""Traced without padding: what is known of every padded tensor is right, and no padding is left."""

from __future__ import annotations

import pytest
import torch
from exporting import narrowings, output
from families import FAMILIES, Family
from families import one_thread as one_thread
from families_stages import STAGED
from torch import Tensor, nn
from torch.nn import functional as F

from blockfit.data.images import images as open_images
from blockfit.fit.plan import Plan
from blockfit.formats.traced import Bare, trace
from blockfit.formats.unpadded import Heads, Unpadded
from blockfit.models.stages import find_blocks
from blockfit.models.surgery import apply_plan
from blockfit.search.states import TracedImages

NEEDED = dict.fromkeys(
    ["timm-vit", "timm-deit-distilled", "vit-classifier", "dinov2-registers", "clip-vision", "beit",
     "timm-dinov3", "dinov3", "timm-eva02", "timm-hiera", "timm-pvt-v2", "segformer", "detr",
     "timm-swin", "sam2-trunk"], 0,
) | {"swin-v2": 8}  # fmt: skip
"""By family, how many narrowed heads are needed whole: queries and keys of 4 blocks, for a norm."""


def family_of(name: str) -> Family:
    return FAMILIES[name] if name in FAMILIES else STAGED[name].family


def narrowed(name: str) -> tuple[nn.Module, Tensor]:
    """A tiny model with half of the dimensions of all heads."""
    family = family_of(name)
    model, images = family.build(), family.images(3)
    blocks = find_blocks(model, images)
    originals = TracedImages.of(model, blocks, open_images(images, batch_size=3))
    cuts = [cut for cut in narrowings(originals, Plan(()), 0.5) if cut.part != "mlp"]
    apply_plan(model, blocks, Plan((), tuple(cuts)), ())
    return model, images


def with_zeros(heads: Heads, ndim: int) -> Tensor:
    """The padded tensor of these heads."""
    axis = -1 if heads.axis is None else heads.axis
    if heads.stack is not None and axis < heads.stack:
        axis += 1  # the pieces do not have the axis along which they stand
    short = [heads.size - piece.shape[axis] for piece in heads.pieces]
    full = [
        F.pad(piece, [0, 0] * (-axis - 1) + [0, missing])
        for piece, missing in zip(heads.pieces, short, strict=True)
    ]
    if heads.axis is None:
        return torch.cat([piece.flatten(-2) for piece in full], -1)
    return full[0] if heads.stack is None else torch.stack(full, heads.stack + ndim)


class Checked(Unpadded):
    """Compares all that is noted with the padded tensor."""

    noted = 0

    def note(self, value: Tensor, heads: Heads | None) -> None:
        super().note(value, heads)
        if heads is not None:
            torch.testing.assert_close(with_zeros(heads, value.ndim), value)
            Checked.noted += 1


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_known_of_padded_heads_is_so_and_the_outputs_stay(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = narrowed(name)
    expected = output(model, images)
    monkeypatch.setattr(Checked, "noted", 0)
    with torch.no_grad(), Checked():
        found = output(model, images)
    assert Checked.noted > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    own = pads(family_of(name).build(), images)  # of windows
    assert pads(model, images, unpadded=True) == own + NEEDED[name]


def pads(model: nn.Module, images: Tensor, **how: bool) -> int:
    """How often a model's graph pads a tensor."""
    graph = trace(Bare(model).eval(), images, any_batch=False, **how).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return sum("pad" in target for target in called)


def test_what_needs_whole_heads_gets_them() -> None:
    kept, zeros = torch.randn(2, 5, 3, 4), torch.zeros(2, 5, 3, 4)
    whole = torch.cat([kept, zeros], -1)
    other = torch.randn(2, 5, 3, 8)
    with Unpadded():
        padded = F.pad(kept, (0, 4))
        normed = F.layer_norm(padded, (8,))
        turned = padded.roll(1, -1) * other
        product = padded @ other.transpose(-2, -1)
        first = padded.reshape(2, 5, 24)[..., :4]
        left = F.pad(kept, (4, 0))[..., :4]
        ones = F.pad(kept, (0, 4), value=1.0)[..., :4].sum() + F.pad(kept, (0, 4), value=1.0).sum()
    assert torch.equal(normed, F.layer_norm(whole, (8,)))
    assert torch.equal(turned, whole.roll(1, -1) * other)
    assert torch.equal(product, whole @ other.transpose(-2, -1))
    assert torch.equal(first, whole.reshape(2, 5, 24)[..., :4])
    assert torch.equal(left, zeros)
    torch.testing.assert_close(ones, 2 * kept.sum() + 2 * 5 * 3 * 4)


def test_nothing_stays_known_of_what_may_have_changed() -> None:
    kept, other = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 8)

    def run() -> list[Tensor]:
        padded = F.pad(kept, (0, 4))
        twice = padded.transpose(1, 2)
        padded *= 2.0
        third = F.pad(kept, (0, 4))
        third[..., 6] = 1.0
        fourth = F.pad(kept, (0, 4))
        fourth.add_(other)
        fifth = F.pad(kept, (0, 4))
        torch.neg(kept, out=fifth[..., 4:])
        cropped = F.pad(kept, (0, -2))
        left = [padded, twice, third, fourth, fifth]
        return [
            cropped @ cropped.transpose(-2, -1),
            *(x[..., :4] for x in left),
            *(x @ x.transpose(-2, -1) for x in left),
        ]

    expected = run()
    with Unpadded():
        found = run()
    for one, other_one in zip(found, expected, strict=True):
        assert torch.equal(one, other_one)
