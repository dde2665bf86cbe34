"""The model card of an exported folder: its base, its plan, what it lost, how to load it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blockfit.errors import BlockfitError
from blockfit.fit.plan import PARTS, Plan
from blockfit.formats.folder import Saved
from blockfit.formats.parity import Parity
from blockfit.formats.passport import public
from blockfit.models.source import Source
from blockfit.provenance import installed_versions
from blockfit.units import amount, number, percent, share

_FOLDERS = re.compile(r"(^|[=:,]|file://)((?:~[\w-]*|\.{1,2})?/(?!/)[^=:,]*)")
"""A path on the machine, where a word of a command begins or after what may stand before it."""

TASKS = {
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForDepthEstimation": "depth-estimation",
}
"""How the names of transformers' classes end → the Hub's names of what they do."""


_IMPORTS = {"torchvision": "import json\n\nimport safetensors.torch\nimport torchvision"}
"""By library, what the lines that load a checkpoint need beside it."""


@dataclass(frozen=True)
class Origin:
    """What the user says of the original, where its folder or its name does not.

    Args:
        base_model: its repository on the Hub, as ``OWNER/NAME``; else found in the model's name.
        license: of its weights, by the Hub's identifier or in words; else what the model states.

    Raises:
        BlockfitError: where the base model is no name of a repository, or the licence is empty.
    """

    base_model: str | None = None
    license: str | None = None

    @property
    def said(self) -> bool:
        """Whether the user says anything."""
        return self.base_model is not None or self.license is not None

    def __post_init__(self) -> None:
        if self.base_model is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.base_model):
            raise BlockfitError(
                f"base_model={self.base_model!r} is no repository of the Hub; give one, such as "
                "facebook/dinov2-small"
            )
        if self.license is not None and not re.fullmatch(r"\S[^\n]*", self.license):
            raise BlockfitError(
                f"license={self.license!r} names no licence; give one in a line, such as apache-2.0"
            )


def model_card(
    saved: Saved,
    parity: Parity,
    how_to_load: str,
    needs_code: bool = False,
    origin: Origin | None = None,
) -> str:
    """The text of ``README.md``: metadata in YAML, then Markdown.

    Only what the saved folder says is written: figures that its run did not measure are left out.

    Args:
        how_to_load: a line of Python, for a repository called ``OWNER/NAME``.
        needs_code: the folder comes with code of its own.
    """
    from huggingface_hub import ModelCardData

    origin = origin or Origin()
    if origin.license is not None:
        saved = replace(saved, source=replace(saved.source, licence=origin.license))
    shown = replace(parity, source=public(parity.source))
    name = origin.base_model or public(saved.source.name)
    cls = str(saved.source.arguments.get("class", ""))
    data = ModelCardData(
        license=_licence_id(saved.source.licence),
        base_model=origin.base_model or _on_hub(saved.source),
        library_name=saved.source.library,
        pipeline_tag=next(
            (task for end, task in TASKS.items() if cls.endswith(end)), "image-feature-extraction"
        ),
        tags=["blockfit", "compressed", *(["custom_code"] if needs_code else [])],
    )
    parts = (
        _title(saved, name),
        _what(saved, name),
        _loading(saved.source.library, how_to_load, needs_code),
        _preprocessing(saved),
        _plan(saved),
        _figures(saved.report),
        _calibration(saved.report),
        _command(saved.report.get("command")),
        f"## Check\n\nThis folder against the model it was written from: {shown}.",
        f"Made with blockfit {installed_versions()['blockfit']}, torch {saved.versions['torch']}.",
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"


def with_origin(text: str, origin: Origin) -> str:
    """A card that ``model_card`` wrote, with what the user says of the original.

    The metadata are set; the title and the sentence on the origin follow where they are still as
    they were written.
    """
    from huggingface_hub import ModelCard

    if not origin.said:
        return text
    card = ModelCard(text, ignore_metadata_errors=True)
    body = card.text
    if (found := _MADE_FROM.search(body)) is not None:
        name = origin.base_model or found["name"]
        told = found["told"] if origin.license is None else f"licence: {origin.license}"
        body = body.replace(found[0], f"Made from {name} ({told}) without training:", 1)
        title = re.escape(found["name"])
        body = re.sub(rf"\A(\s*# ){title}(?=,? )", lambda title: f"{title[1]}{name}", body)
    if origin.base_model is not None:
        card.data["base_model"] = origin.base_model
    if origin.license is not None:
        card.data["license"] = _licence_id(origin.license)
    return f"---\n{card.data.to_yaml()}\n---\n{body}"


_MADE_FROM = re.compile(
    r"Made from (?P<name>\S.*) \((?P<told>licence: .+|it does not state a licence)\) "
    "without training:"
)


def _on_hub(source: Source) -> str | None:
    """The base model's name on the Hub, where it has one."""
    if source.library == "timm":
        return f"timm/{source.name}" if re.fullmatch(r"\w+\.\w+", source.name) else None
    named = re.fullmatch(r"[\w-]+/[\w.-]+", source.name) and not Path(source.name).exists()
    return source.name if named else None


def _loading(library: str, how_to_load: str, needs_code: bool) -> str:
    code = " Its own code, `modeling_blockfit.py`, is run." if needs_code else ""
    imports = _IMPORTS.get(library, f"import {library}")
    return (
        f"## How to load\n\n```python\n{imports}\n\nmodel = {how_to_load}\n```\n\n"
        f"In the place of `OWNER/NAME` stands this repository, or a folder with its files.{code}"
    )


def _licence_id(licence: str | None) -> str | None:
    """The Hub's identifiers are in lower case; anything that cannot be one is ``other``."""
    if licence is None:
        return None
    return licence.lower() if re.fullmatch(r"[A-Za-z0-9.+-]+", licence) else "other"


def _title(saved: Saved, name: str) -> str:
    removed, depth = len(saved.plan.removed_blocks), saved.blocks.depth
    if not saved.plan.narrowings:
        return f"# {name} without {removed} of {depth} blocks"
    return f"# {name}, made smaller: {saved.plan.changed(depth)}"


def _what(saved: Saved, name: str) -> str:
    licence = saved.source.licence
    told = f"licence: {licence}" if licence else "it does not state a licence"
    ways = []
    if saved.plan.replacements:
        ways.append(
            "runs of transformer blocks were replaced by closed-form maps that were fitted by "
            "least squares"
        )
    if saved.plan.narrowings:
        ways.append(
            "parts of blocks keep fewer dimensions, and the layers that read them were solved "
            "again by least squares"
        )
    else:
        ways.append("kept blocks were re-solved to go with them where the recipe says so")
    return (
        f"Made from {name} ({told}) without training: {', and '.join(ways)}. Class, signature and "
        "outputs are the original's."
    )


def _preprocessing(saved: Saved) -> str:
    own = saved.source.preprocessing
    if own is None:
        return "## Preprocessing\n\nNot known: prepare images as for the base model."
    return f"## Preprocessing\n\n{own.describe()}"


def _plan(saved: Saved) -> str:
    rows = []
    for entry in saved.plan:
        blocks = ", ".join(map(str, entry.span.blocks))
        rank = "" if entry.rank is None else f", rank {entry.rank}"
        rows.append(f"| {entry.span} | {blocks} | {entry.map}{rank} |")
    text = "## Plan\n\nBlocks are numbered from 0."
    if rows:
        text += "\n\n| span | blocks removed | map |\n|---|---|---|\n" + "\n".join(rows)
    if saved.plan.removed_blocks or saved.plan.narrowings:
        text += f"\n\n```text\n{picture(saved.plan, saved.blocks.depth)}\n```"
    if saved.plan.narrowings:
        text += (
            "\n\nDimensions that stay, of those that there were; of values and keys, of each head:"
            f"\n\n| block | {' | '.join(PARTS)} |\n|---{'|---' * len(PARTS)}|\n"
        )
        text += "\n".join(_narrowed(block, saved.plan) for block in saved.plan.narrowed_blocks)
    return text


_BAR = 10
"""Characters of a part that is whole."""


def picture(plan: Plan, depth: int) -> str:
    """What is left of every block as bars of text, a line per block."""
    parts = [part for part in PARTS if any(cut.part == part for cut in plan.narrowings)]
    width = _BAR + 6
    lines = ["block  " + "".join(f"{part:<{width}}" for part in parts or ["kept"])]
    gone = {block: entry.map for entry in plan for block in entry.span.blocks}
    for block in range(depth):
        cells = [_bar(cut.kept / cut.size) if (cut := plan.at(block).get(part)) else _bar(1.0)
                 for part in parts or ["kept"]]  # fmt: skip
        told = f"– {gone[block]}" if block in gone else "".join(f"{c:<{width}}" for c in cells)
        lines.append(f"{block:>5}  {told}")
    return "\n".join(line.rstrip() for line in lines)


def _bar(left: float) -> str:
    full = max(1, round(_BAR * left))
    return f"{'█' * full}{'░' * (_BAR - full)} {left:.0%}"


def _command(line: object) -> str:
    """The command line, without the folders of the machine where it ran."""
    if not isinstance(line, str) or not line:
        return ""
    try:
        words = shlex.split(line)
    except ValueError:  # a report of the user's own
        return ""
    bare = (_FOLDERS.sub(lambda path: path[1] + Path(path[2]).name, word) for word in words)
    return f"## How it was made\n\n```bash\n{shlex.join(bare)}\n```"


def _narrowed(block: int, plan: Plan) -> str:
    cuts = plan.at(block)
    cells = [f"{cuts[p].kept} of {cuts[p].size}" if p in cuts else "all" for p in PARTS]
    return f"| {block} | {' | '.join(cells)} |"


def _figures(report: Mapping[str, Any]) -> str:
    rows = []
    for name, key in (("parameters", "parameters"), ("FLOPs per image", "flops")):
        before, after = report.get(f"{key}_before"), report.get(f"{key}_after")
        if before and after:
            rows.append(f"| {name} | {amount(before)} | {amount(after)} | {share(after, before)} |")
    text = "| | before | after | of the original |\n|---|---|---|---|\n" + "\n".join(rows)
    worth = report.get("held_out")
    if worth is not None:
        text += f"\n\nOn {worth['images']} held-out calibration images, which chose the plan: "
        told = []
        if worth.get("kl") is not None:
            told = [
                f"KL {number(worth['kl'])} nats",
                f"top-1 agreement {percent(worth['agreement'])}",
            ]
        text += ", ".join(
            [
                *told,
                f"feature cosine {number(worth['feature_cosine'])}",
                f"relative feature error {number(worth['feature_relative_error'])}",
            ]
        )
        text += "."
    text += _final(report.get("final"))
    return f"## Before and after\n\n{text}" if rows or worth else ""


def _final(final: Mapping[str, Any] | None) -> str:
    """Figures of images that decided nothing, with intervals; or that there are none."""
    if final is None:
        return " Accuracy on a task was not measured for this card."
    rows = []
    for name, key, shown, on in (
        ("top-1, original", "top1_before", percent, "labelled"),
        ("top-1, this model", "top1_after", percent, "labelled"),
        ("points of top-1 lost", "drop", lambda value: number(value, 2), "labelled"),
        ("top-1 agreement", "agreement", percent, "images"),
        ("KL from the original, nats", "kl", number, "images"),
        ("relative feature error", "feature_error", number, "images"),
    ):
        if (figure := final.get(key)) is not None:
            ends = f"{shown(figure['low'])} to {shown(figure['high'])}"
            rows.append(f"| {name} | {shown(figure['value'])} | {ends} | {final[on]} |")
    if final.get("top1_after") is None:
        rows.append("| top-1 | not measured: no labels of the head's classes | | |")
    source = public(str(final["source"]))
    return (
        f"\n\nOn images that were used for nothing else ({source}):\n\n"
        f"| | value | {final['confidence']:.0%} interval | images |\n|---|---|---|---|\n"
        + "\n".join(rows)
    )


def _calibration(report: Mapping[str, Any]) -> str:
    told = report.get("calibration")
    if not isinstance(told, Mapping) or not {"source", "used", "total", "seed"} <= told.keys():
        return ""  # a report of the user's own
    source = public(str(told["source"]))
    recipe = report.get("recipe", {}).get("name")
    return (
        f"## Calibration\n\n{told['used']} of {told['total']} images of {source}, without labels, "
        f"drawn with seed {told['seed']}; recipe {recipe}."
    )
