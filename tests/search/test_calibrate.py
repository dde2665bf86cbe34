"""The one pass: what is summed, over which tokens, and what it leaves behind."""

from __future__ import annotations

import copy

import pytest
import torch
from families import DEPTH, FAMILIES, one_thread  # noqa: F401
from small import PREFIX, small_blocks, small_images, small_pictures, small_vit
from torch import Tensor

from blockfit.data.images import images as open_images
from blockfit.errors import BlockfitError
from blockfit.fit.moments import Moments
from blockfit.fit.plan import Span, spans_up_to
from blockfit.models.blocks import find_chain, record
from blockfit.search.calibrate import calibrate, moments_of
from blockfit.search.states import TracedImages

SPANS = spans_up_to(6, 3)
PATCHES = 9


def flat(moments: Moments, token_type: str = "all") -> Tensor:
    problems = [moments.regression(span, token_type) for span in moments.spans]
    return torch.cat([t.flatten() for p in problems for t in (p.xx, p.xy, p.sum_x, p.sum_y, p.yy)])


@pytest.mark.parametrize("name", ["timm-deit-distilled", "dinov2-registers", "plain-tuple"])
@torch.no_grad()
def test_the_moments_are_those_of_the_stored_states(name: str) -> None:
    family = FAMILIES[name]
    model, pictures = family.build(), family.images(7)
    blocks = find_chain(model)
    spans = spans_up_to(DEPTH, DEPTH)
    moments = calibrate(model, blocks, open_images(pictures, batch_size=3), spans)
    with record(model, blocks) as states:
        model(pictures)
    k = family.prefix_tokens(model)
    assert moments.tokens == {"prefix": 7 * k, "patch": 7 * (states[0].shape[1] - k)}
    for span in spans:
        for token_type, tokens in (("prefix", slice(0, k)), ("patch", slice(k, None))):
            x, y = (states[b][:, tokens].flatten(0, 1).double() for b in (span.start, span.stop))
            problem = moments.regression(span, token_type)
            torch.testing.assert_close(problem.xx, x.T @ x, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(problem.xy, x.T @ y, rtol=1e-4, atol=1e-3)


def test_every_token_of_every_image_counts_also_in_a_last_short_batch() -> None:
    model = small_vit()
    moments = calibrate(model, small_blocks(model), small_images(21), SPANS)
    assert moments.tokens == {"prefix": 21 * PREFIX, "patch": 21 * PATCHES}
    few = calibrate(model, small_blocks(model), small_images(21), SPANS, tokens_per_image=4)
    assert few.tokens == {"prefix": 21 * PREFIX, "patch": 21 * 4}
    more = calibrate(model, small_blocks(model), small_images(21), SPANS, tokens_per_image=99)
    assert torch.equal(flat(more), flat(moments))


@pytest.mark.parametrize("tokens_per_image", [None, 4])
def test_states_that_are_kept_need_no_second_pass(tokens_per_image: int | None) -> None:
    model, how = small_vit(), {"tokens_per_image": tokens_per_image, "seed": 3}
    blocks, images = small_blocks(model), small_images(21)
    originals = TracedImages.of(model, blocks, images)
    assert originals.complete
    found = moments_of(originals.kept(), blocks, SPANS, **how)
    again = calibrate(model, blocks, images, SPANS, **how)
    assert found.tokens == again.tokens
    assert torch.equal(flat(found), flat(again))
    assert not TracedImages.of(model, blocks, images, limit_bytes=0).complete


def test_the_same_tokens_are_drawn_whatever_the_batch_size() -> None:
    model = small_vit()
    blocks = small_blocks(model)

    def drawn(batch_size: int, seed: int = 0) -> Tensor:
        data = small_images(20, batch_size=batch_size)
        return flat(calibrate(model, blocks, data, SPANS, tokens_per_image=3, seed=seed), "patch")

    one = drawn(20)
    for batch_size in (1, 7):
        torch.testing.assert_close(drawn(batch_size), one, rtol=1e-5, atol=1e-4)
    assert (drawn(20, seed=1) - one).norm() > 1e-2 * one.norm()


def test_tokens_differ_from_image_to_image() -> None:
    """The states of copies of one image differ only by the tokens that are drawn."""
    model = small_vit()
    blocks = small_blocks(model)
    copies = open_images(small_pictures(1).expand(64, -1, -1, -1).contiguous(), batch_size=16)
    moments = calibrate(model, blocks, copies, [Span(0, 2)], tokens_per_image=2)
    whole = calibrate(model, blocks, copies.take(1), [Span(0, 2)])
    rank = torch.linalg.matrix_rank(moments.regression(Span(0, 2), "patch").xx, rtol=1e-9)
    assert rank == torch.linalg.matrix_rank(whole.regression(Span(0, 2), "patch").xx, rtol=1e-9)


def test_memory_of_the_sums_does_not_grow_with_the_images() -> None:
    model = small_vit()
    blocks = small_blocks(model)
    sizes = {calibrate(model, blocks, small_images(n), SPANS).nbytes() for n in (4, 64)}
    assert len(sizes) == 1


def test_two_runs_add_up_to_one() -> None:
    model = small_vit()
    blocks = small_blocks(model)
    data = small_images(20, batch_size=5)
    whole = calibrate(model, blocks, data, SPANS)
    first = calibrate(model, blocks, data.take(10), SPANS)
    rest = open_images(small_pictures(20)[10:], batch_size=5)
    first.merge(calibrate(model, blocks, rest, SPANS))
    torch.testing.assert_close(flat(first), flat(whole), rtol=1e-12, atol=1e-9)


def test_the_model_is_left_as_it_was() -> None:
    model = small_vit().train()
    weights = copy.deepcopy(model.state_dict())
    chance = torch.get_rng_state()
    done: list[tuple[int, int]] = []
    calibrate(
        model, small_blocks(model), small_images(20), SPANS, tokens_per_image=2,
        progress=lambda *now: done.append(now),
    )  # fmt: skip
    assert done == [(8, 20), (16, 20), (20, 20)]
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_image_that_gives_nan_is_named_together_with_the_block() -> None:
    model = small_vit()
    blocks = small_blocks(model)
    pictures = small_pictures(12)
    pictures[9] = float("nan")
    data = open_images(pictures, batch_size=5)
    name = [name for batch in data.batches() for name in batch.names][9]
    with pytest.raises(BlockfitError) as caught:
        calibrate(model, blocks, data, SPANS)
    assert "the input of block 0" in str(caught.value)
    assert name in str(caught.value)
    model.blocks[4].mlp.narrow.weight.data[:] = float("inf")
    with pytest.raises(BlockfitError, match=r"the output of block 4 holds NaN or infinite"):
        calibrate(model, blocks, small_images(4), SPANS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_without_images_there_is_nothing_to_calibrate_on() -> None:
    model = small_vit()
    with pytest.raises(BlockfitError, match="there are no calibration images"):
        calibrate(model, small_blocks(model), small_images(4).take(0), SPANS)
