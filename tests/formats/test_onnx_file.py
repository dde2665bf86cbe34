"""ONNX files: onnxruntime gives what torch gives, for every family and any number of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import FEW, blockfit_command
from exporting import MAPS, nearly_empty, output, prepared, saved
from families import EXPORTED, FAMILIES
from families import one_thread as one_thread
from families_plain import PLAIN
from torch import Tensor

from blockfit.errors import BlockfitError
from blockfit.fit.plan import Plan
from blockfit.formats.onnx_file import Session, export_onnx
from blockfit.formats.traced import Bare, Resolution, run

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", EXPORTED["ONNX"])
def test_onnxruntime_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    """Of any number of images; of hand-written models that count theirs, of as many."""
    small, counted = nearly_empty(name), name in PLAIN
    size = tuple(FAMILIES[name].images(1).shape[-2:])
    done = export_onnx(
        small, tmp_path / "small.onnx", batch=4 if counted else None, resolution=Resolution(size)
    )
    session = Session(done.path)
    for count in (4,) if counted else (1, 3, 8):
        images = FAMILIES[name].images(count, seed=count)
        found, expected = session.outputs(images), run(Bare(small.model), images)
        assert found.keys() == expected.keys()
        for part, value in expected.items():
            torch.testing.assert_close(found[part], value, rtol=1e-4, atol=2e-5)
    assert done.parity.images == 16
    assert done.parity.max_abs_error < 2e-5


@pytest.mark.parametrize("name", ["timm-vit", "dinov2-classifier", "clip-vision"])
def test_onnxruntime_runs_narrowed_blocks(name: str, tmp_path: Path) -> None:
    small = saved(tmp_path / "small", name, MAPS, share=0.5)
    assert {cut.part for cut in small.plan.narrowings} == {"mlp", "values", "keys"}
    done = export_onnx(small, tmp_path / "small.onnx")
    images = FAMILIES[name].images(3, seed=5)
    found = next(iter(Session(done.path).outputs(images).values()))
    assert torch.allclose(found, output(small.model, images), atol=2e-5)


def test_a_model_that_draws_in_each_forward_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BlockfitError, match=r"ViTMAEModel draws random numbers .*export_program"):
        export_onnx(nearly_empty("vit-mae"), tmp_path / "small.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    small = saved(tmp_path / "small", "timm-vit", MAPS, prepared(32))
    done = export_onnx(small, tmp_path / "small.onnx", opset=20)
    model = onnx.load(done.path)
    onnx.checker.check_model(model)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 20
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", 3, 32, 32]
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert Plan.from_json(json.loads(told["blockfit.plan"])) == MAPS
    assert json.loads(told["blockfit.preprocessing"]) == prepared(32).to_json()
    assert set(json.loads(told["blockfit.versions"])) >= {"blockfit", "torch", "timm"}
    assert told["blockfit.base_model"].startswith("vit_tiny_patch16_224")


@pytest.mark.parametrize("name", ["timm-vit", "dinov2-classifier"])
def test_any_resolution_where_the_model_can(name: str, tmp_path: Path) -> None:
    small = saved(tmp_path / "small", name, MAPS)
    done = export_onnx(small, tmp_path / "small.onnx", resolution=Resolution(None))
    assert done.size is None
    assert done.parity.images == 48
    images = torch.randn(2, 3, 72, 40)
    found = next(iter(Session(done.path).outputs(images).values()))
    # Against the same model at that one resolution, by the library's own way to get there.
    if name == "timm-vit":
        small.model.set_input_size(img_size=(72, 40))  # type: ignore[operator]
    # timm resamples once with antialiasing, the graph in each forward: near, not equal.
    close = 2e-2 if name == "timm-vit" else 1e-5
    assert torch.allclose(found, output(small.model, images), atol=close)


@pytest.mark.parametrize("name", ["timm-vit", "dinov2-classifier"])
def test_half_precision_is_half_as_large_and_near(name: str, tmp_path: Path) -> None:
    small = saved(tmp_path / "small", name, MAPS, prepared(32), share=0.5)
    whole = export_onnx(small, tmp_path / "whole.onnx")
    done = export_onnx(small, tmp_path / "half.onnx", dtype="float16")
    assert (whole.dtype, done.dtype) == ("float32", "float16")
    kinds = {tensor.data_type for tensor in onnx.load(done.path).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert onnx.TensorProto.FLOAT not in kinds
    weights = 2 * sum(parameter.numel() for parameter in small.model.parameters())
    assert whole.size_bytes - done.size_bytes > 0.95 * weights
    assert next(small.model.parameters()).dtype == torch.float32
    images = FAMILIES[name].images(3, seed=5)
    own, found = (next(iter(Session(f.path).outputs(images).values())) for f in (whole, done))
    assert found.dtype == torch.float16
    error = float((own - found.float()).abs().max())
    assert 0 < error < 8 * torch.finfo(torch.float16).eps * float(own.abs().max())
    assert done.parity.max_abs_error > whole.parity.max_abs_error


def test_the_command_writes_half_precision_and_refuses_what_no_runtime_reads(
    tmp_path: Path,
) -> None:
    command = ("export", "demo", "--onnx", "-o", tmp_path / "demo.onnx", *FEW, "--weights")
    refused = blockfit_command(*command, "bfloat16")
    assert refused.code == 2
    assert "float32 or float16 weights, not bfloat16; give one as --weights" in (refused.error)
    other = ("export", "demo", "--pt2", "-o", tmp_path / "demo.pt2", "--weights", "float16")
    assert "--plain and --onnx only" in blockfit_command(*other).error
    told: dict[str, Any] = blockfit_command(*command, "float16", "--json").json
    assert told["dtype"] == "float16"
    assert told["parity"]["agreement"] == 1


def test_any_resolution_is_refused_where_the_model_cannot(tmp_path: Path) -> None:
    small = saved(tmp_path / "small", "torchvision-vit", MAPS)
    with pytest.raises(BlockfitError, match=r"cannot take images of any size .*fixed resolution"):
        export_onnx(small, tmp_path / "small.onnx", resolution=Resolution(None))


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = saved(tmp_path / "small", "timm-vit", MAPS, prepared(32))
    right = Session.outputs

    def wrong(self: Session, images: Tensor) -> dict[str, Tensor]:
        return {name: value + 0.01 for name, value in right(self, images).items()}

    monkeypatch.setattr(Session, "outputs", wrong)
    with pytest.raises(BlockfitError, match="ONNX file was not kept: its outputs differ"):
        export_onnx(small, tmp_path / "small.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_large_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = saved(tmp_path / "small", "timm-vit", MAPS, prepared(32))
    monkeypatch.setattr("blockfit.formats.onnx_file.ONE_FILE", 1000)
    done = export_onnx(small, tmp_path / "small.onnx")
    weights = tmp_path / "small.onnx.data"
    assert weights.stat().st_size > done.path.stat().st_size / 10
    assert done.size_bytes == weights.stat().st_size + done.path.stat().st_size
    images = FAMILIES["timm-vit"].images(2)
    assert torch.allclose(
        Session(done.path).outputs(images)["output"], output(small.model, images), atol=1e-5
    )


def test_the_command_exports_an_original_and_compares_levels(tmp_path: Path) -> None:
    command = ("export", "demo", "--onnx", "-o", tmp_path / "demo.onnx", *FEW, "--compare-levels")
    told: dict[str, Any] = blockfit_command(*command, "--json").json
    assert (told["form"], told["blocks"], told["opset"]) == ("onnx", 12, 18)
    assert told["parity"]["images"] == 40
    assert told["parity"]["source"] == "digits"
    assert told["parity"]["agreement"] == 1
    names = [level["name"] for level in told["levels"]]
    assert names[:5] == ["pytorch", "none", "basic", "extended", "all"]
    assert all(level["latency_ms"] > 0 for level in told["levels"])
    assert all(level["parity"]["max_abs_error"] < 1e-4 for level in told["levels"][1:])
