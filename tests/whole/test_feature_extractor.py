"""Features of a model as a step of scikit-learn's pipelines."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError, SkipTestWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks
from small import small_pictures, small_vit

import blockfit
from blockfit.models.demo import digits


@pytest.fixture(scope="module")
def pictures() -> tuple[list[Image.Image], np.ndarray]:
    pixels, labels = digits("test")
    grey = pixels[:60, 0]
    grey = (255 * (grey - grey.min()) / (grey.max() - grey.min())).to(torch.uint8).numpy()
    return [Image.fromarray(one) for one in grey], labels[:60].numpy()


def test_the_rows_are_what_the_head_reads() -> None:
    model, images = small_vit(3), small_pictures(9)
    read: list[torch.Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    found = blockfit.FeatureExtractor(model, batch_size=4).fit_transform(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, read[0].numpy(), atol=1e-5)


def test_a_pipeline_learns_from_pillow_images_and_is_cross_validated(
    pictures: tuple[list[Image.Image], np.ndarray],
) -> None:
    pipeline = make_pipeline(blockfit.FeatureExtractor("demo"), LogisticRegression(max_iter=500))
    scores = cross_val_score(pipeline, *pictures, cv=3)
    assert scores.mean() > 0.8
    pipeline[:-1].set_output(transform="pandas")
    frame = pipeline[:-1].fit_transform(pictures[0])
    assert list(frame.columns)[:2] == ["feature0", "feature1"]


def test_small_models_are_parameters_of_a_search(
    pictures: tuple[list[Image.Image], np.ndarray], tmp_path: Path
) -> None:
    result = blockfit.compress(blockfit.load("demo"), "digits", spans=[(9, 11)], final=0)
    result.save(tmp_path / "small")
    pipeline = make_pipeline(blockfit.FeatureExtractor("demo"), LogisticRegression(max_iter=500))
    models = {"featureextractor__model": ["demo", str(tmp_path / "small"), result]}
    found = GridSearchCV(pipeline, models, cv=2, error_score="raise").fit(*pictures)
    scores = found.cv_results_["mean_test_score"]
    assert scores[1] == scores[2]
    by_hand = blockfit.FeatureExtractor(result).fit_transform(pictures[0])
    np.testing.assert_array_equal(
        blockfit.FeatureExtractor(tmp_path / "small").fit_transform(pictures[0]), by_hand
    )


def test_images_come_as_paths_arrays_and_columns(
    pictures: tuple[list[Image.Image], np.ndarray], tmp_path: Path
) -> None:
    paths = []
    for number, picture in enumerate(pictures[0][:5]):
        paths.append(str(tmp_path / f"{number}.png"))
        picture.save(paths[-1])
    extractor = blockfit.FeatureExtractor("demo").fit(paths)
    expected = extractor.transform(pictures[0][:5])
    pixels = np.stack([np.asarray(picture) for picture in pictures[0][:5]])
    for source in (paths, np.array(paths), np.array(paths, dtype=object), pixels):
        np.testing.assert_array_equal(extractor.transform(source), expected)
    pandas = pytest.importorskip("pandas")
    np.testing.assert_array_equal(extractor.transform(pandas.Series(paths)), expected)


def test_an_image_that_cannot_be_read_shifts_no_row(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(20)]
    for path in paths:
        Image.new("L", (8, 8), 90).save(path)
    paths[7].write_bytes(b"no picture")
    extractor = blockfit.FeatureExtractor("demo").fit(paths)
    with pytest.raises(blockfit.BlockfitError, match=r"1 images cannot be read \(.*7\.png\)"):
        extractor.transform(paths)


def test_clones_share_the_model_and_are_not_fitted() -> None:
    model = blockfit.load("demo")
    extractor = blockfit.FeatureExtractor(model, batch_size=4).fit(torch.rand(2, 1, 8, 8))
    copy = clone(extractor)
    assert copy.model is model
    assert copy.get_params() == extractor.get_params()
    with pytest.raises(NotFittedError):
        copy.transform(torch.rand(2, 1, 8, 8))


TABULAR = {
    "check_fit_score_takes_y", "check_estimators_overwrite_params",
    "check_dont_overwrite_parameters", "check_estimators_fit_returns_self",
    "check_readonly_memmap_input", "check_positive_only_tag_during_fit",
}  # fmt: skip
"""Checks that fit an estimator on a table of numbers, which are no images."""


def test_scikit_learns_own_checks_pass_as_far_as_they_need_no_table() -> None:
    extractor: Any = blockfit.FeatureExtractor("demo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipTestWarning)
        estimator_checks.check_estimator(extractor)
    checks = getattr(estimator_checks, "_yield_api_checks", None)
    if checks is None:
        pytest.skip("this scikit-learn has no list of its checks of the interface")
    passed = 0
    for check in checks(extractor):
        name = getattr(check, "func", check).__name__
        if name not in TABULAR:
            check("FeatureExtractor", clone(extractor))
            passed += 1
    assert passed >= 8
