"""What experiments share: spans by similarity, hidden states within memory, rows of verdicts."""

from __future__ import annotations

import pytest
import torch
from families import one_thread as one_thread
from small import SmallViT, small_blocks, small_images, small_pictures, small_vit

from blockfit.data.images import Images
from blockfit.data.images import images as open_images
from blockfit.errors import BlockfitError
from blockfit.evaluation.paper import lab as laboratory
from blockfit.evaluation.paper.judge import Judge
from blockfit.evaluation.paper.lab import FULL, QUICK, Lab, Settings, thinned
from blockfit.fit.plan import Span, spans_up_to

FEW = Settings(
    calibration=24, longest=3, compared=(1, 2), sets=2, samples=(8, 24), positions=(8, 24), steps=3
)


def draw(count: int, seed: int) -> Images:
    return open_images(small_pictures(64), limit=count, seed=seed, batch_size=8)


def lab_of(model: SmallViT, settings: Settings = FEW) -> Lab:
    pictures = small_pictures(32, 9)
    with torch.no_grad():
        test = open_images((pictures, model(pictures).argmax(1)), batch_size=8)
    blocks = small_blocks(model)
    return Lab(model, blocks, settings, draw, Judge(model, blocks, test), {"other": draw})


def hidden_states(model: SmallViT, pictures: torch.Tensor) -> list[torch.Tensor]:
    states: list[torch.Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _, a: states.append(a[0])) for b in model.blocks]
    hooks.append(model.norm.register_forward_pre_hook(lambda _, a: states.append(a[0])))
    with torch.no_grad():
        model(pictures)
    for hook in hooks:
        hook.remove()
    return states


def test_the_nearest_span_has_the_smallest_mse_between_its_input_and_output() -> None:
    model = small_vit()
    lab = lab_of(model)
    states = hidden_states(model, torch.cat(list(draw(24, 0))))
    for length in (1, 2, 3):
        spans = [Span(start, start + length) for start in range(7 - length)]
        errors = {s: float((states[s.stop] - states[s.start]).square().mean()) for s in spans}
        nearest = lab.nearest(length)
        assert nearest == min(errors, key=errors.__getitem__)
        assert lab.distance(nearest) == pytest.approx(errors[nearest], rel=1e-4)


@pytest.mark.parametrize("room", [None, 0])
def test_hidden_states_are_the_models_own_however_little_memory_there_is(
    room: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if room is not None:
        monkeypatch.setattr(laboratory, "MOST_BYTES", room)
    model = small_vit()
    lines: list[str] = []
    lab = lab_of(model)
    lab.say = lines.append
    spans = [Span(0, 2), Span(1, 2), Span(3, 6)]
    images = small_images(20)
    expected = hidden_states(model, torch.cat(list(images)))
    found = list(lab.states(images, spans))
    assert [span for span, _, _ in found] == spans
    for span, x, y in found:
        assert torch.allclose(x, expected[span.start], atol=1e-6)
        assert torch.allclose(y, expected[span.stop], atol=1e-6)
    assert len(lines) == (1 if room is None else 3)


def test_rows_begin_with_the_original_and_hold_points_of_change() -> None:
    model = small_vit()
    lab = lab_of(model)
    solution = lab.solved(Span(1, 4), "identity", lab.moments)
    known = {"removed": 3, "spans": "1:4", "map": "identity", "mse": 0.5}
    whole, row = lab.judged([(known, solution)])
    assert whole["map"] == "original"
    assert (whole["removed"], whole["mse"], whole["top1"], whole["change"]) == (0, None, 1, 0)
    assert list(whole) == list(row)
    assert row["change"] == pytest.approx(100 * (row["top1"] - 1))
    assert row["change"] < 0
    assert row["mse"] == 0.5


def test_candidates_are_judged_in_groups_that_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab = lab_of(small_vit())
    lines: list[str] = []
    lab.say = lines.append
    solved = [
        ({"removed": len(span)}, lab.solved(span, "linear", lab.moments)) for span in lab.spans[:5]
    ]
    together = lab.judged(iter(solved))
    assert lines.count("judging 5 models on 32 test images") == 1
    monkeypatch.setattr(laboratory, "MOST_BYTES", 2 * 16 * 16 * 4)
    assert lab.judged(iter(solved)) == together
    assert [line.split()[1] for line in lines if "judging" in line] == ["5", "2", "2", "1"]


def test_thinned_spans_spread_from_the_first_to_the_last() -> None:
    spans = spans_up_to(12, 2)
    kept = thinned(spans, 4)
    assert [str(s) for s in kept if len(s) == 1] == ["0:1", "4:5", "7:8", "11:12"]
    assert [str(s) for s in kept if len(s) == 2] == ["0:2", "3:5", "7:9", "10:12"]
    assert sorted(thinned(spans, None)) == sorted(spans)
    assert len(thinned(spans, 1)) == 2


def test_settings_fit_the_model() -> None:
    small = FULL.fitting(4)
    assert (small.longest, small.compared) == (3, (1, 2, 3))
    assert QUICK.fitting(12) == QUICK
    assert QUICK.fitting(2).compared == (1,)
    with pytest.raises(BlockfitError, match="one block only"):
        FULL.fitting(1)
    with pytest.raises(BlockfitError, match="seeds must be 1 or more"):
        Settings(seeds=0)
