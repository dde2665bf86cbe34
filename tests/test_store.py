"""Saved folders: the same outputs bit for bit, nothing that was removed, nothing half written."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import DEPTH, FAMILIES, WIDTH
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blockfit import atomic, store
from blockfit.blocks import Blocks, block_modules, find_blocks
from blockfit.demo import DigitsViT, demo_arguments
from blockfit.errors import BlockfitError
from blockfit.head import primary_output
from blockfit.maps import empty_map
from blockfit.models import Source, source_of
from blockfit.preprocess import Preprocessing
from blockfit.probe import call
from blockfit.spans import Plan, Replacement, Span
from blockfit.store import check_folder, is_saved, load, load_saved, save
from blockfit.surgery import apply_plan
from blockfit.tensors import file_bytes, named_tensors, narrowest, stored_dtype

PLAN = Plan((Replacement(Span(0, 1), "low-rank", 3), Replacement(Span(2, 4), "affine")))
REPORT = {"seed": 0, "calibration": {"used": 8}, "ratio": 0.5}


def small_model(
    name: str, plan: Plan = PLAN, change: Callable[[Any], Any] | None = None
) -> tuple[nn.Module, Blocks, Source, Tensor]:
    """A compressed tiny model with random maps, its blocks, its source, and images for it."""
    if name == "demo":
        model: nn.Module = DigitsViT(**demo_arguments())
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        images = torch.randn(3, 1, 8, 8)
    else:
        model, images = FAMILIES[name].build(), FAMILIES[name].images()
    if change is not None:
        change(model)
    model.eval()
    source, blocks = source_of(model), find_blocks(model, images)
    maps = [empty_map(entry, blocks.width, blocks.prefix_tokens) for entry in plan]
    for parameter in (p for m in maps for p in m.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    apply_plan(model, blocks, plan, maps)
    return model, blocks, source, images


def saved(folder: Path, name: str = "plain", plan: Plan = PLAN, **options: Any) -> nn.Module:
    model, blocks, source, _ = small_model(name, plan, **options)
    save(folder, model, blocks, plan, source=source, report=REPORT)
    return model


def output(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return primary_output(call(model, images))


# -- the same model again -----------------------------------------------------------------------

KINDS = {
    "transformers": "dinov2-classifier",
    "timm": "timm-dinov2-reg4",
    "torchvision": "torchvision-vit",
    "demo": "demo",
    "module": "plain-tuple",
}

LOAD_ALL = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from blockfit.head import primary_output
from blockfit.store import load
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
    arguments = [str(folders), str(torch.get_num_threads()), str(traffic)]
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
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
    assert back.source == source == source_of(back.model)
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


def test_transformers_recognises_the_folder_by_its_config(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, blocks, source, _ = small_model("dinov2-classifier")
    processor = transformers.BitImageProcessor(size={"height": 32, "width": 32})
    own = Preprocessing("transformers", processor.to_dict())
    source = Source(source.library, source.name, source.arguments, "mit", own)
    save(tmp_path / "small", model, blocks, PLAN, source=source, report=REPORT)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "small")
    assert type(config) is type(model.config)
    assert config.architectures == ["Dinov2ForImageClassification"]
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


# -- what does not fit is refused ---------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "blockfit.json"
    values = json.loads(path.read_text("utf-8"))
    change(values)
    path.write_text(json.dumps(values), "utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(colour="red"), "unknown key 'colour'"),
        (lambda v: v.pop("plan"), "key 'plan' is missing"),
        (lambda v: v.update(format=3), "format 3 is newer than 2.*update"),
        (lambda v: v.update(format=True), "format must be a whole number"),
        (lambda v: v.pop("format"), "format must be a whole number"),
        (lambda v: v.update(report=[]), "report must hold an object"),
        (lambda v: v["blocks"].update(depth="4"), "blocks: depth must be a whole number"),
        (lambda v: v["blocks"].update(width=0), "blocks: width must be at least 1"),
        (lambda v: v["blocks"].update(heads=2), "blocks: unknown key 'heads'"),
        (lambda v: v["blocks"].pop("path"), "blocks: key 'path' is missing"),
        (lambda v: v["blocks"].update(path="encoder"), "no module 'encoder'"),
        (lambda v: v["blocks"].update(width=8), "rank|shape"),
        (lambda v: v["plan"][0].update(map="cubic"), "unknown map 'cubic'"),
        (lambda v: v["plan"][0].update(weight=1), r"plan\[0\]: unknown key 'weight'"),
        (lambda v: v["plan"][1].update(stop=9), "span 2:9 leaves the model"),
        (lambda v: v["plan"].pop(), "unknown tensor 'blocks.3.map.bias'"),
        (lambda v: v["base"].update(library="keras"), "unknown library 'keras'"),
        (lambda v: v["base"].update(extra=1), "base: unknown key 'extra'"),
        (lambda v: v["base"]["arguments"]["options"].update(embed_dim=64), "shape"),
        (lambda v: v["base"]["arguments"].update(architecture="vit_none"), "no model 'vit_none'"),
        (lambda v: v["versions"].update(torch=2), "versions: torch must be a text"),
        (lambda v: v.update(dtype="int8"), "dtype: unknown dtype 'int8'"),
        (lambda v: v.update(dtype="float16"), "stored as F32, expected torch.float16"),
        (lambda v: v.update(dtype="float64"), "stored as F32, expected torch.float64"),
        (lambda v: v["other_dtypes"].update({"norm.bias": "float31"}), "unknown dtype 'float31'"),
        (
            lambda v: v["base"]["arguments"].update(architecture="local-dir:/tmp/x"),
            "'local-dir:/tmp/x' is not the bare name of a timm architecture",
        ),
        (
            lambda v: v["base"]["arguments"]["options"].update(checkpoint_path="x.pth"),
            "timm's option 'checkpoint_path'",
        ),
        (lambda v: v["other_dtypes"].update({"x": "float16"}), "other_dtypes: .* no tensor 'x'"),
        (lambda v: v["tied"].update({"x": "norm.bias"}), "tied: the model has no tensor 'x'"),
        (lambda v: v["tied"].update({"norm.bias": "cls_token"}), "cannot be the same tensor"),
        (lambda v: v["tied"].update({"norm.bias": "norm.bias"}), "must name a tensor"),
        (lambda v: v["tied"].update({"norm.bias": "norm.weight"}), "unknown tensor 'norm.bias'"),
        (lambda v: v["layout"].update({"norm.bias": [0, 1]}), "has 1 dimensions, not 2"),
        (lambda v: v["layout"].update({"norm.bias": [1]}), "must order dimensions"),
        (lambda v: v["layout"].update({"y": [0]}), "layout: the model has no tensor 'y'"),
    ],
)
def test_a_changed_blockfit_json_is_refused_with_file_and_key(
    timm_folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = shutil.copytree(timm_folder, tmp_path / "small")
    edit(folder, change)
    with pytest.raises(BlockfitError, match=message) as raised:
        load(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timm") / "small"
    saved(folder, "timm-vit")
    return folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold an object"),
        ('{"format": 1, "format": 1}', "key 'format' appears twice"),
        ('{"format": NaN}', "NaN is no number of JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_blockfit_json_is_refused(
    timm_folder: Path, tmp_path: Path, text: str, message: str
) -> None:
    folder = shutil.copytree(timm_folder, tmp_path / "small")
    (folder / "blockfit.json").write_text(text, "utf-8")
    with pytest.raises(BlockfitError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(spare=torch.zeros(1)), "unknown tensor 'spare'"),
        (lambda t: t.pop("norm.bias"), "tensor 'norm.bias' is missing"),
        (lambda t: t.update({"norm.bias": torch.zeros(3)}), r"'norm.bias' has shape \(3,\)"),
        (
            lambda t: t.update({"norm.bias": t["norm.bias"].double()}),
            "'norm.bias' is stored as F64, expected torch.float32",
        ),
        (
            lambda t: t.update({"norm.bias": t["norm.bias"].to(torch.float8_e5m2)}),
            "'norm.bias' is stored as F8_E5M2, expected torch.float32",
        ),
        (
            lambda t: t.update({"norm.bias": t["norm.bias"].int()}),
            "'norm.bias' is stored as I32, expected torch.float32",
        ),
    ],
)
def test_changed_weights_are_refused_with_file_and_name(
    timm_folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = shutil.copytree(timm_folder, tmp_path / "small")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BlockfitError, match=message) as raised:
        load(folder)
    assert str(folder / "model.safetensors") in str(raised.value)


def test_a_cut_off_weights_file_is_refused(timm_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(timm_folder, tmp_path / "small")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(BlockfitError, match=r"model\.safetensors cannot be read"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BlockfitError, match=r"model\.safetensors is missing"):
        load(folder)


def test_a_folder_of_something_else_is_said_to_be_none(tmp_path: Path) -> None:
    assert not is_saved(tmp_path)
    with pytest.raises(BlockfitError, match="no folder that blockfit saved"):
        load(tmp_path)
    with pytest.raises(BlockfitError, match="there is no folder"):
        load(tmp_path / "none")


def test_links_that_lead_out_of_the_folder_are_refused(timm_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(timm_folder, tmp_path / "small")
    for name in ("model.safetensors", "blockfit.json"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(BlockfitError, match=rf"{name} is a link that leads out"):
            load(folder)
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)
    (tmp_path / "link").symlink_to(folder)
    load(tmp_path / "link")


def test_a_snapshot_in_the_hubs_cache_is_loaded(timm_folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in timm_folder.iterdir():
        shutil.copy(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    load(snapshot)


def test_an_unknown_device_is_one_sentence(timm_folder: Path) -> None:
    with pytest.raises(BlockfitError, match=r"cannot put .* on nowhere"):
        load(timm_folder, device="nowhere")


# -- what cannot be saved is refused before anything is written ---------------------------------


def test_a_model_that_its_source_does_not_rebuild_is_refused(tmp_path: Path) -> None:
    model, blocks, source, _ = small_model("vit-classifier")
    model.classifier = nn.Linear(WIDTH, 7)
    with pytest.raises(BlockfitError, match=r"classifier.* has shape \(7"):
        save(tmp_path / "small", model, blocks, PLAN, source=source, report={})
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    model, blocks, source, _ = small_model("plain")
    other = Plan.of(["1:2"], "affine")
    with pytest.raises(BlockfitError, match="compressed by the plan 0:1 low-rank"):
        save(tmp_path / "small", model, blocks, other, source=source, report={})


@pytest.mark.parametrize("report", [{"loss": float("nan")}, {"plan": PLAN}, {"x": torch.ones(1)}])
def test_a_report_that_is_no_json_is_refused(tmp_path: Path, report: dict[str, Any]) -> None:
    model, blocks, source, _ = small_model("plain")
    with pytest.raises(BlockfitError, match="the report cannot be written as JSON"):
        save(tmp_path / "small", model, blocks, PLAN, source=source, report=report)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_no_file_can_hold_are_refused(tmp_path: Path) -> None:
    model, blocks, source, _ = small_model("plain")
    block = block_modules(model, blocks)[1]
    block.norm1.weight = nn.Parameter(torch.empty(WIDTH, device="meta"))
    with pytest.raises(BlockfitError, match=r"transformer\.1\.norm1\.weight is on the meta device"):
        save(tmp_path / "small", model, blocks, PLAN, source=source, report={})


# -- whole or not at all ------------------------------------------------------------------------


def test_a_folder_with_something_else_in_it_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (tmp_path / "file").write_text("text")
    for overwrite in (False, True):
        with pytest.raises(BlockfitError, match="not empty and was not saved by blockfit"):
            check_folder(tmp_path / "photos", overwrite)
        with pytest.raises(BlockfitError, match="is a file"):
            check_folder(tmp_path / "file", overwrite)
    with pytest.raises(BlockfitError, match=r"cannot write .*file/small"):
        saved(tmp_path / "file" / "small")


def test_a_saved_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    first = saved(folder, "plain")
    model, blocks, source, images = small_model("plain")
    with pytest.raises(BlockfitError, match=r"holds what an earlier run wrote.*--overwrite"):
        save(folder, model, blocks, PLAN, source=source, report={})
    own = FAMILIES["plain"].build()
    assert torch.equal(output(load(folder, model=own), images), output(first, images))
    save(folder, model, blocks, PLAN, source=source, report={}, overwrite=True)
    assert torch.equal(output(load(folder, model=own), images), output(model, images))
    assert [p.name for p in tmp_path.iterdir()] == ["small"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(BlockfitError, match=r"also holds notes\.txt"):
        save(folder, model, blocks, PLAN, source=source, report={}, overwrite=True)


def rename_fails(monkeypatch: pytest.MonkeyPatch, when: Callable[[Path, Path], bool]) -> None:
    real = Path.rename

    def rename(old: Path, new: Path) -> Path:
        if when(old, new):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(old, new)

    monkeypatch.setattr(Path, "rename", rename)


def test_what_was_replaced_is_never_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the new folder nor, after that, the old one can take the name."""
    folder = tmp_path / "small"
    saved(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    model, blocks, source, _ = small_model("plain")
    rename_fails(monkeypatch, lambda old, new: new == folder)
    with pytest.raises(BlockfitError, match="what it held is now at") as raised:
        save(folder, model, blocks, PLAN, source=source, report={}, overwrite=True)
    kept = Path(str(raised.value).rpartition("now at ")[2])
    assert {p.name: p.read_bytes() for p in kept.iterdir()} == before
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupted_run_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "_to_disk", interrupt)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_the_mark_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    real = Path.write_text

    def note(path: Path, *args: Any, **kwargs: Any) -> int:
        written.extend(p.name for p in path.parent.iterdir())
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", note)
    saved(tmp_path / "small", "vit-classifier")
    assert sorted(written) == ["config.json", "model.safetensors", "model.safetensors"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("step", ["weights", "disk", "name"])
def test_a_full_disk_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, overwrite: bool
) -> None:
    folder = tmp_path / "small"
    if overwrite:
        saved(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()} if overwrite else {}
    model, blocks, source, _ = small_model("plain")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "weights":
        monkeypatch.setattr(store, "save_file", full)
    elif step == "disk":
        monkeypatch.setattr(atomic, "_to_disk", full)
    else:
        rename_fails(monkeypatch, lambda old, new: new == folder and old.name != "old")
    with pytest.raises(BlockfitError, match=r"cannot write .*small: No space left on device"):
        save(folder, model, blocks, PLAN, source=source, report={}, overwrite=overwrite)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["small"] if overwrite else [])
    if overwrite:
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


KILLED = """
import os, signal, sys
from test_store import small_model, PLAN
from blockfit import atomic
from blockfit.store import save
model, blocks, source, _ = small_model("plain")
calls = 0
real = atomic._to_disk
def kill(path):
    global calls
    calls += 1
    if calls == 3:  # all files are complete, only the name is missing
        os.kill(os.getpid(), signal.SIGKILL)
    real(path)
atomic._to_disk = kill
save(sys.argv[1] + "/small", model, blocks, PLAN, source=source, report={})
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL on Windows")
def test_a_killed_run_leaves_no_folder_that_loads(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert (left[0] / "blockfit.json").is_file()
    with pytest.raises(BlockfitError, match="no folder that blockfit saved"):
        load(left[0], model=FAMILIES["plain"].build())
