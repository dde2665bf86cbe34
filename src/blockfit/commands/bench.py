"""``blockfit bench``: the original against compressed models, in turn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import blockfit
from blockfit.commands import options as opt
from blockfit.commands.command import command
from blockfit.commands.output import Output

if TYPE_CHECKING:
    from torch import nn

    from blockfit.models.blocks import Blocks

Smalls = Annotated[
    list[str], typer.Argument(metavar="SMALL...", help="Folders that compress wrote, or models.")
]
Original = Annotated[str, opt.option("--against", "The original.", opt.DATA, "MODEL")]
BatchSizes = Annotated[
    list[int] | None,
    opt.option("--batch-size", "Images per pass; 1 and 32. Repeatable.", opt.HOW, "N"),
]
Engines = Annotated[
    list[str] | None, opt.option("--engine", "eager, compiled, onnx. Repeatable.", opt.HOW, "NAME")
]
Dtypes = Annotated[
    list[str] | None,
    opt.option("--dtype", "float32, bfloat16, float16. Repeatable.", opt.HOW, "NAME"),
]
Threads = Annotated[
    int | None, opt.option("--threads", "On the CPU; torch's own by default.", opt.HOW, "N")
]
Rounds = Annotated[int, opt.option("--rounds", "Timed passes of each model.", opt.HOW, "N")]
MarkdownFile = Annotated[
    Path | None, opt.option("--markdown", "Write the tables to this file.", opt.OUT, "FILE")
]
PictureFile = Annotated[
    Path | None, opt.option("--picture", "Draw the speed-ups as a PNG.", opt.OUT, "FILE")
]


@command("Look", "blockfit bench small/ --against MODEL --markdown bench.md")
def bench(
    out: Output,
    smalls: Smalls,
    against: Original,
    loading: opt.Loading,
    batch_size: BatchSizes = None,
    engine: Engines = None,
    dtype: Dtypes = None,
    threads: Threads = None,
    rounds: Rounds = 11,
    markdown_file: MarkdownFile = None,
    picture: PictureFile = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Time compressed models against their original, in turn."""
    import torch

    from blockfit.evaluation.engines import DTYPES, ENGINES
    from blockfit.evaluation.speed import BATCH_SIZES, Settings
    from blockfit.files import check_file, new_file, write_text
    from blockfit.reports import bench_page as page

    for file, suffix in ((markdown_file, ".md"), (picture, ".png")):
        if file is not None:
            check_file(file, page.FORMS[suffix], overwrite)
    settings = Settings(
        batch_sizes=batch_size or BATCH_SIZES,
        engines=engine or ENGINES[:1],
        dtypes=dtype or DTYPES[:1],
        device=loading.place(),
        threads=torch.get_num_threads() if threads is None else threads,
        rounds=rounds,
    )
    code = opt.Code(loading.trust_remote_code)  # bench moves the models itself
    with out.working():
        models, blocks = _opened(out, smalls, code)
        out.note(f"device: {settings.device}")
        out.say(f"loading {against}")
        original = code.load(against)
        result = blockfit.bench(original, models, settings, blocks=blocks, say=out.say)
    if markdown_file is not None:
        with new_file(markdown_file, page.FORMS[".md"], overwrite) as partial:
            write_text(partial, page.markdown(result))
    if picture is not None:
        with new_file(picture, page.FORMS[".png"], overwrite) as partial:
            page.draw(result, partial)
    out.line(page.how_measured(result))
    out.table(page.COLUMNS, [page.cells(row) for row in result.rows])
    out.table(page.cost_columns(result), page.cost_cells(result))
    for line in (*page.remark_lines(result), *result.skipped):
        out.line(line)
    out.result(result.to_json())


def _opened(
    out: Output, names: list[str], code: opt.Code
) -> tuple[dict[str, nn.Module], dict[str, Blocks]]:
    models: dict[str, nn.Module] = {}
    blocks = {}
    for name, key in opt.short_names(names).items():
        out.say(f"loading {name}")
        models[key], where = code.load_small(name)
        if where is not None:
            blocks[key] = where
    return models, blocks
