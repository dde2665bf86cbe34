"""A stock checkpoint that blockfit wrote goes through what people do with checkpoints.

All rows run in one process where blockfit is not installed (``tests/tools/stock_alone.py``); every
row is compared with the small model here. docs/deploy.md lists the rows.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import environment, output, uniform
from families import CLASSES, FAMILIES
from families import one_thread as one_thread
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blockfit.formats.folder import Saved
from blockfit.formats.plain import export_plain
from blockfit.models.preprocessing import Preprocessing

transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")

ALONE = Path(__file__).resolve().parents[1] / "tools" / "stock_alone.py"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "deploy.md"
COUNT = 4


@dataclass(frozen=True)
class World:
    """What the rows were given and what they gave."""

    folder: Path
    small: Mapping[str, Saved]
    told: Mapping[str, Any]
    out: Mapping[str, Tensor]

    def row(self, name: str) -> tuple[Tensor, Any]:
        """Outputs of a row and the fact beside them."""
        if why := self.told[name].get("skipped"):
            pytest.skip(why)
        assert "failed" not in self.told[name], self.told[name]["failed"]
        return self.out[name], self.told[name]["fact"]


def images() -> Tensor:
    return FAMILIES["timm-vit"].images(COUNT, seed=9)


def labels() -> Tensor:
    return torch.arange(COUNT) % CLASSES


def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (50, 70, 3), np.uint8)) for _ in range(COUNT)]


def small_models() -> dict[str, Saved]:
    """A tiny ViT of each library, MLPs of half the width, one block less."""
    of_timm = {
        "input_size": [3, 32, 32], "interpolation": "bilinear", "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4], "crop_pct": 0.8, "crop_mode": "center",
    }  # fmt: skip
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}).to_dict()
    prepared = {
        "transformers": ("vit-classifier", Preprocessing("transformers", processor)),
        "timm": ("timm-vit", Preprocessing("timm", of_timm)),
    }
    return {key: uniform(name, 0.5, (1,), own) for key, (name, own) in prepared.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Both checkpoints, and what one process made of them; made once for all workers."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if base.name.startswith("popen") else base) / "stock-runs"
    small = small_models()
    with FileLock(f"{root}.lock"):
        if not (root / "out.json").exists():
            root.mkdir()
            for key, saved in small.items():
                export_plain(saved, root / key)
            save_file({"images": images(), "labels": labels()}, root / "in.safetensors")
            for index, picture in enumerate(pictures()):
                picture.save(root / f"{index}.png")
            _run(root)
    told = json.loads((root / "out.json").read_text())
    return World(root, small, told, load_file(root / "out.safetensors"))


def _run(root: Path) -> None:
    environ = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"}
    command = [environment(root / "environment"), "-I", ALONE, root]
    done = subprocess.run(
        [str(word) for word in command], env=environ, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_pipeline_gives_the_small_models_scores(world: World) -> None:
    found, cls = world.row("pipeline")
    small = world.small["transformers"]
    assert cls == "ViTForImageClassification"
    own = small.source.preprocessing
    assert own is not None
    batch = torch.stack([own(picture) for picture in pictures()])
    assert_close(found, output(small.model, batch).softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_auto_class_loads_it_in_half_precision(dtype: torch.dtype, world: World) -> None:
    found, held = world.row(str(dtype).removeprefix("torch."))
    assert held == str(dtype)
    expected = output(world.small["transformers"].model, images())
    allowed = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert 0 < float((found - expected).abs().max()) < allowed


@pytest.mark.parametrize("library", ["transformers", "timm"])
@pytest.mark.parametrize("row", ["onnx", "compile"])
def test_onnx_and_compiled_outputs_are_the_same(row: str, library: str, world: World) -> None:
    found, _ = world.row(f"{row}_{library}")
    assert_close(found, output(world.small[library].model, images()))


def test_timm_validates_it_with_the_preprocessing_that_it_was_compressed_with(
    world: World,
) -> None:
    found, size = world.row("validate_timm")
    small = world.small["timm"]
    assert size == [3, 32, 32]
    own = small.source.preprocessing
    assert own is not None
    assert_close(found, output(small.model, torch.stack([own(p) for p in pictures()])))


def test_torchao_brings_it_to_int8(world: World) -> None:
    found, layers = world.row("torchao")
    assert layers["linear"] > 0
    assert layers["left whole"] == 0
    expected = output(world.small["transformers"].model, images())
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < 0.05


def test_lora_trains_merges_and_saves(world: World) -> None:
    (apart, merged), count = world.row("peft")
    small = world.small["transformers"].model
    assert_close(merged, apart)
    assert not torch.allclose(merged, output(small, images()), atol=1e-3)
    assert count == sum(p.numel() for p in small.parameters())


def test_a_trainer_takes_the_step_that_sgd_takes(world: World) -> None:
    found, steps = world.row("trainer")
    assert steps == 1
    model: Any = copy.deepcopy(world.small["transformers"].model).train()
    nn.functional.cross_entropy(model(images()).logits, labels()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    expected = output(model.eval(), images())
    assert not torch.allclose(expected, output(world.small["transformers"].model, images()))
    assert_close(found, expected)


def test_the_page_names_every_row(world: World) -> None:
    text = PAGE.read_text("utf-8").partition("### What it goes through")[2].partition("\n##")[0]
    named = set(re.findall(r"`(test_\w+)`", text))
    here = {name for name in globals() if name.startswith("test_")}
    assert named == here - {"test_the_page_names_every_row"}
    rows = {re.sub("_(transformers|timm)$", "", name) for name in world.told}
    assert rows == {
        "pipeline", "float16", "bfloat16", "onnx", "compile", "validate", "torchao", "peft",
        "trainer",
    }  # fmt: skip
