"""The layers that write into the residual stream, found by probing, checked by autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import DEPTH, FAMILIES, one_thread  # noqa: F401
from small import (
    WIDTH,
    Attention,
    GatedBlock,
    PostNormBlock,
    ScaledBlock,
    small_blocks,
    small_pictures,
    small_vit,
)
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.models.blocks import Blocks, block_modules, find_chain
from blockfit.models.residual import (
    Skip,
    Writer,
    find_attention,
    find_writers,
    input_of,
    inputs_of,
    left_out,
    need_writer,
    written,
)
from blockfit.models.trace import Trace, trace

TIMM = ["attn.proj", "mlp.fc2"]
VIT = ["attention.o_proj", "mlp.fc2"]
MLP_ONLY = ["mlp.2"]

EXPECTED = {
    "timm-vit": TIMM,
    "timm-vit-average": TIMM,
    "timm-deit-distilled": TIMM,
    "timm-dinov2": TIMM,
    "timm-dinov2-reg4": TIMM,
    "vit": VIT,
    "deit": VIT,
    "dinov2": VIT,
    "dinov2-registers-classifier": VIT,
    "torchvision-vit": ["mlp.3"],  # nn.MultiheadAttention is fused: its projection is never called
    "plain": MLP_ONLY,
    "plain-in-place": MLP_ONLY,
    "plain-tuple": MLP_ONLY,
    "plain-nested": ["parts.4"],  # the last of five layers that follow each other
}


def seen_by(
    model: nn.Module, blocks: Blocks, images: Tensor, index: int
) -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    """A block, a way to run it, and the hidden state that reaches it."""
    seen: Trace = trace(model, blocks, images, range(blocks.depth + 1))
    block = block_modules(model, blocks)[index]
    return block, seen.runner(block, index), seen.states[index]


def family_block(name: str, index: int) -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    model = FAMILIES[name].build()
    return seen_by(model, find_chain(model), FAMILIES[name].images(), index)


def jacobian(
    block: nn.Module, run: Callable[[Tensor], Tensor], hidden: Tensor, name: str
) -> Tensor:
    """∂ (sum of the block's output over images) / ∂ (shift of the layer's output), by autograd.

    Shape (tokens, width, width): every token is shifted alike, and each answers for itself where
    the layer is simply added.
    """

    def shifted(shift: Tensor) -> Tensor:
        layer = block.get_submodule(name)
        handle = layer.register_forward_hook(lambda module, args, output: output + shift)
        try:
            return run(hidden[:1])[0]
        finally:
            handle.remove()

    return torch.autograd.functional.jacobian(shifted, torch.zeros(hidden.shape[-1]))


@pytest.mark.parametrize("name", EXPECTED)
def test_the_writers_are_the_attentions_projection_and_the_mlps_second_layer(name: str) -> None:
    for index in (0, DEPTH - 1):
        block, run, hidden = family_block(name, index)
        writers = find_writers(block, run, hidden)
        found = [writer.name for writer in writers]
        # Names inside a block are the library's; what they end in is stable.
        assert [f.split(".")[-1] for f in found] == [e.split(".")[-1] for e in EXPECTED[name]]
        for writer in writers:
            assert writer.linear(block).out_features == hidden.shape[-1]


@pytest.mark.parametrize("name", ["timm-dinov2", "dinov2", "vit", "torchvision-vit"])
def test_gains_are_the_jacobians_of_autograd(name: str) -> None:
    """With what writes behind it silenced, a writer's output z reaches the output as gain ∘ z."""
    block, run, hidden = family_block(name, 1)
    writers = find_writers(block, run, hidden)
    for number, writer in enumerate(writers):
        with written(block, {later.name: 0.0 for later in writers[number + 1 :]}):
            slope = jacobian(block, run, hidden, writer.name)
        expected = torch.diag(writer.gain).expand_as(slope)
        torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-4)


def test_layerscale_of_a_users_own_block_is_its_gain() -> None:
    model = small_vit(residual=0.3)
    block, run, hidden = seen_by(model, small_blocks(model), small_pictures(3), 2)
    attention, mlp = find_writers(block, run, hidden)
    assert (attention.name, mlp.name) == ("attention.out", "mlp.narrow")
    torch.testing.assert_close(attention.gain, model.blocks[2].gamma1, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mlp.gain, model.blocks[2].gamma2, rtol=1e-4, atol=1e-6)


def test_without_layerscale_the_gain_is_exactly_one() -> None:
    block, run, hidden = family_block("timm-vit", 1)
    assert all(torch.equal(w.gain, torch.ones(32)) for w in find_writers(block, run, hidden))


class ScaledSumBlock(ScaledBlock):
    """Post-norm with a doubled residual stream (DeepNorm) and a factor per channel."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(2 * x + self.gamma1 * self.attention(x))
        return self.norm2(2 * x + self.gamma2 * self.mlp(x))


class NormedBranchBlock(ScaledBlock):
    """What a branch adds is normalised before it is added (Swin v2)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attention(x))
        return x + self.norm2(self.mlp(x))


@pytest.mark.parametrize("kind", [PostNormBlock, ScaledSumBlock, NormedBranchBlock])
def test_sums_are_found_that_a_norm_is_given(kind: type[nn.Module]) -> None:
    model = small_vit(block=kind, residual=0.3)
    block, run, hidden = seen_by(model, small_blocks(model), small_pictures(3), 1)
    found = find_writers(block, run, hidden)
    assert [(w.name, w.given_to) for w in found] == [
        ("attention.out", "norm1"), ("mlp.narrow", "norm2")
    ]  # fmt: skip
    for writer, factor in zip(found, (block.gamma1, block.gamma2), strict=True):
        gain = factor if kind is ScaledSumBlock else torch.ones(WIDTH)
        torch.testing.assert_close(writer.gain, gain, rtol=1e-4, atol=1e-6)
        with written(block, {writer.name: 0.0}):
            base = writer.sum(block, run, hidden)
        added = writer.sum(block, run, hidden) - base
        read = input_of(block, writer.name, run, hidden)
        torch.testing.assert_close(added, writer.contribution(block, read), rtol=1e-3, atol=1e-5)


class NormedQueryBlock(ScaledBlock):
    """The branches are gated; a layer as wide as the hidden state feeds a norm inside of one."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.norm3 = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.sigmoid(x) * self.attention(self.norm3(self.query(x)))
        return x + torch.sigmoid(x) * self.mlp(self.norm2(x))


@pytest.mark.parametrize("kind", [GatedBlock, NormedQueryBlock])
def test_a_block_that_adds_nothing_simply_has_no_writers(kind: type[nn.Module]) -> None:
    model = small_vit(block=kind)
    block, run, hidden = seen_by(model, small_blocks(model), small_pictures(3), 1)
    assert find_writers(block, run, hidden) == []
    with pytest.raises(
        BlockfitError, match=r"block 1 has no linear layer whose .* the repair needs"
    ):
        need_writer([], 1, "the repair")


class TwiceBlock(ScaledBlock):
    """Uses the MLP twice: its second layer has no single output."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.mlp(x)


@pytest.mark.parametrize(
    ("kind", "expected"), [(TwiceBlock, []), (GatedBlock, [])], ids=["used twice", "gated"]
)
def test_layers_that_are_not_simply_added_do_not_count(
    kind: type[nn.Module], expected: list[str]
) -> None:
    model = small_vit(block=kind)
    block, run, hidden = seen_by(model, small_blocks(model), small_pictures(3), 1)
    assert [w.name for w in find_writers(block, run, hidden) if "mlp" in w.name] == expected


def test_effective_weights_hold_the_gain_and_can_be_stored_again() -> None:
    model = small_vit(residual=0.3)
    block, run, hidden = seen_by(model, small_blocks(model), small_pictures(3), 2)
    mlp = find_writers(block, run, hidden)[-1]
    weight, bias = mlp.effective(block)
    scale = model.blocks[2].gamma2.detach().double()
    linear = model.blocks[2].mlp.narrow
    torch.testing.assert_close(weight, scale[:, None] * linear.weight.detach().double())
    assert bias is not None
    torch.testing.assert_close(bias, scale * linear.bias.detach().double())
    stored = mlp.stored(block, 2 * weight, bias - 1)
    torch.testing.assert_close(stored["mlp.narrow.weight"], 2 * linear.weight.detach())
    torch.testing.assert_close(
        stored["mlp.narrow.bias"], linear.bias.detach() - (1 / scale).float()
    )


def test_a_channel_that_layerscale_switches_off_keeps_its_weights() -> None:
    linear = nn.Linear(3, WIDTH)
    block = nn.Sequential(linear)
    gain = torch.ones(WIDTH)
    gain[4] = 0
    stored = Writer("0", gain).stored(block, torch.full((WIDTH, 3), 7.0).double(), None)
    assert torch.equal(stored["0.weight"][4], linear.weight.detach()[4])
    assert (stored["0.weight"][:4] == 7).all()
    assert "0.bias" not in stored


def test_written_layers_return_what_they_are_told_and_are_free_again() -> None:
    model = small_vit()
    block, run, hidden = seen_by(model, small_blocks(model), small_pictures(3), 2)
    before = run(hidden)
    with written(block, {"mlp.narrow": 0.0, "attention.out": torch.ones_like(hidden)}):
        torch.testing.assert_close(run(hidden), hidden + model.blocks[2].gamma1)
    assert torch.equal(run(hidden), before)
    with pytest.raises(RuntimeError, match="stop"), written(block, {"mlp.narrow": 0.0}):
        raise RuntimeError("stop")
    assert torch.equal(run(hidden), before)


@torch.no_grad()
def test_the_input_of_a_layer_is_heard_with_and_without_the_rest_of_the_block() -> None:
    model = small_vit()
    block, run, hidden = seen_by(model, small_blocks(model), small_pictures(3), 2)
    own = model.blocks[2]
    middle = hidden + own.gamma1 * own.attention(own.norm1(hidden))
    expected = torch.relu(own.mlp.wide(own.norm2(middle)))
    torch.testing.assert_close(input_of(block, "mlp.narrow", run, hidden), expected)
    with inputs_of(block, "mlp.narrow") as heard:
        out = run(hidden)
    torch.testing.assert_close(heard[0], expected)
    torch.testing.assert_close(out, middle + own.gamma2 * own.mlp.narrow(expected))
    with pytest.raises(BlockfitError, match=r"did not run its layer mlp\.narrow"):
        input_of(block, "mlp.narrow", lambda x: x, hidden)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


class TupleAttention(nn.Module):
    """Returns a tuple, as attentions of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return self.inner(hidden), None


class TupleBlock(ScaledBlock):
    def __init__(self) -> None:
        super().__init__()
        self.attention = TupleAttention()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.attention(hidden=self.norm1(x))[0]
        return x + self.gamma2 * self.mlp(self.norm2(x))


class BesideBlock(ScaledBlock):
    """The MLP reads the block's input, not what the attention made of it (ViT-22B)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma1 * self.attention(self.norm1(x)) + self.gamma2 * self.mlp(x)


def small_block(kind: type[nn.Module]) -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    model = small_vit(block=kind)
    return seen_by(model, small_blocks(model), small_pictures(3), 2)


def skipped(
    block: nn.Module, run: Callable[[Tensor], Tensor], hidden: Tensor
) -> tuple[Skip | None, tuple[Writer, Writer]]:
    attention, mlp = find_writers(block, run, hidden)
    return find_attention(block, (attention, mlp), run, hidden), (attention, mlp)


@pytest.mark.parametrize("name", [n for n, names in EXPECTED.items() if len(names) == 2])
def test_an_mlp_is_fed_without_its_attention(name: str) -> None:
    block, run, hidden = family_block(name, 1)
    skip, (attention, mlp) = skipped(block, run, hidden)
    assert skip is not None
    assert "." not in skip.name  # the whole attention, not a part of it
    before, ran = dict(block.get_submodule(skip.name).__dict__), []
    middle = hidden + attention.contribution(block, input_of(block, attention.name, run, hidden))
    expected = input_of(block, mlp.name, run, hidden)
    handle = attention.linear(block).register_forward_hook(lambda *_: ran.append(1))
    with left_out(block, skip):
        found = input_of(block, mlp.name, run, middle)
    assert not ran
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    handle.remove()
    assert block.get_submodule(skip.name).__dict__.keys() == before.keys()
    torch.testing.assert_close(input_of(block, mlp.name, run, hidden), expected)


def test_an_attention_that_returns_a_tuple_is_left_out_too() -> None:
    block, run, hidden = small_block(TupleBlock)
    skip, _ = skipped(block, run, hidden)
    assert skip == Skip("attention", after=1)
    with left_out(block, skip):
        assert torch.equal(run(hidden), hidden + block.gamma2 * block.mlp(block.norm2(hidden)))


def test_an_mlp_beside_the_attention_has_no_shortcut() -> None:
    block, run, hidden = small_block(BesideBlock)
    assert skipped(block, run, hidden)[0] is None
