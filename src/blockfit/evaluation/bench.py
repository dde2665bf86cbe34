"""Original against compressed: time, throughput and memory, and how much of the promise is kept."""

from __future__ import annotations

import copy
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockfit.arguments import checked
from blockfit.errors import BlockfitError
from blockfit.evaluation.engines import Engine, compiling, noise_for, onnx_files, ready, unable
from blockfit.evaluation.shortfall import block_shares, remarks
from blockfit.evaluation.speed import ORIGINAL, Bench, Row, Setting, Settings
from blockfit.models.blocks import Blocks
from blockfit.models.cost import Timing, device_name, flops, in_turn, parameters, size_bytes
from blockfit.models.forward import Batch, first_images
from blockfit.progress import Say, silent
from blockfit.provenance import installed_versions


@checked
def bench(
    original: nn.Module,
    smalls: Mapping[str, nn.Module],
    settings: Settings | None = None,
    *,
    blocks: Mapping[str, Blocks] | None = None,
    say: Say = silent,
) -> Bench:
    """``blockfit.bench`` of modules by name: all of them in turn, A B A B, in every setting.

    The images are noise of the size that the original takes: values do not change the time. Where
    ``blocks`` are known, a shortfall is explained by the time that the removed blocks took.
    """
    settings = settings or Settings()
    if not smalls or ORIGINAL in smalls:
        raise BlockfitError(f"a compressed model cannot be named {ORIGINAL!r}; choose another name")
    models = {ORIGINAL: original, **smalls}
    inputs = noise_for(original, max(settings.batch_sizes))
    costs: dict[str, dict[str, int | None]] = {
        name: {
            "parameters": parameters(model),
            "flops": flops(model, inputs),
            "size_bytes": size_bytes(model),
        }
        for name, model in models.items()
    }
    rows: list[Row] = []
    skipped: dict[str, None] = {}
    files: dict[str, Path] = {}
    with _threads(settings.threads), tempfile.TemporaryDirectory() as folder:
        for setting in settings.each():
            why = unable(setting.engine, setting.dtype, settings.device)
            if why is not None:
                skipped[why] = None
                continue
            if setting.engine == "onnx" and not files:
                say("exporting to ONNX")
                files = onnx_files(models, inputs, Path(folder))
            say(f"timing {setting}")
            batch = first_images(inputs, setting.batch_size)
            rows += _rows(models, setting, settings, batch, costs, blocks or {}, files)
    explained = tuple(replace(row, remarks=remarks(row, rows)) for row in rows)
    return Bench(_machine(settings), settings.rounds, costs, explained, tuple(skipped))


def _rows(
    models: Mapping[str, nn.Module],
    setting: Setting,
    settings: Settings,
    batch: Batch,
    costs: Mapping[str, Mapping[str, int | None]],
    blocks: Mapping[str, Blocks],
    files: Mapping[str, Path],
) -> list[Row]:
    """One setting: every compressed model against the original."""
    dtype = getattr(torch, setting.dtype)
    copies = {name: copy.deepcopy(m).to(settings.device, dtype) for name, m in models.items()}
    with compiling(setting.engine), ExitStack() as stack:
        engines: dict[str, Engine] = {
            name: stack.enter_context(
                ready(
                    setting.engine,
                    model,
                    batch,
                    files[name] if setting.engine == "onnx" else None,
                )
            )
            for name, model in copies.items()
        }
        seconds = in_turn({name: one.run for name, one in engines.items()}, settings.rounds)
        memory = {name: one.memory() for name, one in engines.items()}
        shares = {
            name: block_shares(
                copies[ORIGINAL], copies[name], where, (engines[ORIGINAL].run, engines[name].run)
            )
            for name, where in blocks.items()
            if setting.engine == "eager"
        }
    device = device_name(torch.device(settings.device))
    times = {
        name: Timing(values, setting.batch_size, settings.threads, device)
        for name, values in seconds.items()
    }
    return [
        Row(
            name,
            setting,
            times[ORIGINAL],
            times[name],
            _promised(costs[ORIGINAL]["flops"], costs[name]["flops"]),
            (memory[ORIGINAL], memory[name]),
            shares.get(name),
        )
        for name in times
        if name != ORIGINAL
    ]


def _promised(before: int | None, after: int | None) -> float | None:
    return before / after if before and after else None


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _machine(settings: Settings) -> dict[str, Any]:
    return {
        "device": device_name(torch.device(settings.device)),
        "threads": settings.threads,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": installed_versions(),
    }
