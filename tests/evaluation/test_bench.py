"""``blockfit bench``: times in turn, what the FLOPs promise, and why a gain is missing."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Done, blockfit_command
from commandline import small as small
from exporting import saved
from families import FAMILIES
from families import one_thread as one_thread
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.evaluation import shortfall
from blockfit.evaluation.bench import bench
from blockfit.evaluation.shortfall import block_shares, remarks
from blockfit.evaluation.speed import Row, Setting, Settings, Shares
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Plan
from blockfit.formats import folder as store
from blockfit.models.blocks import Blocks, block_modules
from blockfit.models.cost import Timing, in_turn
from blockfit.models.demo import load_demo
from blockfit.models.load import load_model
from blockfit.models.surgery import apply_plan
from blockfit.reports.bench_page import draw


def timing(*milliseconds: float, images: int = 1) -> Timing:
    return Timing(tuple(value / 1000 for value in milliseconds), images, 1, "x")


def row(
    before: Timing,
    after: Timing,
    promised: float,
    shares: Shares | None = None,
    engine: str = "eager",
) -> Row:
    return Row(
        "a", Setting(before.images, engine, "float32"), before, after, promised, shares=shares
    )


def test_speed_ups_are_those_of_rounds_measured_together() -> None:
    one = row(timing(10, 20, 40, 10), timing(5, 8, 20, 8), 2.5)
    assert one.measured == pytest.approx(2.0)
    assert one.quartiles == (pytest.approx(1.8125), pytest.approx(2.125))
    told = one.to_json()["speedup"]
    assert told["of_promised"] == pytest.approx(0.8)


def test_nothing_is_said_of_a_gain_that_is_there() -> None:
    good = row(timing(20, 20, 20), timing(10, 10, 10), 2.0)
    assert remarks(good, [good]) == ()


def test_a_slower_model_is_called_slower() -> None:
    slow = row(timing(10, 10, 10), timing(20, 20, 20), 1.2)
    assert remarks(slow, [slow])[0] == "slower than the original: 0.50×"


def test_a_gain_within_the_spread_is_none() -> None:
    noisy = row(timing(10, 10, 10, 10), timing(4, 9, 11, 20), 1.2)
    first, second = remarks(noisy, [noisy])
    assert first.startswith("no gain can be told")
    assert "scatter" in second


def test_a_promise_too_small_to_be_felt_is_named() -> None:
    small = row(timing(100, 100), timing(99.5, 99.5), 1.01)
    assert remarks(small, [small]) == ("the FLOPs promise no more than 1.01×",)


def test_a_pass_of_overhead_is_found_by_a_larger_batch() -> None:
    one = row(timing(10, 10), timing(9, 9), 2.0)
    many = row(timing(64, 64, images=32), timing(32, 32, images=32), 2.0)
    (said,) = remarks(one, [one, many])
    assert "5.0 times as long as in a batch of 32" in said
    assert remarks(many, [one, many]) == ()
    compiled = row(timing(64, 64, images=32), timing(32, 32, images=32), 2.0, engine="compiled")
    assert "overhead" not in remarks(one, [one, compiled])[0]


def test_blocks_that_took_little_time_are_named() -> None:
    shares = Shares(removed=0.2, maps=0.05)
    assert shares.promised == pytest.approx(1 / 0.85)
    (said,) = remarks(cheap := row(timing(10, 10), timing(8, 8), 2.0, shares), [cheap])
    assert "took 20.0% of the time and their maps take 5.0%, which allows 1.18×" in said


def test_narrower_heads_that_save_no_time_are_named() -> None:
    shares = Shares(removed=1.0, maps=0.8, narrowed=True, heads=(0.3, 0.31))
    narrow = row(timing(10, 10), timing(8, 8), 1.6, shares)
    why, heads = remarks(narrow, [narrow])
    assert (
        "blocks that were cut took 100.0% of the time and what is left of them takes 80.0%" in why
    )
    assert "save parameters and no time here: their layers took 30.0% of the time" in heads
    faster = row(timing(10, 10), timing(8, 8), 1.25, replace(shares, heads=(0.3, 0.2)))
    assert remarks(faster, [faster]) == ()


def test_the_time_of_narrowed_heads_is_measured_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = Clock()
    monkeypatch.setattr(shortfall, "time", clock)
    family = FAMILIES["timm-vit"]
    small, original = saved(tmp_path / "small", "timm-vit", Plan(()), share=0.5), family.build()
    images = family.images(1)
    passes = (functools.partial(original, images), functools.partial(small.model, images))
    seconds = {"attn.qkv": (2.0, 3.0), "attn.proj": (1.0, 1.0), "mlp.fc1": (4.0, 2.0)}
    for place, model in enumerate((original, small.model)):
        for block in block_modules(model, small.blocks):
            for name, taken in seconds.items():

                def spend(*_: Any, taken: float = taken[place]) -> None:
                    clock.now += taken

                layer = block.get_submodule(name)
                forward = layer.forward

                def timed(x: Tensor, forward: Any = forward, spend: Any = spend) -> Any:
                    spend()
                    return forward(x)

                layer.forward = timed
    shares = shortfall.block_shares(original, small.model, small.blocks, passes)
    assert shares is not None
    assert shares.narrowed
    assert shares.removed == pytest.approx(1.0)
    assert shares.maps == pytest.approx(6 / 7)
    assert shares.heads == pytest.approx((3 / 7, 4 / 7))


class Clock:
    """A clock that stands still but for what blocks add to it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class TimedBlock(nn.Module):
    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = [clock], seconds
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0].now += self.seconds
        return x * self.weight


def test_the_time_of_removed_blocks_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(shortfall, "time", clock)

    def build() -> nn.Module:
        return nn.Sequential(*(TimedBlock(clock, seconds) for seconds in (1.0, 2.0, 4.0, 3.0)))

    original, small = build(), build()
    blocks = Blocks(path="", depth=4, width=4, prefix_tokens=1, input_name="x", output_items=0)
    plan = Plan.of(["1:3"], "affine")
    apply_plan(small, blocks, plan, [empty_map(entry, 4) for entry in plan])
    images = torch.randn(1, 3, 4)
    runs = (functools.partial(original, images), functools.partial(small, images))
    assert block_shares(original, small, blocks, runs) == Shares(removed=0.6, maps=0.0)
    assert all(not module._forward_hooks for module in original.modules())
    assert block_shares(nn.Linear(4, 4), small, blocks, runs) is None
    assert block_shares(original, original, blocks, runs) is None


def without_two_blocks() -> tuple[nn.Module, nn.Module, Blocks]:
    family = FAMILIES["timm-vit"]
    original, small = family.build(), family.build()
    blocks = Blocks("blocks", 4, 32, 1, "x", 0)
    apply_plan(small, blocks, Plan.of(["1:3"], "identity"), [nn.Identity()])
    return original, small, blocks


def test_every_setting_is_measured_and_the_models_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    original, small, blocks = without_two_blocks()
    settings = Settings((1, 3), dtypes=("float32", "bfloat16"), threads=2, rounds=3)
    result = bench(original, {"small": small}, settings, blocks={"small": blocks})
    assert threads == [2, torch.get_num_threads()]
    assert {p.dtype for m in (original, small) for p in m.parameters()} == {torch.float32}
    assert [(r.setting.dtype, r.setting.batch_size) for r in result.rows] == [
        ("float32", 1), ("float32", 3), ("bfloat16", 1), ("bfloat16", 3),
    ]  # fmt: skip
    tokens, width, stem_and_head = 17, 32, 2 * 16 * 32 * 3 * 64 + 2 * 32 * 5
    block = 2 * (4 * tokens * width**2 + 2 * tokens**2 * width + 8 * tokens * width**2)
    for one in result.rows:
        assert one.promised == pytest.approx(
            (stem_and_head + 4 * block) / (stem_and_head + 2 * block)
        )
        assert len(one.before.seconds) == len(one.after.seconds) == 3
        assert one.before.threads == 2
        before, after = one.memory
        assert before is not None
        assert after is not None
        assert before > after > 0
        assert one.shares is not None
        assert 0 < one.shares.removed < 1
    assert json.loads(json.dumps(result.to_json()))["rows"][3]["dtype"] == "bfloat16"


def test_compiled_models_are_timed_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        ran.append(len(inputs[0]) if inputs[0].ndim == 4 else 0)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    original, small, blocks = without_two_blocks()
    settings = Settings((2,), ("compiled",), rounds=2)
    (one,) = bench(original, {"small": small}, settings, blocks={"small": blocks}).rows
    assert ran == [2, 2]  # one graph for each model, of the batch that was asked for
    assert one.shares is None


def test_onnx_is_timed_beside_torch_where_it_can_be() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    original, small, _ = without_two_blocks()
    settings = Settings((2, 1), ("onnx",), ("float32", "bfloat16"), rounds=2)
    result = bench(original, {"small": small}, settings)
    assert [(one.setting.batch_size, one.setting.dtype) for one in result.rows] == [
        (2, "float32"), (1, "float32"),
    ]  # fmt: skip
    assert all(one.memory == (None, None) for one in result.rows)
    (said,) = result.skipped
    assert said.startswith("onnx in bfloat16 on cpu is not measured")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engines": ("jit",)}, "unknown engine 'jit'"),
        ({"dtypes": ("int8",)}, "unknown dtype 'int8'"),
        ({"batch_sizes": (4, 0)}, "batch size must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"rounds": 1}, "rounds must be at least 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BlockfitError, match=message):
        Settings(**change)


def test_functions_are_called_in_turn() -> None:
    calls: list[str] = []
    seconds = in_turn({name: functools.partial(calls.append, name) for name in "ab"}, 3)
    assert calls == ["a", "b"] * 5
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_the_command_prints_writes_and_draws(small: tuple[Path, Done], tmp_path: Path) -> None:
    page, picture = tmp_path / "page.md", tmp_path / "picture.png"
    given = ("bench", small[0], "--against", "demo", "--batch-size", "2", "--rounds", "3")
    files = ("--markdown", page, "--picture", picture)
    told = blockfit_command(*given, *files, "--threads", "1", "--json").json
    (one,) = told["rows"]
    assert one["model"] == "small"
    assert one["original"]["threads"] == told["machine"]["threads"] == 1
    assert one["original"]["images"] == 2
    assert one["original"]["runs"] == told["rounds"] == 3
    before, after = (told["models"][name]["flops"] for name in ("original", "small"))
    assert one["speedup"]["promised"] == pytest.approx(before / after)
    assert told["models"]["small"]["parameters"] == small[1].json["parameters_after"]
    assert "| small | 2 | eager | fp32 |" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = blockfit_command(*given, *files)
    assert "is there already" in again.error
    shown = blockfit_command(*given, *files, "--overwrite")
    assert shown.code == 0
    assert "promised" in shown.out
    assert sorted(tmp_path.iterdir()) == [page, picture]  # nothing unfinished is left
    assert "unknown engine" in blockfit_command(*given, "--engine", "fast").error


def test_a_saved_folder_loads_in_another_dtype(small: tuple[Path, Done]) -> None:
    half = store.load(small[0], dtype="bfloat16")
    whole = store.load(small[0])
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for name, value in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], value.bfloat16())
    with pytest.raises(BlockfitError, match="unknown dtype 'int4'"):
        store.load(small[0], dtype="int4")


def test_the_picture_is_drawn_without_a_gain(tmp_path: Path) -> None:
    model = load_model("demo")
    result = bench(model, {"same": load_demo()}, Settings((1,), rounds=2))
    draw(result, tmp_path / "x.png")
    assert result.rows[0].promised == 1
    assert any("promise no more than 1.00×" in said for said in result.rows[0].remarks)
