"""Hand-written models: nothing of any library, blocks of every form."""

from __future__ import annotations

import torch
from family import CLASSES, DEPTH, WIDTH, Family, one
from torch import Tensor, nn


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP as a user would write them."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(x)
        x = x + self.attention(inner, inner, inner, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class InPlaceBlock(PlainBlock):
    """Writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(x)
        x += self.attention(inner, inner, inner, need_weights=False)[0]
        x += self.mlp(self.norm2(x))
        return x


class TupleBlock(PlainBlock):
    """Takes the hidden state by keyword and returns it with its attention weights."""

    def forward(self, *, mask: None, tokens: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.norm1(tokens)
        read, weights = self.attention(inner, inner, inner)
        tokens = tokens + read
        return tokens + self.mlp(self.norm2(tokens)), weights


class NestedBlock(PlainBlock):
    """Holds a longer list of same-class modules than the model has blocks."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.parts = nn.ModuleList(nn.Linear(width, width) for _ in range(DEPTH + 1))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for part in self.parts:
            y = part(y)
        return x + y


class PlainViT(nn.Module):
    """A user's own model: nothing of any library, and no config."""

    def __init__(self, block: type[nn.Module] = PlainBlock, prefix: int = 1) -> None:
        super().__init__()
        self.img_size = 32
        self.stem = nn.Conv2d(3, WIDTH, 8, 8)
        self.prefix = nn.Parameter(torch.zeros(1, prefix, WIDTH))
        self.position = nn.Parameter(torch.zeros(1, 16 + prefix, WIDTH))
        self.transformer = nn.ModuleList(block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def tokens(self, images: Tensor) -> Tensor:
        patches = self.stem(images).flatten(2).transpose(1, 2)
        return torch.cat([self.prefix.expand(len(images), -1, -1), patches], 1) + self.position

    def hidden_states(self, images: Tensor) -> list[Tensor]:
        states = [self.tokens(images)]
        for block in self.transformer:
            # Blocks may write into their input: keep a copy of every state.
            states.append(block(states[-1].clone()))
        return states

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.tokens(images)
        for block in self.transformer:
            hidden = block(hidden)
        return self.head(self.norm(hidden).mean(1))


class TupleViT(PlainViT):
    def forward(self, images: Tensor) -> Tensor:
        hidden = self.tokens(images)
        for block in self.transformer:
            hidden = block(mask=None, tokens=hidden)[0]
        return self.head(self.norm(hidden).mean(1))


class AttributeViT(PlainViT):
    """Its blocks are attributes of the model, between other modules."""

    def __init__(self) -> None:
        super().__init__()
        del self.transformer
        for index in range(DEPTH):
            setattr(self, f"block{index}", PlainBlock())
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.block1(self.block0(self.tokens(images)))
        return self.head(self.last(self.block3(self.block2(hidden)))[:, 0])


def _plain(block: type[nn.Module] = PlainBlock, prefix: int = 1) -> Family:
    return Family(
        make=lambda: PlainViT(block, prefix), path="transformer", heads=1,
        prefix_tokens=lambda model: model.prefix.shape[1],
        intermediates=lambda model, images: model.hidden_states(images),
        states=lambda model, images: model.hidden_states(images)[:DEPTH],
    )  # fmt: skip


PLAIN: dict[str, Family] = {
    "plain": _plain(),
    "plain-no-prefix": _plain(prefix=0),
    "plain-in-place": _plain(InPlaceBlock),
    "plain-nested": _plain(NestedBlock),
    "plain-tuple": Family(
        lambda: TupleViT(TupleBlock), "transformer", one, tuple_output=True, heads=1
    ),
    "plain-attributes": Family(AttributeViT, "", one, heads=1),
}
