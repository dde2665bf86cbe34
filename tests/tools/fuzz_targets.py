"""What the fuzz reads: whole folders of every kind, their readers, and plans for a tiny model."""

from __future__ import annotations

import copy
import functools
import gzip
import io
import json
import random
import struct
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exporting import PLAIN, saved
from families import FAMILIES
from mutation import STRANGE, damaged_value
from pictures import PIXELS, encoded, folder_of, grey
from small import small_blocks, small_pictures, small_vit
from stored import KINDS, PLAN, REPORT, small_model

import blockfit
from blockfit.errors import BlockfitError
from blockfit.evaluation import analysis
from blockfit.files import foreign
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import MAP_KINDS, Plan
from blockfit.formats import folder as store
from blockfit.models.preprocessing import Preprocessing
from blockfit.models.surgery import apply_plan
from blockfit.search.budget import Budget
from blockfit.search.sweep import from_sweep, sweep


@dataclass(frozen=True)
class Target:
    """A kind of folder: how a whole one is made, and what reads it.

    Args:
        name: of the kind.
        make: fills an empty folder.
        read: called with the folder and with an empty folder, the only place to write to.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path, Path], object]

    def files(self) -> dict[str, bytes]:
        """The files of a whole folder, by name."""
        return _files(self.name)


@functools.cache
def _files(name: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "whole"
        torch.manual_seed(0)
        TARGETS[name].make(folder)
        TARGETS[name].read(folder, Path(root))  # a whole one is read
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _save(kind: str, folder: Path) -> None:
    model, blocks, source, _ = small_model(KINDS[kind])
    if kind == "transformers":
        source = replace(source, preprocessing=Preprocessing("transformers", _processor()))
    store.save(folder, model, blocks, PLAN, source=source, report=REPORT)


def _save_narrowed(folder: Path) -> None:
    """Format 3: parts of blocks keep fewer dimensions."""
    saved(folder, "vit-classifier", PLAIN, share=0.5)


def _load(kind: str, folder: Path, empty: Path) -> None:
    own = _own() if kind == "module" else None
    model = store.load(folder, model=own)
    assert all(not tensor.is_meta for tensor in model.state_dict().values())
    if kind in ("timm", "transformers"):
        _prepared(model)


@functools.cache
def _own() -> Any:
    return FAMILIES[KINDS["module"]].build()


def _processor() -> dict[str, Any]:
    import transformers

    sides = {"height": 32, "width": 32}
    values: dict[str, Any] = transformers.BitImageProcessor(size=sides, crop_size=sides).to_dict()
    return values


def _prepared(model: Any) -> None:
    """One picture the way the folder says."""
    pictures = np.zeros((1, 40, 30, 3), np.uint8)
    for batch in blockfit.images(pictures, model):
        assert batch.ndim == 4


def _make_sweep(folder: Path) -> None:
    model = blockfit.load("demo")
    sweep(
        model,
        blockfit.images("digits", model, limit=20),
        folder,
        points=(0.9, 0.8),
        latency_images=1,
    )


def _read_sweep(folder: Path, empty: Path) -> None:
    from_sweep(folder, Budget("params", 0.9))


def _transformers(folder: Path) -> None:
    FAMILIES["dinov2-classifier"].build().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_processor()))


def _timm(folder: Path) -> None:
    import timm

    model = FAMILIES["timm-vit"].build()
    timm.models.save_for_hf(model, folder, safe_serialization=True)


def _original(folder: Path, empty: Path) -> None:
    _prepared(blockfit.load(folder))


def _overwrite(folder: Path, empty: Path) -> None:
    """Nobody's folder is taken for one of blockfit's unless all in it is."""
    found = [foreign(folder, form) for form in (store.FORM, analysis.FORM)]
    if None not in found:
        raise BlockfitError(f"{folder} {found[0]}")


def _walk(source: Any) -> None:
    for batch in blockfit.images(source, preprocessing=PIXELS, batch_size=2).batches():
        assert len(batch.names)


def _pictures(folder: Path) -> None:
    folder_of(folder, 3)
    for form in ("JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
        (folder / f"x.{form.lower()}").write_bytes(encoded(grey(9, 32), form))


def _list(folder: Path) -> None:
    folder_of(folder, 3)
    (folder / "list.txt").write_text("000.png\t0\n001.png 1\n002.png 1\n")


def _numpy(folder: Path) -> None:
    folder.mkdir()
    images = np.arange(4 * 64 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    np.save(folder / "x.npy", images)
    np.savez(folder / "x.npz", train_images=images, train_labels=np.arange(4))


def _read_numpy(folder: Path, empty: Path) -> None:
    faults = []
    for name in ("x.npy", "x.npz"):
        try:
            _walk(folder / name)
        except BlockfitError as error:
            faults.append(error)
    if faults:
        raise faults[0]


def _shards(folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as tar:
        for number in range(3):
            label = json.dumps({"label": number}).encode()
            for ending, content in (("png", encoded(grey(number))), ("json", label)):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _mnist(folder: Path) -> None:
    folder.mkdir()
    pixels = struct.pack(">4B3I", 0, 0, 8, 3, 4, 28, 28) + bytes(4 * 784)
    numbers = struct.pack(">4BI", 0, 0, 8, 1, 4) + bytes([3, 1, 2, 0])
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(pixels, mtime=0))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(numbers)


TARGETS = {
    target.name: target
    for target in (
        *(
            Target(f"saved {kind}", functools.partial(_save, kind), functools.partial(_load, kind))
            for kind in KINDS
        ),
        Target("saved narrowed", _save_narrowed, functools.partial(_load, "narrowed")),
        Target("sweep", _make_sweep, _read_sweep),
        Target("transformers folder", _transformers, _original),
        Target("timm folder", _timm, _original),
        Target("overwritten", functools.partial(_save, "module"), _overwrite),
        Target("pictures", _pictures, lambda folder, empty: _walk(folder)),
        Target("list", _list, lambda folder, empty: _walk(folder / "list.txt")),
        Target("numpy", _numpy, _read_numpy),
        Target("shards", _shards, lambda folder, empty: _walk(folder / "x.tar")),
        Target("mnist", _mnist, lambda folder, empty: _walk(f"{folder}:test")),
    )
}


DEPTH = 6
_PICTURES = small_pictures(2)


@functools.cache
def _model() -> tuple[Any, Any]:
    model = small_vit(DEPTH)
    return model, small_blocks(model)


def _random_entry(chance: random.Random) -> Any:
    start = chance.randrange(DEPTH)
    kind = chance.choice(MAP_KINDS)
    entry: dict[str, Any] = {"start": start, "stop": start + chance.randint(1, 3), "map": kind}
    if kind == "low-rank" or chance.random() < 0.05:
        entry["rank"] = chance.choice((1, 2, 16, 17, 0, -1))
    if chance.random() < 0.2:
        entry["per_token_type"] = chance.random() < 0.8
    return entry


def _random_narrowing(chance: random.Random) -> Any:
    """A part of the tiny model; now and then with another size, layer or number of heads."""
    part, size, rows, reader = chance.choice(
        (
            ("mlp", 32, [["mlp.wide", 0]], "mlp.narrow"),
            ("values", 16, [["attention.qkv", 32]], "attention.out"),
            ("keys", 16, [["attention.qkv", 0], ["attention.qkv", 16]], ""),
        )
    )
    entry = {
        "block": chance.randrange(DEPTH), "part": part, "kept": chance.randint(1, size),
        "size": size, "heads": 1, "rows": rows, "reader": reader,
    }  # fmt: skip
    if chance.random() < 0.1:
        key = chance.choice(("kept", "size", "heads", "block"))
        entry[key] = chance.choice((0, -1, 2, 17, 33, 2**31, 2**63, 10**30))
    if chance.random() < 0.05:
        entry["rows"] = [[chance.choice(("mlp.wide", "norm1", "", "x", "mlp")), 8]]
    if chance.random() < 0.05:
        entry["reader"] = chance.choice(("mlp.narrow", "attention.out", "mlp.wide", "mlp", "."))
    return entry


def plan_case(chance: random.Random) -> None:
    """A random plan: refused, or applied to a model that then runs and comes back from JSON."""
    value: Any = [_random_entry(chance) for _ in range(chance.choice((0, 1, 1, 2, 2, 3)))]
    if chance.random() < 0.4:
        value += [_random_narrowing(chance) for _ in range(chance.choice((1, 1, 2, 4)))]
    if chance.random() < 0.4:
        value = damaged_value(value, chance)
    if chance.random() < 0.05:
        value = chance.choice(STRANGE)
    original, blocks = _model()
    plan = Plan.from_json(value)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    plan.check(DEPTH)
    model = copy.deepcopy(original)
    before = {name: id(module) for name, module in model.named_modules()}
    try:
        maps = [empty_map(entry, blocks.width, blocks.prefix_tokens) for entry in plan]
        apply_plan(model, blocks, plan, maps)
    except BlockfitError:
        assert before == {name: id(module) for name, module in model.named_modules()}
        raise
    with torch.no_grad():
        assert model(_PICTURES).isfinite().all()
