"""The options of the ``blockfit`` command, each written once, and the groups that commands share.

Nothing here imports torch: help, completion and typing errors must answer at once. What the names
of choices are is checked against the code by a test.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import blockfit
from blockfit import processes
from blockfit.commands.tables import show_images
from blockfit.errors import BlockfitError
from blockfit.fit.plan import MAP_KINDS

if TYPE_CHECKING:
    from torch import nn

    from blockfit.commands.output import Output
    from blockfit.data.images import Images
    from blockfit.models.blocks import Blocks
    from blockfit.search.budget import Budget
    from blockfit.search.recipes import Recipe

REMOVE, HOW, DATA, OUT = "What to remove", "How", "Model and images", "Output"
FORM = "Form, one of"

LOOKED_AT = 64
"""Images on which a report compares both models where nobody says how many."""


def option(*names: str, help: str, panel: str | None = None, **more: Any) -> Any:
    """An option in one of the panels of ``--help``."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


# -- models and images --------------------------------------------------------------------------

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

# -- what to remove, and how --------------------------------------------------------------------

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
    str | None, option("--recipe", help="default, paper, plain.", panel=HOW, show_default=False)
]
Plain = Annotated[
    bool, option("--plain", help="The same as --recipe plain: adds no module.", panel=HOW)
]
Map = Annotated[str | None, option("--map", help=f"{', '.join(MAP_KINDS)}.", panel=HOW)]
Rank = Annotated[int | None, option("--rank", help="Of low-rank maps.", panel=HOW)]
Repair = Annotated[str | None, option("--repair", help="none, mlp, mlp+attention.", panel=HOW)]
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
    str | None,
    option(
        "--select", help="Choose spans by effect, mse, angular, first, last, random.", panel=HOW
    ),
]
Contiguous = Annotated[bool, option("--contiguous", help="One span only.", panel=HOW)]
Protect = Annotated[
    str | None, option("--protect", help="Blocks that must stay, such as 3,6,9.", panel=HOW)
]
HoldOut = Annotated[
    float | None,
    option("--hold-out", help="Part of the images that judges: 0.2.", panel=HOW),
]
MaxMemory = Annotated[
    str | None,
    option("--max-memory", help="For sums and hidden states above the model: 2GB.", panel=HOW),
]

# -- what is written and said -------------------------------------------------------------------

Folder = Annotated[Path, option("--output", "-o", help="Folder to write.", panel=OUT)]
MaybeFolder = Annotated[Path | None, option("--output", "-o", help="Folder to write.", panel=OUT)]
Overwrite = Annotated[
    bool, option("--overwrite", help="Replace what an earlier run wrote.", panel=OUT)
]
ReportFile = Annotated[
    Path | None, option("--report", help="Explain the run on one HTML page.", panel=OUT)
]
Resume = Annotated[
    bool,
    option("--resume", help="Save progress beside the output, and go on from it.", panel=OUT),
]
Json = Annotated[bool, option("--json", help="One JSON object on standard output.", panel=OUT)]
Quiet = Annotated[bool, option("--quiet", "-q", help="Errors only.", panel=OUT)]
Verbose = Annotated[bool, option("--verbose", "-v", help="Log what is done.", panel=OUT)]
Debug = Annotated[bool, option("--debug", help="Show tracebacks.", panel=OUT)]


# -- groups: a parameter of such a type becomes the options of its fields --------------------------


@dataclass(frozen=True)
class Reading:
    """How images are drawn and read."""

    limit: Limit = None
    seed: Seed = 0
    batch_size: BatchSize = 32
    image_column: ImageColumn = None
    label_column: LabelColumn = None
    workers: Workers = 0
    max_pixels: MaxPixels = None

    def open(self, source: Any, model: nn.Module | None, **changes: Any) -> Images:
        """The images of ``source``, prepared as ``model`` needs them."""
        return blockfit.images(source, model, **{**asdict(self), **changes})


@dataclass(frozen=True)
class Code:
    """Whether code of a checkpoint may run; for commands that have no choice of device."""

    trust_remote_code: TrustRemoteCode = False

    def load(self, name: str, device: str | None = None) -> nn.Module:
        """The model of that name; what is not asked for is not passed on."""
        options: dict[str, Any] = {"trust_remote_code": True} if self.trust_remote_code else {}
        return blockfit.load(name, device=device, **options)

    def load_small(self, name: str, device: str | None = None) -> tuple[nn.Module, Blocks | None]:
        """A model, and where its blocks are, where it was saved by blockfit."""
        from blockfit.formats.folder import is_saved, load_saved

        if is_saved(name):
            saved = load_saved(name, device=device)
            return saved.model, saved.blocks
        return self.load(name, device), None


@dataclass(frozen=True)
class Loading:
    """How a model is loaded."""

    device: Device = None
    trust_remote_code: TrustRemoteCode = False

    def load(self, name: str) -> nn.Module:
        """The model of that name, on the device."""
        return Code(self.trust_remote_code).load(name, self.place())

    def load_small(self, name: str) -> tuple[nn.Module, Blocks | None]:
        """A model, and where its blocks are, where it was saved by blockfit."""
        return Code(self.trust_remote_code).load_small(name, self.place())

    def place(self) -> str | None:
        """The torch device, which is there.

        Raises:
            BlockfitError: where it is not.
        """
        if self.device is None:
            return None
        import torch

        name = processes.own_device(self.device)
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise BlockfitError(f"cannot use --device {name}: {reason}") from error
        return name


@dataclass(frozen=True)
class Amount:
    """How small the model has to be, or how much it may lose."""

    remove: Remove = None
    params: Params = None
    flops: Flops = None
    latency: Latency = None
    max_kl: MaxKl = None
    max_drop: MaxDrop = None

    def budget(self) -> Budget | None:
        """The one that was given."""
        from blockfit.search.budget import Budget

        return Budget.of(**asdict(self))


@dataclass(frozen=True)
class Method:
    """Which spans go and what is fitted in their place."""

    recipe: RecipeName = None
    plain: Plain = False
    map: Map = None
    rank: Rank = None
    per_token_type: PerTokenType = False
    ridge: Ridge = None
    prefix_weight: PrefixWeight = None
    repair: Repair = None
    repair_ridge: RepairRidge = None
    select: Select = None
    contiguous: Contiguous = False

    def named(self) -> str | Recipe:
        """The recipe that ``--recipe``, ``--plain``, ``--select`` and ``--contiguous`` mean."""
        from blockfit.search.recipes import named_recipe

        if self.plain and self.recipe not in (None, "plain"):
            raise BlockfitError(
                f"--plain is --recipe plain; leave --plain or --recipe {self.recipe} away"
            )
        chosen = "plain" if self.plain else self.recipe or "default"
        changes: dict[str, Any] = {} if self.select is None else {"select": self.select}
        if self.contiguous:
            changes["contiguous"] = True
        return named_recipe(chosen, **changes) if changes else chosen

    def changes(self) -> dict[str, Any]:
        """What changes a recipe, by the names that ``compress`` has for it; ``None``: nothing."""
        names = ("map", "rank", "ridge", "prefix_weight", "repair", "repair_ridge")
        changed: dict[str, Any] = {name: getattr(self, name) for name in names}
        return {**changed, "per_token_type": self.per_token_type or None}


@dataclass(frozen=True)
class Judging:
    """What the search must leave alone, and what it judges by."""

    protect: Protect = None
    hold_out: HoldOut = None

    def protected(self) -> tuple[int, ...]:
        """``3,6,9`` as numbers."""
        parts = [] if self.protect is None else self.protect.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise BlockfitError(
                f"cannot read --protect {self.protect!r}; write block numbers, such as 3,6,9"
            )
        return tuple(int(part) for part in parts)

    def part(self) -> float:
        """The part of the images that judges."""
        from blockfit.search.session import HOLD_OUT as usual

        return usual if self.hold_out is None else self.hold_out


@dataclass(frozen=True)
class Running:
    """What a long run keeps while it runs."""

    resume: Resume = False
    max_memory: MaxMemory = None

    def state(self, output: Path | None) -> Path | None:
        """Where progress is saved: beside the output, where ``--resume`` was given.

        Raises:
            BlockfitError: where there is no output to save it beside.
        """
        from blockfit.checkpoint import place_beside

        if self.resume and output is None:
            raise BlockfitError("--resume saves beside the output; name one with -o")
        return place_beside(output) if self.resume and output is not None else None


def given(*groups: Any, **values: Any) -> dict[str, Any]:
    """Options by their names on the command line, those of groups among them."""
    merged = {name: value for group in groups for name, value in asdict(group).items()}
    return {f"--{name.replace('_', '-')}": value for name, value in {**values, **merged}.items()}


def refuse(options: dict[str, Any], why: str) -> None:
    """Refuse options that were given where they have no use.

    Raises:
        BlockfitError: naming the first one.
    """
    for name, value in options.items():
        if value is not None and value is not False and value != []:
            raise BlockfitError(f"{name} {why}")


def opened(
    out: Output, model: str, images: str, reading: Reading, loading: Loading
) -> tuple[nn.Module, Images]:
    """A model and images for it, as the command line names them; both are told of."""
    out.say(f"loading {model}")
    loaded = loading.load(model)
    pictures = reading.open(images, loaded)
    show_images(out, pictures.description())
    return loaded, pictures
