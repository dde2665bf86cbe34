"""The command parses, calls and prints: results on standard output, all else on the other."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import FEW, Done, blockfit_command
from commandline import small as small
from families import one_thread as one_thread

import blockfit
from blockfit import api
from blockfit.commands.output import Output
from blockfit.models.demo import digits, load_demo
from blockfit.units import amount


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every call of ``compress``, which then stops."""
    seen: list[dict[str, Any]] = []

    def stop(model: Any, images: Any, **options: Any) -> None:
        seen.append({"images": images, **options})
        raise blockfit.BlockfitError("seen")

    monkeypatch.setattr(api, "compress", stop)
    return seen


def test_compress_prints_one_json_object_with_the_promised_keys(small: tuple[Path, Done]) -> None:
    folder, done = small
    told = done.json
    assert told["plan"] == [{"start": 9, "stop": 11, "map": "affine"}]
    assert told["removed_blocks"] == 2
    assert told["parameters_before"] == sum(p.numel() for p in load_demo().parameters())
    small_model = blockfit.load(folder)
    assert told["parameters_after"] == sum(p.numel() for p in small_model.parameters())
    assert told["parameters_after"] < told["parameters_before"]
    assert told["seconds"] > 0
    assert told["output"] == str(folder)
    assert told["held_out"]["images"] == 8
    assert done.err == ""


def test_the_saved_model_is_the_one_that_python_makes(small: tuple[Path, Done]) -> None:
    folder, _ = small
    model = load_demo()
    images = blockfit.images("digits", model, limit=40, seed=0)
    same = blockfit.compress(model, images, spans=["9:11"], map="affine").model
    pictures = digits("test")[0][:20]
    with torch.inference_mode():
        expected = same(pictures)
        assert torch.equal(blockfit.load(folder)(pictures), expected)
        assert not torch.equal(model(pictures), expected)


def test_compress_shows_people_the_result_on_standard_output(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    done = blockfit_command("compress", "demo", *FEW, "--span", "9:11", "-o", folder)
    assert done.code == 0
    assert [line for line in done.err.splitlines() if line[0] != "["] == [
        "images: 40 of 1,198 from digits, drawn with seed 0",
        "preprocessing: none, tensors as given",
        "labels by number",
        "device: cpu",
    ]
    for text in (
        "602.06 k",
        "9:11",
        "on 8 held-out images, which chose the plan: KL ",
        f"saved to {folder} in ",
        f"next: blockfit evaluate '{folder}' --against demo --images TEST_IMAGES",
    ):
        assert text in done.out


def test_quiet_says_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    done = blockfit_command("compress", "demo", *FEW, "--span", "9:11", "-o", folder, "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert folder.is_dir()


def test_a_sweep_makes_models_without_images(tmp_path: Path) -> None:
    sweep, small = tmp_path / "sweep", tmp_path / "small"
    cheap = ("--select", "last", "--map", "identity", "--repair", "none")
    told = blockfit_command("sweep", "demo", *FEW, *cheap, "-o", sweep, "--json").json
    assert [point["removed"] for point in told["points"]] == list(range(1, 11))
    assert told["output"] == str(sweep)
    made = blockfit_command("compress", "--from", sweep, "--params", "70%", "-o", small, "--json")
    assert made.json["parameters_after"] <= 0.7 * made.json["parameters_before"]
    assert made.json["plan"][0]["map"] == "identity"
    assert blockfit.load(small) is not None
    shown = blockfit_command("sweep", "demo", *FEW, *cheap, "-o", sweep)
    assert "The best plan for every size" in shown.out
    more = ("--images", "digits", "-o", tmp_path / "other")
    refused = blockfit_command("compress", "--from", sweep, "--remove", "2", *more)
    assert "over whole blocks" in refused.error
    refused = blockfit_command(
        "compress", "--from", sweep, "--remove", "2", "--limit", "64", "-o", tmp_path / "other"
    )
    assert "--limit has no use with --from without --images" in refused.error
    refused = blockfit_command("compress", "--from", sweep, "-o", tmp_path / "other")
    assert "--from needs a budget" in refused.error


def test_with_images_a_sweep_meets_a_budget_between_its_points(tmp_path: Path) -> None:
    sweep, small = tmp_path / "sweep", tmp_path / "small"
    blockfit_command("sweep", "demo", *FEW, "--points", "90,50", "--cuts", "mlp", "-o", sweep)
    how = ("--from", sweep, "--images", "digits", "--limit", "48", "--params", "71.5%")
    made = blockfit_command("compress", *how, "--final", "16", "-o", small, "--json").json
    assert 0.71 <= made["parameters_after"] / made["parameters_before"] <= 0.715
    assert made["final"]["images"] == 16
    assert blockfit.load(small) is not None


def test_every_option_of_compress_reaches_the_call(
    calls: list[dict[str, Any]], tmp_path: Path
) -> None:
    given = (
        "--images", "digits", "--limit", "40", "--seed", "7", "--batch-size", "16",
        "--params", "62%", "--recipe", "default", "--map", "low-rank", "--rank", "4",
        "--repair", "mlp", "--ridge", "auto", "--select", "mse", "--contiguous",
        "--workers", "1", "--per-token-type", "--prefix-weight", "5", "--repair-ridge", "0.3",
        "--protect", "3, 6,9", "--blocks", "blocks", "--hold-out", "0.3", "--device", "cpu",
    )  # fmt: skip
    assert blockfit_command("compress", "demo", *given, "-o", tmp_path / "x").error == "seen"
    call = calls[0]
    assert (len(call["images"]), call["images"].seed, call["images"].batch_size) == (40, 7, 16)
    assert (call["params"], call["remove"], call["spans"]) == ("62%", None, None)
    assert call["images"].workers == 1
    recipe = call["recipe"]
    assert (recipe.name, recipe.select, recipe.contiguous) == ("default", "mse", True)
    assert (call["map"], call["rank"], call["per_token_type"]) == ("low-rank", 4, True)
    assert (call["ridge"], call["prefix_weight"]) == ("auto", 5.0)
    assert (call["repair"], call["repair_ridge"]) == ("mlp", 0.3)
    assert call["protect"] == (3, 6, 9)
    assert (call["blocks"], call["hold_out"], call["seed"]) == ("blocks", 0.3, 7)


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (("--span", "2:4", "--span", "9:11"), "spans", ["2:4", "9:11"]),
        (("--remove", "3"), "remove", 3),
        (("--flops", "0.7"), "flops", "0.7"),
        (("--latency", "70%"), "latency", "70%"),
        (("--max-kl", "0.1"), "max_kl", 0.1),
        (("--max-drop", "0.5"), "max_drop", 0.5),
        (("--remove", "3", "--plain"), "recipe", "plain"),
        (("--params", "80%", "--uniform"), "uniform", True),
        (("--params", "80%"), "uniform", False),
        (("--remove", "3"), "recipe", "default"),
    ],
)
def test_every_way_to_say_what_goes_reaches_the_call(
    calls: list[dict[str, Any]], tmp_path: Path, given: tuple[str, ...], name: str, value: Any
) -> None:
    done = blockfit_command("compress", "demo", *FEW, *given, "-o", tmp_path / "x")
    assert done.error == "seen"
    assert calls[0][name] == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "say what to remove"),
        (("--remove", "2", "--params", "0.5"), "give one budget"),
        (("--remove", "0"), "whole number"),
        (("--params", "much"), "cannot read 'much' as --params"),
        (("--span", "9-11"), "cannot read '9-11' as a span"),
        (("--span", "3:10", "--span", "8:12"), "overlap"),
        (("--span", "9:13"), "leaves the model"),
        (("--span", "9:11", "--protect", "10"), "block 10, which is protected"),
        (("--span", "9:11", "--map", "cubic"), "unknown map 'cubic'"),
        (("--span", "9:11", "--select", "mse"), "--select has no use with --span"),
        (("--span", "9:11", "--blocks", "nowhere"), "nowhere"),
        (("--remove", "2", "--recipe", "best"), "unknown recipe 'best'"),
        (("--remove", "2", "--plain", "--recipe", "paper"), "leave --plain or"),
        (("--remove", "2", "--protect", "three"), "cannot read --protect 'three'"),
        (("--remove", "2", "--ridge", "much"), "such as 1e-4, or auto"),
        (("--remove", "2", "--limit", "4"), "too few"),
        (("--remove", "2", "--device", "abacus"), "cannot use --device abacus"),
        (("--remove", "2", "--images", "no/such/folder"), "no/such/folder"),
    ],
)
def test_a_refused_compression_says_one_sentence_and_writes_nothing(
    tmp_path: Path, given: tuple[str, ...], message: str
) -> None:
    done = blockfit_command("compress", "demo", *FEW, *given, "-o", tmp_path / "x")
    assert message in done.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("compress", "--remove", "3", "-o", "x"), "give a model and --images"),
        (("compress", "demo", "--images", "digits"), "--output (-o) is missing"),
        (("compress", "demo", "--imags", "digits"), "--imags"),
        (("compress", "demo", "--remove", "two", "-o", "x"), "--remove takes a whole number"),
        (("shrink",), "there is no command shrink"),
        (("evaluate", "no/such/model", "--data", "digits:test"), "no/such/model"),
        (("evaluate", "demo", "--data", "digits", "--against", "no/model"), "no/model"),
        (("compress", "--from", "no/sweep", "--remove", "2", "-o", "x"), "no/sweep"),
        (("analyze", "demo", "--images", "digits", "--blocks", "nowhere"), "nowhere"),
    ],
)
def test_other_wrong_calls_say_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in blockfit_command(*command).error
    assert not list(tmp_path.iterdir())


def test_a_taken_folder_is_refused_before_the_long_work(
    small: tuple[Path, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    (tmp_path / "diary.txt").write_text("mine")
    for folder, message in ((tmp_path, "not saved by blockfit"), (small[0], "--overwrite")):
        for command in (("compress", "demo", *FEW, "--remove", "2"), ("demo",)):
            assert message in blockfit_command(*command, "-o", folder).error


def test_debug_shows_the_traceback_before_the_sentence(tmp_path: Path) -> None:
    done = blockfit_command("compress", "demo", "-o", tmp_path / "x", "--debug")
    assert done.code == 2
    assert done.err.startswith("Traceback")
    assert done.err.splitlines()[-1].startswith("blockfit: error: give a model and --images")


def test_an_unexpected_fault_exits_1_and_points_to_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(api, "load", fail)
    done = blockfit_command("analyze", "demo", *FEW, "--json")
    assert (done.code, done.out) == (1, "")
    expected = "unexpected RuntimeError: first line; add --debug to see where"
    assert done.err == f"blockfit: error: {expected}\n"


def test_an_interrupted_run_says_so_and_exits_130(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "compress", interrupt)
    done = blockfit_command("compress", "demo", *FEW, "--remove", "2", "-o", tmp_path / "x", "-q")
    assert (done.code, done.out) == (130, "")
    assert done.err == "blockfit: interrupted; nothing unfinished was saved\n"


def test_what_libraries_print_stays_off_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    real = api.load

    def chatty(*arguments: Any, **options: Any) -> Any:
        print("Loading weights: 100%")
        warnings.warn("a library is unhappy", stacklevel=1)
        return real(*arguments, **options)

    monkeypatch.setattr(api, "load", chatty)
    done = blockfit_command("analyze", "demo", *FEW, "--json")
    assert "similarity" in done.json
    assert "unhappy" not in done.err


def test_progress_shows_count_and_rate_on_a_terminal_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = {}
    for kind in (Terminal, io.StringIO):
        with contextlib.redirect_stderr(kind()) as screen:
            out = Output(as_json=True, quiet=False)
            with out.working():
                out.say("reading")
                out.count(3, 10)
        shown[kind] = screen.getvalue()
    assert "reading" in shown[Terminal]
    assert "3/10" in shown[Terminal]
    assert shown[io.StringIO] == ""


def test_amounts_are_short() -> None:
    shown = [amount(12), amount(602_058), amount(22_059_274), amount(4.41e7, "B"), amount(None)]
    assert shown == ["12", "602.06 k", "22.06 M", "44.10 MB", "–"]


def test_version_and_help() -> None:
    assert blockfit_command("--version").out == f"blockfit {blockfit.__version__}\n"
    for arguments in ((), ("--help",)):
        done = blockfit_command(*arguments)
        assert done.code == 0
        assert all(
            name in done.out for name in ("compress", "evaluate", "analyze", "sweep", "demo")
        )


def test_demo_in_a_process_of_its_own_prints_json_and_keeps_the_accuracy() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blockfit", "demo", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told = json.loads(done.stdout)
    made = told["compress"]
    assert 0.61 < made["parameters_after"] / made["parameters_before"] <= 0.62
    assert any("part" in cut for cut in made["plan"])
    before, after = (told["evaluate"][name]["top1"] for name in ("original", "compressed"))
    assert before >= 0.97
    assert after >= before - 0.01
    assert told["evaluate"]["compressed"]["size_bytes"] < told["evaluate"]["original"]["size_bytes"]


def test_a_refused_call_in_a_process_of_its_own_exits_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blockfit", "evaluate", "no/model", "--data", "digits", "--json"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("blockfit: error: ")
    assert len(done.stderr.splitlines()) == 1
