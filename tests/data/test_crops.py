"""Views of images: crops of what was there, the same each time, with places of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pictures import PIXELS, folder_of, levels, spoil
from torch import Tensor
from torch.utils.data import DataLoader

from blockfit.data.images import Images, images
from blockfit.data.views import SMALLEST, can_be_cropped, cropped


def pictures(count: int = 3, side: int = 32) -> Tensor:
    """Pictures that get lighter from the left to the right and from the top to the bottom."""
    ramp = torch.arange(side).float()
    return (ramp[:, None] * 100 + ramp).expand(count, 3, side, side).contiguous()


def viewed(data: Images, views: int) -> Images:
    return replace(data, views=views)


def test_a_view_is_a_part_of_the_image_and_nothing_is_mirrored() -> None:
    given = pictures(20)
    shown = cropped(given, range(20), 1, 0)
    assert shown.shape == given.shape
    assert (shown.diff(dim=-1)[..., 2:-2, 2:-2] > 0).all()
    assert (shown.diff(dim=-2)[..., 2:-2, 2:-2] > 0).all()
    span = (shown[:, 0, 16, -3] - shown[:, 0, 16, 2]) / (given[:, 0, 16, -3] - given[:, 0, 16, 2])
    assert SMALLEST - 0.05 < float(span.min()) < 0.7
    assert 0.8 < float(span.max()) < 1.05


def test_a_view_depends_on_place_view_and_seed_alone() -> None:
    given = pictures(4)
    shown = cropped(given, [4, 5, 6, 7], 2, 3)
    assert torch.equal(shown[1:3], cropped(given[1:3], [5, 6], 2, 3))
    for other in (cropped(given, [5, 6, 7, 8], 2, 3), cropped(given, [4, 5, 6, 7], 1, 3)):
        assert not torch.equal(shown, other)
    assert not torch.equal(shown, cropped(given, [4, 5, 6, 7], 2, 4))


def test_what_is_no_picture_stays_as_it_is() -> None:
    batch = {"pixel_values": pictures(2).half(), "input_ids": torch.ones(2, 5), "size": 32}
    shown = cropped(batch, [0, 1], 1, 0)
    assert isinstance(shown, dict)
    assert shown["pixel_values"].dtype == torch.float16
    assert not torch.equal(shown["pixel_values"], batch["pixel_values"])
    assert shown["input_ids"] is batch["input_ids"]
    assert shown["size"] == 32


@pytest.mark.parametrize(
    ("batch", "can"),
    [
        (torch.zeros(2, 3, 8, 8), True),
        (torch.zeros(2, 1, 8, 8), True),
        ({"pixel_values": torch.zeros(2, 3, 8, 8), "input_ids": torch.zeros(2, 5).long()}, True),
        (torch.zeros(2, 13, 8, 8), False),  # bands of a satellite, or hidden states
        (torch.zeros(2, 3, 4, 8, 8), False),  # clips
        (torch.zeros(2, 100, 8), False),  # spectrograms, points
        ({"input_ids": torch.zeros(2, 5).long()}, False),
        ({"pixel_values": torch.zeros(2, 3, 8, 8), "pixel_mask": torch.ones(2, 8, 8)}, False),
        (torch.zeros(2, 3, 8, 8).to(torch.uint8), False),
    ],
)
def test_pictures_are_told_from_what_cannot_be_cropped(batch: object, can: bool) -> None:
    assert can_be_cropped(batch) is can  # type: ignore[arg-type]


def test_a_walk_shows_all_images_as_they_are_then_every_view_of_all(tmp_path: Path) -> None:
    data = images(folder_of(tmp_path, 10), preprocessing=PIXELS, batch_size=4)
    batches = list(viewed(data, 3).batches())
    assert [len(batch.names) for batch in batches] == [4, 4, 2] * 3
    assert [place for batch in batches for place in batch.places] == list(range(30))
    assert [batch.number for batch in batches] == [0, 4, 8, 10, 14, 18, 20, 24, 28]
    assert len(viewed(data, 3)) == 10
    for batch, own in zip(batches, data.batches(), strict=False):
        assert torch.equal(batch.inputs, own.inputs)
        assert batch.names == own.names
    assert batches[3].names[0] == f"{batches[0].names[0]} (view 1)"
    again = list(viewed(data, 3).batches())
    for one, other in zip(batches, again, strict=True):
        assert torch.equal(one.inputs, other.inputs)


@pytest.mark.parametrize("start", [0, 3, 8, 10, 13, 25, 29, 30])
def test_a_walk_goes_on_at_any_place_of_any_view(tmp_path: Path, start: int) -> None:
    data = viewed(images(folder_of(tmp_path, 10), preprocessing=PIXELS, batch_size=4), 3)
    rest = [place for batch in data.batches(start) for place in batch.places]
    assert rest == list(range(start, 30))


def test_processes_share_the_views_of_all_images(tmp_path: Path) -> None:
    data = viewed(images(folder_of(tmp_path, 10), preprocessing=PIXELS, batch_size=4), 2)
    places = [
        place
        for rank in (0, 1)
        for batch in replace(data, shard=(rank, 2)).batches()
        for place in batch.places
    ]
    assert sorted(places) == list(range(20))


def test_an_unreadable_image_has_no_view(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 20)
    spoil(folder, 5)
    data = viewed(images(folder, preprocessing=PIXELS, batch_size=4), 2)
    assert sum(len(batch.names) for batch in data.batches()) == 38
    assert len(data) == 19
    assert len(data.skipped) == 1


def test_a_loader_is_walked_once_for_every_view() -> None:
    loader = DataLoader(pictures(6), batch_size=4)  # type: ignore[arg-type]
    shown = [batch.inputs for batch in viewed(images(loader), 2).batches()]
    assert sum(len(inputs) for inputs in shown) == 12
    whole = torch.cat([inputs for inputs in shown if isinstance(inputs, Tensor)])
    assert torch.equal(whole[:6], pictures(6))
    assert not torch.equal(whole[6:], pictures(6))


def test_levels_are_those_of_the_images(tmp_path: Path) -> None:
    data = images(folder_of(tmp_path, 6), preprocessing=PIXELS)
    assert levels(viewed(data, 2)) == 2 * levels(data)  # pictures of one colour
