"""Runs to report: a sweep, an analysis, a small model and an evaluation, all of the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commandline import FEW, blockfit_command


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders and files by what they hold; the sweep's plans are cheap ones."""
    root = tmp_path_factory.mktemp("reports")
    some = ("--repair", "mlp")
    cheap = ("--select", "last", "--repair", "none")
    for command in (
        ("sweep", "demo", *FEW, *cheap, "-o", root / "sweep"),
        ("analyze", "demo", *FEW, "-o", root / "analysis"),
        ("compress", "demo", *FEW, "--span", "2:4", "--span", "9:11", *some, "-o", root / "small"),
    ):
        assert blockfit_command(*command, "--quiet").code == 0
    told = blockfit_command(
        "evaluate", root / "small", "--against", "demo", "--data", "digits:test",
        "--limit", "50", "--json",
    )  # fmt: skip
    (root / "evaluation.json").write_text(json.dumps(told.json))
    return {name: root / name for name in ("sweep", "analysis", "small", "evaluation.json")}
