"""A small vision transformer of the user's own, with LayerScale and blocks that matter little."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from blockfit.data.images import Images
from blockfit.data.images import images as open_images
from blockfit.fit.plan import Span
from blockfit.models.blocks import Blocks, find_chain

WIDTH, CLASSES, PREFIX = 16, 4, 1


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)
        self.narrow = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(torch.relu(self.wide(x)))


class ScaledBlock(nn.Module):
    """Pre-norm, with a factor per channel (LayerScale) on both branches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Attention(), Mlp()
        self.gamma1, self.gamma2 = (nn.Parameter(torch.ones(WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.attention(self.norm1(x))
        return x + self.gamma2 * self.mlp(self.norm2(x))


class PostNormBlock(ScaledBlock):
    """The norm comes after the sum: nothing is simply added to the block's output."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class GatedBlock(ScaledBlock):
    """What both branches return is multiplied by something that depends on the token."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.sigmoid(x) * self.attention(self.norm1(x))
        return x + torch.sigmoid(x) * self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    def __init__(self, depth: int, block: type[nn.Module] = ScaledBlock) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, PREFIX, WIDTH))
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def small_vit(
    depth: int = 6, seed: int = 0, residual: float = 0.5, block: type[nn.Module] = ScaledBlock
) -> SmallViT:
    """Random weights; ``residual`` is how much each block changes the hidden state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SmallViT(depth, block)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "gamma" in name:
                    parameter.copy_(residual * (0.5 + torch.rand(WIDTH)))
                else:
                    parameter.add_(0.2 * torch.randn_like(parameter))
            model.head.weight.mul_(4)
    return model.eval()


def small_blocks(model: nn.Module) -> Blocks:
    """Where its blocks are, found by looking."""
    return find_chain(model, small_pictures(2))


def small_pictures(count: int, seed: int = 0) -> Tensor:
    """Images of one of a few motifs and noise, shape (count, 3, 12, 12): nine patches each."""
    generator = torch.Generator().manual_seed(1000 + seed)
    motifs = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(7))
    which = torch.randint(5, (count,), generator=generator)
    return motifs[which] + 0.7 * torch.randn(count, 3, 12, 12, generator=generator)


def small_images(count: int, seed: int = 0, batch_size: int = 8) -> Images:
    return open_images(small_pictures(count, seed), batch_size=batch_size)


def separate_sets(depth: int, size: int, spans: Iterable[Span]) -> list[tuple[Span, ...]]:
    """By trying all: sets of spans that remove ``size`` blocks, with a kept block between them."""
    out = []
    every = sorted(spans)
    for count in range(1, size + 1):
        for chosen in itertools.combinations(every, count):
            apart = all(a.stop < b.start for a, b in itertools.pairwise(chosen))
            if apart and sum(map(len, chosen)) == size:
                out.append(chosen)
    return out
