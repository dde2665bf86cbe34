"""Tiny random models of every supported family, and what each says of itself.

``FAMILIES[name].build(seed)`` gives a model in eval mode with random weights that matter: no
parameter is left at zero, no LayerScale near it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

DEPTH, WIDTH, CLASSES = 4, 32, 5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models run on one thread: on a busy machine, waiting for a second takes milliseconds.

    Works in every test module that imports it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Args:
        make: builds it; the weights are made random afterwards.
        image: side of its images, in pixels.
        path: where its blocks are.
        prefix_tokens: their number, as the model itself states it.
        intermediates: the hidden states or feature maps that the model offers, if it does.
        states: the model's own h[0] … h[L − 1], if it offers them.
        tuple_output: whether its blocks return (hidden state, something).
        heads: number of linear layers whose mean is the logits.
    """

    make: Callable[[], nn.Module]
    path: str
    prefix_tokens: Callable[[Any], int]
    image: int = 32
    intermediates: Callable[[Any, Tensor], list[Tensor]] | None = None
    states: Callable[[Any, Tensor], list[Tensor]] | None = None
    tuple_output: bool = False
    heads: int = 0

    def build(self, seed: int = 0) -> nn.Module:
        """A fresh model; the same weights for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    def images(self, count: int = 3, seed: int = 0) -> Tensor:
        """Random images, shape (count, 3, side, side)."""
        generator = torch.Generator().manual_seed(1000 + seed)
        return torch.randn(count, 3, self.image, self.image, generator=generator)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The modules that stand where the blocks are, taken by hand."""
        children = list(model.get_submodule(self.path).children())
        kind = "Block", "Layer"
        return [child for child in children if type(child).__name__.endswith(kind)]


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


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        timm = pytest.importorskip("timm")
        small = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "num_classes": CLASSES}
        return timm.create_model(name, pretrained=False, **{**small, **options})

    return make


def _transformers(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        model_class = getattr(transformers, name)
        config = model_class.config_class(
            hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2,
            intermediate_size=2 * WIDTH, image_size=32, patch_size=8, num_labels=CLASSES,
            **options,
        )  # fmt: skip
        return model_class(config)

    return make


def _torchvision(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = pytest.importorskip("torchvision").models
        return models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=DEPTH, num_heads=2, hidden_dim=WIDTH,
            mlp_dim=2 * WIDTH, num_classes=CLASSES, **options,
        )  # fmt: skip

    return make


def _timm_states(model: Any, images: Tensor) -> list[Tensor]:
    out = model.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=True)[1]
    return [torch.cat(part[::-1], 1) if isinstance(part, tuple) else part for part in out]


def _timm_intermediates(model: Any, images: Tensor) -> list[Tensor]:
    final, maps = model.forward_intermediates(images, norm=True)
    return [final, *maps, *model.get_intermediate_layers(images, n=[0, DEPTH - 1])]


def _hidden_states(model: Any, images: Tensor) -> list[Tensor]:
    return list(model(images, output_hidden_states=True).hidden_states)


def _backbone(model: Any, images: Tensor) -> list[Tensor]:
    output = model(images, output_hidden_states=True)
    return [*model(images).feature_maps, *output.feature_maps, *output.hidden_states]


def _timm_family(name: str, heads: int = 1, image: int = 32, **options: Any) -> Family:
    return Family(
        make=_timm(name, img_size=image, **options), image=image, path="blocks",
        prefix_tokens=lambda model: model.num_prefix_tokens,
        intermediates=_timm_intermediates,
        states=lambda model, images: [_blank, *_timm_states(model, images)][:DEPTH],
        heads=heads,
    )  # fmt: skip


_blank = torch.empty(0)
"""Stands for a state that the model does not offer."""


def _transformers_family(
    name: str, path: str, prefix: Callable[[Any], int], heads: int, **options: Any
) -> Family:
    backbone = name.endswith("Backbone")
    return Family(
        make=_transformers(name, **options), path=path, prefix_tokens=prefix, heads=heads,
        intermediates=_backbone if backbone else _hidden_states,
        states=lambda model, images: _hidden_states(model, images)[:DEPTH],
    )  # fmt: skip


def _one(model: Any) -> int:
    return 1


def _registers(model: Any) -> int:
    return 1 + model.config.num_register_tokens


def _class_and_distillation(model: Any) -> int:
    embeddings = model.base_model.embeddings
    return embeddings.cls_token.shape[1] + embeddings.distillation_token.shape[1]


def _plain(block: type[nn.Module] = PlainBlock, prefix: int = 1) -> Family:
    return Family(
        make=lambda: PlainViT(block, prefix), path="transformer", heads=1,
        prefix_tokens=lambda model: model.prefix.shape[1],
        intermediates=lambda model, images: model.hidden_states(images),
        states=lambda model, images: model.hidden_states(images)[:DEPTH],
    )  # fmt: skip


FAMILIES: dict[str, Family] = {
    "timm-vit": _timm_family("vit_tiny_patch16_224", patch_size=8),
    "timm-vit-bare": _timm_family("vit_tiny_patch16_224", heads=0, patch_size=8, num_classes=0),
    "timm-vit-average": _timm_family(
        "vit_base_patch16_224", patch_size=8, global_pool="avg", class_token=False
    ),
    "timm-deit-distilled": _timm_family("deit_tiny_distilled_patch16_224", heads=2, patch_size=8),
    "timm-dinov2": _timm_family("vit_small_patch14_dinov2", image=28, num_classes=CLASSES),
    "timm-dinov2-bare": _timm_family("vit_small_patch14_dinov2", heads=0, image=28, num_classes=0),
    "timm-dinov2-reg4": _timm_family("vit_small_patch14_reg4_dinov2", image=28),
    "timm-clip-style": _timm_family("vit_base_patch16_clip_224", patch_size=8),
    "vit": _transformers_family("ViTModel", "layers", _one, 0, pooler_output_size=WIDTH),
    "vit-classifier": _transformers_family("ViTForImageClassification", "vit.layers", _one, 1),
    "deit": _transformers_family("DeiTModel", "layers", _class_and_distillation, 0),
    "deit-classifier": _transformers_family(
        "DeiTForImageClassification", "deit.layers", _class_and_distillation, 1
    ),
    "deit-teacher": _transformers_family(
        "DeiTForImageClassificationWithTeacher", "deit.layers", _class_and_distillation, 2
    ),
    "dinov2": _transformers_family("Dinov2Model", "encoder.layer", _one, 0),
    "dinov2-classifier": _transformers_family(
        "Dinov2ForImageClassification", "dinov2.encoder.layer", _one, 1
    ),
    "dinov2-backbone": _transformers_family(
        "Dinov2Backbone", "encoder.layer", _one, 0, out_indices=[1, 2, 4]
    ),
    "dinov2-registers": _transformers_family(
        "Dinov2WithRegistersModel", "encoder.layer", _registers, 0, num_register_tokens=3
    ),
    "dinov2-registers-classifier": _transformers_family(
        "Dinov2WithRegistersForImageClassification", "dinov2_with_registers.encoder.layer",
        _registers, 1,
    ),
    "torchvision-vit": Family(_torchvision(), "encoder.layers", _one, heads=1),
    "torchvision-vit-representation": Family(
        _torchvision(representation_size=16), "encoder.layers", _one, heads=1
    ),
    "plain": _plain(),
    "plain-no-prefix": _plain(prefix=0),
    "plain-in-place": _plain(InPlaceBlock),
    "plain-nested": _plain(NestedBlock),
    "plain-tuple": Family(
        lambda: TupleViT(TupleBlock), "transformer", _one, tuple_output=True, heads=1
    ),
    "plain-attributes": Family(AttributeViT, "", _one, heads=1),
}  # fmt: skip
