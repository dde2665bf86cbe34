"""The shipped demo model is what the documentation says it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from blockfit.errors import BlockfitError
from blockfit.models.demo import WEIGHTS, DigitsViT, demo_arguments, digits, load_demo


def test_shipped_weights_reach_97_percent_on_held_out_digits() -> None:
    images, labels = digits("test")
    with torch.inference_mode():
        predicted = load_demo()(images).argmax(-1)
    assert (predicted == labels).float().mean().item() >= 0.97


def test_shipped_model_is_float32_has_12_blocks_and_weighs_at_most_3_mb() -> None:
    model = load_demo()
    assert not model.training
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert len(model.get_submodule("blocks")._modules) == 12
    assert WEIGHTS.stat().st_size <= 3_000_000


def test_shipped_weights_are_finite() -> None:
    assert all(torch.isfinite(tensor).all() for tensor in load_file(WEIGHTS).values())


def test_digits_splits_share_no_image_and_cover_scikit_learns_set() -> None:
    calibration, calibration_labels = digits("calibration")
    test, test_labels = digits("test")
    assert calibration.shape == (1198, 1, 8, 8)
    assert test.shape == (599, 1, 8, 8)
    assert calibration.dtype == test.dtype == torch.float32
    assert calibration_labels.dtype == test_labels.dtype == torch.int64
    known = {image.numpy().tobytes() for image in calibration}
    assert not any(image.numpy().tobytes() in known for image in test)
    raw = load_digits()
    both = torch.cat([calibration, test])
    assert sorted(((both + 1) * 8).sum(dim=(1, 2, 3)).tolist()) == sorted(
        raw.images.sum(axis=(1, 2)).tolist()
    )
    assert torch.bincount(test_labels).min() >= 50


def test_digits_refuses_an_unknown_split() -> None:
    with pytest.raises(BlockfitError, match="unknown split 'train'"):
        digits("train")  # type: ignore[arg-type]


def test_load_demo_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    load_demo()
    assert torch.equal(torch.get_rng_state(), before)


def test_attention_equals_torchs_own_multi_head_attention() -> None:
    block = DigitsViT(**demo_arguments()).blocks[0]
    attention = block.get_submodule("attn")
    reference = torch.nn.MultiheadAttention(64, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(attention.get_parameter("qkv.weight"))
        reference.in_proj_bias.copy_(attention.get_parameter("qkv.bias"))
        reference.out_proj.weight.copy_(attention.get_parameter("proj.weight"))
        reference.out_proj.bias.copy_(attention.get_parameter("proj.bias"))
        hidden = torch.randn(2, 17, 64)
        expected, _ = reference(hidden, hidden, hidden)
        torch.testing.assert_close(attention(hidden), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("head.bias"), "head.bias is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unknown tensor extra"),
        (lambda tensors: tensors.update({"head.bias": torch.zeros(3)}), r"has shape \(3,\)"),
    ],
)
def test_load_demo_names_the_tensor_that_does_not_fit(tmp_path: Path, change, message) -> None:
    tensors = load_file(WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    with pytest.raises(BlockfitError, match=message):
        load_demo(tmp_path / "changed.safetensors")


def test_load_demo_names_a_file_that_it_cannot_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    with pytest.raises(BlockfitError, match=r"broken\.safetensors"):
        load_demo(broken)
    broken.write_bytes(b"not safetensors")
    with pytest.raises(BlockfitError, match=r"broken\.safetensors"):
        load_demo(broken)
