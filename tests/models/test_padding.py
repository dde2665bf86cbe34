"""Padding of texts: what counts of a padded batch is what counts of its texts alone."""

from __future__ import annotations

import torch

from blockfit.fit.moments import Moments
from blockfit.fit.plan import Span
from blockfit.models.padding import real_rows, real_tokens, without_padding
from blockfit.search.narrowing import centred
from blockfit.search.tokens import Draw

LENGTHS = (9, 5, 7)
HIDDEN = torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.arange(12) < torch.tensor(LENGTHS)[:, None]


def test_only_a_mask_of_padded_texts_is_taken() -> None:
    ids = torch.ones(3, 12, dtype=torch.long)
    found = real_tokens({"input_ids": ids, "attention_mask": MASK.long()}, HIDDEN)
    assert found is not None
    assert torch.equal(found, MASK)
    assert real_tokens({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, HIDDEN) is None
    assert real_tokens({"input_ids": ids}, HIDDEN) is None
    assert real_tokens({"input_ids": ids, "attention_mask": MASK.long()}, HIDDEN[:, :7]) is None
    beside = {"pixel_values": torch.zeros(3, 3, 8, 8), "attention_mask": MASK.long()}
    assert real_tokens(beside, HIDDEN) is None


def test_tokens_are_drawn_of_every_text_as_if_it_came_alone() -> None:
    places = range(4, 7)
    for share in (1.0, 0.5):
        draw = Draw(1, share)
        alone = [
            draw.take(HIDDEN[i : i + 1, :n], range(4 + i, 5 + i))[0] for i, n in enumerate(LENGTHS)
        ]
        assert torch.equal(draw.take(HIDDEN, places, MASK)[0], torch.cat(alone))
        weighed = [
            torch.ones(len(rows)).double() if own is None else own
            for rows, n in zip(alone, LENGTHS, strict=True)
            for own in [draw.weights(3.0, n)]
        ]
        found = draw.weights_of_real(3.0, MASK, places)
        assert found is not None
        torch.testing.assert_close(found, torch.cat(weighed))
    assert Draw(1).weights_of_real(1.0, MASK, places) is None


def test_moments_of_real_tokens_are_those_of_the_texts_one_by_one() -> None:
    span, after = Span(0, 2), HIDDEN.flip(-1) * 2 + 1
    padded, alone = (Moments([span], 4, 1) for _ in range(2))
    padded.add_some({0: HIDDEN, 2: after}, MASK, int(MASK[:, 1:].sum()))
    for i, n in enumerate(LENGTHS):
        alone.add({0: HIDDEN[i : i + 1, :n], 2: after[i : i + 1, :n]})
    assert padded.tokens == alone.tokens == {"prefix": 3, "patch": sum(LENGTHS) - 3}
    found, expected = padded.regression(span), alone.regression(span)
    torch.testing.assert_close(found.xx, expected.xx)
    torch.testing.assert_close(found.xy, expected.xy)
    assert padded.patch_share == alone.patch_share == 1.0


def test_keys_are_centred_on_real_tokens() -> None:
    alone = [centred(HIDDEN[i : i + 1, :n])[0] for i, n in enumerate(LENGTHS)]
    torch.testing.assert_close(centred(HIDDEN, MASK), torch.cat(alone))


def test_padding_may_hold_anything_without_being_seen() -> None:
    dirty = torch.where(MASK[..., None], HIDDEN, torch.full_like(HIDDEN, float("nan")))
    assert torch.equal(without_padding(dirty, MASK).nan_to_num(99.0)[MASK], HIDDEN[MASK])
    assert not without_padding(dirty, MASK)[~MASK].any()
    assert torch.equal(real_rows(dirty, MASK), HIDDEN[MASK])
