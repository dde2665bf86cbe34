"""Images are drawn over the whole set, in the same order; broken ones are skipped and named."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import PIXELS, folder_of, labels, levels, spoil, stack, table
from PIL import Image
from torch import Tensor, nn

from blockfit.data.images import images
from blockfit.errors import BlockfitError


def test_without_a_limit_all_images_come_in_their_order(tmp_path: Path) -> None:
    data = images(folder_of(tmp_path, 10), preprocessing=PIXELS, batch_size=4)
    assert levels(data) == list(range(10))
    assert [len(batch) for batch in data] == [4, 4, 2]
    assert len(data) == 10


def test_a_limit_is_drawn_over_the_whole_set_and_never_the_first(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 60)
    drawn = levels(images(folder, preprocessing=PIXELS, limit=20, seed=0))
    assert len(set(drawn)) == 20
    assert min(drawn) < 15
    assert max(drawn) > 45
    assert drawn != sorted(drawn)
    assert drawn != levels(images(folder, preprocessing=PIXELS, limit=20, seed=1))


def test_the_draw_depends_on_the_seed_only(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 60)
    drawn = levels(images(folder, preprocessing=PIXELS, limit=20, seed=3))
    torch.manual_seed(99)
    np.random.seed(99)
    again = images(folder, preprocessing=PIXELS, limit=20, seed=3, batch_size=7)
    assert levels(again) == drawn
    assert levels(again) == drawn
    fewer = images(folder, preprocessing=PIXELS, limit=9, seed=3)
    assert levels(fewer) == drawn[:9] == levels(again.take(9))


def test_a_split_is_disjoint_complete_and_reproducible(tmp_path: Path) -> None:
    data = images(folder_of(tmp_path, 50), preprocessing=PIXELS, limit=40)
    fit, held_out = data.split(0.2, seed=5)
    assert (len(fit), len(held_out)) == (32, 8)
    assert set(levels(fit)) | set(levels(held_out)) == set(levels(data))
    assert levels(held_out) == levels(data.split(0.2, seed=5)[1])
    assert levels(held_out) != levels(data.split(0.2, seed=6)[1])
    order = levels(data)
    assert levels(fit) == [level for level in order if level in set(levels(fit))]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 0.01])
def test_a_split_with_an_empty_part_is_refused(fraction: float, tmp_path: Path) -> None:
    data = images(folder_of(tmp_path, 10), preprocessing=PIXELS)
    with pytest.raises(BlockfitError, match="cannot hold out"):
        data.split(fraction)


SOURCES: dict[str, Callable[[Path], Any]] = {
    "folder": lambda folder: folder,
    "list": lambda folder: listed(folder),
    "shards": lambda folder: sharded(folder),
    "table": lambda folder: table(40, broken=7),
    "array": lambda folder: (
        np.arange(40, dtype=np.uint8).reshape(40, 1, 1) + np.zeros((8, 8), "u1")
    ),
}


def listed(folder: Path) -> Path:
    names = sorted(path.name for path in folder.iterdir())
    (folder / "list.txt").write_text("".join(f"{n}\t{i % 3}\n" for i, n in enumerate(names)))
    return folder / "list.txt"


def sharded(folder: Path) -> str:
    files = sorted(folder.iterdir())
    for number in range(2):
        with tarfile.open(folder / f"shard-{number}.tar", "w") as tar:
            for file in files[20 * number : 20 * number + 20]:
                tar.add(file, file.name)
    return str(folder / "shard-{0..1}.tar")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("kind", SOURCES)
def test_any_number_of_workers_gives_the_same_batches_and_leaves_the_random_state_alone(
    kind: str, tmp_path: Path
) -> None:
    spoil(folder_of(tmp_path, 40), 7)
    source = SOURCES[kind](tmp_path)
    before = torch.get_rng_state()
    options: dict[str, Any] = {"preprocessing": PIXELS, "limit": 30, "seed": 2, "batch_size": 8}
    alone = images(source, **options)
    expected = list(alone.batches())
    for workers in (1, 2, 3):
        helped = images(source, **options, workers=workers)
        for found, batch in zip(helped.batches(), expected, strict=True):
            assert isinstance(found.inputs, Tensor)
            assert torch.equal(found.inputs, batch.inputs)  # type: ignore[arg-type]
            assert found.names == batch.names
            assert (found.labels is None) == (batch.labels is None)
            assert found.labels is None or torch.equal(found.labels, batch.labels)  # type: ignore[arg-type]
        assert helped.skipped == alone.skipped
    assert len(alone.skipped) == (kind != "array")
    assert torch.equal(torch.get_rng_state(), before)


def test_broken_files_are_skipped_named_and_do_not_change_the_others(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 60)
    whole = levels(images(folder, preprocessing=PIXELS, limit=30, seed=0))
    spoil(folder, whole[3])
    (folder / f"{whole[17]:03d}.png").write_bytes(b"")
    data = images(folder, preprocessing=PIXELS, limit=30, seed=0, batch_size=8)
    assert levels(data) == [v for i, v in enumerate(whole) if i not in (3, 17)]
    assert [Path(name).stem for name in data.skipped] == [f"{whole[i]:03d}" for i in (3, 17)]
    assert len(data) == 28
    assert data.description()["used"] == 28
    assert data.description()["drawn"] == 30
    assert data.description()["skipped"] == data.skipped
    assert json.loads(json.dumps(data.description())) == data.description()


def test_more_than_a_tenth_broken_stops_and_names_the_first(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 40)
    spoil(folder, 4, 9, 14, 19)
    assert len(levels(images(folder, preprocessing=PIXELS))) == 36
    spoil(folder, 30)
    match = r"5 or more of 40 images .*004.png, .*009.png, .*014.png, … \(\w+: .*\)"
    with pytest.raises(BlockfitError, match=match):
        levels(images(folder, preprocessing=PIXELS))


def test_a_small_part_of_a_good_set_is_not_stopped_by_its_one_broken_file(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 40)
    data = images(folder, preprocessing=PIXELS)
    fit, held_out = data.split(0.1)
    spoil(folder, levels(held_out)[0])
    fit, held_out = images(folder, preprocessing=PIXELS).split(0.1)
    assert len(levels(held_out)) == 3
    assert len(held_out.skipped) == 1
    assert len(levels(fit)) == 36
    assert fit.skipped == []


def test_a_fault_of_the_preprocessing_is_no_broken_file(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 4)

    def fails(image: Image.Image) -> Tensor:
        raise KeyError("my own mistake")

    with pytest.raises(KeyError, match="my own mistake"):
        levels(images(folder, preprocessing=fails))
    shapeless: Any = lambda image: np.zeros(3)  # noqa: E731
    for workers in (0, 1):
        data = images(folder, preprocessing=shapeless, workers=workers)
        with pytest.raises(BlockfitError, match=r"^the preprocessing must return tensors \(chan"):
            levels(data)


class Named(nn.Module):
    """A model that only knows the names of its classes."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.config = type("Config", (), {"id2label": dict(enumerate(names))})


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("ant", "bee", "fly"), [1, 0, 2, 1, 0, 2]),
        (("Fly", "BEE", "Ant"), [1, 2, 0, 1, 2, 0]),
        (("wasp", "bee, honey bee", "x", "house fly, fly", "ant"), [1, 4, 3, 1, 4, 3]),
        (("bee", "ant", "fly"), [0, 1, 2, 0, 1, 2]),
        (("red", "green", "blue"), None),
        (("bee", "ant", "fly, x", "fly, y"), [0, 1, -1, 0, 1, -1]),
    ],
    ids=["other order", "other case", "aliases", "same order", "other names", "shared alias"],
)
def test_labels_go_by_name_where_names_are_the_models(
    names: tuple[str, ...], expected: list[int] | None
) -> None:
    assert labels(images(table(), Named(*names), preprocessing=PIXELS)) == expected


def test_the_demos_digits_have_a_name() -> None:
    calibration, test = images("digits"), images("digits:test")
    assert (len(calibration), len(test)) == (1198, 599)
    assert next(iter(test)).shape == (32, 1, 8, 8)  # type: ignore[union-attr]
    assert test.description()["source"] == "digits:test"


@pytest.mark.parametrize("option", [{"limit": 0}, {"batch_size": 0}, {"workers": -1}], ids=str)
def test_numbers_that_make_no_sense_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(BlockfitError, match="at least"):
        images(stack(3), **option)  # type: ignore[arg-type]


@pytest.mark.shared
def test_the_real_images_are_drawn_decoded_and_labelled(
    cifar10_test: Path, shared_model: Path
) -> None:
    pytest.importorskip("datasets")
    from blockfit.models.load import load_model

    model = load_model(shared_model)
    data = images(cifar10_test, model, limit=64, seed=0)
    with torch.inference_mode():
        hits = sum(
            int((model(batch.inputs).logits.argmax(-1) == batch.labels).sum())
            for batch in data.batches()
        )
    assert hits >= 56  # 95.16% on all 10,000
    assert data.description()["total"] == 10_000
    assert data.class_names is not None
    assert data.class_names[0] == "airplane"
