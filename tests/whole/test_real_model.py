"""The real trained model and real images, where they lie in ../shared."""

from __future__ import annotations

import json
from pathlib import Path

import fresh
import pytest
import torch
from safetensors import safe_open

import blockfit

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def model(shared_model):
    return blockfit.load(shared_model)


@pytest.fixture(scope="module")
def images(model, cifar10_train):
    return blockfit.images(cifar10_train, model, limit=60, seed=0)


def test_three_blocks_go_at_a_small_loss_and_the_folder_says_so(model, images, tmp_path):
    spans = ["0:1", "2:3", "5:6"]
    dropped = blockfit.compress(model, images, spans=spans, map="identity")
    paper = blockfit.compress(model, images, spans=spans, recipe="paper", map="linear")
    result = blockfit.compress(model, images, spans=spans, map="affine", repair="mlp+attention")
    kl = result.report["held_out"]["kl"]
    assert kl < paper.report["held_out"]["kl"] < dropped.report["held_out"]["kl"]
    for entry in result.report["maps"]:
        assert entry["error"] < entry["identity_error"]

    blockfit.save(result, tmp_path / "small")
    with safe_open(tmp_path / "small" / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    for block in (0, 2, 5):
        own = [n for n in names if n.startswith(f"dinov2.encoder.layer.{block}.")]
        assert own
        assert all(".map." in name for name in own)

    batch = next(iter(images))
    torch.save(batch, tmp_path / "batch.pt")
    code = (
        "import sys, torch, blockfit\n"
        "torch.set_num_threads(1)\n"
        "model = blockfit.load(sys.argv[1])\n"
        "with torch.no_grad():\n"
        "    torch.save(model(torch.load(sys.argv[2], weights_only=True)).logits, sys.argv[3])\n"
    )
    paths = [str(tmp_path / name) for name in ("small", "batch.pt", "logits.pt")]
    fresh.python("-c", code, *paths)
    again = torch.load(tmp_path / "logits.pt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(result.model(batch).logits, again)


def test_the_small_file_is_smaller_by_what_the_plan_says(model, images, shared_model, tmp_path):
    result = blockfit.compress(model, images, spans=["9:11"], map="affine")
    blockfit.save(result, tmp_path / "small")
    before = (Path(shared_model) / "model.safetensors").stat().st_size
    after = (tmp_path / "small" / "model.safetensors").stat().st_size
    report = result.report
    assert after / before == pytest.approx(
        report["parameters_after"] / report["parameters_before"], rel=0.01
    )


def test_hidden_states_keep_their_number(model, images):
    batch = next(iter(images))
    with torch.no_grad():
        before = model(batch, output_hidden_states=True).hidden_states
        small = blockfit.compress(model, images, spans=["9:11"]).model
        after = small(batch, output_hidden_states=True).hidden_states
    assert len(before) == len(after) == 13
    assert all(torch.equal(a, b) for a, b in zip(before[:10], after[:10], strict=True))


def test_the_command_line_prints_one_json_object(shared_model, cifar10_train, tmp_path):
    done = fresh.python(
        "-m", "blockfit", "compress", shared_model, "--json", "--images", cifar10_train,
        "--limit", 40, "--views", 1, "--span", "9:11", "--map", "linear", "-o", tmp_path / "small",
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert said["plan"] == [{"start": 9, "stop": 11, "map": "linear"}]
    assert said["removed_blocks"] == 2
    assert said["parameters_after"] < said["parameters_before"]
