"""Runs to report and their page, made once for all test processes, and a browser to look at it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import FEW, blockfit_command
from filelock import FileLock

PARTS = ("sweep", "analysis", "small", "evaluation.json")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, and ``page.html`` of the sweep with images side by side."""
    base = tmp_path_factory.getbasetemp()
    shared_by_processes = base.parent if base.name.startswith("popen-") else base
    root = shared_by_processes / "reports"
    with FileLock(f"{root}.lock"):
        if not (root / "done").exists():
            root.mkdir()
            _make(root)
            (root / "done").touch()
    return root


@pytest.fixture(scope="session")
def runs(made: Path) -> dict[str, Path]:
    """Folders and files by what they hold; the sweep's plans are cheap ones."""
    return {name: made / name for name in PARTS}


def _make(root: Path) -> None:
    cheap = ("--select", "last", "--repair", "none")
    spans = ("--span", "2:4", "--span", "9:11", "--repair", "mlp")
    told = None
    for command in (
        ("sweep", "demo", *FEW, *cheap, "-o", root / "sweep"),
        ("analyze", "demo", *FEW, "-o", root / "analysis"),
        ("compress", "demo", *FEW, *spans, "-o", root / "small"),
        ("evaluate", root / "small", "--against", "demo", "--data", "digits:test", "--limit", "50"),
        (
            "report", root / "sweep", root / "analysis", "--against", "demo",
            "--images", "digits:test", "--remove", "5", "-o", root / "page.html",
        ),
    ):  # fmt: skip
        done = blockfit_command(*command, "--json")
        told = done.json
        if command[0] == "evaluate":
            (root / "evaluation.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium that notes every request and every line of its console."""
    found = [shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome")]
    browser, driver = next(filter(None, found), None), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield window
    finally:
        window.quit()
