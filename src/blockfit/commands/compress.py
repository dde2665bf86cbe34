"""``blockfit compress``: a model made smaller, and saved."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blockfit
from blockfit import processes
from blockfit.commands import options as opt
from blockfit.commands import outlook
from blockfit.commands.command import command
from blockfit.commands.output import Output, keeping
from blockfit.errors import BlockfitError
from blockfit.fit.plan import Plan

if TYPE_CHECKING:
    from blockfit.commands.reporter import Reporter
    from blockfit.search.run import Result


USAGE = "blockfit compress MODEL --images DATA --params 62% -o OUTPUT"


@command("Start", "blockfit compress MODEL --images PHOTOS --params 62% -o small/")
def compress(
    out: Output,
    output: opt.Folder,
    reading: opt.Reading,
    loading: opt.Loading,
    written: opt.Written,
    amount: opt.Amount,
    method: opt.Method,
    judging: opt.Judging,
    running: opt.Running,
    model: opt.MaybeModel = None,
    images: opt.MaybePictures = None,
    blocks: opt.BlocksPath = None,
    span: opt.Spans = None,
    sweep_folder: opt.FromSweep = None,
    report: opt.ReportFile = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Make a model smaller: narrower blocks, and maps for whole ones."""
    from blockfit.checkpoint import forget
    from blockfit.commands.reporter import Reporter
    from blockfit.formats.folder import check_folder

    check_folder(output, overwrite)
    page = Reporter(report)
    if sweep_folder is not None:
        _check_settled(
            opt.given(method, judging, running, span=span, blocks=blocks), images, reading, written
        )
        with out.working():
            rest = (images, reading, judging, running, written)
            result = _from_sweep(out, sweep_folder, amount, model, loading, *rest)
            blockfit.save(result, output, overwrite=overwrite)
            page.compressed(out, result, output, sweep=sweep_folder)
        _show(out, page, result, model or result.source.name, output, written.words(images))
        return
    if model is None or (images is None and written.texts is None):
        raise BlockfitError(f"give a model and --images (or --from a sweep): {USAGE}")
    written.need_data(images, report)
    _check_what(span, amount, method, judging)
    how = {**asdict(amount), **method.changes(), "recipe": method.named(), **judging.how()}
    how |= {"max_memory": running.max_memory, "resume": running.state(output)}
    how |= {"seed": reading.seed, "spans": span or None, "blocks": blocks}
    how |= {"say": out.say, "progress": out.count}
    out.expect(outlook.of_compress(method.chosen(), amount.budget()))
    with out.working(), keeping(lambda: _unfinished(how["resume"])):
        original, pictures = opt.opened(out, model, images, reading, loading, True, written)
        result = blockfit.compress(page.kept(original), pictures, inplace=True, **how)
        if processes.is_first():
            out.say(f"saving to {output}")
            blockfit.save(result, output, overwrite=overwrite)
        shown = pictures.apart(min(opt.LOOKED_AT, len(pictures) // 2), reading.seed)[1]
        page.compressed(out, result, output, original, pictures, shown)
        if how["resume"] is not None:
            forget(how["resume"])
    _show(out, page, result, model, output, written.words(images))


def _check_settled(
    unused: dict[str, Any], images: str | None, reading: opt.Reading, written: opt.Written
) -> None:
    """Refuse before any work what a sweep has settled, or images would be needed for."""
    alone = {"--limit": reading.limit, "--texts": written.texts}
    alone |= {name: unused.pop(name) for name in ("--final", "--max-memory")}
    opt.refuse(unused, "cannot be used with --from: the sweep has settled it")
    if images is None:
        opt.refuse(alone, "has no use with --from without --images")


def _check_what(
    span: list[str] | None, amount: opt.Amount, method: opt.Method, judging: opt.Judging
) -> None:
    """Refuse before any work what does not say what goes."""
    if span:
        opt.refuse(
            {"--select": method.select, "--contiguous": method.contiguous},
            "has no use with --span: the spans are chosen already",
        )
    budget = amount.budget()
    if span and budget is not None:
        option = f"--{budget.kind.replace('_', '-')}"
        raise BlockfitError(f"give --span or a budget, not both --span and {option}")
    if budget is None and not span:
        raise BlockfitError(
            "say what to remove: --span by hand or one budget, such as --remove 3 or --params 62%"
        )
    if span:
        Plan.of(span, "identity")  # refuses spans that overlap
    what = {name: getattr(judging, name) for name in ("protect", "whole", "multiple_of")}
    method.chosen().check_use("spans=" if budget is None else f"{budget.kind}=", **what)


def _from_sweep(
    out: Output,
    folder: Path,
    amount: opt.Amount,
    model: str | None,
    loading: opt.Loading,
    images: str | None,
    reading: opt.Reading,
    judging: opt.Judging,
    running: opt.Running,
    written: opt.Written,
) -> Result:
    """The model of a sweep's plan, made without images; with them, of a plan for the budget."""
    from blockfit.search.sweep import read_sweep

    budget = amount.budget()
    if budget is None:
        raise BlockfitError(
            "say how small: --from needs a budget, such as --remove 3 or --params 62%"
        )
    name = model or read_sweep(folder).content.source.loads_as
    if images is not None:
        if name is None:
            raise BlockfitError("the sweep's model was built by the user; give it as MODEL")
        original, pictures = opt.opened(out, name, images, reading, loading, True, written)
        how: dict[str, Any] = {"final": judging.final, "max_memory": running.max_memory}
        how |= {"say": out.say, "progress": out.count, "force_budget": amount.force_budget}
        return blockfit.from_sweep(folder, budget, original, images=pictures, **how)
    out.say("making the sweep's model")
    out.note(f"device: {loading.place()}")
    known = None if name is None else loading.load(name)
    return blockfit.from_sweep(folder, budget, known, force_budget=amount.force_budget)


def _unfinished(state: Path | None) -> str:
    """What a stopped compression has kept: its state, where ``--resume`` was given."""
    if state is None or not state.exists():
        return "nothing unfinished was saved"
    return f"what is done is kept in {state}, and the same command goes on from there"


def _show(
    out: Output, page: Reporter, result: Result, model: str, output: Path, data: list[str]
) -> None:
    from blockfit.search.summaries import compression, plan_lines

    out.show(plan_lines(result.plan))
    out.show(compression(result.report, result.blocks.depth, maps=out.verbose))
    out.warn(result.report["warnings"])
    out.line(f"saved to {output} in {result.report['seconds']:.1f} s")
    words = ["blockfit", "evaluate", str(output), "--against", model, *data]
    out.line(f"next: {shlex.join(words)}")
    page.tell(out)
    out.result({"plan": result.plan.to_json(), **result.report, "output": str(output)})
