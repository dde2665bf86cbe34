"""Folders that were changed, cut or never saved: refused with one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import WIDTH
from safetensors.torch import load_file, save_file
from stored import PLAN, saved, small_model
from torch import nn

from blockfit.errors import BlockfitError
from blockfit.fit.plan import Plan
from blockfit.formats.folder import is_saved, load, save
from blockfit.models.blocks import block_modules

# -- what does not fit is refused ---------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "blockfit.json"
    values = json.loads(path.read_text("utf-8"))
    change(values)
    path.write_text(json.dumps(values), "utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(colour="red"), "unknown key 'colour'"),
        (lambda v: v.pop("plan"), "key 'plan' is missing"),
        (lambda v: v.update(format=5), "format 5 is newer than 4.*update"),
        (lambda v: v.update(format=True), "format must be a whole number"),
        (lambda v: v.pop("format"), "format must be a whole number"),
        (lambda v: v.update(report=[]), "report must hold an object"),
        (lambda v: v["blocks"].update(depth="4"), "blocks: depth must be a whole number"),
        (lambda v: v["blocks"].update(width=0), "blocks: width must be at least 1"),
        (lambda v: v["blocks"].update(heads=2), "blocks: unknown key 'heads'"),
        (lambda v: v["blocks"].pop("path"), "blocks: key 'path' is missing"),
        (lambda v: v["blocks"].update(path="encoder"), "no module 'encoder'"),
        (lambda v: v["blocks"].update(width=8), "rank|shape"),
        (lambda v: v["plan"][0].update(map="cubic"), "unknown map 'cubic'"),
        (lambda v: v["plan"][0].update(weight=1), r"plan\[0\]: unknown key 'weight'"),
        (lambda v: v["plan"][1].update(stop=9), "span 2:9 leaves the model"),
        (lambda v: v["plan"].pop(), "unknown tensor 'blocks.3.map.bias'"),
        (lambda v: v["base"].update(library="keras"), "unknown library 'keras'"),
        (lambda v: v["base"].update(extra=1), "base: unknown key 'extra'"),
        (lambda v: v["base"]["arguments"]["options"].update(embed_dim=64), "shape"),
        (lambda v: v["base"]["arguments"].update(architecture="vit_none"), "no model 'vit_none'"),
        (lambda v: v["versions"].update(torch=2), "versions: torch must be a text"),
        (lambda v: v.update(dtype="int8"), "dtype: unknown dtype 'int8'"),
        (lambda v: v.update(dtype="float16"), "stored as F32, expected torch.float16"),
        (lambda v: v.update(dtype="float64"), "stored as F32, expected torch.float64"),
        (lambda v: v["other_dtypes"].update({"norm.bias": "float31"}), "unknown dtype 'float31'"),
        (
            lambda v: v["base"]["arguments"].update(architecture="local-dir:/tmp/x"),
            "'local-dir:/tmp/x' is not the bare name of a timm architecture",
        ),
        (
            lambda v: v["base"]["arguments"]["options"].update(checkpoint_path="x.pth"),
            "timm's option 'checkpoint_path'",
        ),
        (lambda v: v["other_dtypes"].update({"x": "float16"}), "other_dtypes: .* no tensor 'x'"),
        (lambda v: v["tied"].update({"x": "norm.bias"}), "tied: the model has no tensor 'x'"),
        (lambda v: v["tied"].update({"norm.bias": "cls_token"}), "cannot be the same tensor"),
        (lambda v: v["tied"].update({"norm.bias": "norm.bias"}), "must name a tensor"),
        (lambda v: v["tied"].update({"norm.bias": "norm.weight"}), "unknown tensor 'norm.bias'"),
        (lambda v: v["layout"].update({"norm.bias": [0, 1]}), "has 1 dimensions, not 2"),
        (lambda v: v["layout"].update({"norm.bias": [1]}), "must order dimensions"),
        (lambda v: v["layout"].update({"y": [0]}), "layout: the model has no tensor 'y'"),
    ],
)
def test_a_changed_blockfit_json_is_refused_with_file_and_key(
    timm_folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = shutil.copytree(timm_folder, tmp_path / "small")
    edit(folder, change)
    with pytest.raises(BlockfitError, match=message) as raised:
        load(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timm") / "small"
    saved(folder, "timm-vit")
    return folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold an object"),
        ('{"format": 1, "format": 1}', "key 'format' appears twice"),
        ('{"format": NaN}', "NaN is no number of JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_blockfit_json_is_refused(
    timm_folder: Path, tmp_path: Path, text: str, message: str
) -> None:
    folder = shutil.copytree(timm_folder, tmp_path / "small")
    (folder / "blockfit.json").write_text(text, "utf-8")
    with pytest.raises(BlockfitError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(spare=torch.zeros(1)), "unknown tensor 'spare'"),
        (lambda t: t.pop("norm.bias"), "tensor 'norm.bias' is missing"),
        (lambda t: t.update({"norm.bias": torch.zeros(3)}), r"'norm.bias' has shape \(3,\)"),
        (
            lambda t: t.update({"norm.bias": t["norm.bias"].double()}),
            "'norm.bias' is stored as F64, expected torch.float32",
        ),
        (
            lambda t: t.update({"norm.bias": t["norm.bias"].to(torch.float8_e5m2)}),
            "'norm.bias' is stored as F8_E5M2, expected torch.float32",
        ),
        (
            lambda t: t.update({"norm.bias": t["norm.bias"].int()}),
            "'norm.bias' is stored as I32, expected torch.float32",
        ),
    ],
)
def test_changed_weights_are_refused_with_file_and_name(
    timm_folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = shutil.copytree(timm_folder, tmp_path / "small")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BlockfitError, match=message) as raised:
        load(folder)
    assert str(folder / "model.safetensors") in str(raised.value)


def test_a_cut_off_weights_file_is_refused(timm_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(timm_folder, tmp_path / "small")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(BlockfitError, match=r"model\.safetensors cannot be read"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BlockfitError, match=r"model\.safetensors is missing"):
        load(folder)


def test_a_folder_of_something_else_is_said_to_be_none(tmp_path: Path) -> None:
    assert not is_saved(tmp_path)
    with pytest.raises(BlockfitError, match="no folder that blockfit saved"):
        load(tmp_path)
    with pytest.raises(BlockfitError, match="there is no folder"):
        load(tmp_path / "none")


def test_links_that_lead_out_of_the_folder_are_refused(timm_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(timm_folder, tmp_path / "small")
    for name in ("model.safetensors", "blockfit.json"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(BlockfitError, match=rf"{name} is a link that leads out"):
            load(folder)
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)
    (tmp_path / "link").symlink_to(folder)
    load(tmp_path / "link")


def test_a_snapshot_in_the_hubs_cache_is_loaded(timm_folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in timm_folder.iterdir():
        shutil.copy(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    load(snapshot)


def test_an_unknown_device_is_one_sentence(timm_folder: Path) -> None:
    with pytest.raises(BlockfitError, match=r"cannot put .* on nowhere"):
        load(timm_folder, device="nowhere")


# -- what cannot be saved is refused before anything is written ---------------------------------


def test_a_model_that_its_source_does_not_rebuild_is_the_users_own(tmp_path: Path) -> None:
    model, blocks, source, _ = small_model("vit-classifier")
    model.classifier = nn.Sequential(nn.Linear(WIDTH, 7), nn.Linear(7, 3))
    with pytest.warns(UserWarning, match=r"class of your own.*classifier\.\d\.weight has shape"):
        save(tmp_path / "small", model, blocks, PLAN, source=source, report={})
    with pytest.raises(BlockfitError, match="class of your own, which blockfit cannot build"):
        load(tmp_path / "small")


def test_a_plan_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    model, blocks, source, _ = small_model("plain")
    other = Plan.of(["1:2"], "affine")
    with pytest.raises(BlockfitError, match="compressed by the plan 0:1 low-rank"):
        save(tmp_path / "small", model, blocks, other, source=source, report={})


@pytest.mark.parametrize("report", [{"loss": float("nan")}, {"plan": PLAN}, {"x": torch.ones(1)}])
def test_a_report_that_is_no_json_is_refused(tmp_path: Path, report: dict[str, Any]) -> None:
    model, blocks, source, _ = small_model("plain")
    with pytest.raises(BlockfitError, match="the report cannot be written as JSON"):
        save(tmp_path / "small", model, blocks, PLAN, source=source, report=report)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_no_file_can_hold_are_refused(tmp_path: Path) -> None:
    model, blocks, source, _ = small_model("plain")
    block = block_modules(model, blocks)[1]
    block.norm1.weight = nn.Parameter(torch.empty(WIDTH, device="meta"))
    with pytest.raises(BlockfitError, match=r"transformer\.1\.norm1\.weight is on the meta device"):
        save(tmp_path / "small", model, blocks, PLAN, source=source, report={})
