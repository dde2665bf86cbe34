"""Case 18: models of clips (images, frames, channels, height, width) in every exported form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import one_thread as one_thread

import blockfit
from blockfit.formats.onnx_file import Session
from blockfit.models.load import load_model

transformers = pytest.importorskip("transformers")

SMALL = {
    "image_size": 16, "num_frames": 4, "hidden_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 5,
}  # fmt: skip
MODELS = {
    "VideoMAE": {"patch_size": 8, "tubelet_size": 2},
    "Vivit": {"tubelet_size": [2, 8, 8]},
    "Timesformer": {"patch_size": 8},
}


def clips(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=MODELS)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = getattr(transformers, f"{request.param}Config")(**SMALL, **MODELS[request.param])
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}ForVideoClassification")(config).eval()
    batches = [{"pixel_values": clips(8, seed)} for seed in range(3)]
    result = blockfit.compress(model, batches, params=0.8, progress=False)
    folder = tmp_path_factory.mktemp(request.param) / "small"
    blockfit.save(result, folder)
    return folder, result.model


def logits(model: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(images).logits
    return found


def test_onnxruntime_takes_any_number_of_clips(small: Any, tmp_path: Path) -> None:
    folder, model = small
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    session = Session(Path(blockfit.export_onnx(folder, tmp_path / "small.onnx").path))
    for count in (1, 3):
        found = session.outputs(clips(count, seed=9))["logits"]
        assert torch.allclose(found, logits(model, clips(count, seed=9)), atol=1e-5)


def test_a_program_takes_them(small: Any, tmp_path: Path) -> None:
    folder, model = small
    done = blockfit.export_program(folder, tmp_path / "small.pt2")
    found = torch.export.load(done.path).module()(clips(3, seed=9))["logits"]
    assert torch.allclose(found, logits(model, clips(3, seed=9)), atol=1e-5)


def test_a_hub_folder_gives_the_same_outputs(small: Any, tmp_path: Path) -> None:
    folder, model = small
    done = blockfit.export_hub(folder, tmp_path / "hub")
    assert "AutoModelForVideoClassification" in done.how_to_load
    again = load_model(tmp_path / "hub", trust_remote_code=True)
    assert torch.allclose(logits(again, clips(3)), logits(model, clips(3)), atol=1e-5)
