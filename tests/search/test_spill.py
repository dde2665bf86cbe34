"""A limit of memory: the same results, sums in groups, hidden states in files."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import blockfit_command
from families import one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import on_ranks
from small import WIDTH, small_blocks, small_images, small_pictures, small_vit
from torch import Tensor

from blockfit import api
from blockfit.data.images import images as open_images
from blockfit.errors import BlockfitError
from blockfit.evaluation.analysis import analyze
from blockfit.fit.moments import Moments
from blockfit.fit.plan import Plan, spans_up_to
from blockfit.models.stages import find_blocks
from blockfit.search import spill as shelf
from blockfit.search.calibrate import calibrate
from blockfit.search.solve import Choices, solve
from blockfit.search.spill import GroupedMoments, Shelf, check_batch, groups_of, moments_bytes
from blockfit.search.states import TracedImages
from blockfit.units import bytes_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_a_tensor_beyond_the_limit_has_the_same_bits_and_leaves_no_file(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    value = (torch.randn(5, 3, 7) * 100).to(dtype).transpose(0, 2)
    kept = Shelf(0).hold(value)
    assert kept is not value
    assert torch.equal(kept, value)
    assert kept.dtype == dtype
    assert list(tmp_path.iterdir()) == []


def test_room_comes_back_when_a_tensor_goes() -> None:
    place = Shelf(100)
    first = place.hold(torch.zeros(20))
    assert place.used_bytes == 80
    second = place.hold(torch.ones(20))
    assert place.used_bytes == 80
    del first
    assert place.used_bytes == 0
    assert torch.equal(second, torch.ones(20))
    assert place.hold(torch.empty(0)).numel() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep what was freed otherwise")
def test_what_was_freed_goes_back_to_the_system() -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
        return pages * resource.getpagesize()

    pieces = [torch.ones(1 << 14) for _ in range(2000)]  # 64 KiB each: below what is mapped alone
    last = torch.ones(1 << 14)  # keeps the end of the heap
    full = resident()
    del pieces
    Shelf(0).tidy()
    assert full - resident() > 100e6
    assert last.sum() == len(last)


def test_a_folder_that_takes_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    with pytest.raises(BlockfitError, match=r"cannot put hidden states into .*No space left"):
        Shelf(0).hold(torch.zeros(3))


@settings(max_examples=30)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(3, 200))
def test_groups_hold_every_span_once_and_fit(depth: int, longest: int, squares: int) -> None:
    spans = spans_up_to(depth, min(longest, depth))
    limit = squares * moments_bytes(1, 0, WIDTH) * 1.1
    groups = groups_of(spans, WIDTH, limit)
    assert sorted(span for group in groups for span in group) == sorted(spans)
    for group in groups:
        assert Moments(group, WIDTH, 1).nbytes() <= limit
    with pytest.raises(BlockfitError, match=r"one span take .* raise max_memory= to"):
        groups_of(spans, WIDTH, moments_bytes(2, 1, WIDTH) - 1)


def test_moments_in_groups_are_those_in_one(tmp_path: Path) -> None:
    model, images = small_vit(), small_images(24)
    blocks, spans = small_blocks(model), spans_up_to(6, 3)
    whole = calibrate(model, blocks, images, spans)
    groups = groups_of(spans, WIDTH, moments_bytes(4, 3, WIDTH))
    assert len(groups) > 3
    parts = (calibrate(model, blocks, images, group) for group in groups)
    grouped = GroupedMoments(groups, parts)
    assert grouped.spans == whole.spans
    for span in [*spans, *reversed(spans)]:
        one, other = whole.regression(span), grouped.of(span).regression(span)
        assert torch.equal(one.xy, other.xy)
        assert torch.equal(one.xx, other.xx)


def compressed(limit: str | None) -> tuple[Any, Tensor, Any]:
    result = api.compress(small_vit(4), small_images(48), remove=2, max_memory=limit)
    weights = torch.cat([value.flatten() for value in result.model.state_dict().values()])
    return result.plan, weights, result.report["held_out"]


def test_a_limit_changes_nothing_but_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []
    hold = Shelf.hold

    def counted(self: Shelf, tensor: Tensor) -> Tensor:
        kept = hold(self, tensor)
        held.append(kept is not tensor)
        return kept

    monkeypatch.setattr(Shelf, "hold", counted)
    plan, weights, report = compressed(None)
    assert not held
    again, same, figures = compressed("150kB")
    assert any(held)
    assert (again, figures) == (plan, report)
    assert torch.equal(same, weights)


@pytest.mark.parametrize("precision", [None, torch.float16])
def test_what_grows_with_the_depth_lies_on_the_shelf(
    precision: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = small_vit(3), api.images(small_images(16), batch_size=8)
    blocks = find_blocks(model, next(iter(data)))
    free = TracedImages.of(model, blocks, data)
    shelved = TracedImages.of(model, blocks, data, shelf=Shelf(0))
    plan = Plan(
        (),
        tuple(
            replace(part, kept=part.size // 2)
            for index in range(3)
            for part in free.probe.parts(index).whole.values()
        ),
    )
    placed: set[int] = set()
    hold = Shelf.hold

    def counted(self: Shelf, tensor: Tensor) -> Tensor:
        kept = hold(self, tensor)
        placed.add(kept.data_ptr())
        return kept

    monkeypatch.setattr(Shelf, "hold", counted)
    solved = []
    for images in (free, shelved):
        choices = Choices()
        solution = solve(images, plan, choices=choices)
        if precision is not None:
            solution = solution.rounded(precision, images.hold)
        solved.append(solution)
    assert solved[0].weights.keys() == solved[1].weights.keys()
    for name, value in solved[1].weights.items():
        assert value.data_ptr() in placed, name
        assert torch.equal(value, solved[0].weights[name])
    assert len(choices.neurons) == len(choices.values) == len(choices.keys) == 3
    for kept in choices.neurons.values():
        assert kept.weight.data_ptr() in placed
    for basis in (b for of in (choices.values, choices.keys) for bs in of.values() for b in bs):
        assert {basis.left.data_ptr(), basis.right.data_ptr()} <= placed


def test_too_little_room_is_refused_with_what_would_do() -> None:
    state = torch.zeros(1, 10, WIDTH)
    check_batch(8, state, 6, 200_000)
    with pytest.raises(BlockfitError, match="use batch_size=5"):
        check_batch(8, state, 6, 50_000)
    with pytest.raises(BlockfitError, match="raise max_memory="):
        check_batch(8, state, 6, 100)
    with pytest.raises(BlockfitError, match="cannot read '2 apples' as max_memory"):
        analyze(small_vit(), small_images(8), max_memory="2 apples")
    done = blockfit_command(
        "sweep", "demo", "--images", "digits", "--limit", "16", "-o", "/nowhere/x",
        "--max-memory", "1kB",
    )  # fmt: skip
    assert "of --max-memory 1e-06 GB; raise --max-memory" in done.error


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("500m", 5 * 10**8), ("7", 7), ("1kb", 1000)],
)
def test_memory_is_read_as_people_write_it(text: str, size: int) -> None:
    assert bytes_of(text) == size


class Endless:
    """Batches that are made when they are asked for and kept nowhere."""

    def __init__(self, images: int) -> None:
        self.images = images

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(self.images // 64):
            yield small_pictures(64, seed=number % 10)


def peak(images: int) -> int:
    model = small_vit(6)
    blocks = small_blocks(model)
    moments = calibrate(model, blocks, open_images(Endless(images)), spans_up_to(6, 3))
    assert moments.tokens["prefix"] == images
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_memory_of_a_calibration_is_flat_from_256_to_10_000_images(tmp_path: Path) -> None:
    """The hidden states of all images would be 45 MB, the images 17 MB."""
    (few,), (many,) = (on_ranks(1, peak, count, folder=tmp_path) for count in (256, 9984))
    assert many - few < 8e6
    assert many < 1.05 * few


def test_an_analysis_needs_more_passes_for_less_memory() -> None:
    model, images = small_vit(), small_images(16)
    said: list[str] = []
    few = analyze(model, images, max_memory=100_000, say=said.append)
    assert any("pass 2 of" in line for line in said)
    assert few.tables == analyze(model, images).tables
    assert shelf.MOMENTS_SHARE + shelf.STATES_SHARE < 1
