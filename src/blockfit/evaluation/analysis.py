"""How redundant the blocks of a model are: one pass over images, tables of all pairs of states."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockfit import drawing
from blockfit import processes as ranks
from blockfit.arguments import at_least, checked
from blockfit.checkpoint import Checkpoint, settled
from blockfit.data.images import Images, prepared_images
from blockfit.errors import BlockfitError
from blockfit.evaluation import summaries
from blockfit.files import FolderForm, check_target, new_folder, write_text
from blockfit.fit.plan import Span, spans_up_to
from blockfit.fit.similarity import COLUMNS, Tables, merged, part
from blockfit.formats.folder import module_of
from blockfit.models.blocks import Blocks, call, find_chain, record
from blockfit.models.cost import runs_on
from blockfit.models.forward import evaluating, first_images
from blockfit.models.load import source_of
from blockfit.models.preprocessing import Given
from blockfit.models.tensors import fingerprint
from blockfit.progress import Progress, Say, told
from blockfit.provenance import command_line, made
from blockfit.search.calibrate import TOKENS_PER_IMAGE, calibrate
from blockfit.search.setting import CALIBRATION_IMAGES, changing
from blockfit.summary import Summary, frame
from blockfit.units import bytes_of

MARK = "analysis.json"
CSV = "similarity.csv"
PICTURE = "similarity.png"
FILES = (MARK, CSV, PICTURE)
"""All that an analysis folder may hold."""

FORM = FolderForm(MARK, '"patch_tokens_per_image":', FILES)

MOST_BYTES = 2 << 30
"""Memory for moments. The pairs of a large model take more, and then several passes."""


@dataclass(frozen=True, repr=False)
class Analysis:
    """What ``analyze`` found.

    Args:
        tables: similarity of all pairs of hidden states h[0] … h[L].
        blocks: where the blocks are.
        report: JSON values: model, calibration images, tokens per image.
        warnings: what the user should know.
        files: names of the files that were written, if any were.
    """

    tables: Tables
    blocks: Blocks
    report: dict[str, Any]
    warnings: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "format": 1,
            **self.report,
            "blocks": self.blocks.to_json(),
            "similarity": self.tables.to_json(),
            "warnings": list(self.warnings),
        }

    def __repr__(self) -> str:
        images, states = self.report["calibration"]["used"], len(self.tables.boundaries)
        return f"Analysis({self.report['model']}, {states} hidden states of {images} images)"

    def summary(self) -> Summary:
        """The input of every block beside its output, by every metric."""
        return Summary.of(summaries.analysis(self.tables), warnings=self.warnings)

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def to_frame(self) -> Any:
        """A ``pandas.DataFrame`` with a row per metric, token type and pair of hidden states.

        Columns: ``metric``, ``token_type``, ``start``, ``stop``, ``value`` (none where the metric
        is not defined).

        Raises:
            BlockfitError: where pandas is not installed.
        """
        return frame(dict(zip(COLUMNS, row, strict=True)) for row in self.tables.rows())

    def plot(self, metric: str = "r2", token_type: str = "all", ax: Any = None) -> Any:
        """Draw one metric between all pairs of hidden states.

        Args:
            metric: one of ``METRICS``; ``r2`` is what an affine map of the earlier state explains
                of the later one.
            token_type: ``all``, ``prefix`` or ``patch``.
            ax: matplotlib's axes; a new figure by default.

        Returns:
            The axes.

        Raises:
            BlockfitError: where there is no such table, or without matplotlib.
        """
        boundaries = self.tables.boundaries
        self.tables.at(metric, boundaries[0], boundaries[-1], token_type)  # refuses unknown ones
        axis = drawing.axes_of(ax, 4.4, 3.8)
        drawing.heat_map(axis, boundaries, self.tables.values[metric][token_type], metric == "mse")
        title = f"{drawing.METRIC_WORDS[metric]}, {token_type} tokens"
        axis.set(xlabel="to hidden state", ylabel="from hidden state", title=title)
        return axis

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write ``analysis.json``, ``similarity.csv`` and, with matplotlib, ``similarity.png``.

        Args:
            folder: new or empty.
            overwrite: replace what an earlier analysis wrote.

        Raises:
            BlockfitError: where the folder is taken or cannot be written.
        """
        write(self, folder, overwrite)


@checked
@told
def analyze(
    model: nn.Module | str | Path,
    images: Any,
    folder: str | Path | None = None,
    *,
    blocks: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    preprocessing: Given | None = None,
    say: Say | None = None,
    progress: Progress | bool | None = None,
    resume: str | Path | None = None,
    max_memory: int | str | None = None,
) -> Analysis:
    """Compare the hidden states of all pairs of block boundaries.

    ``folder`` gets ``analysis.json``, ``similarity.csv`` (metric,token_type,start,stop,value) and,
    where matplotlib is installed, ``similarity.png``: all of it or nothing. What is not named here
    is as in ``compress``.

    Args:
        model: any module with blocks, or its name.
        images: ``Images``, or whatever ``blockfit.images`` takes; labels are not used.
        folder: new or empty; nothing is written where ``None``.
        seed: of the draw of patch tokens.
        overwrite: replace a folder that an analysis wrote.
        resume: a folder in which the sums are saved from time to time, and gone on from.
        max_memory: what the sums may take, as ``"2GB"`` or in bytes; more passes need less.

    Raises:
        BlockfitError: no blocks, no images, NaN or infinite hidden states, a folder that is taken.
    """
    assert say is not None  # functions, whatever the caller gave
    assert callable(progress)
    at_least(0, seed=seed)
    room = MOST_BYTES
    if max_memory is not None:
        room = bytes_of(str(max_memory), "max_memory") // 2
    if folder is not None:
        check_target(folder, FORM, overwrite)
    model = module_of(model)
    images = prepared_images(images, model, preprocessing, seed).draw(CALIBRATION_IMAGES, seed)
    example = images.first("analyse")
    where = find_chain(model, example, blocks)
    patches = _tokens(model, where, example) - where.prefix_tokens
    taken = min(TOKENS_PER_IMAGE, patches)
    groups = _groups(where, room)
    checkpoint = None if resume is None else _checkpoint(resume, model, where, images, seed)
    parts = []
    for number, spans in enumerate(groups):
        say("hidden states" + (f", pass {number + 1} of {len(groups)}" if groups[1:] else ""))
        moments = calibrate(
            model,
            where,
            images,
            spans,
            tokens_per_image=taken,
            seed=seed,
            progress=progress,
            checkpoint=checkpoint,
        )
        say("comparing hidden states")
        parts.append(part(moments))
    report = {
        "command": command_line(),
        "model": source_of(model).name,
        "seed": seed,
        "calibration": images.description(),
        "patch_tokens_per_image": {"all": patches, "taken": taken},
        "made": made(runs_on(model)),
    }
    warned = (*changing(images), *_warnings(parts[0], where))
    result = Analysis(merged(parts), where, report, warned)
    if folder is not None and ranks.is_first():
        result = write(result, folder, overwrite)
    if checkpoint is not None:
        checkpoint.forget()
    return result


def _checkpoint(
    folder: str | Path, model: nn.Module, blocks: Blocks, images: Images, seed: int
) -> Checkpoint:
    """Where the sums are saved from time to time, for this run alone."""
    told = settled(images.description(), images.digest())
    run = {"model": fingerprint(model), "calibration": told, "seed": seed}
    return Checkpoint(folder, {**run, "batch_size": images.batch_size, "blocks": blocks.to_json()})


def write(result: Analysis, folder: str | Path, overwrite: bool = False) -> Analysis:
    """Write an analysis to a folder that ``check_target`` allows; returns it with its files."""
    with new_folder(folder, FORM, overwrite) as partial:
        result.tables.write_csv(partial / CSV)
        try:
            result.tables.draw(partial / PICTURE, str(result.report["model"]))
        except BlockfitError as error:
            result = dataclasses.replace(result, warnings=(*result.warnings, str(error)))
        text = json.dumps(result.to_json(), indent=1, allow_nan=False)
        write_text(partial / MARK, text + "\n")
        files = tuple(name for name in FILES if (partial / name).exists())
    return dataclasses.replace(result, files=files)


def _tokens(model: nn.Module, blocks: Blocks, example: Any) -> int:
    with evaluating(model), torch.no_grad(), record(model, blocks) as states:
        call(model, first_images(example, 1))
        return states[0].shape[1]


def _groups(blocks: Blocks, most_bytes: int) -> list[list[Span]]:
    """The spans between all pairs of boundaries, in as few groups as memory allows."""
    square = 2 * 8 * blocks.width**2  # float64, prefix and patch tokens
    room = max(most_bytes // square - (blocks.depth + 1), blocks.depth)
    groups: list[list[Span]] = [[]]
    for span in spans_up_to(blocks.depth, blocks.depth):
        if len(groups[-1]) == room:
            groups.append([])
        groups[-1].append(span)
    return groups


def _warnings(tables: Tables, blocks: Blocks) -> tuple[str, ...]:
    few = [n for n, count in tables.tokens.items() if 0 < count < 4 * blocks.width]
    return tuple(
        f"{tables.tokens[name]} {name} tokens are few for width {blocks.width}: r2 and cka of "
        f"{name} tokens are too high; give more images"
        for name in few
    )
