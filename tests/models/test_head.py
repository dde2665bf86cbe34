"""Features and logits are found from outside, whatever the form of the output."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import CLASSES, FAMILIES, WIDTH, PlainViT, one_thread  # noqa: F401
from small import small_images, small_vit
from torch import Tensor, nn

import blockfit
from blockfit.errors import BlockfitError
from blockfit.models.blocks import find_chain
from blockfit.models.head import observe, primary_output


@pytest.fixture
def images() -> Tensor:
    return FAMILIES["plain"].images()


class Headed(PlainViT):
    """Averages the tokens and leaves the rest to ``finish``."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, CLASSES)
        self.pooler = nn.Linear(WIDTH, WIDTH)
        self.before = nn.Linear(WIDTH, WIDTH)

    def forward(self, images: Tensor) -> Any:
        hidden = self.before(self.tokens(images))
        for block in self.transformer:
            hidden = block(hidden)
        return self.finish(self.norm(hidden))

    def finish(self, hidden: Tensor) -> Any:
        raise NotImplementedError


def test_poolers_and_layers_on_the_way_to_the_head_make_no_logits(images: Tensor) -> None:
    class Pooled(Headed):
        def finish(self, hidden: Tensor) -> Any:
            return {"last_hidden_state": hidden, "pooled": self.pooler(hidden[:, 0]).tanh()}

    model = Pooled().eval()
    seen = observe(model, find_chain(model), images)
    assert seen.logits is None
    torch.testing.assert_close(seen.features, model(images)["last_hidden_state"].flatten(1))


def test_a_head_behind_a_pooler_reads_what_the_pooler_gives(images: Tensor) -> None:
    class Classifier(Headed):
        def finish(self, hidden: Tensor) -> Any:
            return self.head(self.pooler(hidden[:, 0]).tanh()).float()

    model = Classifier().eval().to(torch.bfloat16)
    seen = observe(model, find_chain(model), images.bfloat16())
    assert seen.logits is not None
    assert seen.logits.dtype == torch.float32
    torch.testing.assert_close(model.head(seen.features).float(), seen.logits)


def test_the_sum_of_two_heads_is_logits_and_both_are_features(images: Tensor) -> None:
    class Summed(Headed):
        def finish(self, hidden: Tensor) -> Any:
            return SimpleNamespace(logits=self.head(hidden[:, 0]) + self.other(hidden[:, 1]))

    model = Summed().eval()
    seen = observe(model, find_chain(model), images)
    assert seen.features.shape == (3, 2 * WIDTH)
    first, second = seen.features.chunk(2, dim=1)
    torch.testing.assert_close(model.head(first) + model.other(second), seen.logits)


def test_probabilities_are_no_logits(images: Tensor) -> None:
    class Softmax(Headed):
        def finish(self, hidden: Tensor) -> Any:
            return self.head(hidden[:, 0]).softmax(-1)

    model = Softmax().eval()
    seen = observe(model, find_chain(model), images)
    assert seen.logits is None
    torch.testing.assert_close(seen.features, model(images))


def test_a_linear_layer_before_the_blocks_is_no_head(images: Tensor) -> None:
    class Early(Headed):
        def forward(self, images: Tensor) -> Any:
            early = self.other(self.tokens(images).mean(1))
            super().forward(images)
            return early

        def finish(self, hidden: Tensor) -> Any:
            return self.head(hidden[:, 0])

    model = Early().eval()
    assert observe(model, find_chain(model), images).logits is None


@pytest.mark.parametrize("name", ["plain", "dinov2-classifier", "timm-deit-distilled"])
def test_observing_leaves_modes_hooks_and_random_state(name: str) -> None:
    model, images = FAMILIES[name].build(), FAMILIES[name].images()
    blocks = find_chain(model)
    expected = observe(model, blocks, images)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    state = torch.get_rng_state()
    seen = observe(model, blocks, images)
    assert torch.equal(seen.features, expected.features)
    assert seen.logits is not None
    assert not seen.logits.requires_grad
    assert not seen.logits.is_inference()
    assert all(m.training for m in model.modules())
    assert all(not m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_logits_that_are_not_finite_are_logits_still(images: Tensor) -> None:
    model = FAMILIES["plain"].build()
    blocks = find_chain(model)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
        model.head.bias[1] = float("inf")
    seen = observe(model, blocks, images)
    assert seen.logits is not None
    assert seen.features.shape == (3, WIDTH)
    assert seen.logits.isfinite().sum(1).tolist() == [CLASSES - 2] * 3


def test_a_mapping_is_observed_like_its_tensor(images: Tensor) -> None:
    model = FAMILIES["plain"].build()
    blocks = find_chain(model)
    seen, same = observe(model, blocks, images), observe(model, blocks, {"images": images})
    assert torch.equal(seen.features, same.features)


def test_a_forward_that_fails_leaves_no_hooks(images: Tensor) -> None:
    model = FAMILIES["plain"].build().train()
    blocks = find_chain(model)
    with pytest.raises(RuntimeError):
        observe(model, blocks, images[:, :1])
    assert all(m.training and not m._forward_hooks for m in model.modules())


def test_the_primary_output_is_the_most_telling_tensor() -> None:
    a, b, c = (torch.full((2, 1), value) for value in (1.0, 2.0, 3.0))
    assert primary_output({"loss": torch.tensor(0.0), "last_hidden_state": b, "logits": a}) is a
    assert primary_output(SimpleNamespace(pooler_output=a, last_hidden_state=b)) is b
    assert primary_output(namedtuple("Output", ["features", "logits"])(a, b)) is b
    assert primary_output(a) is a
    assert primary_output((torch.tensor(0.0), a, b)) is a
    assert primary_output([a, b, c]) is c
    assert primary_output({"feature_maps": (a, b)}) is b
    with pytest.raises(BlockfitError, match="returned str, which holds no tensor"):
        primary_output("nothing")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("vit", "the output has shape (3, 17, 32), not (images, classes)"),
        ("clip-two-towers", "the output is image embeddings, which are features"),
        ("timm-vit-bare", "no linear layer (nn.Linear) runs after the last block"),
        ("timm-vit", ""),
    ],
)
def test_why_no_head_is_recognised_is_said(name: str, why: str) -> None:
    model, images = FAMILIES[name].build(), FAMILIES[name].images()
    seen = observe(model, find_chain(model), images)
    assert seen.no_head == why
    assert (seen.logits is None) == bool(why)


def test_a_head_that_is_no_linear_layer_is_told_of_where_it_is_missed() -> None:
    model = small_vit(4)
    model.head = nn.Sequential(model.head, nn.Softmax(dim=-1))
    why = "the output is not what a linear layer (nn.Linear) after the last block returns"
    small = blockfit.compress(model, small_images(24), spans=["1:2"])
    assert small.report["held_out"]["kl"] is None
    assert any(f"no head is recognised ({why})" in line for line in small.report["warnings"])
    for budget in ({"max_kl": 0.1}, {"max_drop": 1.0}):
        with pytest.raises(blockfit.BlockfitError) as refused:
            blockfit.compress(model, small_images(60), **budget, force_budget=True)
        assert f"head, and none is recognised ({why})" in str(refused.value)


@pytest.mark.parametrize("problem", ["one column", "regression", "multi_label_classification"])
def test_a_head_without_a_choice_of_classes_is_judged_by_its_features(
    problem: str, images: Tensor
) -> None:
    class Scoring(Headed):
        def finish(self, hidden: Tensor) -> Any:
            return self.head(hidden[:, 0])

    model = Scoring().eval()
    if problem == "one column":
        model.head = nn.Linear(WIDTH, 1)
    else:
        model.config = SimpleNamespace(problem_type=problem)  # type: ignore[assignment]
    seen, read = observe(model, find_chain(model), images), []
    model.head.register_forward_hook(lambda module, args, output: read.append(args[0]))
    model(images)
    assert seen.logits is None
    assert ("one column" if problem == "one column" else repr(problem)) in seen.no_head
    torch.testing.assert_close(seen.features, read[0])
