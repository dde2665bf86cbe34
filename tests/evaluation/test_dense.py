"""Mean intersection over union, against scikit-learn and transformers' own post-processing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import blockfit_command
from families import CLASSES, FAMILIES
from families import one_thread as one_thread
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score

import blockfit
from blockfit.errors import BlockfitError
from blockfit.evaluation.dense import IGNORED, confusion, open_masks, scores
from blockfit.models.preprocessing import Preprocessing

SIZES = [(40, 52), (33, 32), (64, 48), (32, 32), (50, 41)]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny segmenter, pictures of several sizes, and masks with ignored pixels."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("dense")
    FAMILIES["dpt-segmentation"].build().save_pretrained(folder / "model")
    how = {"size": {"height": 32, "width": 32}, "keep_aspect_ratio": False}
    transformers.DPTImageProcessor(**how, ensure_multiple_of=1).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    for number, (high, wide) in enumerate(SIZES):
        for kind in ("images", "masks"):
            (folder / kind / "part").mkdir(parents=True, exist_ok=True)
        picture = rng.integers(0, 255, (high, wide, 3)).astype(np.uint8)
        mask = rng.integers(0, CLASSES - 1, (high, wide)).astype(np.uint8)
        mask[:5] = IGNORED
        Image.fromarray(picture).save(folder / "images" / "part" / f"{number}.png")
        image = Image.fromarray(mask, "P" if number % 2 else "L")
        if number % 2:
            image.putpalette(rng.integers(0, 255, 768).astype(np.uint8).tobytes())
        image.save(folder / "masks" / "part" / f"{number}.png")
    return folder


def by_transformers(here: Path, reduce: bool = False) -> tuple[float, float]:
    transformers = pytest.importorskip("transformers")
    model = transformers.DPTForSemanticSegmentation.from_pretrained(here / "model").eval()
    processor = transformers.DPTImageProcessor.from_pretrained(here / "model")
    truth, guess = [], []
    for number, size in enumerate(SIZES):
        picture = Image.open(here / "images" / "part" / f"{number}.png")
        mask = np.asarray(Image.open(here / "masks" / "part" / f"{number}.png")).astype(int)
        with torch.no_grad():
            out = model(**processor(picture, return_tensors="pt"))
        said = processor.post_process_semantic_segmentation(out, target_sizes=[size])[0].numpy()
        if reduce:
            mask = np.where((mask == 0) | (mask == IGNORED), IGNORED, mask - 1)
        truth.append(mask[mask != IGNORED])
        guess.append(said[mask != IGNORED])
    flat = np.concatenate(truth), np.concatenate(guess)
    labels = sorted(set(flat[0]) | set(flat[1]))
    miou = jaccard_score(*flat, labels=labels, average="macro")
    return float(miou), float(accuracy_score(*flat))


def test_the_command_gives_scikit_learns_figures(here: Path) -> None:
    found = blockfit_command(
        "evaluate", here / "model", "--data", here / "images", "--protocol", "dense", "--json",
        "--masks", here / "masks", "--batch-size", "2",
    )  # fmt: skip
    worth = found.json["protocols"]["dense"]["compressed"]
    miou, accuracy = by_transformers(here)
    assert worth["miou"] == pytest.approx(miou, abs=1e-4)
    assert worth["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-4)


def test_masks_may_be_a_column_and_their_labels_reduced(here: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = {
        key: [str(here / kind / "part" / f"{n}.png") for n in range(len(SIZES))]
        for key, kind in (("image", "images"), ("label", "masks"))
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    table = tmp_path / "table.parquet"
    datasets.Dataset.from_dict(files, features).to_parquet(table)
    model = blockfit.load(here / "model")
    images = blockfit.images(str(table), model, limit=len(SIZES), seed=3, batch_size=3)
    masks = open_masks("label", str(table))
    found = scores(confusion(model, images, masks))
    assert found["miou"] == pytest.approx(by_transformers(here)[0], abs=1e-4)
    how = images.preprocessing
    assert isinstance(how, Preprocessing)
    how.settings["do_reduce_labels"] = True
    reduced = scores(confusion(model, images, masks))
    assert reduced["miou"] == pytest.approx(by_transformers(here, reduce=True)[0], abs=1e-4)
    with pytest.raises(BlockfitError, match="neither a folder nor a column"):
        open_masks("nothing", str(table))


def test_wrong_masks_and_models_are_refused(here: Path, tmp_path: Path) -> None:
    model = blockfit.load(here / "model")
    images = blockfit.images(str(here / "images"), model)

    def with_mask(mask: np.ndarray) -> None:
        confusion(model, images, lambda name, position: mask)

    with pytest.raises(BlockfitError, match="label 77, but the model has 5 classes"):
        with_mask(np.full((8, 8), 77))
    with pytest.raises(BlockfitError, match="all pixels"):
        scores(confusion(model, images, lambda name, position: np.full((8, 8), IGNORED)))
    with pytest.raises(BlockfitError, match="holds no masks"):
        open_masks(str(tmp_path))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "0.png")
    with pytest.raises(BlockfitError, match="one channel of whole numbers"):
        confusion(model, images, open_masks(str(tmp_path)))
    (tmp_path / "0.png").rename(tmp_path / "other.png")
    with pytest.raises(BlockfitError, match="has no mask for the image"):
        confusion(model, images, open_masks(str(tmp_path)))
    classifier = FAMILIES["vit-classifier"].build()
    tensors = blockfit.images(FAMILIES["vit-classifier"].images())
    with pytest.raises(BlockfitError, match="needs a map of classes"):
        confusion(classifier, tensors, lambda name, position: np.zeros((2, 2), int))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "dense"], "--protocol dense and --masks go together"),
        (["--masks", "m"], "--protocol dense and --masks go together"),
        (["--classes", "n.txt"], "belong to --protocol zero-shot"),
        (["--protocol", "knn"], "--protocol and --train go together"),
        (["--protocol", "zero-shot", "--train", "x"], "--protocol and --train go together"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], message: str) -> None:
    found = blockfit_command("evaluate", "demo", "--data", "digits:test", *options)
    assert message in found.error
