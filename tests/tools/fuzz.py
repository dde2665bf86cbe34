"""Damaged folders and random plans against everything that reads them, random targets against
everything that writes.

    python tests/tools/fuzz.py --folders 10000 --plans 10000 --targets 20000 --seed 0

Whatever is read either works or is refused with one sentence. No other exception, no case above
``PATIENCE`` seconds, no file written or changed anywhere but in the case's own empty folder, no
network, no other program, nothing unpickled. ``test_fuzz.py`` runs a few of each kind.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from fuzz_targets import TARGETS, plan_case
from fuzz_writes import run_writes
from mutation import damaged_folder

from blockfit.errors import BlockfitError

PATIENCE = 60
"""Seconds that one case may take."""

MOST_MEMORY = 12 << 30
"""Bytes that the process may map; a number in a file must not make it take more."""

LONGEST_SENTENCE = 1500


@dataclass
class Watch:
    """What Python's audit events tell of the process while a case runs."""

    allowed: Path | None = None
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event == "open" and isinstance(arguments[0], str | bytes) and _writes(arguments):
            path = Path(arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0])
            if str(path) != "/dev/null" and self.allowed not in path.absolute().parents:
                self.seen.append(f"{event} {path}")
        elif event in EVENTS:
            self.seen.append(f"{event} {arguments!r:.100}")


EVENTS = frozenset(
    (
        *("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec"),
        *("os.posix_spawn", "os.fork", "pickle.find_class", "os.remove", "os.rename", "os.mkdir"),
        *("os.rmdir", "os.symlink", "os.link", "os.chmod", "shutil.rmtree", "ctypes.dlopen"),
    )
)


def _writes(arguments: tuple[Any, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    return (isinstance(mode, str) and any(c in mode for c in "wax+")) or bool(flags & 0o1103)


class TooSlow(BaseException):
    """A case took longer than ``PATIENCE``."""


@contextmanager
def patience(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tree(folder: Path) -> dict[str, Any]:
    """Everything below a folder, by name, with its kind, size and time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        found[str(path.relative_to(folder))] = (state.st_mode, state.st_size, state.st_mtime_ns)
    return found


_WATCH = Watch()
_ADDED: list[bool] = []


@contextmanager
def watched(allowed: Path) -> Iterator[list[str]]:
    """The list of what happened that must not, filled when the ``with`` ends."""
    if not _ADDED:
        sys.addaudithook(_WATCH)  # for good: hooks cannot be removed
        _ADDED.append(True)
    _WATCH.seen.clear()
    seen: list[str] = []
    _WATCH.allowed = allowed
    try:
        yield seen
    finally:
        _WATCH.allowed = None
        seen += _WATCH.seen


def outcome(read: Any, *arguments: Any) -> tuple[str, str]:
    """``ok``, ``refused`` or ``fault``, and what was said."""
    try:
        with patience(PATIENCE):
            read(*arguments)
    except BlockfitError as error:
        text = str(error)
        if "\n" in text or not 10 < len(text) <= LONGEST_SENTENCE:
            return "fault", f"no one sentence: {text[:300]!r} ({len(text)} characters)"
        return "refused", text
    except TooSlow:
        return "fault", f"more than {PATIENCE} s\n{traceback.format_exc()}"
    except BaseException:
        return "fault", traceback.format_exc()
    return "ok", ""


def folder_case(number: int, seed: int, root: Path, names: list[str]) -> tuple[str, str, str]:
    """One damaged folder: which target, what came of it, and what was said."""
    chance = random.Random(f"{seed} {number}")
    target = TARGETS[chance.choice(names)]
    place = root / "case"
    place.mkdir()
    (place / "target").mkdir()
    damage = damaged_folder(place / "folder", target.files(), chance)
    before, linspace = tree(place), torch.linspace
    with watched(place / "target") as seen:
        result, said = outcome(target.read, place / "folder", place / "target")
    shutil.rmtree(place / "target")
    (place / "target").mkdir()
    after = tree(place)
    before.pop("target")
    after.pop("target")
    if seen:
        result, said = "fault", f"side effects: {seen[:3]}; {said}"
    if before != after or torch.linspace is not linspace:
        result, said = "fault", f"something outside the target changed; {said}"
    shutil.rmtree(place)
    return result, f"{target.name}: {damage}", said


def run_folders(count: int, seed: int, names: list[str] | None = None, first: int = 0) -> Counter:
    """Run damaged folders; the faults are printed with their number."""
    tally: Counter[str] = Counter()
    for target in (names or TARGETS) if count else ():
        TARGETS[target].files()  # made before anything is watched
    with tempfile.TemporaryDirectory() as root:
        for number in range(first, first + count):
            result, what, said = folder_case(number, seed, Path(root), names or list(TARGETS))
            tally[result] += 1
            if result == "fault":
                print(f"folder {number}, seed {seed}: {what}\n{said}\n", file=sys.stderr)
    return tally


def run_plans(count: int, seed: int, first: int = 0) -> Counter:
    """Run random plans; the faults are printed with their number."""
    tally: Counter[str] = Counter()
    for number in range(first, first + count):
        result, said = outcome(plan_case, random.Random(f"plan {seed} {number}"))
        tally[result] += 1
        if result == "fault":
            print(f"plan {number}, seed {seed}\n{said}\n", file=sys.stderr)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folders", type=int, default=10_000)
    parser.add_argument("--plans", type=int, default=10_000)
    parser.add_argument("--targets", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    faults = 0
    for what, count, run in (
        ("folders", given.folders, lambda n: run_folders(n, given.seed, given.target, given.first)),
        ("plans", given.plans, lambda n: run_plans(n, given.seed, given.first)),
        ("targets", given.targets, lambda n: run_writes(n, given.seed, outcome, given.first)),
    ):
        started = time.perf_counter()
        tally = run(count)
        faults += tally["fault"]
        print(
            f"{count} {what}, seed {given.seed}: {tally['refused']} refused with one sentence, "
            f"{tally['ok']} done, {tally['fault']} faults, {time.perf_counter() - started:.0f} s"
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
