"""``blockfit demo``: the shipped model made smaller, and what it was worth."""

from __future__ import annotations

import blockfit
from blockfit.commands import options as opt
from blockfit.commands import outlook
from blockfit.commands.command import command
from blockfit.commands.output import Output

IMAGES = 512
"""Calibration images."""

PARAMS = "62%"
"""The part of the parameters that remains where nothing else is asked for."""


@command("Start", "blockfit demo")
def demo(
    out: Output,
    params: opt.Params = None,
    remove: opt.Remove = None,
    output: opt.MaybeFolder = None,
    seed: opt.Seed = 0,
    report: opt.ReportFile = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Make a shipped model smaller, to 62% of its parameters, and show what it is worth."""
    from blockfit.commands.reporter import Reporter
    from blockfit.evaluation.summaries import evaluation
    from blockfit.formats.folder import check_folder
    from blockfit.search.summaries import compression, plan_lines

    page = Reporter(report)
    if output is not None:
        check_folder(output, overwrite)
    if remove is None and params is None:
        params = PARAMS
    budget = opt.Amount(remove=remove, params=params).budget()
    out.expect(outlook.of_compress(opt.Method().chosen(), budget))
    with out.working():
        reading = opt.Reading(limit=IMAGES, seed=seed, batch_size=64)
        original, pictures = opt.opened(out, "demo", "digits", reading, opt.Loading())
        result = blockfit.compress(
            original,
            pictures,
            params=params,
            remove=remove,
            seed=seed,
            say=out.say,
            progress=out.count,
        )
        if output is not None:
            blockfit.save(result, output, overwrite=overwrite)
        out.say("evaluating on the test digits")
        test = blockfit.images("digits:test", original, batch_size=64)
        out.show_images(test)
        worth = blockfit.evaluate(
            result.model, test, against=original, blocks=result.blocks, progress=out.count
        ).to_json()
        page.compressed(out, result, output, original, pictures, test, evaluation=worth)
    out.show(plan_lines(result.plan))
    out.show(compression(result.report, result.blocks.depth, maps=out.verbose))
    out.warn(result.report["warnings"])
    out.show(evaluation(worth))
    if output is not None:
        out.line(f"saved to {output}")
    page.tell(out)
    made = {
        "plan": result.plan.to_json(),
        **result.report,
        "output": None if output is None else str(output),
    }
    out.result({"compress": made, "evaluate": worth})
