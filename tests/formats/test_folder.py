"""Saved folders: the same outputs bit for bit, and nothing that was removed."""

from __future__ import annotations

import copy
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pytest
import torch
from families import DEPTH, FAMILIES, WIDTH
from safetensors.torch import load_file, save_file
from stored import KINDS, PLAN, REPORT, output, saved, small_model
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.formats.folder import load, load_saved, save
from blockfit.formats.own_model import RECORD
from blockfit.models.load import Source, source_of
from blockfit.models.preprocessing import Preprocessing
from blockfit.models.tensors import file_bytes, named_tensors, narrowest, stored_dtype

LOAD_ALL = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from blockfit.models.head import primary_output
from blockfit.formats.folder import load
torch.set_num_threads(int(sys.argv[2]))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    own = None
    if folder.name == "module":
        from families import FAMILIES
        own = FAMILIES["plain-tuple"].build(7)
    state = torch.get_rng_state()
    model = load(folder, model=own)
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    images = load_file(Path(sys.argv[3]) / f"{folder.name}.safetensors")["images"]
    with torch.no_grad():
        out = primary_output(model(images)).contiguous()
    save_file({"out": out}, Path(sys.argv[3]) / f"{folder.name}.out.safetensors")
"""


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor]]:
    """Per kind of model: its output before saving, and after loading in a fresh process."""
    folders, traffic = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("traffic")
    before = {}
    for kind, name in KINDS.items():
        torch.manual_seed(0)
        model, blocks, source, images = small_model(name)
        assert source.library == kind
        save(folders / kind, model, blocks, PLAN, source=source, report=REPORT)
        save_file({"images": images}, traffic / f"{kind}.safetensors")
        before[kind] = output(model, images)
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    arguments = (folders, torch.get_num_threads(), traffic)
    fresh.python("-c", LOAD_ALL, *arguments, env={**os.environ, "PYTHONPATH": paths})
    return {
        kind: (out, load_file(traffic / f"{kind}.out.safetensors")["out"])
        for kind, out in before.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_process_gives_the_same_outputs_bit_for_bit(
    fresh_process: dict[str, tuple[Tensor, Tensor]], kind: str
) -> None:
    before, after = fresh_process[kind]
    assert before.isfinite().all()
    assert before.std() > 0
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back(name: str, tmp_path: Path) -> None:
    model, blocks, source, images = small_model(name)
    save(tmp_path / "small", model, blocks, PLAN, source=source, report=REPORT)
    fresh = FAMILIES[name].build(1) if source.library == "module" else None
    back = load_saved(tmp_path / "small", model=fresh)
    assert torch.equal(output(model, images), output(back.model, images))
    assert (back.plan, back.blocks, back.report) == (PLAN, blocks, REPORT)
    told = {key: value for key, value in back.source.arguments.items() if key != RECORD}
    assert replace(back.source, arguments=told) == source
    assert source_of(back.model) == back.source
    assert list(back.model.state_dict()) == list(model.state_dict())
    assert type(back.model) is type(model)
    assert (tmp_path / "small" / "model.safetensors").stat().st_size == file_bytes(model)


def test_no_removed_weight_is_in_the_file(tmp_path: Path) -> None:
    whole = FAMILIES["dinov2-classifier"].build()
    model, blocks, source, _ = small_model("dinov2-classifier")
    save(tmp_path / "small", model, blocks, PLAN, source=source, report=REPORT)
    stored = load_file(tmp_path / "small" / "model.safetensors")
    removed = [whole.get_submodule(blocks.path)[i] for i in PLAN.removed_blocks]  # type: ignore[index]
    for weight in (p for block in removed for p in block.parameters()):
        assert not any(weight.shape == t.shape and torch.equal(weight, t) for t in stored.values())
    gone = sum(p.numel() for block in removed for p in block.parameters())
    maps = WIDTH * WIDTH + WIDTH + 2 * 3 * WIDTH + WIDTH
    assert sum(t.numel() for t in stored.values()) == (
        sum(t.numel() for t in whole.state_dict().values()) - gone + maps
    )


def test_loading_draws_no_random_numbers_and_initialises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "small", "vit-classifier")
    touched: list[int] = []

    def watch(name: str) -> None:
        original = getattr(nn.init, name)

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not tensor.is_meta:
                touched.append(tensor.numel())
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(nn.init, name, counted)

    for name in ("normal_", "trunc_normal_", "uniform_", "kaiming_uniform_", "zeros_", "ones_"):
        watch(name)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    load(tmp_path / "small")
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert touched == []


def test_hidden_states_are_recorded_as_before(tmp_path: Path) -> None:
    model, blocks, source, images = small_model("dinov2-classifier")
    save(tmp_path / "small", model, blocks, PLAN, source=source, report=REPORT)
    back = load(tmp_path / "small")
    mine = model(images, output_hidden_states=True).hidden_states
    its = back(images, output_hidden_states=True).hidden_states
    assert len(its) == DEPTH + 1
    assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_the_file_is_the_dtype_of_the_model(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = saved(tmp_path / "small", "vit-classifier", change=lambda m: m.to(dtype))
    back = load(tmp_path / "small")
    assert {p.dtype for p in back.parameters()} == {dtype}
    assert all(torch.equal(a, b) for a, b in zip(
        model.state_dict().values(), back.state_dict().values(), strict=True
    ))  # fmt: skip
    assert all(p.requires_grad for p in back.parameters())


def rounded(dtype: torch.dtype) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()

    return change


@pytest.mark.parametrize(("half", "name"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_float32_weights_out_of_a_half_precision_checkpoint_are_stored_as_there(
    tmp_path: Path, half: torch.dtype, name: str
) -> None:
    def change(model: Any) -> None:
        rounded(half)(model)
        model.norm.bias.data[0] = -0.0
        model.head.weight.data[0, 0] = 1.0 + 2**-10 if half == torch.float16 else 2**-40
        model.norm.weight.data = torch.rand(WIDTH) + 2**-20  # and one that no half holds
        model.head.weight.data = model.head.weight.data.t().contiguous().t()

    model: Any = saved(tmp_path / "small", "plain", change=change)
    file = tmp_path / "small" / "model.safetensors"
    stored = load_file(file)
    assert (stored["head.weight"].dtype, stored["norm.weight"].dtype) == (half, torch.float32)
    assert json.loads((tmp_path / "small" / "blockfit.json").read_text())["dtype"] == "float32"
    assert file.stat().st_size == file_bytes(model)
    back: Any = load(tmp_path / "small", model=FAMILIES["plain"].build())
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    for mine, its in zip(model.state_dict().values(), back.state_dict().values(), strict=True):
        assert torch.equal(mine.view(torch.int32), its.view(torch.int32))
        assert mine.stride() == its.stride()
    images = FAMILIES["plain"].images()
    assert torch.equal(output(model, images), output(back, images))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 0.5, -0.0], torch.float16),
        ([2**-24, 65504.0, float("inf")], torch.float16),
        ([2**-25, 1.0], torch.bfloat16),
        ([65536.0, 0.0], torch.bfloat16),
        ([65504.0, 2**-25], torch.float32),
        ([0.1], torch.float32),
        ([float("nan"), 1.0], torch.float32),
        ([], torch.float32),
    ],
)
def test_a_dtype_is_narrower_only_where_not_one_bit_is_lost(
    values: list[float], expected: torch.dtype
) -> None:
    assert stored_dtype(torch.tensor(values)) == expected
    assert stored_dtype(torch.tensor(values).double()) == torch.float64
    assert stored_dtype(torch.tensor(values, device="meta")) == torch.float32


def test_the_narrowest_dtype_holds_every_parameter() -> None:
    model = nn.Linear(2, 2)
    assert narrowest(model) is None
    rounded(torch.bfloat16)(model)
    model.bias.data.fill_(2**-30)
    assert narrowest(model) == torch.bfloat16
    rounded(torch.float16)(model)
    assert narrowest(model) in (torch.float16, torch.bfloat16)
    model.bias.data.fill_(1 + 2**-10)
    model.weight.data.fill_(1.0)
    assert narrowest(model) == torch.float16
    model.weight.data.fill_(2**-30)
    assert narrowest(model) is None


def test_norms_kept_in_float32_stay_so(tmp_path: Path) -> None:
    def mixed(model: nn.Module) -> None:
        model.half()
        model.norm.float()  # type: ignore[union-attr]

    saved(tmp_path / "small", "plain", change=mixed)
    back = load(tmp_path / "small", model=FAMILIES["plain"].build())
    assert back.norm.weight.dtype == torch.float32
    assert back.head.weight.dtype == torch.float16


def test_buffers_outside_the_state_dict_come_back(tmp_path: Path) -> None:
    def buffers(model: nn.Module) -> None:
        model.register_buffer("factor", torch.randn(4), persistent=False)
        model.register_buffer("counter", torch.tensor(5))

    def own() -> nn.Module:
        fresh = FAMILIES["plain"].build()
        fresh.register_buffer("factor", torch.zeros(4), persistent=False)
        fresh.register_buffer("counter", torch.tensor(0))
        return fresh

    model = saved(tmp_path / "small", "plain", change=buffers)
    back = load(tmp_path / "small", model=own())
    assert torch.equal(back.factor, model.factor)
    assert back.counter == 5
    assert "factor" not in back.state_dict()


def test_a_weight_that_lies_transposed_in_memory_comes_back_so(tmp_path: Path) -> None:
    def transposed(model: Any) -> None:
        model.head.weight.data = model.head.weight.data.t().contiguous().t()
        model.stem.to(memory_format=torch.channels_last)

    model: Any = saved(tmp_path / "small", "plain", change=transposed)
    back: Any = load(tmp_path / "small", model=FAMILIES["plain"].build())
    assert back.head.weight.stride() == model.head.weight.stride() == (1, model.head.out_features)
    assert torch.equal(back.head.weight, model.head.weight)
    assert back.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(back.stem.weight, model.stem.weight)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    def tie(model: Any) -> None:
        model.transformer[1].norm2.weight = model.transformer[1].norm1.weight
        model.norm.weight.data = model.norm.bias.data  # two parameters, one memory

    model = saved(tmp_path / "small", "plain", change=tie)
    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert len(stored) == len(named_tensors(model)) - 2
    back: Any = load(tmp_path / "small", model=FAMILIES["plain"].build())
    assert back.transformer[1].norm2.weight is back.transformer[1].norm1.weight
    assert back.norm.weight is back.norm.bias
    assert (tmp_path / "small" / "model.safetensors").stat().st_size == file_bytes(model)


def test_views_of_one_tensor_are_stored_apart(tmp_path: Path) -> None:
    def views(model: Any) -> None:
        both = torch.randn(2 * WIDTH)
        model.norm.weight.data, model.norm.bias.data = both[:WIDTH], both[WIDTH:]

    model: Any = saved(tmp_path / "small", "plain", change=views)
    back: Any = load(tmp_path / "small", model=FAMILIES["plain"].build())
    assert torch.equal(back.norm.bias, model.norm.bias)


def test_a_loaded_model_can_be_saved_again(tmp_path: Path) -> None:
    model = saved(tmp_path / "small", "timm-vit")
    back = load_saved(tmp_path / "small")
    save(tmp_path / "again", back.model, back.blocks, back.plan, source=back.source, report={})
    for name in ("model.safetensors", "blockfit.json"):
        assert (tmp_path / "again" / name).exists()
    images = FAMILIES["timm-vit"].images()
    assert torch.equal(output(load(tmp_path / "again"), images), output(model, images))


def test_transformers_reads_the_image_processor_of_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, blocks, source, _ = small_model("dinov2-classifier")
    processor = transformers.BitImageProcessor(size={"height": 32, "width": 32})
    own = Preprocessing("transformers", processor.to_dict())
    source = Source(source.library, source.name, source.arguments, "mit", own)
    save(tmp_path / "small", model, blocks, PLAN, source=source, report=REPORT)
    read = transformers.AutoImageProcessor.from_pretrained(tmp_path / "small")
    assert read.to_dict()["size"] == {"height": 32, "width": 32}
    back = load_saved(tmp_path / "small")
    assert back.source.preprocessing == own
    assert back.source.licence == "mit"
    assert back.versions["torch"] == metadata.version("torch")


# -- a user's own class -------------------------------------------------------------------------


def test_a_users_own_class_must_be_given_and_stays_as_it_is(tmp_path: Path) -> None:
    saved(tmp_path / "small")
    with pytest.raises(BlockfitError, match=r"class of your own.*model="):
        load(tmp_path / "small")
    mine = FAMILIES["plain"].build(3)
    before = copy.deepcopy(mine.state_dict())
    back = load(tmp_path / "small", model=mine)
    assert all(torch.equal(before[k], v) for k, v in mine.state_dict().items())
    assert len(list(mine.parameters())) > len(list(back.parameters()))
    assert not {p.data_ptr() for p in mine.parameters()} & {p.data_ptr() for p in back.parameters()}


def test_another_class_than_the_saved_one_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "small")
    with pytest.raises(BlockfitError, match=r"blockfit\.json.*no module 'transformer'"):
        load(tmp_path / "small", model=FAMILIES["torchvision-vit"].build())
    headless: Any = FAMILIES["plain"].build()
    headless.head = nn.Identity()
    with pytest.raises(BlockfitError, match=r"model\.safetensors: unknown tensor 'head\.bias'"):
        load(tmp_path / "small", model=headless)
