"""Every source in docs/data.md is read as written there."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from pictures import PIXELS, folder_of, labels, levels, table
from test_layouts import cifar, mnist
from test_ready import hub
from test_tar_shards import shards

from blockfit.data.images import images
from blockfit.data.ready import READY

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text("utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.partition("## Labels")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| source")
]
SOURCES = [(text, row[2]) for row in ROWS for text in re.findall(r"`([^`]+)`", row[1])]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the page speaks of."""
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "photos", 3)
    for name in ("cat", "ant"):
        folder_of(tmp_path / "animals" / name, 2)
    for name in ("n01440764", "n01443537"):
        folder_of(tmp_path / "imagenet" / "val" / name, 2)
        folder_of(tmp_path / "imagenet" / "train" / name, 1)
    (tmp_path / "list.txt").write_text("photos/002.png 1\nphotos/000.png 0\n")
    (tmp_path / "list.csv").write_text("path,label\nphotos/002.png,cat\nphotos/000.png,ant\n")
    (tmp_path / "list.tsv").write_text("class\timage\ncat\tphotos/002.png\nant\tphotos/000.png\n")
    (tmp_path / "shards").mkdir()
    packed = gzip.compress((shards(tmp_path / "shards") / "shard-000000.tar").read_bytes())
    (tmp_path / "packed.tar.gz").write_bytes(packed)
    array = np.repeat(np.arange(4, dtype=np.uint8), 64).reshape(4, 8, 8)
    np.save("arrays.npy", array)
    np.savez("arrays.npz", images=array, labels=[0, 1, 0, 1])
    np.savez("mnist.npz", x_train=array, y_train=[0, 1, 2, 3], x_test=array, y_test=[3, 2, 1, 0])
    mnist(cifar(tmp_path / "root"))
    mnist(tmp_path / "root", "FashionMNIST")
    return tmp_path


@pytest.mark.parametrize(("source", "promise"), SOURCES, ids=[source for source, _ in SOURCES])
def test_each_source_is_read_as_it_is_written(
    source: str, promise: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source.startswith(("table", "parts", "saved")):
        (here / "parts").mkdir()
        table(6).to_parquet(here / "table.parquet")
        table(6).to_parquet(here / "parts" / "0.parquet")
        table(6).save_to_disk(here / "saved")
    name = source.partition(":")[0]
    if name in READY:
        pytest.importorskip("datasets")
        (here / "hub").mkdir()
        columns = [READY[name].label_column or "label"]
        hub(monkeypatch, here / "hub", name, **{column: ["a", "b"] for column in columns})
    data = images(source, preprocessing=None if name == "digits" else PIXELS)
    assert len(levels(data)) == len(data) > 0
    assert (labels(data) is None) == (promise == "none")


def test_the_table_is_complete() -> None:
    written = {source.partition(":")[0] for source, _ in SOURCES}
    assert READY.keys() <= written
    assert all("`" in row[1] for row in ROWS)
