"""Tar shards are read by position, without unpacking, whatever their members are called."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import pickle
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import PIXELS, encoded, grey, labels, levels
from torch import nn

from blockfit.data.decode import Unreadable
from blockfit.data.images import images
from blockfit.data.tar_shards import from_shards
from blockfit.errors import BlockfitError

Member = tuple[str, bytes]


def tar_of(file: Path, *members: Member) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return file


def picture(level: int, name: str | None = None) -> Member:
    return name or f"{level:04d}.png", encoded(grey(level))


def shards(folder: Path, count: int = 4, each: int = 5) -> Path:
    """``shard-000000.tar`` …: pictures whose grey level is their number, classes modulo 3."""
    for number in range(count):
        members: list[Member] = []
        for level in range(number * each, (number + 1) * each):
            members += [picture(level), (f"{level:04d}.cls", f"{level % 3}\n".encode())]
        tar_of(folder / f"shard-{number:06d}.tar", *members)
    return folder


@pytest.mark.parametrize(
    "pattern", ["shard-{000000..000003}.tar", "shard-*.tar", "shard-00000{0,1,2,3}.tar", ""]
)
def test_shards_come_as_a_range_a_pattern_or_a_folder(pattern: str, tmp_path: Path) -> None:
    data = images(str(shards(tmp_path) / pattern), preprocessing=PIXELS, batch_size=6)
    assert levels(data) == list(range(20))
    assert labels(data) == [level % 3 for level in range(20)]
    first = next(data.batches()).names[0]
    assert first == f"{tmp_path}/shard-000000.tar/0000.png"


def test_a_part_of_the_shards_and_a_draw_over_all_of_them(tmp_path: Path) -> None:
    pattern = str(shards(tmp_path) / "shard-{000001..000002}.tar")
    assert levels(images(pattern, preprocessing=PIXELS)) == list(range(5, 15))
    drawn = images(str(tmp_path / "*.tar"), preprocessing=PIXELS, limit=8, seed=1)
    found = levels(drawn)
    assert len(set(found)) == 8
    assert max(found) > 10
    assert labels(drawn) == [level % 3 for level in found]


def test_a_missing_shard_of_a_range_is_named(tmp_path: Path) -> None:
    pattern = str(shards(tmp_path, 2) / "shard-{000000..000002}.tar")
    with pytest.raises(BlockfitError, match=r"no file matches .*shard-000002\.tar \(of .*\}\.tar"):
        images(pattern, preprocessing=PIXELS)


@pytest.mark.parametrize("inside", ["{5..2}", "{0..9999999}", "{0..999}{0..999}"])
def test_ranges_that_make_no_sense_are_refused(inside: str, tmp_path: Path) -> None:
    with pytest.raises(BlockfitError, match=r"upwards|more than"):
        images(f"{tmp_path}/{inside}.tar", preprocessing=PIXELS)


@pytest.mark.parametrize("form", ["tar.gz", "tgz", "tar.xz", "misnamed tar"])
def test_compressed_shards_are_unpacked_for_the_time_of_the_run(
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    # Short, since the loader's workers put sockets there, whose paths may have 107 characters.
    room = Path(tempfile.mkdtemp(prefix="room", dir="/tmp"))
    request.addfinalizer(lambda: shutil.rmtree(room, ignore_errors=True))
    monkeypatch.setattr("tempfile.tempdir", str(room))
    plain = (shards(tmp_path, 1) / "shard-000000.tar").read_bytes()
    file = tmp_path / f"packed.{form.split()[-1]}"
    file.write_bytes(lzma.compress(plain) if form == "tar.xz" else gzip.compress(plain))
    data = images(file, preprocessing=PIXELS, workers=2, batch_size=2)
    for _ in range(2):  # a worker that ends takes nothing away
        assert levels(data) == list(range(5))
    assert len(list(room.iterdir())) == 1
    del data
    assert list(room.iterdir()) == []


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_a_compressed_shard_that_is_cut_short_leaves_nothing_behind(
    cut: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(room))
    packed = gzip.compress((shards(tmp_path, 1) / "shard-000000.tar").read_bytes())
    (tmp_path / "x.tar.gz").write_bytes(packed[: int(cut * len(packed))])
    with pytest.raises(BlockfitError, match=r"cannot unpack the shard .*x\.tar\.gz"):
        images(tmp_path / "x.tar.gz", preprocessing=PIXELS)
    assert list(room.iterdir()) == []


def test_labels_come_from_cls_or_json_as_numbers_or_texts(tmp_path: Path) -> None:
    def read(**options: Any) -> tuple[list[int] | None, list[str] | None]:
        data = images(tmp_path / "x.tar", preprocessing=PIXELS, **options)
        return labels(data), data.class_names

    meta = [{"label": 4, "kind": "bee"}, {"label": 2, "kind": "ant"}, {"label": 4, "kind": "bee"}]
    json_files = [(f"{i:04d}.json", json.dumps(m).encode()) for i, m in enumerate(meta)]
    tar_of(tmp_path / "x.tar", *[picture(i) for i in range(3)], *json_files)
    assert read() == ([4, 2, 4], None)
    assert read(label_column="kind") == ([1, 0, 1], ["ant", "bee"])
    with pytest.raises(BlockfitError, match=r"no \.json of an image has the key 'sort'"):
        read(label_column="sort")
    texts = [("0000.cls", b"fly\n"), ("0001.cls", b"bee"), ("0002.cls", b"fly")]
    tar_of(tmp_path / "x.tar", *[picture(i) for i in range(3)], *json_files, *texts)
    assert read() == ([1, 0, 1], ["bee", "fly"])  # .cls before .json
    assert read(label_column="label") == ([4, 2, 4], None)
    tar_of(tmp_path / "x.tar", picture(0), ("0000.cls", b"-1"), picture(1), ("0001.cls", b"3"))
    assert read() == ([-1, 3], None)  # −1 is how data sets write "unknown"
    tar_of(tmp_path / "x.tar", picture(0), ("0000.json", b'{"label": [1, 2]}'))
    assert read() == (None, None)
    with pytest.raises(BlockfitError, match="'label' holds no label"):
        read(label_column="label")
    tar_of(tmp_path / "x.tar", picture(0), ("0000.json", b"{"))
    with pytest.raises(BlockfitError, match=r"0000\.json is no JSON"):
        read()


def test_text_labels_go_to_the_models_classes_by_name(tmp_path: Path) -> None:
    members = [picture(0), ("0000.cls", b"ant"), picture(1), ("0001.cls", b"bee")]
    model = nn.Module()
    model.config = type("Config", (), {"id2label": {0: "wasp", 1: "bee", 2: "ant"}})
    data = images(tar_of(tmp_path / "x.tar", *members), model, preprocessing=PIXELS)
    assert labels(data) == [2, 1]


def test_a_key_counts_once_and_its_other_pictures_can_be_asked_for(tmp_path: Path) -> None:
    both = [picture(9, "a.png"), picture(1, "a.jpg"), picture(50, "a.mask.png")]
    views = [picture(2, "b.left.png"), picture(3, "b.right.png"), ("b.cls", b"7"), ("a.cls", b"6")]
    file = tar_of(tmp_path / "x.tar", *both, *views)
    data = images(file, preprocessing=PIXELS)
    assert (levels(data), labels(data)) == ([1, 2, 3], [6, 7, 7])
    assert levels(images(file, preprocessing=PIXELS, image_column="mask.png")) == [50]
    assert levels(images(file, preprocessing=PIXELS, image_column="right.png")) == [3]


def test_a_later_member_of_the_same_name_replaces_the_earlier(tmp_path: Path) -> None:
    file = tar_of(tmp_path / "x.tar", picture(1, "a.png"), picture(2, "b.png"), picture(3, "a.png"))
    assert levels(images(file, preprocessing=PIXELS)) == [3, 2]


def test_odd_member_names_are_only_texts(tmp_path: Path) -> None:
    names = ["../../up.png", "/etc/abs.png", "new\nline\x1b[31m.png", "x/y/é 1.PNG", "a" * 300]
    names[-1] += ".png"
    inside = tmp_path / "inside"
    inside.mkdir()
    file = tar_of(
        inside / "x.tar",
        *[picture(i, name) for i, name in enumerate(names)],
        ("._x.png", b"macOS"),
        ("dir/.hidden.png", b""),
        ("notes.txt", b"no picture"),
        (".png", b"no name"),
    )
    with tarfile.open(file, "a") as tar:
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "../../up.png")):
            link = tarfile.TarInfo(f"link{kind.decode()}.png")
            link.type, link.linkname = kind, target
            tar.addfile(link)
        broken = tarfile.TarInfo("latin\udce9.png")
        broken.size = len(encoded(grey(5)))
        tar.addfile(broken, io.BytesIO(encoded(grey(5))))
    data = images(file, preprocessing=PIXELS)
    assert levels(data) == [0, 1, 2, 3, 4, 5]
    found = [name for batch in data.batches() for name in batch.names]
    assert all(name.isprintable() and name.encode() for name in found)
    assert found[2].endswith(r"new\nline\x1b[31m.png")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["inside", "x.tar"]


def test_broken_pictures_in_shards_are_skipped_and_named(tmp_path: Path) -> None:
    members = [picture(level) for level in range(30)]
    members[7] = ("0007.png", members[7][1][:30])
    members[9] = ("0009.png", b"")
    data = images(tar_of(tmp_path / "x.tar", *members), preprocessing=PIXELS)
    assert levels(data) == [i for i in range(30) if i not in (7, 9)]
    assert [Path(name).name for name in data.skipped] == ["0007.png", "0009.png"]


@pytest.mark.parametrize("damage", ["cut in a picture", "cut in a header", "broken header", "text"])
def test_a_shard_that_cannot_be_read_to_its_end_is_named(damage: str, tmp_path: Path) -> None:
    file = shards(tmp_path, 1) / "shard-000000.tar"
    with tarfile.open(file) as tar:
        last = tar.getmembers()[-2]
    content = bytearray(file.read_bytes())
    if damage == "cut in a picture":
        content = content[: last.offset_data + 20]
    elif damage == "cut in a header":
        content = content[: last.offset + 100]
    elif damage == "broken header":
        content[last.offset : last.offset + 512] = bytes(range(256)) * 2
    else:
        content = bytearray(b"no archive at all")
    file.write_bytes(content)
    with pytest.raises(BlockfitError, match=r"cannot read the shard .*shard-000000\.tar"):
        images(file, preprocessing=PIXELS)


def test_a_member_whose_size_goes_backwards_ends_in_a_refusal(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.png")
        member.pax_headers = {"size": "-1024"}
        tar.addfile(member)
    with pytest.raises(BlockfitError, match="cannot read the shard"):
        images(tmp_path / "x.tar", preprocessing=PIXELS)


def test_a_picture_beyond_the_limit_or_the_end_is_unreadable_before_it_is_read(
    tmp_path: Path,
) -> None:
    records = from_shards([tar_of(tmp_path / "x.tar", picture(1))], "x")
    records.read.where[0, 2] = 2**40  # type: ignore[attr-defined]
    with pytest.raises(Unreadable, match="too many"):
        records.read(0)
    records.read.where[0, 2] = 2**20  # type: ignore[attr-defined]
    with pytest.raises(Unreadable, match="the shard ends"):
        records.read(0)


def test_shards_reach_worker_processes_as_a_small_value(tmp_path: Path) -> None:
    records = from_shards(sorted(shards(tmp_path).glob("*.tar")), "shards")
    sent = pickle.dumps(records.read)
    assert len(sent) < 4000
    again = pickle.loads(sent)  # noqa: S301
    assert [again(i) for i in (19, 0)] == [records.read(i) for i in (19, 0)]
    assert isinstance(again.where, np.ndarray)


def test_a_folder_with_shards_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    tar_of(tmp_path / "set-train-0.tar", picture(1), picture(2))
    tar_of(tmp_path / "set-val-0.tar", picture(3))
    with pytest.raises(BlockfitError, match=r"shards of the splits train, val; give one, as in"):
        images(tmp_path, preprocessing=PIXELS)
    assert levels(images(f"{tmp_path}:val", preprocessing=PIXELS)) == [3]
    with pytest.raises(BlockfitError, match="no shards of the split 'test'"):
        images(tmp_path, preprocessing=PIXELS, split="test")


def test_shards_among_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(grey(1)))
    mixed = [tmp_path / "a.png", tar_of(tmp_path / "x.tar", picture(1))]
    with pytest.raises(BlockfitError, match=r"x\.tar is no image; give \.tar files by them"):
        images(mixed, preprocessing=PIXELS)
