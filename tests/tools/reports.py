"""Runs to report and their page, made once for all test processes, and a browser to look at it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commandline import FEW, blockfit_command
from filelock import FileLock
from PIL import Image

from blockfit.evaluation.side_by_side import Prediction, Sample, SideBySide
from blockfit.reports.content import Experiment
from blockfit.reports.page import render
from blockfit.reports.runs import read_runs

PARTS = ("sweep", "analysis", "thin", "small", "evaluation.json")
"""``thin`` is the analysis with one table only, which is quickly drawn."""

EVIL = """</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'"><b>"""

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs; ``page.html`` of the sweep with images; ``hostile.html`` full of EVIL."""
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
        ("sweep", "demo", *FEW, *cheap, "--measure-latency", "1", "-o", root / "sweep"),
        ("analyze", "demo", *FEW, "-o", root / "analysis"),
        ("compress", "demo", *FEW, *spans, "-o", root / "small"),
        (
            "evaluate", root / "small", "--against", "demo", "--images", "digits:test",
            "--limit", "300",
        ),
        (
            "report", root / "sweep", root / "analysis", "--against", "demo",
            "--images", "digits:test", "--remove", "5", "-o", root / "page.html",
        ),
    ):  # fmt: skip
        done = blockfit_command(*command, "--json")
        told = done.json
        if command[0] == "evaluate":
            (root / "evaluation.json").write_text(json.dumps(told))
    shutil.copytree(root / "analysis", root / "thin")
    found = json.loads((root / "thin" / "analysis.json").read_text())
    found["similarity"]["metrics"] = {"mse": {"all": found["similarity"]["metrics"]["mse"]["all"]}}
    (root / "thin" / "analysis.json").write_text(json.dumps(found))
    (root / "hostile.html").write_text(_hostile(root), encoding="utf-8")
    shutil.copytree(root / "sweep", root / "few")  # a page of few plans is drawn in few seconds
    content = json.loads((root / "few" / "sweep.json").read_text())
    content["points"] = content["points"][:3]
    (root / "few" / "sweep.json").write_text(json.dumps(content))
    shutil.copytree(root / "few", root / "twin")
    several = [root / name for name in ("few", "small", "twin", "evaluation.json")]
    (root / "several.html").write_text(render(read_runs(several)), encoding="utf-8")


def _hostile(root: Path) -> str:
    """A page of copies of two runs with a script in every text that is free to choose."""
    small, analysis = root / "hostile", root / f"hostile<b>{'x' * 20}"
    shutil.copytree(root / "small", small)
    shutil.copytree(root / "thin", analysis)
    saved: Any = json.loads((small / "blockfit.json").read_text())
    saved["base"] |= {"name": EVIL, "licence": EVIL}
    saved["versions"] = {EVIL: EVIL}
    saved["report"] |= {"warnings": [EVIL], "budget": EVIL, "sweep": EVIL}
    saved["report"]["calibration"] |= {"source": EVIL, "skipped": [EVIL]}
    saved["report"]["recipe"]["name"] = EVIL
    (small / "blockfit.json").write_text(json.dumps(saved))
    found: Any = json.loads((analysis / "analysis.json").read_text())
    found |= {"model": EVIL, "warnings": [EVIL]}
    found["calibration"]["source"] = EVIL
    (analysis / "analysis.json").write_text(json.dumps(found))
    content = read_runs([small, analysis])
    assert content.compressed is not None
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    png, said = file.getvalue(), Prediction((EVIL, EVIL), (0.9, 0.1))
    sample = Sample(EVIL, png, EVIL, said, said, 0.5, (png, png))
    errors = {"patch": (0.0,) * 13}
    side = SideBySide(content.compressed.plan, 1, EVIL, 0, 0, (sample,), errors, errors, 0.5)
    experiment = Experiment(EVIL, EVIL, (EVIL,), ((EVIL,),))
    return render(replace(content, side=side, experiments=(experiment,)))


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
    window.command_executor.client_config.timeout = 250  # a busy machine is slow, not broken
    try:
        yield window
    finally:
        window.quit()
