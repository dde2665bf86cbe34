"""What somebody else's folder cannot do: reach the network, run code, fill the memory."""

from __future__ import annotations

import inspect
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from families import one_thread  # noqa: F401
from fuzz_targets import TARGETS
from pictures import folder_of
from torch import nn

import blockfit
from blockfit import untrusted
from blockfit.commands import app as cli
from blockfit.errors import BlockfitError, printable
from blockfit.fit.plan import Plan, Replacement, Span
from blockfit.models import load as models
from blockfit.models import source
from blockfit.models.preprocessing import Preprocessing
from blockfit.models.source import bounded, check_original
from blockfit.untrusted import MOST_HEADER, open_tensors, read_json


def written(folder: Path, target: str, change: Any = None) -> Path:
    """A whole folder of one of the fuzz's kinds, its config changed."""
    folder.mkdir()
    for name, content in TARGETS[target].files().items():
        (folder / name).write_bytes(content)
    if change is not None:
        config = folder / ("blockfit.json" if target.startswith("saved") else "config.json")
        values = json.loads(config.read_text())
        change(values)
        config.write_text(json.dumps(values))
    return folder


# -- network ------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The Hub's switches are on, every attempt to reach anything is noted and fails."""
    constants = pytest.importorskip("huggingface_hub.constants")
    attempts: list[str] = []

    def refused(*arguments: Any, **options: Any) -> Any:
        attempts.append(repr(arguments[:2]))
        raise OSError("no network in this test")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    return attempts


def test_work_on_local_files_reaches_no_network(no_network: list[str], tmp_path: Path) -> None:
    photos = folder_of(tmp_path / "photos", 10)
    for target in ("transformers folder", "timm folder"):
        name = target.split()[0]
        model = blockfit.load(written(tmp_path / name, target))
        images = blockfit.images(photos, model)
        result = blockfit.compress(model, images, spans=["1:2"], map="scale")
        blockfit.save(result, tmp_path / f"{name}-small")
        small = blockfit.load(tmp_path / f"{name}-small")
        assert len(next(iter(blockfit.images(photos, small)))) == 10
    assert no_network == []


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(model_type="dpt", backbone="facebook/dinov2-base", architectures=None),
        lambda v: v.update(attn_implementation="kernels-community/flash-attn"),
        lambda v: v.update(_attn_implementation="kernels-community/flash-attn"),
        lambda v: v.update(use_kernels=True),
    ],
)
def test_a_folders_config_cannot_have_the_hub_asked(
    no_network: list[str], tmp_path: Path, change: Any
) -> None:
    pytest.importorskip("transformers")
    folder = written(tmp_path / "model", "transformers folder", change)
    with pytest.raises(BlockfitError, match="would have the Hub asked"):
        blockfit.load(folder)
    assert no_network == []


def test_a_config_that_only_describes_is_not_refused() -> None:
    check_original(
        {
            "attn_implementation": "sdpa",
            "_attn_implementation_autoset": True,
            "use_kernels": False,
            "backbone": "resnet50",
            "auto_map": {"AutoModel": "owner/name--file.Class"},
            "backbone_config": {"model_type": "dinov2"},
            "labels": ["a/b", {"backbone": None}],
        }
    )
    with pytest.raises(BlockfitError, match="Hub"):
        check_original({"parts": [{"encoder_attn_implementation": {"": "a/b"}}]})


def test_a_saved_folders_config_cannot_name_a_checkpoint_to_look_up(
    no_network: list[str], tmp_path: Path
) -> None:
    def names_one(values: dict[str, Any]) -> None:
        values["base"]["arguments"]["config"]["_name_or_path"] = "owner/name"
        values["base"]["arguments"]["config"]["name_or_path"] = "owner/name"
        values["base"]["preprocessing"] = None

    folder = written(tmp_path / "small", "saved transformers", names_one)
    model = blockfit.load(folder)
    with pytest.raises(BlockfitError, match="does not say how its images are prepared"):
        blockfit.images(folder_of(tmp_path / "photos", 2), model)
    assert no_network == []


# -- code ---------------------------------------------------------------------------------------


def test_every_command_that_loads_a_model_takes_the_flag_and_none_has_it_on() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    loading = {
        *("compress", "sweep", "analyze", "evaluate", "compare", "reproduce"),
        *("bench", "report", "quantize", "check", "export"),
    }
    assert loading <= commands.keys()
    for name in loading:
        (flag,) = (p for p in commands[name].params if "--trust-remote-code" in p.opts)
        assert flag.is_flag
        assert flag.default is False
    assert inspect.signature(models.load_model).parameters["trust_remote_code"].default is False


@pytest.mark.parametrize("command", ["compress", "analyze", "check", "export", "bench"])
def test_a_checkpoints_code_runs_on_the_command_line_only_where_it_is_trusted(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    auto = {"AutoConfig": "mine.MineConfig", "AutoModel": "mine.Mine"}
    config = {"model_type": "mine", "architectures": ["Mine"], "auto_map": auto}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise RuntimeError('this code ran')")
    more = {
        "compress": ["--images", "digits", "--remove", "1", "-o", str(tmp_path / "small")],
        "export": ["--onnx", "-o", str(tmp_path / "small.onnx")],
        "bench": ["--against", "demo"],
    }
    arguments = [command, str(tmp_path), *more.get(command, ["--images", "digits"])]
    assert cli.run(arguments) == 2
    assert "allow it with --trust-remote-code if you trust" in capsys.readouterr().err
    assert cli.run([*arguments, "--trust-remote-code"]) == 2
    assert "this code ran" in capsys.readouterr().err


# -- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1e999}', "too large a number"),
        ('{"a": ' + "9" * 30 + "}", "too large a number"),
        ('{"a": ' + "9" * 9999 + "}", "too large a number"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": 1, "a": 2}', "key 'a' appears twice"),
        ("[" * 66 + "]" * 66, "more than 64 levels"),
        ("[" * 99_999, "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
        ('{"a', "not valid JSON"),
    ],
)
def test_json_beyond_its_limits_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text, "utf-8")
    with pytest.raises(BlockfitError, match=message):
        read_json(tmp_path / "x.json")


def test_json_within_its_limits_is_read(tmp_path: Path) -> None:
    value = {"a": [2**63 - 1, -1.5e300, None, True], "b": json.loads("[" * 60 + "]" * 60)}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json") == value
    (tmp_path / "x.json").write_text("[Infinity, 1e999]")
    assert read_json(tmp_path / "x.json", exact=False) == [float("inf")] * 2


def test_a_large_json_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.json").write_text("[" + " " * 2000 + "]")
    assert read_json(tmp_path / "x.json") == []
    monkeypatch.setattr(untrusted, "MOST_JSON", 1000)
    with pytest.raises(BlockfitError, match="holds 2002 bytes, more than the 1000"):
        read_json(tmp_path / "x.json")


def test_a_long_header_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as content:
        content.write((MOST_HEADER + 8).to_bytes(8, "little"))
        content.truncate(MOST_HEADER + 100)  # a hole: takes no room on the disk
    message = "header of 16777224 bytes is longer than 16777216"
    with pytest.raises(BlockfitError, match=message), open_tensors(file):
        pass
    file.write_bytes((2**64 - 1).to_bytes(8, "little") + b"{}")
    with pytest.raises(BlockfitError, match="ends within its header"), open_tensors(file):
        pass


def test_no_number_builds_a_model_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert source.MOST_TENSORS == 5000
    monkeypatch.setattr(source, "MOST_TENSORS", 200)
    with bounded():
        nn.ModuleList(nn.Linear(1, 1) for _ in range(99))
    before = torch.linspace
    with pytest.raises(BlockfitError, match="more than 200 blocks or parameters"), bounded():
        nn.ModuleList(nn.Linear(1, 1) for _ in range(10**9))
    with pytest.raises(BlockfitError, match="more than 200 blocks"), bounded():
        torch.linspace(0, 0.1, 10**12)
    assert torch.linspace is before
    assert len(list(nn.Linear(1, 1).parameters())) == 2  # and nothing is counted any more


def test_the_depth_of_a_saved_folder_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "MOST_TENSORS", 200)

    def deep(values: dict[str, Any]) -> None:
        values["base"]["arguments"]["config"]["num_hidden_layers"] = 10**6

    folder = written(tmp_path / "small", "saved transformers", deep)
    with pytest.raises(BlockfitError, match=r"blockfit\.json: it describes a model of more than"):
        blockfit.load(folder)


def test_preprocessing_cannot_blow_a_picture_up() -> None:
    with pytest.raises(BlockfitError, match="size is 1000000, beyond 4096 pixels"):
        Preprocessing("transformers", {"image_processor_type": "X", "size": {"height": 10**6}})
    with pytest.raises(BlockfitError, match="beyond 4096"):
        Preprocessing.plain(4097)


# -- words --------------------------------------------------------------------------------------


def test_an_error_stays_one_line_of_printable_characters() -> None:
    hostile = "a\nb\x1b[31m\x00\ud800" + "x" * 5000 + " what to do"
    text = str(BlockfitError(f"{hostile!s}"))
    assert text.startswith("a b\\x1b[31m\\x00\\ud800xxx")
    assert text.endswith("xxx what to do")
    assert len(text) < 1010
    assert printable("spans 3–9 × 8 → ä") == "spans 3–9 × 8 → ä"
    with pytest.raises(BlockfitError) as raised:
        Plan((Replacement(Span(1, 2), "a\nb" * 9000),))
    assert "\n" not in str(raised.value)
