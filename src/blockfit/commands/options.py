"""The options of the ``blockfit`` command, each written once, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from blockfit import processes as ranks
from blockfit.commands.output import start_logging
from blockfit.errors import BlockfitError
from blockfit.evaluation.protocols import PROTOCOLS
from blockfit.fit.plan import MAP_KINDS
from blockfit.search.recipes import RECIPES, SELECTIONS, Recipe, named_recipe
from blockfit.search.session import HOLD_OUT
from blockfit.search.solve import REPAIRS


def option(*names: str, help: str, panel: str | None = None, **more: Any) -> Any:
    """An option in one of the panels of ``--help``."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def _log(wanted: bool) -> None:
    if wanted:
        start_logging()


REMOVE, HOW, DATA, OUT = "What to remove", "How", "Model and images", "Output"
FORM = "Form, one of"

Model = Annotated[
    str,
    typer.Argument(
        help="A model folder, a Hub id, timm/, torchvision/ or open_clip/NAME, or demo."
    ),
]
MaybeModel = Annotated[
    str | None,
    typer.Argument(
        help="A model folder, a Hub id, timm/, torchvision/ or open_clip/NAME, or demo."
    ),
]
Small = Annotated[str, typer.Argument(help="A folder that compress wrote, or any model.")]
TestData = Annotated[
    str,
    option("--data", help="A folder, file, pattern, data set or digits:test.", panel=DATA),
]
Against = Annotated[
    str | None, option("--against", help="The original model, to compare with.", panel=DATA)
]
Protocol = Annotated[
    list[str] | None,
    option(
        "--protocol",
        help=f"Judge as well by {', '.join(PROTOCOLS)}. Repeatable.",
        panel=HOW,
    ),
]
Train = Annotated[
    str | None, option("--train", help="Labelled images that --protocol learns from.", panel=DATA)
]
Classes = Annotated[
    Path | None,
    option("--classes", help="Class names for zero-shot, one per line.", panel=DATA),
]
Prompts = Annotated[
    list[str] | None,
    option("--prompt", help="For zero-shot, {} is the class name. Repeatable.", panel=HOW),
]
Masks = Annotated[
    str | None,
    option("--masks", help="For dense: a folder of masks, or a column of --data.", panel=DATA),
]
TrainLimit = Annotated[
    int | None, option("--train-limit", help="Draw this many of --train.", panel=DATA)
]
Pictures = Annotated[
    str,
    option("--images", help="A folder, file, pattern, data set or digits.", panel=DATA),
]
MaybePictures = Annotated[
    str | None,
    option("--images", help="A folder, file, pattern, data set or digits.", panel=DATA),
]
Limit = Annotated[
    int | None, option("--limit", help="Draw this many images over the whole set.", panel=DATA)
]
Seed = Annotated[int, option("--seed", help="Of every draw.", panel=DATA)]
BatchSize = Annotated[int, option("--batch-size", help="Images per forward.", panel=DATA)]
ImageColumn = Annotated[
    str | None, option("--image-column", help="Of a table; found by its type.", panel=DATA)
]
LabelColumn = Annotated[
    str | None, option("--label-column", help="Of a table; found by its type.", panel=DATA)
]
Workers = Annotated[
    int, option("--workers", help="Processes that decode; 0 decodes in this one.", panel=DATA)
]
MaxPixels = Annotated[
    int | None,
    option("--max-pixels", help="Pictures of more are unreadable; 178956970.", panel=DATA),
]
Device = Annotated[
    str | None, option("--device", help="cpu (default), cuda, cuda:1, mps.", panel=DATA)
]
TrustRemoteCode = Annotated[
    bool,
    option("--trust-remote-code", help="Run code that comes with a Hub checkpoint.", panel=DATA),
]
BlocksPath = Annotated[
    str | None,
    option("--blocks", help="Dotted path of the list of blocks; found by default.", panel=DATA),
]
Spans = Annotated[
    list[str] | None,
    option("--span", help="By hand: 9:11 removes blocks 9 and 10. Repeatable.", panel=REMOVE),
]
Remove = Annotated[int | None, option("--remove", help="This many blocks.", panel=REMOVE)]
Params = Annotated[
    str | None,
    option("--params", help="Until at most this part remains, such as 62%.", panel=REMOVE),
]
Flops = Annotated[str | None, option("--flops", help="The same of the FLOPs.", panel=REMOVE)]
Latency = Annotated[
    str | None, option("--latency", help="The same of the latency on this machine.", panel=REMOVE)
]
MaxKl = Annotated[
    float | None, option("--max-kl", help="As much as this KL allows, in nats.", panel=REMOVE)
]
MaxDrop = Annotated[
    float | None,
    option("--max-drop", help="As much as this loss of top-1 allows, in points.", panel=REMOVE),
]
FromSweep = Annotated[
    Path | None, option("--from", help="A sweep's folder; needs a budget, no images.", panel=REMOVE)
]
RecipeName = Annotated[
    str | None, option("--recipe", help=f"{', '.join(RECIPES)}.", panel=HOW, show_default=False)
]
Plain = Annotated[
    bool, option("--plain", help="The same as --recipe plain: adds no module.", panel=HOW)
]
PlainCheckpoint = Annotated[
    bool,
    option(
        "--plain",
        help="An ordinary transformers or timm checkpoint with fewer blocks.",
        panel=FORM,
    ),
]
Onnx = Annotated[bool, option("--onnx", help="An ONNX file.", panel=FORM)]
Pt2 = Annotated[bool, option("--pt2", help="A torch.export program (.pt2).", panel=FORM)]
Hub = Annotated[
    bool,
    option("--hub", help="A transformers folder with its own code, for any map.", panel=FORM),
]
ExportedFolder = Annotated[
    Path, typer.Argument(help="A folder that export --plain or --hub wrote.")
]
Repository = Annotated[str, typer.Argument(help="Where to, as owner/name.")]
Private = Annotated[bool, option("--private", help="Where the repository is new.", panel=OUT)]
ResolutionText = Annotated[
    str | None,
    option(
        "--resolution",
        help="Of the images: 224, 224x320 (height first) or dynamic; by default the model's own.",
        panel=HOW,
    ),
]
FixedBatch = Annotated[
    int | None,
    option("--fixed-batch", help="Take this many images only, instead of any number.", panel=HOW),
]
Opset = Annotated[
    int | None, option("--opset", help="Version of the ONNX operator set; 18.", panel=HOW)
]
CompareLevels = Annotated[
    bool,
    option("--compare-levels", help="Time onnxruntime's graph optimisation levels.", panel=HOW),
]
CheckPictures = Annotated[
    str | None,
    option("--images", help="To compare on; by default two sample photographs.", panel=DATA),
]
Map = Annotated[str | None, option("--map", help=f"{', '.join(MAP_KINDS)}.", panel=HOW)]
Rank = Annotated[int | None, option("--rank", help="Of low-rank maps.", panel=HOW)]
Repair = Annotated[str | None, option("--repair", help=f"{', '.join(REPAIRS)}.", panel=HOW)]
Ridge = Annotated[
    str | None,
    option("--ridge", help="λ of the maps: a number (0: plain least squares) or auto.", panel=HOW),
]
RepairRidge = Annotated[
    float | None,
    option("--repair-ridge", help="λ of the repairs, towards the original weights.", panel=HOW),
]
PrefixWeight = Annotated[
    float | None,
    option("--prefix-weight", help="Of a prefix token in every fit; patch tokens: 1.", panel=HOW),
]
PerTokenType = Annotated[
    bool, option("--per-token-type", help="One map for prefix and one for patch tokens.", panel=HOW)
]
Select = Annotated[
    str | None, option("--select", help=f"Choose spans by {', '.join(SELECTIONS)}.", panel=HOW)
]
Contiguous = Annotated[bool, option("--contiguous", help="One span only.", panel=HOW)]
Protect = Annotated[
    str | None, option("--protect", help="Blocks that must stay, such as 3,6,9.", panel=HOW)
]
HoldOut = Annotated[
    float | None,
    option("--hold-out", help=f"Part of the images that judges: {HOLD_OUT}.", panel=HOW),
]
Folder = Annotated[Path, option("--output", "-o", help="Folder to write.", panel=OUT)]
Target = Annotated[Path, option("--output", "-o", help="Folder or file to write.", panel=OUT)]
MaybeFolder = Annotated[Path | None, option("--output", "-o", help="Folder to write.", panel=OUT)]
Overwrite = Annotated[
    bool, option("--overwrite", help="Replace what an earlier run wrote.", panel=OUT)
]
ReportFile = Annotated[
    Path | None, option("--report", help="Explain the run on one HTML page.", panel=OUT)
]
Verbose = Annotated[
    bool,
    option("--verbose", "-v", help="Log what is done.", panel=OUT, callback=_log, is_eager=True),
]
MeasureLatency = Annotated[
    int | None,
    option(
        "--measure-latency",
        help="Time every plan against the original, this many images per forward.",
        panel=HOW,
    ),
]
MaxMemory = Annotated[
    str | None,
    option("--max-memory", help="For sums and hidden states above the model: 2GB.", panel=HOW),
]
Resume = Annotated[
    bool,
    option("--resume", help="Save progress beside the output, and go on from it.", panel=OUT),
]
Json = Annotated[bool, option("--json", help="One JSON object on standard output.", panel=OUT)]
Quiet = Annotated[bool, option("--quiet", "-q", help="Errors only.", panel=OUT)]
Debug = Annotated[bool, option("--debug", help="Show tracebacks.", panel=OUT)]


def device(name: str | None) -> str | None:
    """A torch device that is there.

    Raises:
        BlockfitError: where it is not.
    """
    if name is not None:
        name = ranks.own_device(name)
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise BlockfitError(f"cannot use --device {name}: {reason}") from error
    return name


def recipe(name: str | None, plain: bool, select: str | None, contiguous: bool) -> str | Recipe:
    """The recipe that ``--recipe``, ``--plain``, ``--select`` and ``--contiguous`` mean."""
    if plain and name not in (None, "plain"):
        raise BlockfitError(f"--plain is --recipe plain; leave --plain or --recipe {name} away")
    chosen = "plain" if plain else name or "default"
    changes: dict[str, Any] = {} if select is None else {"select": select}
    if contiguous:
        changes["contiguous"] = True
    return named_recipe(chosen, **changes) if changes else chosen


READING_NAMES = ("image_column", "label_column", "workers", "max_pixels")
"""Options that say how images are read, by their names in ``api.images``."""


def reading(context: typer.Context) -> dict[str, Any]:
    """The options of ``READING_NAMES`` that a command was given."""
    return {name: context.params[name] for name in READING_NAMES}


def loading(context: typer.Context) -> dict[str, Any]:
    """Options of ``api.load`` that a command was given; what is not asked for is left out."""
    name = "trust_remote_code"
    return {name: True} if context.params[name] else {}


HOW_NAMES = (
    "map",
    "rank",
    "per_token_type",
    "ridge",
    "prefix_weight",
    "repair",
    "repair_ridge",
)
"""Options that change a recipe, by their names in ``api.compress`` and ``recipe_for``."""


def how(context: typer.Context) -> dict[str, Any]:
    """The options of ``HOW_NAMES`` that a command was given; ``None`` for the others."""
    given = {name: context.params[name] for name in HOW_NAMES}
    return {name: None if value is False else value for name, value in given.items()}


def block_numbers(text: str | None) -> tuple[int, ...]:
    """``3,6,9`` as numbers."""
    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise BlockfitError(f"cannot read --protect {text!r}; write block numbers, such as 3,6,9")
    return tuple(int(part) for part in parts)


def refuse(options: dict[str, Any], why: str) -> None:
    """Refuse options that were given where they have no use.

    Raises:
        BlockfitError: naming the first one.
    """
    for name, value in options.items():
        if value is not None and value is not False and value != []:
            raise BlockfitError(f"{name} {why}")
