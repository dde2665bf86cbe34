"""Weights in int8: what they are, that they come back bit for bit, what each step costs."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Done, blockfit_command
from commandline import small as small
from exporting import output
from exporting import saved as narrowed
from families import DEPTH, EXPORTED, FAMILIES
from families import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from blockfit import compress
from blockfit.data.images import images as open_images
from blockfit.errors import BlockfitError
from blockfit.evaluation.precision import check_precision
from blockfit.evaluation.stages import quantize, stages
from blockfit.fit.plan import Plan
from blockfit.formats import folder as store
from blockfit.formats.int8 import round_embeddings, targets, to_int8
from blockfit.models.blocks import block_modules, find_chain
from blockfit.models.cost import flops, parameters, size_bytes
from blockfit.models.demo import load_demo
from blockfit.models.head import primary_output
from blockfit.models.tensors import (
    INT8_KINDS,
    dequantized,
    grid_parts,
    int8_kind,
    int8_parts,
    on_grid,
    rows,
    worth_a_grid,
)

pytest.importorskip("torchao")

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def saved_again(folder: Path, tiny: store.Saved) -> Path:
    store.save(folder, tiny.model, tiny.blocks, tiny.plan, source=tiny.source, report=tiny.report)
    return folder


@pytest.mark.parametrize("kind", INT8_KINDS)
def test_a_model_in_int8_comes_back_bit_for_bit(
    small: tuple[Path, Done], tmp_path: Path, kind: str
) -> None:
    saved = store.load_saved(small[0])
    before = copy.deepcopy(saved.model.state_dict())
    tiny = quantize(saved, kind)
    folder = saved_again(tmp_path / "tiny", tiny)
    again = store.load_saved(folder)
    with torch.no_grad():
        wanted, exact = tiny.model(IMAGES), saved.model(IMAGES)
        assert torch.equal(again.model(IMAGES), wanted)
    assert 0 < (wanted - exact).abs().max() < 0.05 * exact.abs().max()
    assert int8_kind(again.model.parameters()) == kind
    assert again.report["int8"] == kind
    file = folder / "model.safetensors"
    assert size_bytes(again.model) == size_bytes(tiny.model) == file.stat().st_size
    assert file.stat().st_size < 0.55 * (small[0] / "model.safetensors").stat().st_size
    assert flops(again.model, IMAGES) == flops(saved.model, IMAGES)
    assert parameters(again.model) == parameters(saved.model)
    assert all(torch.equal(v, before[k]) for k, v in saved.model.state_dict().items())


def test_integers_and_factors_are_the_nearest_to_the_weights(
    small: tuple[Path, Done], tmp_path: Path
) -> None:
    saved = store.load_saved(small[0])
    stored = load_file(
        saved_again(tmp_path / "x", quantize(saved, "dynamic")) / "model.safetensors"
    )
    names = [name for name, value in stored.items() if value.dtype == torch.int8]
    assert len(names) == 10 * 4 + 1  # four layers of each kept block, and the map
    assert "blocks.10.map.weight" in names
    for name in names:
        exact, factors = saved.model.get_parameter(name).detach(), stored[f"{name}.scale"]
        largest = exact.abs().amax(1, keepdim=True)
        torch.testing.assert_close(factors, largest / 127.5, rtol=1e-6, atol=0)
        assert ((stored[name] * factors - exact).abs() <= 0.5001 * factors).all()
    others = stored.keys() - {*names, *(f"{name}.scale" for name in names)}
    for name in others:
        assert torch.equal(stored[name].float(), saved.model.state_dict()[name])


@pytest.mark.parametrize("name", EXPORTED["int8"])
@pytest.mark.parametrize("kind", INT8_KINDS)
def test_families_run_in_int8(name: str, kind: str) -> None:
    family = FAMILIES[name]
    model, images = family.build(), family.images(2)
    with torch.no_grad():
        exact = primary_output(family.run(model, images))
        hooks = [dict(module._forward_hooks) for module in model.modules()]  # transformers' own
        names = to_int8(model, find_chain(model, images), kind, images)
        rounded = primary_output(family.run(model, images))
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()
    # Attention that reads its weights without calling a layer keeps them.
    known = {
        "timm-beit": 12, "torchvision-vit": 8, "timm-vit": 16, "dinov2-classifier": 24,
        "siglip-vision": 24,
    }  # fmt: skip
    assert len(names) == known.get(name, len(names)) >= 2 * DEPTH
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("name", ["timm-vit", "dinov2-classifier", "torchvision-vit"])
@pytest.mark.parametrize("kind", INT8_KINDS)
def test_narrowed_layers_run_in_int8_and_come_back(name: str, kind: str, tmp_path: Path) -> None:
    saved = narrowed(tmp_path / "small", name, Plan(()), share=0.5)
    images = FAMILIES[name].images(3, seed=4)
    tiny = quantize(saved, kind)
    exact, wanted = output(saved.model, images), output(tiny.model, images)
    assert 0 < (wanted - exact).norm() < 0.05 * exact.norm()
    folder = saved_again(tmp_path / "tiny", tiny)
    again = store.load_saved(folder)
    assert torch.equal(output(again.model, images), wanted)
    assert again.plan == saved.plan
    told = json.loads((folder / store.MARK).read_text())
    assert told["format"] == 4
    stored = load_file(folder / "model.safetensors")
    for embedding in told["int8"]["stored"]:
        exact, rounded = (m.get_parameter(embedding).detach() for m in (saved.model, tiny.model))
        assert stored[embedding].dtype == torch.int8
        factors = stored[f"{embedding}.scale"]
        assert (rows(rounded - exact).abs() <= 0.5001 * factors).all()
        torch.testing.assert_close(
            factors, rows(exact).abs().amax(1, True) / 127, rtol=6e-4, atol=0
        )
    assert len(told["int8"]["stored"]) == 1, "the patches' projection; positions are few here"
    assert (folder / "model.safetensors").stat().st_size == size_bytes(again.model)
    blocks = block_modules(saved.model, saved.blocks)
    paths = {id(module): path for path, module in saved.model.named_modules()}
    for cut in saved.plan.narrowings:
        layers = [*(rows.layer for rows in cut.rows), *([cut.reader] if cut.reader else [])]
        for layer in layers:
            name_of = paths[id(blocks[cut.block].get_submodule(layer))]
            assert stored[f"{name_of}.weight"].dtype == torch.int8


@given(
    shape=st.sampled_from([(64, 64), (1, 80, 64), (32, 8, 4, 4), (5000,), (3, 5), (1, 4096)]),
    scale=st.sampled_from([1e-30, 1e-4, 1.0, 3e4]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_what_is_on_a_grid_is_found_again_to_the_bit(
    shape: tuple[int, ...], scale: float, seed: int
) -> None:
    exact = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) == 2:
        exact[0] = 0
    rounded = on_grid(exact)
    assert torch.equal(on_grid(rounded), rounded)
    parts = grid_parts(rounded)
    assert (parts is not None) == worth_a_grid(exact)
    assert grid_parts(exact) is None or not exact.any()
    assert grid_parts(torch.full(shape, -0.0)) is None, "the sign of a zero is a bit, too"
    if parts is not None:
        assert parts[0].shape == exact.shape
        assert torch.equal(dequantized(*parts), rounded)


def test_embeddings_are_rounded_and_heads_are_not() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=200, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config).eval()
    tokens = {"input_ids": torch.arange(3, 43).view(4, 10)}
    before = {name: value.clone() for name, value in model.named_parameters()}
    found = round_embeddings(model, find_chain(model, tokens))
    assert [name.rpartition("embeddings.")[2] for name in found] == ["token_embedding.weight"]
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == (name not in found)
        assert (value - before[name]).abs().max() <= before[name].abs().max() / 253


def without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)


def test_weight_only_loads_without_torchao(
    small: tuple[Path, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = quantize(store.load_saved(small[0]), "weight-only")
    folder = saved_again(tmp_path / "tiny", tiny)
    with torch.no_grad():
        wanted = tiny.model(IMAGES)
        without_torchao(monkeypatch)
        plain = store.load(folder)
        assert int8_kind(plain.parameters()) is None
        torch.testing.assert_close(plain(IMAGES), wanted, rtol=1e-4, atol=1e-4)


def test_what_needs_torchao_says_so(
    small: tuple[Path, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = store.load_saved(small[0])
    folder = saved_again(tmp_path / "tiny", quantize(saved, "dynamic"))
    without_torchao(monkeypatch)
    for refused in (lambda: store.load(folder), lambda: quantize(saved, "weight-only")):
        with pytest.raises(BlockfitError, match=r"blockfit\[quantize\]"):
            refused()


def test_what_cannot_be_rounded_is_refused(small: tuple[Path, Done]) -> None:
    saved = store.load_saved(small[0])
    with pytest.raises(BlockfitError, match="unknown int8 kind 'static'"):
        quantize(saved, "static")
    tiny = quantize(saved, "dynamic")
    for refused in (
        lambda: quantize(tiny, "weight-only"),
        lambda: compress(tiny.model, IMAGES, remove=1),
        lambda: check_precision(tiny.model, tiny.blocks, open_images(IMAGES), "float16"),
    ):
        with pytest.raises(BlockfitError, match="in int8 already"):
            refused()


def test_layers_outside_the_blocks_are_left_alone() -> None:
    model = load_demo()
    names = targets(model, find_chain(model, IMAGES), IMAGES)
    assert len(names) == 48
    assert all(name.startswith("blocks.") for name in names)


def renamed(manifest: dict[str, Any]) -> None:
    manifest["int8"]["weights"][0] = "blocks.0.nothing"


def no_matrix(manifest: dict[str, Any]) -> None:
    manifest["int8"]["weights"].append("blocks.0.norm1.weight")


def unknown_kind(manifest: dict[str, Any]) -> None:
    manifest["int8"]["kind"] = "int4"


def twice(manifest: dict[str, Any]) -> None:
    manifest["int8"]["weights"].append(manifest["int8"]["weights"][0])


def one_less(manifest: dict[str, Any]) -> None:
    manifest["int8"]["weights"].pop()


def nothing_stored(manifest: dict[str, Any]) -> None:
    manifest["format"] = 4
    manifest["int8"]["stored"] = []


def stored_elsewhere(manifest: dict[str, Any]) -> None:
    manifest["format"] = 4
    manifest["int8"]["stored"] = ["pos"]


def both(manifest: dict[str, Any]) -> None:
    manifest["format"] = 4
    manifest["int8"]["stored"] = manifest["int8"]["weights"][:1]


def older(manifest: dict[str, Any]) -> None:
    manifest["format"] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "has no matrix 'blocks.0.nothing'"),
        (no_matrix, "has no matrix 'blocks.0.norm1.weight'"),
        (unknown_kind, "unknown kind 'int4'"),
        (twice, "each once"),
        (one_less, "unknown tensor"),
        (older, "unknown key 'int8'"),
        (nothing_stored, "stored must list names of tensors, each once"),
        (stored_elsewhere, "has no tensor 'pos' of its own"),
        (both, "stored must list names of tensors, each once"),
    ],
)
def test_a_damaged_folder_is_refused(
    small: tuple[Path, Done],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    folder = saved_again(tmp_path / "tiny", quantize(store.load_saved(small[0]), "weight-only"))
    mark = folder / "blockfit.json"
    manifest = json.loads(mark.read_text())
    assert manifest["format"] == 2
    change(manifest)
    mark.write_text(json.dumps(manifest))
    with pytest.raises(BlockfitError, match=message):
        store.load(folder)


def test_an_ordinary_folder_stays_in_the_first_format(small: tuple[Path, Done]) -> None:
    assert json.loads((small[0] / "blockfit.json").read_text())["format"] == 1


def test_stages_are_judged_on_the_same_images(small: tuple[Path, Done]) -> None:
    saved, original = store.load_saved(small[0]), load_demo()
    data = open_images("digits:test", original, limit=100, batch_size=40)
    models = {"original": original, "compressed": saved.model}
    first, second = stages(models, dict.fromkeys(models, 7), data, saved, rounds=2)
    assert first.size_bytes == 7
    right = agree = 0
    off = whole = 0.0
    with torch.no_grad():
        for batch in data.batches():
            before, after = original(batch.inputs), saved.model(batch.inputs)
            right += int((after.argmax(1) == batch.labels).sum())
            agree += int((after.argmax(1) == before.argmax(1)).sum())
            off += float((after - before).double().square().sum())
            whole += float(before.double().square().sum())
    assert second.top1 == right / 100
    assert second.agreement == agree / 100
    assert second.error == pytest.approx((off / whole) ** 0.5)
    assert (first.agreement, first.error) == (1.0, 0.0)
    assert second.throughput.images == 40
    assert len(second.latency.seconds) == 2


def test_the_command_shows_what_each_step_costs(small: tuple[Path, Done], tmp_path: Path) -> None:
    given = ("quantize", small[0], "--int8", "weight-only", "-o", tmp_path / "tiny")
    compare = ("--against", "demo", "--data", "digits:test", "--limit", "60")
    told = blockfit_command(*given, *compare, "--json").json
    names = [stage["name"] for stage in told["stages"]]
    assert names == ["original", "compressed", "+ int8 weight-only"]
    assert told["original_float32_bytes"] == 4 * parameters(load_demo())
    assert told["size_bytes"] == (tmp_path / "tiny" / "model.safetensors").stat().st_size
    assert all(0.9 < stage["top1"] <= 1 for stage in told["stages"])
    assert "--overwrite" in blockfit_command(*given).error
    alone = blockfit_command(*given, "--overwrite")
    assert "weights:" in alone.out
    assert "go together" in blockfit_command(*given, "--overwrite", "--against", "demo").error
    shown = blockfit_command(*given, "--overwrite", *compare[:-1], "8")
    assert "points of top-1 from the stage before" in shown.out
    tiny = store.load(tmp_path / "tiny")
    assert any(int8_parts(parameter) for parameter in tiny.parameters())
    few = ("--data", "digits:test", "--limit", "8")
    judged = blockfit_command("evaluate", tmp_path / "tiny", *few, "--json").json
    assert judged["compressed"]["size_bytes"] == told["size_bytes"]


@pytest.fixture(scope="module")
def calibrated(small: tuple[Path, Done], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX file with static int8 activations, calibrated on what compress was given."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    given = ("quantize", small[0], "--int8", "onnx-static", "-o", file)
    compare = ("--against", "demo", "--data", "digits:test", "--limit", "40")
    told = blockfit_command(*given, *compare, "--json").json
    assert told["size_bytes"] == file.stat().st_size < 0.45 * told["original_float32_bytes"]
    tiny = told["stages"][2]
    assert tiny["agreement"] > 0.95
    assert 0 < tiny["relative_error"] < 0.2
    assert tiny["latency_ms"]["median"] > 0
    return file


def test_static_int8_is_calibrated_on_the_same_images(
    calibrated: Path, small: tuple[Path, Done]
) -> None:
    """The range of the input of the head is that of the calibration images' features."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(calibrated)
    told = {entry.key for entry in model.metadata_props}
    assert {"blockfit.plan", "blockfit.preprocessing"} <= told
    saved = store.load_saved(small[0])
    features = []
    saved.model.head.register_forward_hook(lambda m, a, out: features.append(a[0]))
    with torch.no_grad():
        for batch in open_images("digits", saved.model, limit=40):
            saved.model(batch)
    values = torch.cat(features)
    span = float(values.max().clamp(min=0) - values.min().clamp(max=0))
    arrays = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    (gemm,) = (node for node in model.graph.node if node.op_type == "Gemm")
    (back,) = (node for node in model.graph.node if gemm.input[0] in node.output)
    assert float(arrays[back.input[1]]) == pytest.approx(span / 255, rel=1e-2)


def test_onnx_files_are_named_and_guarded(
    small: tuple[Path, Done], tmp_path: Path, calibrated: Path
) -> None:
    given = ("quantize", small[0], "--int8")
    assert "must end in .onnx" in blockfit_command(*given, "onnx-dynamic", "-o", tmp_path).error
    assert "is there already" in blockfit_command(*given, "onnx-dynamic", "-o", calibrated).error
    wrong = (*given, "dynamic", "-o", tmp_path / "x", "--images", "digits")
    assert "needs no calibration" in blockfit_command(*wrong).error
    done = blockfit_command(*given, "onnx-dynamic", "-o", tmp_path / "x.onnx", "--json").json
    assert done["size_bytes"] < 0.45 * 4 * parameters(load_demo())
