"""Case 12: blocks that are kept in chunks are found one by one, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import WIDTH, PlainBlock, PlainViT, one_thread  # noqa: F401
from torch import Tensor, nn

import blockfit
from blockfit.errors import BlockfitError
from blockfit.models.blocks import block_modules, find_chain

DEPTH = 12


class BlockChunk(nn.ModuleList):
    """As DINOv2's code has it."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class SkippingChunk(BlockChunk):
    """A residual group: its input is added once more."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def in_chunks(blocks: list[nn.Module], *, chunk: type[BlockChunk] = BlockChunk) -> nn.ModuleList:
    """Four chunks of three; placeholders keep the numbers of DINOv2's checkpoints."""
    parts = [blocks[i : i + 3] for i in range(0, DEPTH, 3)]
    return nn.ModuleList(
        chunk([*(nn.Identity() for _ in range(3 * i)), *part]) for i, part in enumerate(parts)
    )


def in_sequentials(blocks: list[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Sequential(*blocks[:7]), nn.Sequential(*blocks[7:]))


def in_two_levels(blocks: list[nn.Module]) -> nn.Sequential:
    pairs = [nn.Sequential(*blocks[i : i + 2]) for i in range(0, DEPTH, 2)]
    return nn.Sequential(nn.Sequential(*pairs[:3]), nn.Sequential(*pairs[3:]))


def model_of(arranged: Callable[[list[nn.Module]], nn.Module], seed: int = 0) -> PlainViT:
    torch.manual_seed(seed)
    model = PlainViT()
    model.transformer = arranged([PlainBlock() for _ in range(DEPTH)])
    return model.eval()


FORMS: dict[str, Callable[[list[nn.Module]], nn.Module]] = {
    "chunks": in_chunks, "Sequentials": in_sequentials, "two levels": in_two_levels,
}  # fmt: skip
every_form = pytest.mark.parametrize("arranged", FORMS.values(), ids=list(FORMS))


def the_blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, PlainBlock)]


@every_form
def test_blocks_in_chunks_are_found_one_by_one(
    arranged: Callable[[list[nn.Module]], nn.Module],
) -> None:
    model = model_of(arranged)
    for path in (None, "transformer"):
        blocks = find_chain(model, path=path)
        assert (blocks.path, blocks.depth, blocks.prefix_tokens) == ("transformer", DEPTH, 1)
        assert block_modules(model, blocks) == the_blocks(model)


@every_form
def test_two_blocks_are_two_blocks_also_where_they_lie_in_chunks(
    arranged: Callable[[list[nn.Module]], nn.Module], tmp_path: Path
) -> None:
    model, images = model_of(arranged), torch.randn(24, 3, 32, 32)
    small = blockfit.compress(model, images, remove=2, recipe="plain")
    assert small.report["removed_blocks"] == 2
    gone = sum(p.numel() for p in PlainBlock().parameters())
    count = [sum(p.numel() for p in m.parameters()) for m in (model, small.model)]
    assert count[0] - count[1] == 2 * gone
    assert find_chain(small.model) == small.blocks

    hidden = model.tokens(images)
    removed = small.plan.removed_blocks
    for index, block in enumerate(the_blocks(small.model)):
        hidden = hidden if index in removed else block(hidden)
    expected = small.model.head(small.model.norm(hidden).mean(1))
    torch.testing.assert_close(small.model(images), expected)

    blockfit.save(small, tmp_path / "small")
    again = blockfit.load(tmp_path / "small", model=model_of(arranged, seed=1))
    assert torch.equal(again(images), small.model(images))


def test_maps_and_repairs_reach_blocks_in_chunks() -> None:
    model, images = model_of(in_chunks), torch.randn(24, 3, 32, 32)
    flat = model_of(nn.ModuleList)
    flat.load_state_dict(dict(zip(flat.state_dict(), model.state_dict().values(), strict=True)))
    chunked, plain = (
        blockfit.compress(m, images, spans=["2:4", "8:9"], repair="mlp") for m in (model, flat)
    )  # fmt: skip
    torch.testing.assert_close(chunked.model(images), plain.model(images))
    assert chunked.report["repaired_blocks"] == plain.report["repaired_blocks"] != []


def test_chunks_that_do_more_than_run_their_blocks_are_refused() -> None:
    model = model_of(lambda blocks: in_chunks(blocks, chunk=SkippingChunk))
    with pytest.raises(BlockfitError) as refused:
        find_chain(model)
    assert str(refused.value) == (
        "the 4 modules at 'transformer' hold 12 blocks, but block 3 does not read what block 2 "
        "returned; to remove whole modules, give blocks=transformer"
    )
    assert find_chain(model, path="transformer").depth == 4


class Added(nn.Module):
    """A sublayer with its norm and the sum, as many write it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_a_block_of_two_sublayers_of_one_class_stays_one_block() -> None:
    model = PlainViT()
    model.transformer = nn.ModuleList(
        nn.Sequential(
            Added(Mixed()),
            Added(nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))),
        )
        for _ in range(6)
    )
    blocks = find_chain(model.eval())
    assert (blocks.path, blocks.depth) == ("transformer", 6)


def test_a_block_that_runs_one_class_over_rows_and_then_columns_stays_one_block() -> None:
    class Axial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.columns = PlainBlock(), PlainBlock()

        def forward(self, x: Tensor) -> Tensor:
            side = x[:, 1:].reshape(len(x) * 4, 4, WIDTH)
            side = self.rows(side).reshape(len(x), 4, 4, WIDTH).transpose(1, 2)
            side = self.columns(side.reshape(len(x) * 4, 4, WIDTH))
            return torch.cat([x[:, :1], side.reshape(len(x), 16, WIDTH)], 1)

    model = PlainViT()
    model.transformer = nn.ModuleList(Axial() for _ in range(5))
    assert find_chain(model.eval()).depth == 5
