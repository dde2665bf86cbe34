"""``blockfit doctor`` says what is there and how to get what is not."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import pytest
import torch
from commandline import blockfit_command

import blockfit
from blockfit.commands import doctor

ASKED = [
    "torch>=2.4",
    "nothing-of-the-kind[more]>=7,<8; extra == 'timm'",
    "numpy>=1.26; extra == 'timm'",
    "numpy>=1.26; (python_version >= '3.10') and extra == \"plots\"",
    "blockfit[timm,plots]; extra == 'all'",
]


def test_what_an_extra_lacks_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ASKED)
    told = blockfit_command("doctor", "--json").json
    extras = {extra["name"]: extra for extra in told["extras"]}
    assert extras.keys() == {"timm", "plots"}
    assert extras["timm"]["missing"] == ["nothing-of-the-kind"]
    assert extras["timm"]["command"] == 'pip install "blockfit[timm]"'
    assert extras["plots"]["missing"] == []
    packages = {package["name"]: package for package in told["packages"]}
    assert packages["torch"] == {
        "name": "torch", "wanted": ">=2.4", "installed": metadata.version("torch"),
    }  # fmt: skip
    assert packages["nothing-of-the-kind"]["installed"] is None
    assert packages["nothing-of-the-kind"]["wanted"] == ">=7,<8"
    shown = blockfit_command("doctor").out
    assert 'pip install "blockfit[timm]"' in shown
    assert 'pip install "blockfit[plots]"' not in shown


def test_the_packages_own_extras_are_known() -> None:
    extras = {extra.name for extra in doctor.examine().extras}
    assert {"timm", "transformers", "datasets", "plots"} <= extras
    assert "all" not in extras


def test_devices_caches_and_the_offline_switch_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "hub").mkdir()
    found = doctor.examine()
    assert found.devices[0].name == "cpu"
    assert len(found.devices) >= 1 + torch.cuda.device_count()
    hub, sets, _ = found.caches
    assert (hub.path, hub.exists) == (str(tmp_path / "hub"), True)
    assert (sets.path, sets.exists) == (str(tmp_path / "datasets"), False)
    assert found.offline
    assert found.python.startswith(platform.python_version())
    assert blockfit.__version__ in {package.installed for package in found.packages}
    assert "HF_HUB_OFFLINE is set" in blockfit_command("doctor").out
    assert blockfit_command("doctor", "--quiet").out == ""
