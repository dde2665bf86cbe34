"""A run that is killed at any moment goes on, and ends as one that was never stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Done, blockfit_command
from commandline import small as small
from families import one_thread  # noqa: F401
from processes import on_ranks, start
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import small_blocks, small_images, small_pictures, small_vit

from blockfit import api
from blockfit.checkpoint import EVERY_NAME, Checkpoint, place_beside
from blockfit.data.images import images as open_images
from blockfit.errors import BlockfitError
from blockfit.evaluation.evaluate import evaluate
from blockfit.fit.moments import Moments
from blockfit.fit.plan import spans_up_to
from blockfit.search.calibrate import calibrate
from blockfit.search.span_search import Search

SPANS = spans_up_to(6, 3)


@pytest.fixture(autouse=True)
def _always_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EVERY_NAME, "0")


def flat(moments: Moments) -> list[float]:
    counts, tensors = moments.state()
    return [*map(float, counts), *(x for t in tensors.values() for x in t.tolist())]


def calibrated(folder: str | None) -> list[float]:
    model = small_vit()
    checkpoint = None if folder is None else Checkpoint(folder, {"test": 1})
    images = small_images(61, batch_size=2)
    found = calibrate(
        model, small_blocks(model), images, SPANS, tokens_per_image=4, checkpoint=checkpoint
    )
    return flat(found)


def compressed(folder: str | None) -> list[Any]:
    result = api.compress(small_vit(4), small_images(48), remove=2, resume=folder)
    weights = torch.cat([value.flatten() for value in result.model.state_dict().values()])
    return [result.plan.to_json(), weights.double().tolist(), result.report["held_out"]]


def evaluated(folder: str | None) -> Any:
    data = open_images((small_pictures(61), (torch.arange(61) % 4).numpy()), batch_size=2)
    checkpoint = None if folder is None else Checkpoint(folder, {"test": 1})
    worth = evaluate(
        small_vit(seed=1), data, against=small_vit(), measure=False, checkpoint=checkpoint
    )
    return settled(json.loads(json.dumps(worth.to_json())))


@pytest.mark.parametrize("run", [calibrated, compressed, evaluated])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    run: Any, tmp_path: Path
) -> None:
    unbroken = json.loads(json.dumps(run(None)))
    began = time.monotonic()
    assert on_ranks(1, run, None, folder=tmp_path) == [unbroken]
    takes = time.monotonic() - began
    chance, state = random.Random(0), str(tmp_path / "state")
    kept = 0
    for _ in range(4):
        (one,) = start(1, run, state, folder=tmp_path)
        time.sleep(takes * chance.uniform(0.1, 0.6))
        os.kill(one.process.pid or 0, signal.SIGKILL)
        one.process.join(30)
        kept += len(list(Path(state).glob("*.safetensors")))
    assert on_ranks(1, run, state, folder=tmp_path) == [unbroken]
    assert kept > 0 or list(Path(state).glob("*.safetensors"))


def test_a_pass_goes_on_behind_the_last_batch_that_was_saved(tmp_path: Path) -> None:
    model, images = small_vit(), small_images(40)
    blocks = small_blocks(model)
    whole = calibrate(model, blocks, images, SPANS)
    seen: list[int] = []

    def stops(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, blocks, images, SPANS, progress=stops, checkpoint=Checkpoint(tmp_path, {}))
    rest: list[int] = []
    again = calibrate(
        model, blocks, images, SPANS, checkpoint=Checkpoint(tmp_path, {}),
        progress=lambda done, total: rest.append(done),
    )  # fmt: skip
    assert (seen, rest) == ([8, 16, 24], [24, 32, 40])
    assert flat(again) == flat(whole)


def test_scores_and_decisions_are_not_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compressed(str(tmp_path / "state"))

    def never(*_: Any) -> None:
        raise AssertionError("worked again on what was saved")

    monkeypatch.setattr(Search, "_score", never)
    monkeypatch.setattr(Search, "_decide", never)
    assert compressed(str(tmp_path / "state")) == first


def both(folder: str) -> list[Any]:
    return [calibrated(folder), evaluated(folder)]


def test_several_processes_go_on_each_from_its_own_state(tmp_path: Path) -> None:
    state = tmp_path / "state"
    first = on_ranks(2, both, str(state), folder=tmp_path)
    assert len(list(state.glob("*-1.safetensors"))) == 2
    next(state.glob("moments-*-1.safetensors")).unlink()  # one had not saved yet
    assert on_ranks(2, both, str(state), folder=tmp_path) == first
    with pytest.raises(BlockfitError, match="another processes; repeat that run to go on, or del"):
        calibrated(str(state))


@pytest.mark.parametrize("damage", ["run", "text", "shape", "keys", "folder"])
def test_the_state_of_another_run_or_a_damaged_one_is_refused(damage: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    calibrated(str(state))
    (file,) = state.glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        told = stored.metadata()
    tensors = load_file(file)
    if damage == "run":
        with pytest.raises(BlockfitError, match="with another test; repeat that run to go on"):
            Checkpoint(state, {"test": 2}).load(file.stem.rpartition("-")[0])
        return
    if damage == "folder":
        with pytest.raises(BlockfitError, match="is a file"):
            Checkpoint(file, {})
        return
    if damage == "text":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "shape":
        save_file({k: v[:5].clone() for k, v in tensors.items()}, file, told)
    else:
        save_file(tensors, file, {**told, "extra": ""})
    with pytest.raises(BlockfitError, match=r"cannot be read|other spans|no progress of a run"):
        calibrated(str(state))


COMMANDS = {
    "sweep": "sweep demo --images digits --limit 48 --protect 0,1,2,3,4,5,6 --recipe plain "
    "--resume -o {}/sweep",
    "evaluate": "evaluate {}/small --against demo --data digits:test --limit 100 --batch-size 2 "
    "--resume",
    "reproduce": "reproduce --model demo --data digits --quick --limit 40 --test-limit 40 "
    "--samples 10,20 --seeds 1 --experiments similarity,samples,seeds -o {}/tables",
}
MEASURED = {
    *("seconds", "cpu_seconds", "latency_ms", "batch_ms", "images_per_second"),
    *("peak_memory_bytes", "speedup", "latency_part", "command", "made"),
}
"""What differs from run to run by its nature."""


def settled(value: Any) -> Any:
    """A JSON value without what was measured and without the folder's name."""
    if isinstance(value, dict):
        return {
            k: settled(v) for k, v in value.items() if k not in MEASURED | {"output", "command"}
        }
    return [settled(one) for one in value] if isinstance(value, list) else value


def commanded(name: str, folder: str) -> Any:
    """What a command printed, and every tensor and table that it wrote."""
    done = blockfit_command(*COMMANDS[name].format(folder).split(), "--json")
    files = sorted(p for end in ("safetensors", "csv") for p in Path(folder).glob(f"[st]*/*.{end}"))
    told = done.json
    if name == "reproduce":
        told.pop("data")  # of what this call read, not of what was there already
    return [settled(told), [[path.name, path.read_bytes().hex()] for path in files]]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_killed_again_and_again_ends_with_the_same_bits(
    name: str, tmp_path: Path, small: tuple[Path, Done]
) -> None:
    for part in ("whole", "killed"):
        (tmp_path / part).mkdir()
        shutil.copytree(small[0], tmp_path / part / "small")
    began = time.monotonic()
    (unbroken,) = on_ranks(1, commanded, name, str(tmp_path / "whole"), folder=tmp_path)
    takes = time.monotonic() - began
    chance, folder = random.Random(name), str(tmp_path / "killed")

    def kept() -> bool:
        """Whether there is progress, or a part of the result."""
        found = [*Path(folder).glob(".*/*.safetensors"), *Path(folder).glob("*/*.json")]
        return any(file.parent.name != "small" for file in found)

    for kill in range(4):
        (one,) = start(1, commanded, name, folder, folder=tmp_path)
        if kill < 3:
            time.sleep(takes * chance.uniform(0.1, 0.8))
        else:  # a quick machine has nothing to keep before its end
            while not kept() and one.process.is_alive():
                time.sleep(0.005)
        one.process.kill()
        one.process.join(30)
        if kill >= 2 and kept():
            break
    assert kept()
    assert on_ranks(1, commanded, name, folder, folder=tmp_path) == [unbroken]
    assert not list(Path(folder).glob(".*"))  # the progress is gone


def test_the_command_line_saves_beside_the_output_and_tidies_up(tmp_path: Path) -> None:
    """The state of another seed is refused; that of the same run is used and then deleted."""
    state = place_beside(tmp_path / "found")
    command = ("analyze", "demo", "--images", "digits", "--limit", "24", "--resume", "-q", "-o")
    assert blockfit_command(*command, tmp_path / "found").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["found"]
    assert not state.exists()
    done = blockfit_command(*command[:-2], "--json")
    assert done.error == "--resume saves beside the output; name one with -o"
