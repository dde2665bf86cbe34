"""The report at the end of a command (``--report``), made from what the command has at hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from blockfit import processes as ranks
from blockfit.commands.options import LOOKED_AT
from blockfit.commands.output import Output
from blockfit.data.images import Images
from blockfit.errors import BlockfitError
from blockfit.evaluation.analysis import analyze
from blockfit.evaluation.side_by_side import side_by_side
from blockfit.fields import Values
from blockfit.files import expanded
from blockfit.formats import folder as store
from blockfit.models.blocks import Blocks
from blockfit.reports.content import Content, joined
from blockfit.reports.page import check_report, write_report
from blockfit.reports.runs import analysis_content, read_evaluation, read_run, result_content
from blockfit.search.budget import Budget
from blockfit.search.run import Result
from blockfit.search.sweep import from_sweep
from blockfit.search.sweep_file import MARK as SWEEP_MARK


class Reporter:
    """The report at the end of a command; does nothing where none was asked for.

    Raises:
        BlockfitError: where the file is taken, or several processes share the run.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is None:
            return
        if ranks.launched()[1] > 1:
            raise BlockfitError(
                "--report needs a single process; run blockfit report on what this run writes"
            )
        check_report(path)

    def kept(self, model: nn.Module) -> nn.Module:
        """A copy of the original where a report will need it after the surgery."""
        return model if self.path is None else copy.deepcopy(model)

    def compressed(
        self,
        out: Output,
        result: Result,
        folder: Path | None,
        original: nn.Module | None = None,
        images: Images | None = None,
        shown: Images | None = None,
        sweep: Path | None = None,
        evaluation: dict[str, Any] | None = None,
    ) -> None:
        """Write the report of a compression."""
        if self.path is None:
            return
        parts = {"the model": _result(result, folder)}
        if sweep is not None:
            parts[str(sweep)] = read_run(sweep)
        if evaluation is not None:
            measured = read_evaluation(Values(evaluation, "the evaluation"))
            parts["the evaluation"] = Content("", evaluation=measured)
        if original is not None and images is not None:
            parts["the analysis"] = self._similarity(out, original, images)
        content = joined(parts)
        if original is not None and shown is not None:
            few = shown.take(LOOKED_AT)
            content = beside(out, content, original, result.model, result.blocks, few)
        self._write(out, content)

    def swept(
        self, out: Output, folder: Path, original: nn.Module, images: Images, shown: Images
    ) -> None:
        """Write the report of a sweep of ``original``; the images as in ``compressed``."""
        if self.path is None:
            return
        parts = {str(folder): read_run(folder)}
        parts["the analysis"] = self._similarity(out, original, images)
        content = joined(parts)
        small, blocks = small_model([str(folder)], content, None, original, None)
        few = shown.take(LOOKED_AT)
        self._write(out, beside(out, content, original, small, blocks, few))

    def analysed(self, out: Output, found: dict[str, Any]) -> None:
        """Write the report of an analysis, from ``Analysis.to_json``."""
        if self.path is not None:
            self._write(out, analysis_content(Values(found, "the analysis")))

    def reproduced(self, out: Output, folder: Path) -> None:
        """Write the report of the experiments that ``folder`` holds."""
        if self.path is not None:
            self._write(out, read_run(folder))

    def _similarity(self, out: Output, original: nn.Module, images: Images) -> Content:
        found = analyze(original, images, say=out.say, progress=out.count)
        content = analysis_content(Values(found.to_json(), "the analysis"))
        return replace(content, commands=())  # no command of its own made it

    def _write(self, out: Output, content: Content) -> None:
        assert self.path is not None
        out.say("drawing the report")
        write_report(content, self.path)

    def tell(self, out: Output) -> None:
        """Say where the report is."""
        if self.path is not None:
            out.line(f"report in {self.path}, open it in a browser")


def _result(result: Result, folder: Path | None) -> Content:
    if folder is not None:
        return read_run(folder)
    values = Values(result.report, "the report")
    return result_content(result.plan, result.blocks.depth, result.source, values)


def small_model(
    runs: Sequence[str],
    content: Content,
    remove: int | None,
    original: nn.Module,
    device: str | None,
) -> tuple[nn.Module, Blocks]:
    """The small model that the runs are about."""
    for run in runs:
        if store.is_saved(run):
            if remove is not None:
                raise BlockfitError(
                    f"--remove has no use here: {run} holds one small model; leave it out"
                )
            saved = store.load_saved(run, device=device)
            return saved.model, saved.blocks
    for run in runs:
        if (expanded(run) / SWEEP_MARK).is_file():
            chosen = content.chosen
            budget = Budget.of(remove=remove)
            if budget is None and chosen is not None and chosen.target is not None:
                budget = Budget("params", chosen.target)
            size = 1 if chosen is None else chosen.removed
            result = from_sweep(run, budget or Budget("remove", size), original)
            return result.model, result.blocks
    raise BlockfitError(
        "there is no small model to show; give a folder that compress or sweep wrote as well"
    )


def beside(
    out: Output,
    content: Content,
    original: nn.Module,
    small: nn.Module,
    blocks: Blocks,
    images: Images,
) -> Content:
    """``content`` with both models on the same images."""
    out.say("both models on the same images")
    return replace(content, side=side_by_side(original, small, blocks, images, out.count))
