"""Several processes give what one gives, share the work, and end when one of them does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from families import one_thread  # noqa: F401
from processes import free_port, on_ranks, start
from small import PREFIX, small_blocks, small_images, small_pictures, small_vit

from blockfit import api
from blockfit import processes as ranks
from blockfit.commands import output as console
from blockfit.data.images import images as open_images
from blockfit.errors import BlockfitError
from blockfit.evaluation.analysis import analyze
from blockfit.evaluation.evaluate import evaluate
from blockfit.evaluation.protocols import extract
from blockfit.fit.plan import spans_up_to
from blockfit.search.calibrate import calibrate
from blockfit.search.session import Session
from blockfit.search.solve import Solution
from blockfit.search.sweep import sweep

SPANS = spans_up_to(6, 3)
COUNT = 61  # eight batches of 8, the last one of 5


def sums(tokens: int | None = 4) -> list[list[float]]:
    model = small_vit()
    moments = calibrate(
        model, small_blocks(model), small_images(COUNT), SPANS, tokens_per_image=tokens
    )
    problems = [moments.regression(span) for span in SPANS]
    flat = [torch.cat([p.xx.flatten(), p.xy.flatten(), p.sum_x, p.yy]) for p in problems]
    return [*(f.tolist() for f in flat), [float(n) for n in moments.tokens.values()]]


@pytest.mark.parametrize("count", [2, 3, 9])
def test_the_moments_of_several_processes_are_those_of_one(count: int, tmp_path: Path) -> None:
    """Nine processes: one of them has no batch at all."""
    alone = [torch.tensor(row, dtype=torch.float64) for row in sums()]
    assert alone[-1].tolist() == [COUNT * PREFIX, COUNT * 4]
    found = on_ranks(count, sums, folder=tmp_path)
    assert all(rows == found[0] for rows in found)
    for row, one in zip(found[0], alone, strict=True):
        shared = torch.tensor(row, dtype=torch.float64)
        assert (shared - one).norm() <= 1e-9 * one.norm()


def shares() -> list[str]:
    return [name for batch in small_images(COUNT).own().batches() for name in batch.names]


@pytest.mark.parametrize("count", [2, 3])
def test_every_image_is_on_one_process(count: int, tmp_path: Path) -> None:
    found = on_ranks(count, shares, folder=tmp_path)
    whole = [name for batch in small_images(COUNT).batches() for name in batch.names]
    assert sorted(name for names in found for name in names) == sorted(whole)
    assert max(map(len, found)) - min(map(len, found)) <= 8


def compressed(recipe: str, **budget: Any) -> dict[str, Any]:
    labels = (torch.arange(80) % 4).numpy()
    images = open_images((small_pictures(80), labels), batch_size=8)
    result = api.compress(small_vit(), images, recipe=recipe, **(budget or {"remove": 2}))
    weights = torch.cat([value.flatten() for value in result.model.state_dict().values()])
    return {
        "plan": result.plan.to_json(),
        "weights": weights.double().tolist(),
        "held_out": result.report["held_out"],
        "maps": result.report["maps"],
    }


@pytest.mark.parametrize(("count", "recipe"), [(2, "default"), (3, "plain"), (2, "paper")])
def test_the_plan_and_the_model_are_those_of_one_process(
    count: int, recipe: str, tmp_path: Path
) -> None:
    alone, found = compressed(recipe), on_ranks(count, compressed, recipe, folder=tmp_path)
    for one in found:
        assert one["plan"] == alone["plan"]
        assert one["weights"] == found[0]["weights"]
    close = {"rtol": 1e-4, "atol": 1e-5}  # float32 maps of sums that differ in their last bits
    torch.testing.assert_close(
        torch.tensor(found[0]["weights"]), torch.tensor(alone["weights"]), **close
    )
    assert found[0]["held_out"] == pytest.approx(alone["held_out"], rel=1e-4)


def narrowed() -> dict[str, Any]:
    return compressed("default", params=0.7)


@pytest.mark.parametrize("count", [2, 11])
def test_narrowed_models_are_those_of_one_process(count: int, tmp_path: Path) -> None:
    """Eleven processes: one of them has no batch at all."""
    alone, found = narrowed(), on_ranks(count, narrowed, folder=tmp_path)
    assert any("part" in cut for cut in alone["plan"])
    for one in found:
        assert one["plan"] == alone["plan"]
        assert one["weights"] == found[0]["weights"]
    torch.testing.assert_close(
        torch.tensor(found[0]["weights"]), torch.tensor(alone["weights"]), rtol=1e-3, atol=1e-4
    )


def latency() -> list[Any]:
    """With a clock by which cuts save three times as much on the second process."""

    def ratio(_: Session, solution: Solution) -> float:
        cuts = solution.plan.narrowings
        gone = sum(1 - c.kept / c.size for c in cuts) + len(solution.plan.removed_blocks)
        return 1 - gone * (0.02 if ranks.rank() == 0 else 0.06)

    with mock.patch.object(Session, "latency_ratio", ratio):
        return api.compress(small_vit(), small_images(40), latency=0.95).plan.to_json()


def test_a_latency_is_measured_once_and_believed_by_all(tmp_path: Path) -> None:
    found = on_ranks(2, latency, folder=tmp_path)
    assert found[0] == found[1] == latency()


def judged(features: bool = False) -> Any:
    labels = (torch.arange(45) % 4).numpy()
    data = open_images((small_pictures(45), labels), batch_size=8)
    model = small_vit()
    if features:
        found = extract(model, small_blocks(model), data)
        return [found.values.tolist(), found.labels.tolist()]
    worth = evaluate(small_vit(seed=1), data, against=model, measure=False).to_json()
    assert worth.pop("made")["date"]  # to the second
    return json.loads(json.dumps(worth))


@pytest.mark.parametrize("features", [False, True])
def test_an_evaluation_has_the_same_bits_on_any_number_of_processes(
    features: bool, tmp_path: Path
) -> None:
    alone = judged(features)
    for count in (2, 7):  # seven: one process has no batch
        assert on_ranks(count, judged, features, folder=tmp_path) == [alone] * count


def written(folder: str) -> list[str]:
    sweep(small_vit(4), small_images(24), Path(folder) / "sweep", recipe="plain")
    analyze(small_vit(4), small_images(24), Path(folder) / "analysis")
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.json"))


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert "sweep/sweep.json" in written(str(tmp_path / "one"))
    on_ranks(2, written, str(tmp_path / "two"), folder=tmp_path)
    one, two = (json.loads((tmp_path / n / "sweep/sweep.json").read_text()) for n in ("one", "two"))
    assert [p["plan"] for p in two["points"]] == [p["plan"] for p in one["points"]]
    names = [sorted(p.name for p in (tmp_path / n).rglob("*")) for n in ("one", "two")]
    assert names[0] == names[1]


def unreadable(bad: list[int]) -> list[Any]:
    pictures: list[Any] = [bytes(10) if i in bad else _png(i) for i in range(40)]
    images = open_images(pictures, preprocessing=_pixels, batch_size=4)
    own = images.own()
    seen = [place for batch in own.batches() for place in batch.places]
    images.exchange()
    return [seen, len(images), images.skipped]


def _png(level: int) -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("L", (4, 4), level).save(out, "png")
    return out.getvalue()


def _pixels(picture: Any) -> torch.Tensor:
    return torch.tensor(picture.getdata(), dtype=torch.float32).reshape(1, 4, 4 * 3)


def test_what_one_process_cannot_read_all_know(tmp_path: Path) -> None:
    found = on_ranks(2, unreadable, [3, 5, 17], folder=tmp_path)
    assert sorted(found[0][0] + found[1][0]) == [i for i in range(40) if i not in (3, 5, 17)]
    assert [one[1:] for one in found] == [[37, found[0][2]]] * 2
    started = start(2, unreadable, [0, 1, 5, 6, 20], folder=tmp_path)  # 3 and 2 of 40
    for one in started:
        one.process.join(60)
        assert "5 or more of 40 images" in one.error()


def endless() -> None:
    while True:
        ranks.gathered(0)
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_falls_silent_ends_the_others(
    how: signal.Signals, tmp_path: Path
) -> None:
    started = start(3, endless, folder=tmp_path, timeout_s=3.0)
    time.sleep(1.5)
    begun = time.monotonic()
    os.kill(started[1].process.pid or 0, how)
    try:
        for one in (started[0], started[2]):
            one.process.join(20)
            assert "another process of this run ended or cannot be reached" in one.error()
        assert time.monotonic() - begun < 10
    finally:
        os.kill(started[1].process.pid or 0, signal.SIGKILL)
        started[1].process.join(10)


def test_an_environment_that_contradicts_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(BlockfitError, match="start several processes with torchrun"),
        ranks.joined(),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with ranks.joined():
        assert (ranks.rank(), ranks.count()) == (0, 1)


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--nproc-per-node", "2", "--master-port"),
    "accelerate": (
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        "--main_process_port",
    ),
}


def launch(*arguments: str | Path, launcher: str = "torchrun") -> subprocess.Popen[str]:
    start = (sys.executable, "-m", *LAUNCHERS[launcher], str(free_port()), "-m", "blockfit")
    return subprocess.Popen(
        [*start, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_starts_two_processes_that_print_one_object(
    launcher: str, tmp_path: Path
) -> None:
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
    command = ("compress", "demo", "--images", "digits", "--limit", "40", "--map", "affine")
    arguments = (*command, "--span", "9:11", "-o", tmp_path / "small", "--json")
    good = launch(*arguments, launcher=launcher)
    _worker(good.pid, 1)
    out, err = good.communicate(timeout=200)
    assert good.returncode == 0, err
    assert json.loads(out)["removed_blocks"] == 2
    assert err.count("images: 40 of 1,198") == 0
    assert (tmp_path / "small" / "blockfit.json").exists()


def test_an_error_tells_which_process_it_is_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> int:
        raise BlockfitError("no")

    monkeypatch.setattr(console, "TURN_S", 0.1)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert console.guarded(refused, False) == 2
    assert capsys.readouterr().err == "blockfit: error: no\n"
    monkeypatch.setenv("RANK", "1")
    assert console.guarded(refused, False) == 2
    assert capsys.readouterr().err == "blockfit: process 1 of 0–1: error: no\n"


def test_torchrun_ends_in_seconds_when_a_process_is_killed(tmp_path: Path) -> None:
    run = launch("sweep", "demo", "--images", "digits", "-o", tmp_path / "sweep", "--json")
    try:
        worker = _worker(run.pid, 1)
        time.sleep(1)  # anywhere: loading, joining, calibrating
        os.kill(worker, signal.SIGKILL)
        begun = time.monotonic()
        out, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert time.monotonic() - begun < 30
    assert run.returncode != 0
    assert out == ""
    assert "SIGKILL" in err or "another process of" in err


def _worker(parent: int, rank: int) -> int:
    """The process id of torchrun's worker of that rank, once it has been started."""
    for _ in range(600):
        for folder in Path("/proc").iterdir():
            try:
                own = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if own == parent and f"\0RANK={rank}\0" in (folder / "environ").read_text():
                    return int(folder.name)
            except (OSError, ValueError, IndexError):
                continue
        time.sleep(0.1)
    raise AssertionError("torchrun started no worker")


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a cable: 10.77.0.1 and 10.77.0.2."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts need root and iproute2 (ip netns)")
    names = (f"blockfit-a{os.getpid()}", f"blockfit-b{os.getpid()}")
    made: list[str] = []
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
                pytest.skip("the kernel gives no network namespaces here")
            made.append(name)
        _ip("link", "add", "cable0", "netns", names[0], "type", "veth",
            "peer", "name", "cable0", "netns", names[1])  # fmt: skip
        for number, name in enumerate(names, 1):
            _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable0")
            _ip("-n", name, "link", "set", "cable0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def on_two_hosts() -> list[list[float]]:
    return [[float(os.stat("/proc/self/ns/net").st_ino)], *sums()]


def test_two_machines_give_what_one_gives(
    hosts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "cable0")
    started = start(2, on_two_hosts, folder=tmp_path, address="10.77.0.1", namespaces=hosts)
    for one in started:
        one.process.join(60)
    (host_a, *left), (host_b, *right) = (one.value() for one in started)
    assert host_a != host_b
    assert left == right
    for row, alone in zip(left, sums(), strict=True):
        assert row == pytest.approx(alone, rel=1e-9, abs=1e-9)


def test_a_cable_that_is_cut_ends_both_sides(
    hosts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "cable0")
    started = start(
        2, endless, folder=tmp_path, timeout_s=3.0, address="10.77.0.1", namespaces=hosts
    )
    time.sleep(1.5)
    _ip("-n", hosts[0], "link", "set", "cable0", "down")
    for one in started:
        one.process.join(30)
        assert "another process of this run ended or cannot be reached" in one.error()


def test_torchrun_joins_two_machines(
    hosts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own rendezvous; a namespace has no name of its own, so the addresses are said."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "cable0")
    started, place = [], f"10.77.0.1:{free_port()}"
    for number, name in enumerate(hosts, 1):
        command = (
            *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"),
            *("--rdzv-endpoint", place, "--rdzv-conf", f"is_host={number == 1}"),
            *("--local-addr", f"10.77.0.{number}"),
            *("-m", "blockfit", "compress", "demo", "--images", "digits", "--limit", "40"),
            *("--map", "affine", "--span", "9:11", "--json", "-o", str(tmp_path / f"{number}")),
        )
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [one.communicate(timeout=100)[0] for one in started]
    finally:
        for one in started:
            one.kill()
    assert [one.returncode for one in started] == [0, 0]
    printed = [json.loads(output)["removed_blocks"] if output else None for output in outputs]
    assert sorted(printed, key=str) == [2, None]
    assert len(list(tmp_path.glob("*/blockfit.json"))) == 1
