"""What ``sweep.json`` must hold before anything in it is used."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from blockfit.errors import BlockfitError
from blockfit.files import check_kept, is_unfinished, kept_file
from blockfit.fit.plan import Plan
from blockfit.models.blocks import read_blocks
from blockfit.models.source import Source
from blockfit.untrusted import open_tensors, read_json

MARK = "sweep.json"
FORMAT = 1
POINTS = ("removed-*.safetensors", "params-*.safetensors")

_NUMBER, _COUNT, _TEXT, _OBJECT, _MAYBE = "a number", "a whole number", "a text", "an object", None
_YES_OR_NO = "true or false"
_FORM: dict[str, Any] = {
    "format": _COUNT,
    "run": {
        "recipe": _OBJECT, "protect": [_COUNT], "hold_out": _NUMBER, "seed": _COUNT,
        "model": _TEXT, "calibration": _OBJECT, "apart": [_COUNT],
        "whole": [_COUNT], "multiple_of": (_COUNT, _MAYBE), "shares": [_NUMBER],
    },
    "source": _OBJECT,
    "blocks": _OBJECT,
    "original": {"parameters": _COUNT, "flops": (_NUMBER, _MAYBE), "top1": (_NUMBER, _MAYBE)},
    "points": [
        {
            "share": _NUMBER, "removed": _COUNT, "plan": [_OBJECT], "parameters": _COUNT,
            "flops": (_NUMBER, _MAYBE),
            "held_out": {
                "images": _COUNT, "kl": (_NUMBER, _MAYBE), "agreement": (_NUMBER, _MAYBE),
                "feature_cosine": _NUMBER, "feature_relative_error": _NUMBER,
            },
            "maps": [
                {
                    "span": _TEXT, "map": _TEXT, "error": _NUMBER, "identity_error": _NUMBER,
                    "prefix": (_NUMBER, _MAYBE), "patch": (_NUMBER, _MAYBE),
                    "identity_prefix": (_NUMBER, _MAYBE), "identity_patch": (_NUMBER, _MAYBE),
                }
            ],
            "warnings": [_TEXT], "file": _TEXT, "seconds": _NUMBER,
            "repaired_blocks": [_COUNT], "top1": (_NUMBER, _MAYBE), "final": (_OBJECT, _MAYBE),
            "judged": {
                "images": _COUNT, "labelled": _COUNT, "worse": _COUNT, "better": _COUNT,
                "kl": (_NUMBER, _MAYBE), "kl_bound": (_NUMBER, _MAYBE), "apart": _YES_OR_NO,
            },
            "latency": {
                "ratio": _NUMBER, "low": _NUMBER, "high": _NUMBER, "original_ms": _NUMBER,
                "compressed_ms": _NUMBER, "batch_size": _COUNT, "threads": _COUNT,
                "device": _TEXT,
            },
        }
    ],
    "search": _OBJECT,
}  # fmt: skip
"""Keys and what stands behind them: kinds, objects, lists of one kind, or one of several."""

LATER_KEYS = {
    "repaired_blocks", "top1", "latency", "apart", "final", "judged",
    "whole", "multiple_of", "shares", "share",
}  # fmt: skip
"""Keys that sweeps of earlier versions lack, and sweeps of which nothing was timed."""


def read_sweep_file(path: Path) -> dict[str, Any]:
    """The content of a sweep's JSON file, every value that is used later checked.

    Raises:
        BlockfitError: names the file and the key.
    """
    data = read_json(path, exact=False)
    if not isinstance(data, dict) or set(data) != set(_FORM):
        raise BlockfitError(f"{path} is no sweep of this version; run the sweep again")
    if data["format"] != FORMAT:
        raise BlockfitError(f"{path} has format {data['format']!r}; this version reads {FORMAT}")
    try:
        _check(data, _FORM, "")
        blocks = read_blocks(data["blocks"], "blocks")
        Source.from_json(data["source"], "source")
        if any(data["original"][key] in (0, 0.0) for key in ("parameters", "flops")):
            raise BlockfitError("original: a model has parameters and FLOPs")
        _check_share(data["original"], "original")
        for number, point in enumerate(data["points"]):
            _check_point(point, blocks.depth, f"points[{number}]")
    except BlockfitError as error:
        raise BlockfitError(f"{path}: {error}; run the sweep again") from error
    sizes = [point.get("share", point["removed"]) for point in data["points"]]
    if len(set(sizes)) < len(sizes):
        raise BlockfitError(f"{path}: points: a size appears twice; run the sweep again")
    return data


def check_sweep_folder(folder: str | Path) -> Path:
    """Refuse now a folder that holds anything but a sweep, or cannot be written.

    Returns:
        The resolved path, which is to be written.

    Raises:
        BlockfitError: it says which.
    """
    target = check_kept(folder)
    if not target.exists():
        return target
    if not (target / MARK).is_file():
        if any(not is_unfinished(entry.name) for entry in target.iterdir()):
            raise BlockfitError(f"{folder} is not empty and holds no sweep; choose a new folder")
        return target
    data = read_sweep_file(target / MARK)
    known = {point["file"] for point in data["points"]}
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


def write_sweep_file(path: Path, data: dict[str, Any]) -> None:
    """Write ``sweep.json`` whole or not at all.

    Raises:
        BlockfitError: where it cannot be written.
    """
    with kept_file(path) as partial:
        partial.write_text(json.dumps(data, indent=1), encoding="utf-8")


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


def _check_point(point: dict[str, Any], depth: int, where: str) -> None:
    plan = Plan.from_json(point["plan"], f"{where}: plan")
    plan.check(depth)
    if len(plan.removed_blocks) != point["removed"]:
        raise BlockfitError(f"{where}: the plan removes another number of blocks than is written")
    name = point["file"]
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise BlockfitError(f"{where}: file: {name!r} is no file of a sweep")
    _check_share(point, where)
    if not 0 < point.get("share", 0.5) < 1:
        raise BlockfitError(f"{where}: share must be between 0 and 1, got {point['share']}")
    judged = point.get("judged", {})
    if judged and judged["worse"] + judged["better"] > judged["labelled"]:
        raise BlockfitError(f"{where}: judged: more answers have changed than there are labels")
    for key, value in point.get("latency", {}).items():
        if key != "device" and not 0 < value < math.inf:
            raise BlockfitError(f"{where}: latency: {key} must be above 0, got {value}")


def _check_share(figures: dict[str, Any], where: str) -> None:
    top1 = figures.get("top1")
    if top1 is not None and not 0 <= top1 <= 1:
        raise BlockfitError(f"{where}: top1 must be between 0 and 1, got {top1}")


def _check(value: Any, form: Any, where: str) -> None:
    if isinstance(form, dict):
        _check(value, _OBJECT, where)
        for key in (*value, *form):
            if key not in value and key in LATER_KEYS:
                continue
            if (key in value) != (key in form):
                problem = "unknown key" if key in value else "missing key"
                raise BlockfitError(f"{problem} {_place(where, key)!r}")
            _check(value[key], form[key], _place(where, key))
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise BlockfitError(f"{where} must be a list, got {type(value).__name__}")
        for number, inner in enumerate(value):
            _check(inner, form[0], f"{where}[{number}]")
    elif not any(_is(value, kind) for kind in (form if isinstance(form, tuple) else (form,))):
        wanted = form[0] if isinstance(form, tuple) else form
        raise BlockfitError(f"{where} must be {wanted}, got {value!r:.40}")


def _place(where: str, key: str) -> str:
    return f"{where}: {key}" if where else key


def _is(value: Any, kind: str | None) -> bool:
    if kind == _YES_OR_NO:
        return isinstance(value, bool)
    if kind is _MAYBE or isinstance(value, bool):
        return value is None
    if kind == _COUNT:
        return isinstance(value, int) and value >= 0
    if kind == _NUMBER:
        return isinstance(value, int | float) and not math.isnan(value)
    return isinstance(value, str if kind == _TEXT else dict)
