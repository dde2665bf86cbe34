"""Running experiments into a folder: what is there already is kept, the rest is added."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blockfit.errors import BlockfitError
from blockfit.evaluation.paper.charts import draw
from blockfit.evaluation.paper.experiments import EXPERIMENTS, Experiment
from blockfit.evaluation.paper.lab import Lab, Row, stopwatch
from blockfit.evaluation.paper.pages import as_csv, as_table, similarity_table
from blockfit.evaluation.paper.writeup import finding
from blockfit.files import check_kept, encoded, is_unfinished, kept_file, resolved, write_text
from blockfit.progress import Say, silent
from blockfit.provenance import command_line
from blockfit.untrusted import read_json

MARK = "reproduction.json"
INDEX = "index.md"
FORMAT = 1
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}
_KEYS = {"format", "about", "experiments"}
ENDINGS = (".csv", ".md", ".png")
_NAMES = {MARK, INDEX, *(f"{name}{ending}" for name in BY_NAME for ending in ENDINGS)}
_OTHER = {
    "version": "another version of blockfit",
    "model": "another model",
    "train": "other training images",
    "test": "other test images",
    "judge": "another judge",
    "preprocessing": "another preprocessing",
}


def chosen(names: str | None) -> Sequence[Experiment]:
    """The experiments that a text such as ``spans,samples`` names; all by default.

    Raises:
        BlockfitError: for an unknown name.
    """
    if names is None:
        return EXPERIMENTS
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in BY_NAME:
            raise BlockfitError(
                f"unknown experiment {name!r}; choose some of {', '.join(BY_NAME)}, "
                "with commas between them"
            )
    return tuple(e for e in EXPERIMENTS if e.name in wanted)


def earlier(folder: Path, about: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """What an earlier run left in ``folder``; ``None`` where it is new or empty.

    Args:
        about: model, images and judge, which must be those of the earlier run.

    Raises:
        BlockfitError: where the folder holds something else, or experiments about something else.
    """
    target = check_kept(folder)
    if not target.exists():
        return None
    mark = target / MARK
    if not mark.is_file():
        if any(not is_unfinished(entry.name) for entry in target.iterdir()):
            raise BlockfitError(f"{folder} is not empty and holds no experiments; choose a new one")
        return None
    for path in target.iterdir():
        if path.name in _NAMES and not path.is_file():
            raise BlockfitError(f"{path} is no file; move it away or choose a new folder")
    try:
        data = read_json(mark, exact=False)
    except BlockfitError as error:
        raise BlockfitError(f"{error}; choose a new folder") from error
    if not isinstance(data, dict) or set(data) - {"command"} != _KEYS:
        raise BlockfitError(f"{mark} was not written by blockfit reproduce; choose a new folder")
    if data["format"] != FORMAT:
        raise BlockfitError(f"{mark} has format {data['format']!r}; this version reads {FORMAT}")
    _refuse_foreign(target, data)
    if about is not None and data["about"] != about:
        other = [said for key, said in _OTHER.items() if data["about"].get(key) != about.get(key)]
        raise BlockfitError(
            f"{folder} holds experiments with {' and '.join(other)}; choose a new folder"
        )
    return data


def _refuse_foreign(folder: Path, data: Mapping[str, Any]) -> None:
    """Refuse a folder in which something of the user's stands where a run would write."""
    pages = (INDEX, *(f"{name}.md" for name in BY_NAME))
    foreign = [name for name in pages if _has(folder, name) and not _is_own(folder / name)]
    for name in BY_NAME.keys() - data["experiments"].keys():
        foreign += [f"{name}{end}" for end in ENDINGS if end != ".md" and _has(folder, name + end)]
    if foreign:
        raise BlockfitError(
            f"{folder / min(foreign)} is not as blockfit reproduce writes it and would be "
            "replaced; move it away or choose a new folder"
        )


def reproduce(
    lab: Lab,
    folder: Path,
    about: Mapping[str, Any],
    experiments: Sequence[Experiment] = EXPERIMENTS,
    warn: Say = silent,
) -> dict[str, Any]:
    """Run experiments and write each as soon as it is done: CSV, Markdown, picture, JSON, index.

    An experiment that the folder holds with the same settings is not run again. A run that is
    stopped keeps those that are done.

    Args:
        about: JSON values: model, images, judge; what all experiments share.

    Returns:
        What ``reproduction.json`` holds: ``format``, ``about``, and by name each experiment's
        ``settings``, ``rows``, ``finding`` and times.

    Raises:
        BlockfitError: where the folder is taken or cannot be written, or an experiment cannot be
            run.
    """
    about = json.loads(json.dumps(about))
    folder = resolved(folder)
    data = earlier(folder, about) or {"format": FORMAT, "about": about, "experiments": {}}
    if command_line() is not None:
        data["command"] = command_line()
    if not (folder / MARK).exists():  # a run that is killed leaves a folder that it knows again
        _write_text(folder / MARK, json.dumps(data, indent=1, allow_nan=False) + "\n")
    for experiment in experiments:
        if (lacking := _lacking(lab, experiment)) is not None:
            warn(f"{experiment.name} was skipped: {lacking}")
            continue
        settings = _settings(lab, experiment)
        entry = data["experiments"].get(experiment.name)
        if entry is None or entry["settings"] != settings:
            lab.say(experiment.title)
            times: Row = {}
            with stopwatch(times):
                rows = experiment.run(lab)
            said = finding(experiment.name, rows)
            entry = {"settings": settings, "finding": said, **times, "rows": rows}
            (folder / f"{experiment.name}.png").unlink(missing_ok=True)
            data["experiments"][experiment.name] = entry
            order = [name for name in BY_NAME if name in data["experiments"]]
            data["experiments"] = {name: data["experiments"][name] for name in order}
            _write_text(folder / MARK, json.dumps(data, indent=1, allow_nan=False) + "\n")
            _write(folder, experiment, entry, data["about"], warn)
        elif any(not (folder / f"{experiment.name}{end}").exists() for end in ENDINGS):
            _write(folder, experiment, entry, data["about"], warn)
        _write_page(folder / INDEX, _index(folder, data))
    return data


def _lacking(lab: Lab, experiment: Experiment) -> str | None:
    """What an experiment cannot be run without, where that is not there."""
    if experiment.name == "transfer" and not lab.transfers:
        return "it needs another source of images (transfer=)"
    if experiment.name == "several" and lab.settings.longest < 2:
        return "it needs a model of three blocks or more"
    return None


def _settings(lab: Lab, experiment: Experiment) -> dict[str, Any]:
    """What the rows of an experiment depend on, as JSON values."""
    values = asdict(lab.settings)
    settings = {name: values[name] for name in (*experiment.needs, "seed")}
    if experiment.name == "transfer":
        settings["sources"] = list(lab.transfers)
    return json.loads(json.dumps(settings))


def _write(
    folder: Path,
    experiment: Experiment,
    entry: Mapping[str, Any],
    about: Mapping[str, Any],
    warn: Callable[[str], None],
) -> None:
    name, rows = experiment.name, entry["rows"]
    _write_text(folder / f"{name}.csv", as_csv(rows))
    title = f"{experiment.title}: {about['model']['name']}"
    if name != "similarity":
        title += f"\n{about['test']['source']}, {about['test']['images']} test images"
    try:
        with kept_file(folder / f"{name}.png") as partial:
            draw(name, rows, partial, title)
    except BlockfitError as error:
        warn(str(error))
    picture = f"![{experiment.title}]({name}.png)\n\n" if _has(folder, f"{name}.png") else ""
    table = similarity_table(rows) if name == "similarity" else as_table(rows)
    used = "; ".join(f"{key} {_words(value)}" for key, value in entry["settings"].items())
    _write_page(
        folder / f"{name}.md",
        f"# {experiment.title}\n\n{experiment.shows} {entry['finding']}\n\n{picture}{table}\n"
        f"Settings: {used}. {entry['seconds']:.0f} s, {entry['cpu_seconds']:.0f} s of CPU time. "
        f"All numbers: [{name}.csv]({name}.csv).\n",
    )


def _index(folder: Path, data: Mapping[str, Any]) -> str:
    about, done = data["about"], data["experiments"]
    lines = [
        "# The experiments of TBA, run by blockfit",
        "",
        "TBA replaces runs of transformer blocks by linear maps that are fitted in closed form "
        "([arXiv 2410.04941](https://arxiv.org/abs/2410.04941)).",
        "",
        f"- model: {about['model']['name']}, {about['model']['depth']} blocks, "
        f"width {about['model']['width']}, {about['model']['parameters']:,} parameters",
        f"- calibration images: drawn from {about['train']['source']} "
        f"({about['train']['total']:,} images)",
        f"- test images: {about['test']['images']:,} of {about['test']['source']}",
        f"- judged by: {about['judge']}",
        f"- preprocessing: {about['preprocessing']}",
        "",
        "| experiment | what came out | seconds | CPU seconds |",
        "|---|---|---|---|",
    ]
    for name, entry in done.items():
        lines.append(
            f"| [{BY_NAME[name].title}]({name}.md) | {entry['finding']} | "
            f"{entry['seconds']:.0f} | {entry['cpu_seconds']:.0f} |"
        )
    total = [sum(entry[key] for entry in done.values()) for key in ("seconds", "cpu_seconds")]
    lines += [f"| all | | {total[0]:.0f} | {total[1]:.0f} |", ""]
    for name in done:
        if _has(folder, f"{name}.png"):
            lines += [f"![{BY_NAME[name].title}]({name}.png)", ""]
    left = [name for name in BY_NAME if name not in done]
    if left:
        lines += [f"Not run here: {', '.join(left)}.", ""]
    return "\n".join(lines)


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "all" if value is None else str(value)


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _write_page(path: Path, text: str) -> None:
    """Write a page whose last line tells it from one that the user wrote or changed."""
    _write_text(path, f"{text}\n{_mark_of(text)}\n")


def _is_own(path: Path) -> bool:
    """Whether a page is as ``_write_page`` left it."""
    try:
        text, _, last = path.read_bytes().decode("utf-8").removesuffix("\n").rpartition("\n")
    except (OSError, UnicodeDecodeError):
        return False
    return last == _mark_of(text)


def _mark_of(text: str) -> str:
    digest = hashlib.sha256(encoded(text)).hexdigest()
    return f"<!-- written by blockfit reproduce {digest[:16]} -->"


def _write_text(path: Path, text: str) -> None:
    with kept_file(path) as partial:
        write_text(partial, text)
