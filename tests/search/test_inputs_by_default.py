"""How many images a run takes where nobody says so, and images that change (case 22)."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import blockfit_command
from PIL import Image
from small import small_pictures, small_vit
from torch.utils.data import DataLoader, Dataset, TensorDataset

import blockfit
from blockfit.checkpoint import EVERY_NAME, same
from blockfit.data.decode import decode
from blockfit.data.images import images
from blockfit.search.setting import CALIBRATION_IMAGES, unprepared


class Counted(Dataset):
    """Pictures that count how often each is read; with ``noise``, others each time."""

    def __init__(self, count: int, noise: float = 0.0) -> None:
        self.pictures, self.noise, self.read = small_pictures(count), noise, []

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, position: int) -> torch.Tensor:
        self.read.append(position)
        return self.pictures[position] + self.noise * torch.randn(3, 12, 12)


def test_512_images_calibrate_where_nobody_says_how_many():
    """case 22: ten thousand pictures cost what 512 do, and the 512 are drawn over all of them."""
    data = Counted(5000)
    report = blockfit.compress(small_vit(3), data, spans=["1:2"], final=100).report
    told = report["calibration"]
    assert (told["drawn"], told["total"], told["seed"]) == (CALIBRATION_IMAGES, 5000, 0)
    assert told["fit"] + told["held_out"] == CALIBRATION_IMAGES
    assert len(set(data.read) - {0}) <= CALIBRATION_IMAGES + 100  # the first shows what they are
    assert max(data.read) > 4500
    assert blockfit.analyze(small_vit(3), Counted(600)).report["calibration"]["drawn"] == 512


def test_what_the_user_limited_is_used_as_it_is():
    model, pictures = small_vit(3), small_pictures(700)
    for given, drawn in (
        (images(pictures, limit=600, seed=3), 600),
        (images(pictures, limit="all"), 700),
        (images(pictures).take(550), 550),
        (small_pictures(40), 40),
    ):
        report = blockfit.compress(model, given, spans=["1:2"]).report
        assert report["calibration"]["drawn"] == drawn
    whole = images(pictures, seed=9)
    assert whole.draw(512, 0).positions.tolist() == images(pictures, limit=512).positions.tolist()
    with pytest.raises(blockfit.BlockfitError, match='limit must be a number of images or "all"'):
        images(pictures, limit="many")


def test_the_command_says_how_many_images_it_takes(tmp_path, monkeypatch):
    """case 22, from the command line: only what is drawn is decoded."""
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    for number in range(620):
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(folder / f"{number}.png")
    seen = []

    def counted(picture, most):
        seen.append(str(picture))
        return decode(picture, most)

    monkeypatch.setattr("blockfit.data.images.decode", counted)
    how = ("--images", folder, "--span", "3:4", "--final", "8", "-o")
    done = blockfit_command("compress", "demo", *how, tmp_path / "a")
    assert done.code == 0, done.err
    assert "images: 512 of 620 from" in done.err
    assert "drawn with seed 0; --limit all for all" in done.err
    assert len(set(seen)) == 520
    whole = blockfit_command("compress", "demo", *how, tmp_path / "b", "--limit", "all", "--json")
    assert whole.json["calibration"]["used"] == 620


def test_images_that_change_while_they_are_read_are_noticed():
    model = small_vit(3)
    for noise, told in ((0.0, False), (0.5, True)):
        loader = DataLoader(Counted(40, noise), batch_size=8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = blockfit.compress(model, loader, spans=["1:2"]).report
        words = "differ each time that they are read"
        assert any(words in line for line in report["warnings"]) == told
        ours = [w for w in caught if issubclass(w.category, blockfit.BlockfitWarning)]
        assert [str(w.message) for w in ours] == report["warnings"]
        assert all(w.filename == __file__ for w in ours)  # the user's own line
    again = DataLoader(TensorDataset(small_pictures(40)), batch_size=8, shuffle=True)
    assert not images(again).changing  # read by position: the order is blockfit's


def test_the_parts_of_a_run_are_told_beside_one_another():
    model = small_vit(3)
    told = blockfit.compress(model, small_pictures(60), spans=["1:2"]).report["calibration"]
    assert (told["fit"], told["held_out"], told["final"], told["judged"]) == (38, 10, 12, 0)


@pytest.mark.parametrize(("low", "high", "told"), [(0, 255, True), (-2.5, 2.6, False)])
def test_tensors_that_do_not_look_prepared_are_told_of(low: float, high: float, told: bool) -> None:
    """Raw pixels in tensors go to the model as they are, so that a calibration is worth nothing."""
    pictures = low + (high - low) * torch.rand(24, 3, 12, 12, generator=torch.manual_seed(0))
    report = blockfit.compress(small_vit(3), pictures, spans=["1:2"], final=0).report
    lines = [line for line in report["warnings"] if "not normalised yet" in line]
    assert len(lines) == told


def test_values_up_to_one_are_told_of_where_the_model_subtracts_a_mean() -> None:
    pictures = torch.rand(4, 3, 12, 12)
    model = small_vit(3)
    assert unprepared(images(pictures), model, pictures) == ()
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "input_size": (3, 12, 12)}  # as timm's
    assert "not normalised yet" in unprepared(images(pictures), model, pictures)[0]
    assert unprepared(images(pictures), model, pictures - 0.5) == ()


def test_images_that_are_all_the_same_are_told_of() -> None:
    """A loader that gives one image again and again makes every plan look free."""
    model, one = small_vit(3), small_pictures(1)
    with pytest.warns(blockfit.BlockfitWarning, match="first 24 images .* are all the same"):
        blockfit.compress(model, one.expand(24, -1, -1, -1).clone(), remove=1, final=0)


def test_other_images_of_the_same_source_and_size_are_other_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stopped run or an earlier sweep has measured is not gone on with for other images."""
    model, one, other = small_vit(3), small_pictures(24), small_pictures(24, seed=1)
    assert images(one).digest() == images(one.clone()).digest() != images(other).digest()
    assert images(Counted(24, noise=0.1)).digest() is None
    how = {"points": [0.9], "cuts": "mlp", "final": 0}
    blockfit.sweep(model, one, tmp_path / "sweep", **how)
    blockfit.sweep(model, one.clone(), tmp_path / "sweep", **how)
    with pytest.raises(blockfit.BlockfitError, match="a sweep with another calibration"):
        blockfit.sweep(model, other, tmp_path / "sweep", **how)
    monkeypatch.setenv(EVERY_NAME, "0")
    checkpoint = {"resume": tmp_path / "state", "remove": 1, "final": 0}
    blockfit.compress(model, one, **checkpoint)
    blockfit.compress(model, one, **checkpoint)
    with pytest.raises(blockfit.BlockfitError, match="a run with another calibration"):
        blockfit.compress(model, other, **checkpoint)


def test_progress_of_earlier_versions_without_the_content_is_gone_on_with() -> None:
    earlier = {"source": "photos", "seed": 0}
    assert same(earlier, {**earlier, "digest": "abc"})
    assert same({**earlier, "content": "of the first four"}, {**earlier, "digest": "abc"})
    assert not same(earlier, {**earlier, "seed": 1, "digest": "abc"})
    assert not same({**earlier, "digest": "abd"}, {**earlier, "digest": "abc"})


def test_a_digest_is_of_all_files_and_of_images_all_over_the_set(tmp_path: Path) -> None:
    """Not of the first images alone: those are often the same ones."""
    pictures = small_pictures(64)
    last = pictures.clone()
    last[-1] += 1
    assert images(pictures).digest() != images(last).digest()
    assert images(pictures, batch_size=3).digest() == images(pictures).digest()
    for number in range(40):
        noise = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number:02}.png")
    kept = images(tmp_path, preprocessing=16).digest()
    assert images(tmp_path, preprocessing=16).digest() == kept
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(tmp_path / "21.png")
    assert images(tmp_path, preprocessing=16).digest() != kept
