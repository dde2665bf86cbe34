"""``blockfit doctor``: what is installed, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from blockfit.commands.command import command
from blockfit.commands.output import Output
from blockfit.provenance import installed

NAME = "blockfit"

_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?\s*([^;]*)")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


@command("Start", "blockfit doctor")
def doctor(out: Output) -> None:
    """Show versions, devices, caches and what is missing."""
    found = examine()
    out.line(f"Python {found.python} on {found.platform}")
    out.table(
        ("package", "installed", "asked for"),
        [(p.name, p.installed or "–", p.wanted or "–") for p in found.packages],
    )
    out.table(
        ("extra", "missing", "command"),
        [
            (e.name, ", ".join(e.missing) or "nothing", e.command if e.missing else "")
            for e in found.extras
        ],
    )
    out.table(("device", "what it is"), [(d.name, d.description) for d in found.devices])
    out.table(
        ("cache", "folder", "there"),
        [(c.what, c.path, "yes" if c.exists else "not yet") for c in found.caches],
    )
    hub = "only cached files are used (HF_HUB_OFFLINE is set)" if found.offline else "may be asked"
    out.line(f"torch computes with {found.threads} threads; the Hub {hub}")
    out.result(asdict(found))


@dataclass(frozen=True)
class Package:
    """A package that blockfit asks for: its name, what is asked, what is installed."""

    name: str
    wanted: str
    installed: str | None


@dataclass(frozen=True)
class Extra:
    """An extra of blockfit, what it lacks, and what installs it."""

    name: str
    missing: tuple[str, ...]
    command: str


@dataclass(frozen=True)
class Device:
    """What torch can compute on."""

    name: str
    description: str


@dataclass(frozen=True)
class Cache:
    """Where files that were once fetched lie."""

    what: str
    path: str
    exists: bool


@dataclass(frozen=True)
class Findings:
    """What ``examine`` found."""

    python: str
    platform: str
    packages: tuple[Package, ...]
    extras: tuple[Extra, ...]
    devices: tuple[Device, ...]
    threads: int
    caches: tuple[Cache, ...]
    offline: bool


def examine() -> Findings:
    """Look at this machine; nothing is imported but torch, nothing fetched, nothing changed."""
    import torch

    needs = requirements()
    names = {package for packages in needs.values() for package, _ in packages}
    wanted = {name: text for packages in needs.values() for name, text in packages}
    packages = [Package(NAME, "", installed(NAME))]
    packages += [Package(n, wanted[n], installed(n)) for n in sorted(names, key=str.lower)]
    extras = []
    for extra, own in needs.items():
        missing = tuple(name for name, _ in own if installed(name) is None)
        if extra:
            extras.append(Extra(extra, missing, f'pip install "{NAME}[{extra}]"'))
    return Findings(
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        packages=tuple(packages),
        extras=tuple(extras),
        devices=devices(),
        threads=torch.get_num_threads(),
        caches=caches(),
        offline=os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
    )


def requirements() -> dict[str, list[tuple[str, str]]]:
    """Extra → packages with the versions asked for, from the package's own metadata.

    ``""`` holds what is always needed. Extras that only collect others are left out.
    """
    try:
        lines = metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:  # run from a folder, not installed
        lines = []
    found: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        parsed = _REQUIREMENT.match(line)
        marker = _EXTRA.search(line)
        if parsed is None or parsed[1].lower() == NAME:
            continue
        found.setdefault(marker[1] if marker else "", []).append((parsed[1], parsed[3].strip()))
    return found


def devices() -> tuple[Device, ...]:
    """The CPU and whatever accelerator torch sees."""
    import torch

    out = [Device("cpu", f"{os.cpu_count()} cores, {platform.machine()}")]
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        out.append(Device(f"cuda:{number}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB"))
    if torch.backends.mps.is_available():
        out.append(Device("mps", "Apple GPU"))
    return tuple(out)


def caches() -> tuple[Cache, ...]:
    """Where transformers, timm, torchvision and datasets keep what they fetched."""
    import torch

    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")).expanduser()
    places = {
        "models of the Hub (transformers, timm)": os.environ.get("HF_HUB_CACHE", home / "hub"),
        "data sets of the Hub": os.environ.get("HF_DATASETS_CACHE", home / "datasets"),
        "torchvision's weights": Path(torch.hub.get_dir()) / "checkpoints",
    }
    return tuple(Cache(what, str(path), Path(path).is_dir()) for what, path in places.items())
