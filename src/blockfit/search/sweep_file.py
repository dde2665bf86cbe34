"""The files of a sweep's folder: ``sweep.json``, and the tensors of every plan."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from blockfit.checkpoint import same
from blockfit.errors import BlockfitError
from blockfit.fields import LEFT_OUT, read, written
from blockfit.files import check_kept, is_unfinished, kept_file, write_text
from blockfit.models.blocks import Blocks
from blockfit.models.source import Source
from blockfit.search.report import Entry, Original
from blockfit.untrusted import open_tensors, read_json

MARK = "sweep.json"
FORMAT = 1
POINTS = ("removed-*.safetensors", "params-*.safetensors")


@dataclass(frozen=True)
class Run:
    """What the plans of a sweep depend on.

    Args:
        recipe: as ``fields.written`` gives it.
        hold_out: part of the images that chose the plans.
        model: fingerprint of the original.
        calibration: what the images are.
        apart: how many images were set apart, for budgets of loss and for the final figures.
        whole: blocks that nothing may cut; ``None`` where nothing could be narrowed.
        multiple_of: widths of MLPs are multiples of it.
        shares: parts of the parameters that were asked for.
    """

    recipe: dict[str, Any]
    protect: tuple[int, ...]
    hold_out: float
    seed: int
    model: str
    calibration: dict[str, Any]
    apart: tuple[int, ...] | None = field(default=None, metadata=LEFT_OUT)
    whole: tuple[int, ...] | None = field(default=None, metadata=LEFT_OUT)
    multiple_of: int | None = field(default=None, metadata=LEFT_OUT)
    shares: tuple[float, ...] | None = field(default=None, metadata=LEFT_OUT)

    def differences(self, other: Run) -> list[str]:
        """The names of what another run has otherwise."""
        names = [each.name for each in fields(self)]
        different = [n for n in names if not same(getattr(self, n), getattr(other, n))]
        return [{"shares": "list of points"}.get(name, name) for name in different]


@dataclass(frozen=True)
class SweepFile:
    """The content of ``sweep.json``.

    Args:
        run: what the plans depend on.
        points: the plans, in the order in which they were found.
        search: what the search found so far, to go on from.
        format: ``FORMAT``.
        command: the command line that was run last on it; ``None`` where Python did.
        made: when, on what and with which versions it was begun.

    Raises:
        BlockfitError: where the plans cannot be of this model, or two are of one size.
    """

    run: Run
    source: Source
    blocks: Blocks
    original: Original
    points: tuple[Entry, ...]
    search: dict[str, Any]
    format: int = FORMAT
    command: str | None = field(default=None, metadata=LEFT_OUT)
    made: dict[str, Any] | None = field(default=None, metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        for number, entry in enumerate(self.points):
            where, name = f"points[{number}]", entry.file
            entry.plan.check(self.blocks.depth)
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise BlockfitError(f"{where}: file: {name!r} is no file of a sweep")
        if len({entry.size for entry in self.points}) < len(self.points):
            raise BlockfitError("points: a size appears twice")


def read_sweep_file(path: Path) -> SweepFile:
    """The content of a sweep's JSON file.

    Raises:
        BlockfitError: names the file and the key.
    """
    data = read_json(path, exact=False)
    version = data.get("format") if isinstance(data, dict) else None
    if version is None:
        raise BlockfitError(f"{path} is no sweep of this version; run the sweep again")
    if version != FORMAT:
        raise BlockfitError(f"{path} has format {version!r}; this version reads {FORMAT}")
    try:
        return read(SweepFile, data, str(path))
    except BlockfitError as error:
        raise BlockfitError(f"{error}; run the sweep again") from error


def check_sweep_folder(folder: str | Path) -> Path:
    """Refuse now a folder that holds anything but a sweep, or cannot be written.

    Returns:
        The resolved path, which is to be written.
    """
    target = check_kept(folder)
    if not target.exists():
        return target
    if not (target / MARK).is_file():
        if any(not is_unfinished(entry.name) for entry in target.iterdir()):
            raise BlockfitError(f"{folder} is not empty and holds no sweep; choose a new folder")
        return target
    data = read_sweep_file(target / MARK)
    known = {entry.file for entry in data.points}
    for path in (one for pattern in POINTS for one in target.glob(pattern)):
        if path.name not in known and not _is_point(path):
            raise BlockfitError(
                f"{path} is no plan of the sweep and stands where one is written; move it away or "
                "choose a new folder"
            )
    return target


def write_point_file(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> str:
    """Write the tensors of one point; the name of its file.

    Raises:
        BlockfitError: where it cannot be written.
    """
    path = folder / f"{stem}.safetensors"
    if path.exists() and not _is_point(path):
        raise BlockfitError(f"{path} is no plan of the sweep; move it away and run the sweep again")
    with kept_file(path) as partial:
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, partial)
    return path.name


def _is_point(path: Path) -> bool:
    """Whether a file holds what ``write_point_file`` writes: weights and maps, nothing else."""
    try:
        with open_tensors(path) as stored:
            return all(key.startswith(("weights.", "maps.")) for key in stored.keys())  # noqa: SIM118
    except BlockfitError:
        return False


def write_sweep_file(path: Path, content: SweepFile) -> None:
    """Write ``sweep.json`` whole or not at all.

    Raises:
        BlockfitError: where it cannot be written.
    """
    with kept_file(path) as partial:
        write_text(partial, json.dumps(written(content), indent=1))


def read_point_file(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one point, from a file that lies in the sweep's folder itself.

    Raises:
        BlockfitError: where there is none of that name, or it is damaged.
    """
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise BlockfitError(f"{folder / MARK}: file {name!r} is missing; run the sweep again")
    if os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
        raise BlockfitError(f"{path} is a link that leads out of the folder; copy the file")
    try:
        with open_tensors(path) as stored:
            return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except BlockfitError as error:
        raise BlockfitError(f"{error}; run the sweep again") from error
