"""Hierarchical models are refused for what is seen in them, and plain ones are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import WIDTH, PlainBlock, PlainViT, one_thread  # noqa: F401
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.models.blocks import find_chain

SMALL: dict[str, Any] = {"image_size": 64, "num_labels": 3}


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, **options)


def of_transformers(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model_class = getattr(pytest.importorskip("transformers"), name)
        return model_class(model_class.config_class(**{**SMALL, **options}))

    return make


PYRAMIDS: dict[str, Callable[[], nn.Module]] = {
    "timm swin": of_timm("swin_tiny_patch4_window7_224", embed_dim=12, depths=(2, 2, 6, 2)),
    "timm pvt": of_timm("pvt_v2_b0"),
    "timm pit": of_timm("pit_ti_224"),
    "timm levit": of_timm("levit_128s"),
    "timm twins": of_timm("twins_svt_small", embed_dims=(8, 16, 32, 64), num_heads=(1, 2, 2, 2)),
    "timm convnext": of_timm("convnext_atto"),
    "timm resnet": of_timm("resnet10t"),
    "swin": of_transformers(
        "SwinForImageClassification", embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4
    ),
    "hiera": of_transformers(
        "HieraModel", image_size=[64, 64], embed_dim=8, depths=[1, 2, 3, 1], num_heads=[1, 2, 4, 8]
    ),
    "segformer": of_transformers(
        "SegformerForSemanticSegmentation", hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=8
    ),
    "pvt": of_transformers("PvtModel", hidden_sizes=[8, 16, 40, 32], depths=[2, 2, 2, 2]),
    "convnext": of_transformers("ConvNextModel", hidden_sizes=[8, 16, 24, 32], depths=[2, 2, 3, 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", PYRAMIDS)
def test_pyramids_are_refused_with_the_reason(name: str) -> None:
    model = PYRAMIDS[name]().eval()
    with pytest.raises(
        BlockfitError, match=r"is hierarchical: .* turns from \d+ × .* to \d+ × "
    ) as e:
        find_chain(model)
    assert "\n" not in str(e.value)
    assert type(model).__name__ in str(e.value)


class Pyramid(nn.Module):
    """Two stages of plain blocks; the second has fewer tokens, and other width where ``width``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, 8)
        self.early = nn.ModuleList(PlainBlock() for _ in range(2))
        self.merge = nn.Linear(2 * WIDTH, width)
        self.late = nn.ModuleList(PlainBlock(width) for _ in range(4))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images).flatten(2).transpose(1, 2)
        for block in self.early:
            hidden = block(hidden)
        hidden = self.merge(hidden.reshape(len(hidden), 8, 2 * WIDTH))
        for block in self.late:
            hidden = block(hidden)
        return hidden.mean(1)


@pytest.mark.parametrize("width", [WIDTH, 2 * WIDTH])
def test_a_users_pyramid_is_refused_and_one_stage_of_it_is_not(width: int) -> None:
    model, example = Pyramid(width).eval(), torch.randn(2, 3, 32, 32)
    change = f"turns from 16 × {WIDTH} to 8 × {width}.*blocks=early"
    with pytest.raises(BlockfitError, match=change):
        find_chain(model, example)
    late = find_chain(model, example, path="late")
    assert (late.depth, late.width, late.prefix_tokens) == (4, width, 0)


def test_a_plain_model_in_a_row_of_parts_that_change_the_shape_is_found() -> None:
    stem = nn.Sequential(nn.Conv2d(3, WIDTH, 8, 8), nn.Flatten(2))
    turned = nn.Sequential(nn.Linear(16, WIDTH), nn.LayerNorm(WIDTH))
    blocks = nn.Sequential(*[PlainBlock() for _ in range(3)])
    model = nn.Sequential(stem, turned, blocks, nn.Sequential(nn.Linear(WIDTH, 2))).eval()
    assert find_chain(model, torch.randn(2, 3, 32, 32)).path == "2"


def test_blocks_on_maps_before_a_neck_are_refused_but_not_called_hierarchical() -> None:
    class MapBlock(PlainBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1, 2)).reshape(x.shape)

    class OnMaps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, WIDTH, 8, 8)
            self.blocks = nn.Sequential(*[MapBlock() for _ in range(4)])
            self.neck = nn.Sequential(nn.Linear(WIDTH, 7))

        def forward(self, images: Tensor) -> Tensor:
            return self.neck(self.blocks(self.stem(images).permute(0, 2, 3, 1)))

    message = r"found no blocks.*'blocks' with 4 modules, but block 0 does not take a tensor"
    with pytest.raises(BlockfitError, match=message):
        find_chain(OnMaps().eval(), torch.randn(2, 3, 32, 32))


def test_a_decoder_that_gets_more_tokens_back_is_no_stage() -> None:
    class Masked(PlainViT):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.Linear(WIDTH, 16)
            self.decoder = nn.ModuleList(PlainBlock(16) for _ in range(2))

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.tokens(images)[:, ::2]
            for block in self.transformer:
                hidden = block(hidden)
            hidden = self.narrow(hidden).repeat_interleave(2, 1)
            for block in self.decoder:
                hidden = block(hidden)
            return hidden

    assert find_chain(Masked().eval()).path == "transformer"


class PairBlock(PlainBlock):
    """Hands on a second stream beside the hidden state."""

    def forward(self, x: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x) + beside, beside + 1


def test_blocks_that_hand_on_two_streams_are_refused() -> None:
    class Pairs(PlainViT):
        def forward(self, images: Tensor) -> Tensor:
            hidden = self.tokens(images)
            beside = torch.zeros_like(hidden)
            for block in self.transformer:
                hidden, beside = block(hidden, beside)
            return hidden.mean(1)

    message = "'transformer' with 4 modules, but block 1 reads more than one tensor of what block 0"
    with pytest.raises(BlockfitError, match=message):
        find_chain(Pairs(PairBlock).eval())


def test_dropouts_and_identities_in_a_row_are_no_blocks() -> None:
    class Chain(PlainViT):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Sequential(*[nn.Dropout() for _ in range(6)])

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.idle(self.tokens(images))
            for block in self.transformer:
                hidden = block(hidden)
            return hidden.mean(1)

    assert find_chain(Chain().eval()).path == "transformer"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coat_tiny", "is hierarchical|carries several hidden states"),
        ("volo_d1_224", r"work on maps \(14 × 14 × 384\), .* the 2 blocks at 'post_network'"),
    ],
)
def test_models_whose_longest_list_is_no_stack_of_blocks_are_refused(
    name: str, message: str
) -> None:
    model = of_timm(name)().eval()
    with pytest.raises(BlockfitError, match=message):
        find_chain(model)


def test_the_smaller_part_can_be_named() -> None:
    assert find_chain(of_timm("volo_d1_224")().eval(), path="post_network").depth == 2
