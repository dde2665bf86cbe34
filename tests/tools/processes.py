"""Runs on several processes: forks of this one that join each other as a launcher's would."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from blockfit import processes as ranks

CLONE_NEWNET = 0x40000000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Started:
    """A process of a run, and the file that it leaves its result in."""

    process: BaseProcess
    result: Path

    def value(self) -> Any:
        """What its function returned; fails with its traceback where it raised."""
        assert self.result.exists(), f"the process ended with {self.process.exitcode}"
        kind, value = json.loads(self.result.read_text())
        assert kind == "value", value
        return value

    def error(self) -> str:
        """The last line of what it raised."""
        kind, value = json.loads(self.result.read_text())
        assert kind == "error"
        return str(value).strip().splitlines()[-1]


def start(
    count: int,
    function: Callable[..., Any],
    *arguments: Any,
    folder: Path,
    timeout_s: float = 60.0,
    address: str = "127.0.0.1",
    namespaces: Sequence[str] = (),
) -> list[Started]:
    """Start ``function`` on ``count`` forks, each in its own network namespace where given."""
    port, context = free_port(), multiprocessing.get_context("fork")
    started = []
    for rank in range(count):
        result = folder / f"result-{rank}-{port}.json"
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "MASTER_ADDR": address, "MASTER_PORT": str(port),
        }  # fmt: skip
        namespace = namespaces[rank] if namespaces else None
        process = context.Process(
            target=_child, args=(environment, namespace, timeout_s, result, function, arguments)
        )
        process.start()
        started.append(Started(process, result))
    return started


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """What ``function`` returns on every process of a run, as JSON values."""
    started = start(count, function, *arguments, folder=folder)
    for one in started:
        one.process.join(120)
    return [one.value() for one in started]


def _child(
    environment: dict[str, str],
    namespace: str | None,
    timeout_s: float,
    result: Path,
    function: Callable[..., Any],
    arguments: Sequence[Any],
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    partial = result.with_suffix(".partial")
    try:
        if namespace is not None:
            _enter(namespace)
        with ranks.joined(timeout_s):
            text = json.dumps(["value", function(*arguments)])
    except BaseException:
        text = json.dumps(["error", traceback.format_exc()])
    partial.write_text(text)
    partial.rename(result)
    os._exit(0)  # no clean-up of what the parent process owns


def _enter(namespace: str) -> None:
    with open(f"/run/netns/{namespace}", encoding="utf-8") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
