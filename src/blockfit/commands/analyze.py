"""``blockfit analyze``: how alike the hidden states of all blocks are."""

from __future__ import annotations

import blockfit
from blockfit.commands import options as opt
from blockfit.commands import outlook
from blockfit.commands.command import command
from blockfit.commands.output import Output


@command("Look", "blockfit analyze MODEL --images PHOTOS -o analysis/")
def analyze(
    out: Output,
    model: opt.Model,
    reading: opt.Reading,
    loading: opt.Loading,
    written: opt.Written,
    running: opt.Running,
    images: opt.MaybePictures = None,
    output: opt.MaybeFolder = None,
    blocks: opt.BlocksPath = None,
    report: opt.ReportFile = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Compare the hidden states of all blocks (MSE, cosine, CKA …)."""
    from blockfit.commands.reporter import Reporter
    from blockfit.evaluation import summaries
    from blockfit.evaluation.analysis import FORM
    from blockfit.files import check_target

    written.need_data(images, report)
    page = Reporter(report)
    state = running.state(output)
    if output is not None:
        check_target(output, FORM, overwrite)
    out.expect(outlook.ANALYSIS)
    with out.working():
        original, pictures = opt.opened(out, model, images, reading, loading, True, written)
        result = blockfit.analyze(
            original,
            pictures,
            output,
            blocks=blocks,
            seed=reading.seed,
            overwrite=overwrite,
            say=out.say,
            progress=out.count,
            resume=state,
            max_memory=running.max_memory,
        )
        page.analysed(out, result.to_json())
    out.show([summaries.analysis(result.tables)])
    out.warn(result.warnings)
    if output is not None:
        out.line(f"all pairs of states: {', '.join(str(output / name) for name in result.files)}")
    page.tell(out)
    out.result({**result.to_json(), "output": None if output is None else str(output)})
