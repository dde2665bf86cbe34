"""Blocks are found by looking at the model; nothing is left behind in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import DEPTH, FAMILIES, WIDTH, PlainBlock, PlainViT, one_thread  # noqa: F401
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Plan
from blockfit.models.blocks import (
    Blocks,
    block_modules,
    call,
    example_input,
    find_chain,
    overridden,
    record,
)
from blockfit.models.surgery import apply_plan


@pytest.fixture
def model() -> nn.Module:
    return FAMILIES["plain"].build()


@pytest.fixture
def images() -> Tensor:
    return FAMILIES["plain"].images()


class TwoTowers(nn.Module):
    """Two towers of the same depth, one for images and one for other tokens."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.vision = PlainViT()
        self.words = nn.Sequential(*[PlainBlock() for _ in range(depth)])
        self.vocabulary = nn.Embedding(10, WIDTH)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        return self.vision(pixels) @ self.words(self.vocabulary(ids)).mean(1)[:, :5].T


def towers_example() -> dict[str, Tensor]:
    return {"pixels": torch.randn(4, 3, 32, 32), "ids": torch.randint(10, (3, 6))}


def test_blocks_are_plain_values(model: nn.Module) -> None:
    blocks = find_chain(model)
    assert blocks == Blocks("transformer", DEPTH, WIDTH, 1, "x", 0)
    assert Blocks.from_json(json.loads(json.dumps(blocks.to_json()))) == blocks
    assert "stages" not in blocks.to_json()


def test_two_towers_of_the_same_depth_are_both_named() -> None:
    class Stereo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = PlainViT(), PlainViT()

        def forward(self, images: Tensor) -> Tensor:
            return self.left(images) + self.right(images)

    model, example = Stereo().eval(), torch.randn(2, 3, 32, 32)
    with pytest.raises(BlockfitError, match=r"'left.transformer' and 'right.transformer'.*blocks="):
        find_chain(model, example)
    assert find_chain(model, example, path="right.transformer").path == "right.transformer"


@pytest.mark.parametrize("depth", [2, DEPTH, DEPTH + 2])
def test_the_tower_that_reads_the_images_wins_however_long_the_other_is(depth: int) -> None:
    found = find_chain(TwoTowers(depth).eval(), towers_example())
    assert (found.path, found.prefix_tokens) == ("vision.transformer", 1)


def test_a_tower_that_ignores_the_noise_asks_for_its_prefix_tokens() -> None:
    model, example = TwoTowers().eval(), towers_example()
    example["ids"] = example["ids"][:1].repeat(2, 1)
    with pytest.raises(BlockfitError, match="does not depend on the input; pass prefix_tokens"):
        find_chain(model, example, path="words")
    assert find_chain(model, example, path="words", prefix_tokens=0).prefix_tokens == 0


def test_a_wrong_path_is_refused_with_what_looks_like_it(model: nn.Module) -> None:
    with pytest.raises(BlockfitError, match=r"no module 'transfromer'.*'transformer'"):
        find_chain(model, path="transfromer")


def test_a_path_to_something_else_is_refused_with_the_reason(model: nn.Module) -> None:
    with pytest.raises(BlockfitError, match="'stem' holds no two modules"):
        find_chain(model, path="stem")
    with pytest.raises(BlockfitError, match=r"no module 'head\.0'"):
        find_chain(model, path="head.0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, i: x.transpose(1, 2) if i == 2 else x, "does not take|does not read"),
        (lambda x, i: x + 1 if i == 2 else x, "block 2 does not read what block 1 returned"),
    ],
)
def test_lists_that_do_not_hand_on_their_state_are_no_blocks(
    change: Callable[[Tensor, int], Tensor], message: str
) -> None:
    class Between(PlainViT):
        def forward(self, images: Tensor) -> Tensor:
            hidden = self.tokens(images)
            for index, block in enumerate(self.transformer):
                hidden = block(change(hidden, index).reshape(hidden.shape))
            return hidden

    with pytest.raises(BlockfitError, match=f"found no blocks.*'transformer'.*{message}"):
        find_chain(Between())


def test_unused_shared_and_reversed_blocks_are_no_blocks() -> None:
    class Backwards(PlainViT):
        def forward(self, images: Tensor) -> Tensor:
            hidden = self.tokens(images)
            for block in reversed(self.transformer):
                hidden = block(hidden)
            return hidden

    with pytest.raises(BlockfitError, match="block 3 ran when block 0 was due"):
        find_chain(Backwards())
    shared = PlainViT()
    shared.transformer = nn.ModuleList([PlainBlock()] * DEPTH)
    with pytest.raises(BlockfitError, match="one and the same module"):
        find_chain(shared)

    class Half(PlainViT):
        def forward(self, images: Tensor) -> Tensor:
            return self.transformer[1](self.transformer[0](self.tokens(images)))

    with pytest.raises(BlockfitError, match="only 2 of its 4 modules ran"):
        find_chain(Half())


def test_tokens_before_images_are_refused() -> None:
    class TokensFirst(PlainViT):
        def forward(self, images: Tensor) -> Tensor:
            hidden = self.tokens(images).transpose(0, 1)
            for block in self.transformer:
                hidden = block(hidden)
            return hidden

    with pytest.raises(BlockfitError, match=r"take \(tokens, batch, width\)"):
        find_chain(TokensFirst())


def test_a_model_without_lists_is_refused() -> None:
    with pytest.raises(BlockfitError, match=r"no list of same-class modules.*blocks="):
        find_chain(nn.Linear(3, 3), torch.randn(2, 3))


def test_a_convolutional_model_is_refused() -> None:
    layers = [nn.Conv2d(3, 3, 1) for _ in range(4)]
    with pytest.raises(BlockfitError, match=r"found no blocks.*the model itself"):
        find_chain(nn.Sequential(*layers), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.full((2, 3, 32, 32), float("nan")), "NaN or infinite"),
        (torch.zeros(0, 3, 32, 32), "empty"),
        (torch.zeros(2, 1, 32, 32), r"cannot be run on the example \(\(2, 1, 32, 32\)\)"),
        ({"pictures": torch.zeros(2, 3, 32, 32)}, r"pictures \(2, 3, 32, 32\).*unexpected keyword"),
        ([1, 2], "example must be a Tensor of torch, a mapping"),
    ],
)
def test_bad_examples_are_refused(model: nn.Module, example: Any, message: str) -> None:
    with pytest.raises(BlockfitError, match=message):
        find_chain(model, example)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_a_model_that_does_not_say_its_size_asks_for_an_example(model: nn.Module) -> None:
    del model.img_size
    with pytest.raises(BlockfitError, match="pass an example"):
        find_chain(model)
    assert find_chain(model, {"images": torch.randn(1, 3, 32, 32)}).prefix_tokens == 1


def test_nan_weights_are_named(model: PlainViT) -> None:
    with torch.no_grad():
        model.stem.weight.fill_(float("nan"))
    with pytest.raises(BlockfitError, match="the input of block 0 holds NaN"):
        find_chain(model)


def test_prefix_tokens_can_be_set_and_are_checked(model: nn.Module) -> None:
    assert find_chain(model, prefix_tokens=3).prefix_tokens == 3
    with pytest.raises(BlockfitError, match="prefix_tokens is 17, but the model has 17 tokens"):
        find_chain(model, prefix_tokens=17)


def test_on_the_meta_device_only_the_prefix_tokens_are_missing() -> None:
    with torch.device("meta"):
        model = PlainViT()
    with pytest.raises(BlockfitError, match="pass prefix_tokens"):
        find_chain(model)
    assert find_chain(model, prefix_tokens=1) == Blocks("transformer", DEPTH, WIDTH, 1, "x", 0)


def test_finding_leaves_modes_hooks_gradients_and_random_state(
    model: nn.Module, images: Tensor
) -> None:
    model.train()
    model.transformer[1].eval()
    model.head.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    kept = images.clone()
    find_chain(model, images)
    with pytest.raises(BlockfitError):
        find_chain(model, images[:, :1])
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, kept)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_dropout_and_random_masks_do_not_hide_prefix_tokens() -> None:
    class Noisy(PlainViT):
        def tokens(self, images: Tensor) -> Tensor:
            tokens = super().tokens(images)
            patches = tokens[:, 1:]
            keep = torch.rand(patches.shape[:2]).argsort(1)[:, :6, None].expand(-1, -1, WIDTH)
            return nn.functional.dropout(
                torch.cat([tokens[:, :1], patches.gather(1, keep)], 1), 0.5, self.training
            )

    model = Noisy().train()
    state = torch.get_rng_state()
    assert find_chain(model).prefix_tokens == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_an_example_of_bytes_is_varied_too() -> None:
    class FromBytes(PlainViT):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.float() / 255)

    example = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert find_chain(FromBytes(), example).prefix_tokens == 1


def test_example_input_follows_size_channels_and_precision(model: nn.Module) -> None:
    example = example_input(model.to(torch.bfloat16))
    assert isinstance(example, Tensor)
    assert (example.shape, example.dtype) == ((2, 3, 32, 32), torch.bfloat16)
    assert find_chain(model).prefix_tokens == 1


def test_text_and_vision_model_of_a_library() -> None:
    transformers = pytest.importorskip("transformers")
    tower = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64,
    }  # fmt: skip
    config = transformers.CLIPConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        text_config={**tower, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1},
    )
    model = transformers.CLIPModel(config).eval()
    images = example_input(model)
    assert isinstance(images, Tensor)
    for example in (images, {"pixel_values": images, "input_ids": torch.randint(50, (2, 4))}):
        found = find_chain(model, example)
        assert (found.path, found.depth) == ("vision_model.encoder.layers", 2)
        assert found.prefix_tokens == 1
    with pytest.raises(BlockfitError, match="only 0 of its 2 modules ran"):
        find_chain(model, path="text_model.encoder.layers")


def test_a_compressed_model_is_found_again_although_inner_lists_are_unique_now() -> None:
    model = FAMILIES["plain-nested"].build()
    blocks = find_chain(model)
    plan = Plan.of(["0:3"], "identity")
    apply_plan(model, blocks, plan, [empty_map(r, WIDTH) for r in plan])
    assert find_chain(model) == blocks


def test_changed_models_are_refused(model: PlainViT) -> None:
    blocks = find_chain(model)
    model.transformer = model.transformer[:2]
    with pytest.raises(BlockfitError, match="expected 4 blocks at 'transformer' and found 2"):
        block_modules(model, blocks)


def test_two_lists_of_one_length_in_one_module_are_refused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm0, self.norm1 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.block0, self.block1 = PlainBlock(), PlainBlock()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm1(self.block1(self.block0(self.norm0(x)[:, 1:])))

    with pytest.raises(BlockfitError, match="two lists of 2 modules"):
        find_chain(Mixed(), torch.randn(2, 5, WIDTH))


def test_recording_stops_and_starts_anew(model: nn.Module, images: Tensor) -> None:
    blocks = find_chain(model)
    with record(model, blocks) as states:
        call(model, {"images": images})
        call(model, images)
        assert len(states) == DEPTH + 1
        assert not any(state.requires_grad for state in states)
    model(images[:1])
    assert len(states[0]) == len(images)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_overriding_ends_with_an_exception_too(model: nn.Module, images: Tensor) -> None:
    blocks, expected = find_chain(model), model(images)

    def broken(hidden: Tensor) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), overridden(model, blocks, {0: broken}):
        model(images)
    assert all("forward" not in block.__dict__ for block in block_modules(model, blocks))
    assert torch.equal(model(images), expected)


def test_overriding_by_a_module_adds_no_parameters_and_is_recorded(
    model: nn.Module, images: Tensor
) -> None:
    blocks, keys = find_chain(model), list(model.state_dict())
    double = nn.Linear(WIDTH, WIDTH)
    with overridden(model, blocks, {2: double}), record(model, blocks) as states:
        model(images)
        assert list(model.state_dict()) == keys
    assert torch.equal(states[3], double(states[2]))


def test_a_forward_that_was_set_by_hand_comes_back(model: PlainViT, images: Tensor) -> None:
    block, blocks = model.transformer[1], find_chain(model)
    block.forward = lambda x: x + 1
    with overridden(model, blocks, {1: lambda hidden: hidden}):
        pass
    assert torch.equal(block(images), images + 1)


def test_overriding_a_block_that_is_not_there_changes_nothing(model: nn.Module) -> None:
    blocks = find_chain(model)
    functions = dict.fromkeys([0, DEPTH], lambda hidden: hidden)
    with pytest.raises(BlockfitError, match="no block 4"), overridden(model, blocks, functions):
        pass
    assert all("forward" not in block.__dict__ for block in block_modules(model, blocks))
