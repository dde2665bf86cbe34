"""Half precision beside float32: errors at every block, overflows, and the words for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import FEW, Done, blockfit_command
from commandline import small as small
from families import one_thread as one_thread
from small import small_pictures, small_vit
from torch import nn

import blockfit
from blockfit.data.images import Images
from blockfit.data.images import images as open_images
from blockfit.errors import BlockfitError
from blockfit.evaluation.precision import check_precision, overflow_warnings
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Plan
from blockfit.formats import folder as store
from blockfit.models.blocks import Blocks, block_modules, find_chain
from blockfit.models.surgery import apply_plan


def digits(count: int) -> Images:
    return open_images("digits", blockfit.load("demo"), limit=count, batch_size=16)


def with_map(factor: float) -> tuple[nn.Module, Blocks]:
    """The demo model whose blocks 4 and 5 are replaced by a multiplication."""
    model = blockfit.load("demo")
    blocks = find_chain(model, torch.randn(2, 1, 8, 8))
    plan = Plan.of(["4:6"], "scale")
    maps: list[Any] = [empty_map(entry, blocks.width) for entry in plan]
    maps[0].weight.data.fill_(factor)
    apply_plan(model, blocks, plan, maps)
    return model, blocks


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_errors_are_those_of_the_hidden_states(small: tuple[Path, Done], dtype: str) -> None:
    saved = store.load_saved(small[0])
    data = digits(24)
    found = check_precision(saved.model, saved.blocks, data, dtype)
    assert found.images == 24
    assert [b.index for b in found.boundaries] == list(range(13))
    states: dict[str, list[Any]] = {}
    for name in ("float32", dtype):
        model = store.load(small[0], dtype=name)
        kept: list[Any] = []
        for module in block_modules(model, saved.blocks)[5:6]:  # its output is h[6]
            module.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out.float()))
        with torch.no_grad():
            for batch in data.batches():
                model(batch.inputs.to(getattr(torch, name)))  # type: ignore[union-attr]
        states[name] = kept
    exact, half = torch.cat(states["float32"]), torch.cat(states[dtype])
    assert found.boundaries[6].error == pytest.approx(
        float((half - exact).norm() / exact.norm()), rel=1e-3
    )
    assert found.boundaries[6].largest == pytest.approx(float(exact.abs().max()))
    rounding = torch.finfo(getattr(torch, dtype)).eps
    assert 0 < found.boundaries[0].error < rounding
    assert found.warnings == ()
    assert found.agreement == 1
    assert {p.dtype for p in saved.model.parameters()} == {torch.float32}


def test_bfloat16_is_coarser_than_float16(small: tuple[Path, Done]) -> None:
    saved = store.load_saved(small[0])
    coarse, fine = (
        check_precision(saved.model, saved.blocks, digits(16), dtype).output_error
        for dtype in ("bfloat16", "float16")
    )
    assert coarse is not None
    assert fine is not None
    assert coarse > 3 * fine


def test_a_map_that_overflows_is_named() -> None:
    model, blocks = with_map(1e5)
    found = check_precision(model, blocks, digits(16), "float16")
    assert found.boundaries[5].not_finite == 0
    assert found.boundaries[6].not_finite > 0
    assert found.to_json()["boundaries"][6]["relative_error"] is None
    said = " ".join(found.warnings)
    assert "blocks.5.map.weight reaches 1e+05, more than the 6.55e+04 of float16" in said
    assert "the output of block 5 reaches" in said
    assert not any("reaches" in one for one in check_precision(
        model, blocks, digits(16), "bfloat16"
    ).warnings)  # fmt: skip


def test_a_state_close_to_the_limit_is_named() -> None:
    model, blocks = with_map(1.0)
    images = digits(16)
    largest = check_precision(model, blocks, images, "float16").boundaries[6].largest
    model, blocks = with_map(0.5 * 65504 / largest)
    (said, *_) = check_precision(model, blocks, images, "float16").warnings
    assert said.startswith("the output of block 5 reaches")
    assert "close to the 6.55e+04 of float16" in said


def test_an_output_that_loses_accuracy_is_named() -> None:
    """Values that differ by less than bfloat16's steps: a large common shift hides them."""
    model, blocks = with_map(1.0)
    shift: Any = block_modules(model, blocks)[5]
    shift.map.bias.data.fill_(3e4)
    said = " ".join(check_precision(model, blocks, digits(48), "bfloat16").warnings)
    assert "the output is off by" in said


def test_overflows_are_seen_in_float32_already() -> None:
    images = next(iter(digits(16)))
    assert overflow_warnings(*with_map(1.0), images) == []
    said = overflow_warnings(*with_map(1e5), images)
    assert len(said) == 2
    assert "map.weight" in said[0]
    assert said[1].startswith("the output of block 5 reaches")
    model, blocks = with_map(1e5)
    assert overflow_warnings(model.bfloat16(), blocks, images) == []


def test_compress_warns_of_maps_that_overflow_in_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = small_pictures(24)
    result = blockfit.compress(small_vit(), images, spans=["1:2"], map="affine")
    assert not any("float16" in said for said in result.report["warnings"])
    said = ["too large for float16"]
    monkeypatch.setattr("blockfit.calibration.overflow_warnings", lambda *_: said)
    result = blockfit.compress(small_vit(), images, spans=["1:2"], map="affine")
    assert "too large for float16" in result.report["warnings"]


def test_what_cannot_be_checked_is_refused(small: tuple[Path, Done]) -> None:
    saved = store.load_saved(small[0])
    with pytest.raises(BlockfitError, match="unknown dtype 'float64'"):
        check_precision(saved.model, saved.blocks, digits(4), "float64")


def test_the_command_shows_every_hidden_state(small: tuple[Path, Done]) -> None:
    given = ("check", small[0], *FEW)
    told = blockfit_command(*given, "--json").json
    assert [one["dtype"] for one in told["checks"]] == ["bfloat16", "float16"]
    assert all(len(one["boundaries"]) == 13 for one in told["checks"])
    assert all(one["images"] == 40 for one in told["checks"])
    shown = blockfit_command(*given, "--dtype", "bfloat16")
    assert "h[12]" in shown.out
    assert "float16 " not in shown.out.replace("bfloat16", "")
    original = blockfit_command("check", "demo", *FEW, "--dtype", "float16", "--json").json
    assert original["checks"][0]["agreement"] == 1
    assert "unknown dtype" in blockfit_command(*given, "--dtype", "int8").error


def test_as_many_images_as_a_calibration_takes_are_enough(monkeypatch: Any) -> None:
    monkeypatch.setattr("blockfit.search.setting.CALIBRATION_IMAGES", 24)
    check = ["check", "demo", "--images", "digits:test", "--dtype", "float16"]
    done = blockfit_command(*check, "--json")
    assert done.json["data"][0]["used"] == 24
    assert "; --limit all for all" in blockfit_command(*check).err
    assert blockfit_command(*check, "--limit", "30", "--json").json["data"][0]["used"] == 30
