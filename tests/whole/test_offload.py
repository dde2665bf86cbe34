"""Models whose weights accelerate keeps elsewhere: the pass over the images works as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import one_thread  # noqa: F401
from small import small_blocks, small_images, small_vit
from torch import nn

from blockfit import api
from blockfit.errors import BlockfitError
from blockfit.evaluation.analysis import analyze
from blockfit.fit.plan import spans_up_to
from blockfit.models.blocks import find_chain
from blockfit.search.calibrate import calibrate

accelerate = pytest.importorskip("accelerate")


def on_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    """Some blocks stay in memory, the others lie on the disk."""
    places = {name: "cpu" for name, _ in model.named_children() if name != "blocks"}
    places["token"] = "cpu"
    places |= {f"blocks.{i}": "disk" if i % 2 else "cpu" for i in range(6)}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@pytest.mark.parametrize("offload", [on_cpu, on_disk, dispatched])
def test_an_offloaded_model_is_calibrated_and_analysed_as_it_is_in_memory(
    offload: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    model, images, spans = small_vit(), small_images(20), spans_up_to(6, 3)
    whole = calibrate(model, small_blocks(model), images, spans)
    away = offload(copy.deepcopy(model), tmp_path)
    assert any(parameter.is_meta for parameter in away.parameters())
    blocks = find_chain(away, next(iter(images)))
    assert blocks == small_blocks(model)
    found = calibrate(away, blocks, images, spans)
    for span in spans:
        assert torch.equal(found.regression(span).xy, whole.regression(span).xy)
    assert analyze(away, images).tables == analyze(model, images).tables
    assert any(parameter.is_meta for parameter in away.parameters())
    with pytest.raises(BlockfitError, match=r"weights are offloaded .* load it whole"):
        api.compress(away, images, remove=1)


def test_a_model_with_hooks_and_its_weights_in_memory_is_compressed_as_without(
    tmp_path: Path,
) -> None:
    """As ``device_map`` leaves it where everything fits."""
    plain = api.compress(small_vit(4), small_images(40), remove=1)
    hooked = accelerate.dispatch_model(
        small_vit(4), {"": "cpu"}, main_device="cpu", force_hooks=True
    )
    found = api.compress(hooked, small_images(40), remove=1, inplace=True)
    assert found.plan == plain.plan
    pictures = next(iter(small_images(8)))
    with torch.no_grad():
        assert torch.equal(found.model(pictures), plain.model(pictures))
