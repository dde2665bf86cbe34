"""The training and the test part of a data set are found where people keep them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import folder_of

from blockfit.data.splits import train_and_test
from blockfit.errors import BlockfitError


def test_parquet_files_by_their_names(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation", "training_notes"):
        (tmp_path / f"{name}.parquet").touch()
    train, test = train_and_test(str(tmp_path))
    assert train == [str(tmp_path / f"train-0000{i}-of-00002.parquet") for i in (0, 1)]
    assert test == str(tmp_path / "validation.parquet")


def test_the_data_folder_of_a_downloaded_set(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train", "test", "validation"):
        (tmp_path / "data" / f"{name}.parquet").touch()
    found = train_and_test(str(tmp_path))
    assert found == tuple(str(tmp_path / "data" / f"{name}.parquet") for name in ("train", "test"))


def test_folders_of_pictures(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder_of(tmp_path / split / label, 2)
    assert train_and_test(str(tmp_path)) == (f"{tmp_path}:train", f"{tmp_path}:val")


def test_ready_names() -> None:
    assert train_and_test("digits") == ("digits", "digits:test")
    assert train_and_test("cifar100-fine") == ("cifar100-fine:train", "cifar100-fine:test")
    assert train_and_test("imagenet-1k") == ("imagenet-1k:train", "imagenet-1k:validation")


def test_a_set_with_one_part_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", 2)
    with pytest.raises(BlockfitError, match="train= and test="):
        train_and_test(str(tmp_path))
