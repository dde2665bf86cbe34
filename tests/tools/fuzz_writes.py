"""Random targets for every writer, in a small world of folders and files that must stay.

A case is refused with one sentence and has changed nothing, or the target alone is new. What its
check lets through is written. Nothing that blockfit did not write is ever gone.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stored import PLAN, small_model

from blockfit.checkpoint import Checkpoint
from blockfit.errors import BlockfitError
from blockfit.evaluation import analysis
from blockfit.evaluation.paper import study
from blockfit.files import (
    FileForm,
    FolderForm,
    check_file,
    check_target,
    kept_file,
    new_file,
    new_folder,
    resolved,
)
from blockfit.formats import exported_folder, onnx_file, program
from blockfit.formats import folder as store
from blockfit.reports import bench_page, page, plots
from blockfit.search.sweep_file import check_sweep_folder, write_point_file

FOLDERS: dict[str, FolderForm] = {
    "saved": store.FORM,
    "exported": exported_folder.FORM,
    "analysis": analysis.FORM,
}
FILES: dict[str, FileForm] = {
    "onnx": onnx_file.FORM,
    "pt2": program.FORM,
    "report": page.FORM,
    "markdown": bench_page.FORMS[".md"],
    "picture": plots.FORMS["png"],
    "drawing": plots.FORMS["svg"],
}
NAMES = (
    *("photos", "notes.txt", "empty", "saved", "exported", "analysis", "mixed", "nested", "new"),
    *("checkpoint", "to-photos", "to-notes", "to-saved", "to-nothing", "loop", "bare.onnx"),
    *("own.onnx", "own.html", "empty.md", "ümläut", "日本語 フォルダ", "a b", "-o", "nothere"),
    *("deep", "..", ".", "...", "~", "~nobody-of-this-name", "", "/", "small.onnx", "r.html"),
    *("b.md", "p.png", "p.svg", "m.pt2", "x" * 255, "x" * 256, "😀" * 63, "line\nbreak", "nul\0"),
    *("\udcff", "*", "$HOME", "model.safetensors", "blockfit.json", "README.md", "pipe", "sweep"),
    *("removed-01.safetensors", "er", "up"),
)  # fmt: skip
"""What paths are put together from: what the world holds, what it does not, and what no path is."""


Outcome = Callable[..., tuple[str, str]]
"""Runs something and tells ``ok``, ``refused`` or ``fault``, and what was said."""

DEEP = "1/2/3/4/5/6/7/world"
"""Where the world lies: so deep that no target leads out of the folder of the case."""


@dataclass(frozen=True)
class Written:
    """What one writer did.

    Args:
        target: the resolved path, where it went through.
        grows: the target is a folder to which files are added.
    """

    target: Path
    grows: bool = False


def world(root: Path) -> None:
    """Fill an empty folder with a user's files, blockfit's own, and links to both."""
    for name in ("photos", "empty", "home", "ümläut", "nested", "deep/er"):
        (root / name).mkdir(parents=True)
    for name in ("photos/cat.jpg", "photos/p.png", "notes.txt", "home/mine.txt", "ümläut/ö.txt"):
        (root / name).write_text(f"mine: {name}")
    (root / "photos" / "removed-01.safetensors").write_text("mine")
    (root / "bare.onnx").write_text("mine")
    (root / "bare.onnx.data").write_text("mine")
    (root / "own.onnx.data").write_text("mine, although it lies beside")
    (root / "empty.md").write_text("")
    for kind, form in FOLDERS.items():
        _folder(root / kind, form)
    _folder(root / "mixed", store.FORM)
    (root / "mixed" / "diary.txt").write_text("mine")
    (root / "nested" / "config.json").mkdir()
    (root / "nested" / "config.json" / "mine.txt").write_text("mine")
    (root / "nested" / store.MARK).write_text(store.FORM.sign)
    (root / "checkpoint").mkdir()  # as transformers writes it
    for name in ("config.json", "model.safetensors", "README.md"):
        (root / "checkpoint" / name).write_text("mine")
    (root / "own.onnx").write_text(f"… {onnx_file.FORM.sign} …")
    (root / "own.html").write_text(page.MARK)
    (root / "sweep").mkdir()
    (root / "sweep" / "sweep.json").write_text('{"mine": true}')
    for name, to in (
        *(("to-photos", "photos"), ("to-notes", "notes.txt"), ("to-saved", "saved")),
        *(("to-nothing", "nowhere/at/all"), ("loop", "loop"), ("deep/er/up", "../../photos")),
    ):
        (root / name).symlink_to(to)
    os.mkfifo(root / "pipe")


def _folder(folder: Path, form: FolderForm) -> None:
    folder.mkdir()
    for name in form.files[:2]:
        (folder / name).write_text("blockfit's")
    (folder / form.mark).write_text(form.sign)


def seen(root: Path) -> dict[str, tuple[Any, ...]]:
    """Every path below a folder: what it is, its mode, what it holds."""
    found: dict[str, tuple[Any, ...]] = {}
    for at, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(at, name)
            state = os.lstat(path)
            held: Any = None
            if stat.S_ISLNK(state.st_mode):
                held = os.readlink(path)
            elif stat.S_ISREG(state.st_mode):
                with open(path, "rb") as file:
                    held = file.read()
            found[os.path.relpath(path, root)] = (state.st_mode, held)
    return found


def own(name: str) -> bool:
    """Whether a path of the world is a file of blockfit's, which may be replaced when asked."""
    name = name.removeprefix(f"{DEEP}/")
    return name.split("/")[0] in (*FOLDERS, "empty") or name in ("own.onnx", "own.html", "empty.md")


@contextmanager
def _promised() -> Iterator[None]:
    """What the check before it has let through must not be refused."""
    try:
        yield
    except BlockfitError as error:
        raise AssertionError(f"the check let through what is refused: {error}") from error


def _fill_folder(form: FolderForm, target: str, overwrite: bool) -> Written:
    where = check_target(target, form, overwrite)
    with _promised(), new_folder(target, form, overwrite) as partial:
        for name in form.files:
            (partial / name).write_text(f"new {form.sign}")
    return Written(where)


def _fill_file(form: FileForm, target: str, overwrite: bool) -> Written:
    where = check_file(target, form, overwrite)
    with _promised(), new_file(target, form, overwrite) as partial:
        partial.write_text(f"new {form.sign}")
    return Written(where)


@functools.cache
def _model() -> tuple[Any, ...]:
    torch.manual_seed(0)
    return small_model("plain")


def _save(target: str, overwrite: bool) -> Written:
    store.check_folder(target, overwrite)
    model, blocks, source, _ = _model()
    with _promised():
        store.save(target, model, blocks, PLAN, source=source, report={}, overwrite=overwrite)
    return Written(resolved(target))


def _sweep(target: str, overwrite: bool) -> Written:
    where = check_sweep_folder(target)
    with _promised():
        write_point_file(where, 1, {"weights.x": torch.zeros(1)})
    return Written(where, grows=True)


def _study(target: str, overwrite: bool) -> Written:
    study.earlier(Path(target))
    with _promised(), kept_file(resolved(target) / study.INDEX) as partial:
        partial.write_text("new")
    return Written(resolved(target), grows=True)


def _progress(target: str, overwrite: bool) -> Written:
    checkpoint = Checkpoint(target, {})
    with _promised():
        checkpoint.save("moments", 1)
    if overwrite:
        checkpoint.forget()
    return Written(checkpoint.folder, grows=True)


def _pictures(target: str, overwrite: bool) -> Written:
    plot = plots.Plot("p", "", "", lambda palette: None)
    plot.check(Path(target))
    for kind, form in plots.FORMS.items():
        _fill_file(form, f"{target}/p.{kind}", True)
    return Written(resolved(target), grows=True)


WRITERS: dict[str, Callable[[str, bool], Written]] = {
    **{name: functools.partial(_fill_folder, form) for name, form in FOLDERS.items()},
    **{name: functools.partial(_fill_file, form) for name, form in FILES.items()},
    "save": _save,
    "sweep": _sweep,
    "study": _study,
    "progress": _progress,
    "pictures": _pictures,
}


def random_target(chance: random.Random, root: Path) -> str:
    """A path as somebody might type it."""
    parts = [chance.choice(NAMES) for _ in range(chance.choice((1, 1, 2, 2, 3, 4)))]
    if chance.random() < 0.25:
        parts.insert(0, str(root))
    if chance.random() < 0.2:
        parts[-1:] = ["nothere", "..", parts[-1]]
    if chance.random() < 0.2:
        parts.append(f"small{chance.choice(('.onnx', '.pt2', '.md', '.png', '.svg', '.html', ''))}")
    path = "/".join(parts) + chance.choice(("", "", "", "/", "/."))
    return f"{root}{path}" if path.startswith("/") and not path.startswith(str(root)) else path


@contextmanager
def _inside(root: Path) -> Iterator[None]:
    before, home = Path.cwd(), os.environ.get("HOME")
    os.chdir(root)
    os.environ["HOME"] = str(root / "home")
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.pop("HOME") if home is None else os.environ.update(HOME=home)


def write_case(
    number: int, seed: int, outcome: Outcome, root: Path, known: dict[str, Any] | None = None
) -> tuple[str, str, str]:
    """One target and one writer: what came of it, which they were, and what was said.

    Args:
        number: of the case.
        seed: of all cases.
        outcome: as ``fuzz.outcome``.
        root: an empty folder, or the world of the case before.
        known: what ``seen`` says of it, kept from case to case; filled where empty.
    """
    known = {} if known is None else known
    chance = random.Random(f"write {seed} {number}")
    place = root / DEEP
    if not place.exists():
        place.mkdir(parents=True)
        world(place)
        known.clear()
    if not known:
        known.update(seen(root))
    name = chance.choice([*WRITERS])
    target, overwrite = random_target(chance, place), chance.random() < 0.6
    before = known
    done: list[Written] = []

    def run() -> None:
        with _inside(place):
            done.append(WRITERS[name](target, overwrite))

    result, said = outcome(run)
    after = seen(root)
    if result != "fault" and (why := _wrong(before, after, root, done, overwrite)):
        result, said = "fault", f"{why}; {said}"
    if before != after:
        for path in root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return result, f"{name} to {target!r}, overwrite={overwrite}", said


def _wrong(
    before: dict[str, Any], after: dict[str, Any], root: Path, done: list[Written], overwrite: bool
) -> str | None:
    """What a case did that it must not have done."""
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    if any(".blockfit-partial" in path for path in after):
        return "something unfinished was left"
    if not done:
        return f"refused, but changed {sorted(changed)[:3]}" if changed else None
    lost = [path for path in changed if path in before and not (own(path) and overwrite)]
    if lost:
        return f"a foreign file was changed or is gone: {lost[:3]}"
    target = os.path.relpath(done[0].target, root)
    for path in changed:
        inside = path == target or path.startswith(target + "/")
        around = target.startswith(path + "/") and path not in before
        if not inside and not around:
            return f"changed {path}, which is not the target {target}"
    return None


def run_writes(count: int, seed: int, outcome: Outcome, first: int = 0) -> Counter[str]:
    """Run random targets; the faults are printed with their number."""
    tally: Counter[str] = Counter()
    known: dict[str, Any] = {}
    fast = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108
    with tempfile.TemporaryDirectory(dir=fast) as root:
        for number in range(first, first + count):
            result, what, said = write_case(number, seed, outcome, Path(root), known)
            tally[result] += 1
            if result == "fault":
                print(f"target {number}, seed {seed}: {what}\n{said}\n", file=sys.stderr)
    return tally
