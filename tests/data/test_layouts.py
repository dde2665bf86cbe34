"""What torchvision stores is read as torchvision reads it, and no pickle in it is ever run."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import PIXELS, folder_of, labels
from torch import nn

from blockfit.data.images import Images, images
from blockfit.errors import BlockfitError

NAMES = {
    "label_names": [f"class {i}" for i in range(10)],
    "fine_label_names": [f"fine {i}" for i in range(100)],
    "coarse_label_names": [f"coarse {i}" for i in range(20)],
}


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def python_2(value: Any) -> bytes:
    """The opcodes with which Python 2 wrote CIFAR's files: dictionary, lists, an array."""
    if isinstance(value, np.ndarray):
        raw = value.tobytes()
        start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        shape = b"(K\x01" + b"".join(b"M" + struct.pack("<H", n) for n in value.shape) + b"\x86"
        minus_one = b"J\xff\xff\xff\xff"
        kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + 2 * minus_one + b"K\x00tb"
        return start + shape + kind + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    if isinstance(value, dict):
        pairs = b"".join(python_2(k) + python_2(v) for k, v in value.items())
        return b"}(" + pairs + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(python_2(v) for v in value) + b"e"
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode()
    return b"K" + bytes([value])


def dumped(value: Any, writer: str) -> bytes:
    if writer == "Python 2":
        return b"\x80\x02" + python_2(value) + b"."
    return pickle.dumps(value, protocol=int(writer[-1]))


def cifar(root: Path, writer: str = "protocol 2", each: int = 4) -> Path:
    """Both CIFARs with ``each`` pictures per file."""
    ten, hundred = root / "cifar-10-batches-py", root / "cifar-100-python"
    ten.mkdir(parents=True)
    hundred.mkdir()
    for seed, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        batch = {
            "batch_label": "batch",
            "labels": [(seed + i) % 10 for i in range(each)],
            "data": pixels(each, seed),
            "filenames": [f"{i}.png" for i in range(each)],
        }
        (ten / name).write_bytes(dumped(batch, writer))
    (ten / "batches.meta").write_bytes(dumped({"label_names": NAMES["label_names"]}, writer))
    for seed, name in enumerate(["train", "test"]):
        batch = {
            "filenames": [f"{i}.png" for i in range(each)],
            "fine_labels": [99 - i for i in range(each)],
            "coarse_labels": [19 - i for i in range(each)],
            "data": pixels(each, 50 + seed),
        }
        (hundred / name).write_bytes(dumped(batch, writer))
    meta = {key: NAMES[key] for key in ("fine_label_names", "coarse_label_names")}
    (hundred / "meta").write_bytes(dumped(meta, writer))
    return root


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist(root: Path, name: str = "MNIST", packed: bool = False) -> Path:
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for seed, (split, count) in enumerate((("train", 12), ("t10k", 5))):
        rng = np.random.default_rng(seed)
        files = {
            f"{split}-images-idx3-ubyte": rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            f"{split}-labels-idx1-ubyte": rng.integers(0, 10, count, dtype=np.uint8),
        }
        for file, array in files.items():
            content = gzip.compress(idx(array)) if packed else idx(array)
            (raw / (f"{file}.gz" if packed else file)).write_bytes(content)
    return root


def arrays(data: Images) -> list[np.ndarray]:
    return [np.asarray(data.records.read(i)[0]) for i in range(len(data))]  # type: ignore[union-attr]


def same(data: Images, theirs: Any) -> None:
    """The same pictures and labels as torchvision's data set, in the same order."""
    pairs = [theirs[i] for i in range(len(theirs))]
    assert len(data) == len(pairs) > 0
    assert all(
        np.array_equal(own, np.asarray(other))
        for own, (other, _) in zip(arrays(data), pairs, strict=True)
    )
    assert labels(data) == [int(label) for _, label in pairs]


def without_checksums(monkeypatch: pytest.MonkeyPatch, kind: Any, folder: Path) -> None:
    """torchvision's reader knows the true files' sums; here it gets those of the small ones."""

    def summed(names: list[str]) -> list[list[str]]:
        files = [(name, (folder / name).read_bytes()) for name in names]
        return [[name, hashlib.md5(c, usedforsecurity=False).hexdigest()] for name, c in files]

    monkeypatch.setattr(kind, "train_list", summed([name for name, _ in kind.train_list]))
    monkeypatch.setattr(kind, "test_list", summed([name for name, _ in kind.test_list]))
    ((name, md5),) = summed([kind.meta["filename"]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": name, "md5": md5})


@pytest.mark.parametrize("writer", ["Python 2", "protocol 2", "protocol 4", "protocol 5"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_is_read_as_torchvision_reads_it(
    writer: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = pytest.importorskip("torchvision.datasets")
    root = cifar(tmp_path, writer)
    for kind, folder in (
        (sets.CIFAR10, "cifar-10-batches-py"),
        (sets.CIFAR100, "cifar-100-python"),
    ):
        without_checksums(monkeypatch, kind, root / folder)
        data = images(f"{root / folder}:{split}", preprocessing=PIXELS)
        same(data, kind(root, train=split == "train"))
        assert data.class_names == kind(root).classes


def test_cifar_100_has_its_coarse_labels(tmp_path: Path) -> None:
    folder = f"{cifar(tmp_path)}/cifar-100-python:test"
    assert labels(images(folder, preprocessing=PIXELS)) == [99, 98, 97, 96]
    coarse = images(folder, preprocessing=PIXELS, label_column="coarse_label")
    assert labels(coarse) == [19, 18, 17, 16]
    assert coarse.class_names == NAMES["coarse_label_names"]
    assert coarse.description()["columns"] == {"label": "coarse_label"}
    with pytest.raises(BlockfitError, match="no column 'odd'; its labels are coarse_label, fine"):
        images(folder, preprocessing=PIXELS, label_column="odd")


class Runs:
    """Would create a file if it were unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


def test_code_hidden_in_cifars_files_is_never_run(tmp_path: Path) -> None:
    root, witness = cifar(tmp_path), tmp_path / "it ran"
    file = root / "cifar-10-batches-py" / "test_batch"
    batch = {"labels": [1, 2], "data": pixels(2, 0), "more": Runs(witness)}
    file.write_bytes(pickle.dumps(batch))
    data = images(f"{file.parent}:test", preprocessing=PIXELS)
    assert labels(data) == [1, 2]
    file.write_bytes(pickle.dumps(Runs(witness)))
    with pytest.raises(BlockfitError, match="blockfit runs no pickles; give the parquet files"):
        images(f"{file.parent}:test", preprocessing=PIXELS)
    assert not witness.exists()
    pickle.loads(file.read_bytes())  # noqa: S301
    assert witness.exists()


@pytest.mark.parametrize("damage", ["cut", "fewer labels", "by columns", "labels too high", "text"])
def test_cifar_files_that_are_not_as_they_should_be_are_refused(
    damage: str, tmp_path: Path
) -> None:
    file = cifar(tmp_path) / "cifar-10-batches-py" / "test_batch"
    batch: dict[str, Any] = {"labels": [1, 2, 3], "data": pixels(3, 0)}
    batch["labels"] = {"fewer labels": [1], "labels too high": [1, 2, 10]}.get(damage, [1, 2, 3])
    if damage == "by columns":
        batch["data"] = np.asfortranarray(batch["data"])
    content = pickle.dumps(batch, protocol=2)
    content = {"cut": content[:5000], "text": b"no pickle"}.get(damage, content)
    file.write_bytes(content)
    with pytest.raises(BlockfitError, match=r"is not laid out as CIFAR's files are") as caught:
        images(f"{file.parent}:test", preprocessing=PIXELS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_is_read_as_torchvision_reads_it(name: str, split: str, tmp_path: Path) -> None:
    sets = pytest.importorskip("torchvision.datasets")
    theirs = getattr(sets, name)(mnist(tmp_path, name), train=split == "train")
    for place in (tmp_path, tmp_path / name, tmp_path / name / "raw"):
        same(images(f"{place}:{split}", preprocessing=PIXELS), theirs)
    data = images(f"{mnist(tmp_path / 'packed', name, packed=True)}:{split}", preprocessing=PIXELS)
    same(data, theirs)
    expected = theirs.classes if name == "FashionMNIST" else [str(i) for i in range(10)]
    assert data.class_names == expected


def test_broken_files_of_mnist_are_named(tmp_path: Path) -> None:
    raw = mnist(tmp_path) / "MNIST" / "raw"
    file = raw / "t10k-images-idx3-ubyte"
    whole = file.read_bytes()
    for content in (whole[:-1], b"", whole[:9], idx(np.zeros((5, 784), np.uint8))):
        file.write_bytes(content)
        with pytest.raises(BlockfitError, match=r"t10k-images-idx3-ubyte is no file of MNIST's"):
            images(f"{tmp_path}:test", preprocessing=PIXELS)
    file.write_bytes(idx(np.zeros((4, 28, 28), np.uint8)))
    with pytest.raises(BlockfitError, match=r"holds 4 images, but .* 5 labels"):
        images(f"{tmp_path}:test", preprocessing=PIXELS)


def test_a_folder_asks_for_a_split_and_for_one_of_several_sets(tmp_path: Path) -> None:
    mnist(tmp_path)
    with pytest.raises(BlockfitError, match=r"has the splits train, test; say which, as in .*:te"):
        images(tmp_path, preprocessing=PIXELS)
    with pytest.raises(BlockfitError, match="there is no 'dev'"):
        images(tmp_path, preprocessing=PIXELS, split="dev")
    cifar(tmp_path)
    match = r"several data sets, .*MNIST/raw, .*batches-py, .*100-python; give one of them"
    with pytest.raises(BlockfitError, match=match):
        images(tmp_path, preprocessing=PIXELS)
    for file in (tmp_path / "MNIST" / "raw").glob("train*"):
        file.unlink()
    assert len(images(tmp_path / "MNIST", preprocessing=PIXELS)) == 5  # there is only one split


def test_imagenets_folder_gives_its_splits_and_its_order_of_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for start, wnid in enumerate(("n03888257", "n01440764", "n02102040")):
            folder_of(tmp_path / split / wnid, start + 1)
    model = nn.Module()
    model.num_classes = 1000  # type: ignore[assignment]
    data = images(f"{tmp_path}:val", model, preprocessing=PIXELS)
    assert labels(data) == [0, 0, 217, 217, 217, 701]  # tench, English springer, parachute
    assert data.class_names is not None
    assert [data.class_names[i] for i in (0, 217, 701)] == ["n01440764", "n02102040", "n03888257"]
    assert data.labels_line == "labels by WordNet id: 3 of 3 folders"
    model.num_classes = 3  # type: ignore[assignment]
    assert labels(images(f"{tmp_path}:val", model, preprocessing=PIXELS)) == [0, 0, 1, 1, 1, 2]


def test_classes_that_are_none_of_imagenets_have_no_label(tmp_path: Path) -> None:
    folder_of(tmp_path / "n01440764", 2)
    folder_of(tmp_path / "n00000001", 1)
    model = nn.Module()
    model.num_classes = 1000  # type: ignore[assignment]
    data = images(tmp_path, model, preprocessing=PIXELS, batch_size=1)
    assert [None if b.labels is None else b.labels.tolist() for b in data.batches()] == [
        None,
        [0],
        [0],
    ]


def test_the_order_of_imagenets_classes_is_timms() -> None:
    data = pytest.importorskip("timm.data")
    from blockfit.data.labels import imagenet_wnids

    info = data.ImageNetInfo("imagenet-1k")
    assert imagenet_wnids() == [info.index_to_label_name(i) for i in range(1000)]
