"""The paper's data sets by name: the right columns, one split at a time, and what to do offline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pictures import PIXELS, encoded, grey, labels, levels

from blockfit.data.images import images
from blockfit.data.ready import READY
from blockfit.errors import BlockfitError

datasets = pytest.importorskip("datasets")


def card(features: str, sizes: dict[str, int]) -> str:
    """The head of a data set's README on the Hub, with its features and the sizes of its splits."""
    splits = "".join(f"  - name: {n}\n    num_examples: {c}\n" for n, c in sizes.items())
    files = "".join(f"  - split: {n}\n    path: data/{n}-*\n" for n in sizes)
    return (
        f"---\ndataset_info:\n  features:\n{features}  splits:\n{splits}"
        f"configs:\n- config_name: default\n  data_files:\n{files}---\n"
    )


def hub(
    monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, **columns: list[str]
) -> dict[str, int]:
    """A copy of a Hub repository in ``folder``; ``name`` leads there. Its splits' sizes."""
    sizes = {split: 4 + i for i, split in enumerate(READY[name].splits)}
    (folder / "data").mkdir()
    text = "  - name: img\n    dtype: image\n"
    for column, names in columns.items():
        classes = "".join(f"          '{i}': {n}\n" for i, n in enumerate(names))
        text += f"  - name: {column}\n    dtype:\n      class_label:\n        names:\n{classes}"
    (folder / "README.md").write_text(card(text, sizes))
    features = {"img": datasets.Image()}
    features |= {column: datasets.ClassLabel(names=names) for column, names in columns.items()}
    for start, (split, count) in enumerate(sizes.items()):
        rows: dict[str, list[Any]] = {
            "img": [{"bytes": encoded(grey(100 * start + i)), "path": None} for i in range(count)]
        }
        rows |= {
            column: [i % len(names) for i in range(count)] for column, names in columns.items()
        }
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    monkeypatch.setitem(READY, name, replace(READY[name], hub=str(folder)))
    return sizes


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_a_ready_name_gives_one_split_with_its_labels(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, tmp_path, name, label=["bee", "ant"])
    data = images(f"{name}:test", preprocessing=PIXELS)
    assert levels(data) == [100, 101, 102, 103, 104]
    assert labels(data) == [0, 1, 0, 1, 0]
    assert data.class_names == ["bee", "ant"]
    assert data.description()["source"] == f"{name}:test"
    assert levels(images(name, preprocessing=PIXELS, split="train")) == [0, 1, 2, 3]


def test_cifar_100_has_a_name_for_each_kind_of_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"fine_label": ["a", "b", "c"], "coarse_label": ["x", "y"]}
    hub(monkeypatch, tmp_path, "cifar100-fine", **columns)
    monkeypatch.setitem(
        READY, "cifar100-coarse", replace(READY["cifar100-coarse"], hub=str(tmp_path))
    )
    fine = images("cifar100-fine:test", preprocessing=PIXELS)
    coarse = images("cifar100-coarse:test", preprocessing=PIXELS)
    assert (labels(fine), fine.class_names) == ([0, 1, 2, 0, 1], ["a", "b", "c"])
    assert (labels(coarse), coarse.class_names) == ([0, 1, 0, 1, 0], ["x", "y"])
    assert coarse.description()["columns"] == {"image": "img", "label": "coarse_label"}


def test_of_imagenet_only_the_wanted_splits_files_are_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, tmp_path, "imagenet-1k", label=["tench", "goldfish"])
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"would be 150 GB")
    data = images("imagenet-1k:validation", preprocessing=PIXELS)
    assert levels(data) == [100, 101, 102, 103, 104]
    assert labels(data) == [0, 1, 0, 1, 0]
    with pytest.raises(BlockfitError, match=r"imagenet-1k is .* which cannot be read"):
        images("imagenet-1k:train", preprocessing=PIXELS)


def test_the_downloaded_files_are_read_from_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the message for an unreachable Hub tells to give."""
    sizes = hub(monkeypatch, tmp_path, "imagenet-1k", label=["tench", "goldfish"])
    data = images(f"{tmp_path}/data/validation-*.parquet", preprocessing=PIXELS)
    assert len(data) == sizes["validation"]
    assert data.class_names == ["tench", "goldfish"]
    assert len(images(f"{tmp_path}:test", preprocessing=PIXELS)) == sizes["test"]


@pytest.mark.parametrize("name", READY)
def test_the_split_must_be_said(name: str) -> None:
    with pytest.raises(BlockfitError, match=rf"^{name} has the splits train, .*; say which, as in"):
        images(name, preprocessing=PIXELS)
    with pytest.raises(BlockfitError, match="there is no 'dev', as in"):
        images(f"{name}:dev", preprocessing=PIXELS)


@pytest.mark.parametrize("name", READY)
def test_without_the_hub_one_sentence_says_what_to_download(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub.\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(BlockfitError) as caught:
        images(f"{name}:{READY[name].splits[1]}", preprocessing=PIXELS)
    said = str(caught.value)
    assert "\n" not in said
    assert f"hf download {READY[name].hub} --repo-type dataset " in said
    assert ("FOLDER/data/validation-*.parquet" if "imagenet" in name else "FOLDER:test") in said
    assert (READY[name].label_column or name) in said


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "a.png").write_bytes(encoded(grey(7)))
    monkeypatch.chdir(tmp_path)
    assert levels(images("mnist", preprocessing=PIXELS)) == [7]
