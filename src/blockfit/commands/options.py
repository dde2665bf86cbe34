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
from blockfit.arguments import at_least
from blockfit.errors import BlockfitError
from blockfit.fit.plan import MAP_KINDS
from blockfit.units import bytes_of

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


class Rare(str):
    """The panel of an option that ``--help`` leaves out and ``--help-all`` shows."""


def option(
    name: str, help: str, panel: str = OUT, metavar: str | None = None, *short: str, **more: Any
) -> Any:
    """An option, with its short name if it has one, in one of the panels of ``--help``."""
    return typer.Option(name, *short, help=help, rich_help_panel=panel, metavar=metavar, **more)


def rare(
    name: str, help: str, panel: str = OUT, metavar: str | None = None, *short: str, **more: Any
) -> Any:
    """An option that ``--help-all`` alone shows."""
    return option(name, help, Rare(panel), metavar, *short, **more)


# -- models and images --------------------------------------------------------------------------

MODEL_HELP = "A folder, a Hub id, timm/, torchvision/ or open_clip/NAME, or demo."

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
MaybeModel = Annotated[str | None, typer.Argument(help=MODEL_HELP)]
Small = Annotated[str, typer.Argument(help="A folder that compress wrote, or any model.")]
Against = Annotated[
    str | None, option("--against", "The original, to compare with.", DATA, "MODEL")
]
Pictures = Annotated[
    str, option("--images", "Folder, file, pattern, data set or digits.", DATA, "DATA")
]
MaybePictures = Annotated[
    str | None, option("--images", "Folder, file, pattern, data set or digits.", DATA, "DATA")
]


def how_many(text: str | int) -> int | str:
    """A number of images, or ``all``; a default is a number already."""
    if isinstance(text, int):
        return text
    if text == "all" or text.strip().isdecimal():
        return text if text == "all" else int(text)
    raise typer.BadParameter(f"{text!r} is no number of images; write one, such as 512, or all")


Limit = Annotated[
    Any, option("--limit", "Draw so many over the whole set.", DATA, "N|all", parser=how_many)
]
Seed = Annotated[int, rare("--seed", "Of every draw.", DATA, "N")]
BatchSize = Annotated[int, rare("--batch-size", "Images per forward.", DATA, "N")]
BlocksPath = Annotated[
    str | None,
    rare("--blocks", "Dotted path of the list of blocks; else found.", DATA, "PATH"),
]

# -- what to remove, and how --------------------------------------------------------------------

Params = Annotated[
    str | None, option("--params", "Keep at most this part: 62% or 0.62.", REMOVE, "PART")
]
Remove = Annotated[int | None, option("--remove", "Remove so many blocks.", REMOVE, "N")]
FromSweep = Annotated[
    Path | None,
    option("--from", "A sweep; needs a budget. With --images it is met exactly.", REMOVE, "FOLDER"),
]
Spans = Annotated[
    list[str] | None,
    rare("--span", "By hand: 9:11 removes blocks 9, 10. Repeatable.", REMOVE, "A:B"),
]

# -- what is written and said -------------------------------------------------------------------

Folder = Annotated[Path, option("--output", "Folder to write.", OUT, "FOLDER", "-o")]
MaybeFolder = Annotated[Path | None, option("--output", "Folder to write.", OUT, "FOLDER", "-o")]
Overwrite = Annotated[bool, option("--overwrite", "Replace what an earlier run wrote.", OUT)]
BaseModel = Annotated[
    str | None, option("--base-model", "The original on the Hub, for the card.", HOW, "OWNER/NAME")
]
License = Annotated[str | None, option("--license", "Of the original, for the card.", HOW, "ID")]
ReportFile = Annotated[
    Path | None, option("--report", "Explain the run on one HTML page.", OUT, "FILE")
]
Resume = Annotated[bool, rare("--resume", "Save progress, and go on from it.", OUT)]
Json = Annotated[bool, option("--json", "One JSON object on standard output.", OUT)]
Quiet = Annotated[bool, rare("--quiet", "Errors only.", OUT, None, "-q")]
Verbose = Annotated[bool, option("--verbose", "Log what is done; more tables.", OUT, None, "-v")]
Debug = Annotated[bool, rare("--debug", "Show tracebacks.", OUT)]


# -- groups: a parameter of such a type becomes the options of its fields --------------------------


@dataclass(frozen=True)
class Reading:
    """How images are drawn and read."""

    limit: Limit = None
    seed: Seed = 0
    batch_size: BatchSize = 32
    image_column: Annotated[
        str | None, rare("--image-column", "Of a table; found by its type.", DATA, "NAME")
    ] = None
    label_column: Annotated[
        str | None, rare("--label-column", "Of a table; found by its type.", DATA, "NAME")
    ] = None
    preprocessing: Annotated[
        str | None,
        rare("--preprocessing", "Where the model does not say: 224, or a file.", DATA, "HOW"),
    ] = None
    workers: Annotated[int, rare("--workers", "Processes that decode; 0: this one.", DATA, "N")] = 0
    max_pixels: Annotated[
        int | None, rare("--max-pixels", "Pictures of more are unreadable; 178956970.", DATA, "N")
    ] = None

    def check(self) -> None:
        """Refuse before any work what ``blockfit.images`` would refuse."""
        count = None if self.limit == "all" else self.limit
        at_least(1, batch_size=self.batch_size, limit=count, max_pixels=self.max_pixels)
        at_least(0, workers=self.workers, seed=self.seed)

    def open(self, source: Any, model: nn.Module | None, **changes: Any) -> Images:
        """The images of ``source``, prepared as ``model`` needs them."""
        return blockfit.images(source, model, **{**asdict(self), **changes})


@dataclass(frozen=True)
class Written:
    """Texts, for models of texts, and of images and texts."""

    texts: Annotated[
        str | None,
        rare("--texts", "Text file, table or data set; both with --images.", DATA, "DATA"),
    ] = None
    text_column: Annotated[
        str | None, rare("--text-column", "Of a table; found by its name.", DATA, "NAME")
    ] = None
    tokenizer: Annotated[
        str | None, rare("--tokenizer", "Folder or Hub id; else the model's.", DATA, "NAME")
    ] = None

    def check(self) -> None:
        """Refuse before any work what has no use without texts."""
        if self.texts is None:
            refuse(
                {"--text-column": self.text_column, "--tokenizer": self.tokenizer},
                "has no use without --texts",
            )

    def need_data(self, images: str | None, report: Path | None = None) -> None:
        """Refuse before any work that there is nothing to run on, or what texts cannot be.

        Raises:
            BlockfitError: where there are neither images nor texts; for a report on texts.
        """
        if images is None and self.texts is None:
            raise BlockfitError(
                "give --images DATA; or --texts DATA for a model of texts; or both for both towers "
                "of a model"
            )
        if report is not None and self.texts is not None:
            raise BlockfitError(
                "--report shows images beside each other, and cannot show --texts; leave it out"
            )

    def open(self, images: str | None, model: nn.Module, reading: Reading) -> Images:
        """What a command runs on: images, texts, or both in pairs."""
        from blockfit.data.texts import check_two_towers

        if images is not None:
            if self.texts is None:
                return reading.open(images, model)
            check_two_towers(model)
            pictures = reading.open(images, model)
            tokenizer = None if self.tokenizer is None else self._tokenizer(model)
            return blockfit.pairs(
                pictures, self.texts, model, tokenizer=tokenizer, column=self.text_column
            )
        how = {"limit": reading.limit, "seed": reading.seed, "batch_size": reading.batch_size}
        return blockfit.texts(self.texts, self._tokenizer(model), column=self.text_column, **how)

    def words(self, images: str | None) -> list[str]:
        """The data of the next command to run, as it is written."""
        pictures = ["--images", "TEST_IMAGES"] if images is not None or self.texts is None else []
        return [*pictures, *([] if self.texts is None else ["--texts", "TEST_TEXTS"])]

    def _tokenizer(self, model: nn.Module) -> Any:
        from blockfit.data.texts import check_takes_texts
        from blockfit.models.text_tower import named_tokenizer

        check_takes_texts(model)
        return model if self.tokenizer is None else named_tokenizer(model, self.tokenizer)


@dataclass(frozen=True)
class Code:
    """Whether code of a checkpoint may run; for commands that have no choice of device."""

    trust_remote_code: Annotated[
        bool, rare("--trust-remote-code", "Run code that comes with a Hub checkpoint.", DATA)
    ] = False

    def place(self) -> str | None:
        """The torch device; ``None`` where a model stays where it is loaded."""
        return None

    def load(self, name: str) -> nn.Module:
        """The model of that name; what is not asked for is not passed on."""
        options: dict[str, Any] = {"trust_remote_code": True} if self.trust_remote_code else {}
        return blockfit.load(name, device=self.place(), **options)

    def load_small(self, name: str) -> tuple[nn.Module, Blocks | None]:
        """A model, and where its blocks are, where it was saved by blockfit."""
        from blockfit.formats.folder import is_saved, load_saved

        if is_saved(name):
            saved = load_saved(name, device=self.place())
            return saved.model, saved.blocks
        return self.load(name), None


@dataclass(frozen=True)
class Loading(Code):
    """How a model is loaded."""

    device: Annotated[str, option("--device", "auto (cuda, mps, cpu), cuda:1, …", DATA, "NAME")] = (
        "auto"
    )

    def place(self) -> str:
        """The torch device, which is there.

        Raises:
            BlockfitError: where it is not.
        """
        import torch

        name = processes.own_device(best_device() if self.device == "auto" else self.device)
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise BlockfitError(f"cannot use --device {name}: {reason}") from error
        return name


def best_device() -> str:
    """What ``--device auto`` means here: a CUDA device, Apple's GPU, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@dataclass(frozen=True)
class Amount:
    """How small the model has to be, or how much it may lose."""

    remove: Remove = None
    params: Params = None
    flops: Annotated[
        str | None, rare("--flops", "Keep at most this part of them.", REMOVE, "PART")
    ] = None
    latency: Annotated[
        str | None, option("--latency", "At most this part of it, on this machine.", REMOVE, "PART")
    ] = None
    max_kl: Annotated[
        float | None, rare("--max-kl", "At most this KL divergence, in nats.", REMOVE, "X")
    ] = None
    max_drop: Annotated[
        float | None, option("--max-drop", "Lose at most so many points of top-1.", REMOVE, "X")
    ] = None
    force_budget: Annotated[
        bool, rare("--force-budget", "Go by what --max-… measures, not by what is sure.", REMOVE)
    ] = False

    def budget(self) -> Budget | None:
        """The one that was given."""
        from blockfit.search.budget import Budget

        kinds = asdict(self)
        if kinds.pop("force_budget") and self.max_kl is None and self.max_drop is None:
            raise BlockfitError("--force-budget has no use without --max-kl or --max-drop")
        return Budget.of(**kinds)


@dataclass(frozen=True)
class Method:
    """Which spans go and what is fitted in their place."""

    recipe: Annotated[
        str | None,
        rare(
            "--recipe",
            "default, paper, plain, identity, corp, vbp, magnitude.",
            HOW,
            "NAME",
            show_default=False,
        ),
    ] = None
    plain: Annotated[
        bool, rare("--plain", "As --recipe plain: a stock checkpoint can hold it.", HOW)
    ] = False
    map: Annotated[str | None, rare("--map", f"{', '.join(MAP_KINDS)}.", HOW, "KIND")] = None
    rank: Annotated[int | None, rare("--rank", "Of low-rank maps.", HOW, "N")] = None
    per_token_type: Annotated[
        bool, rare("--per-token-type", "One map for prefix, one for patch tokens.", HOW)
    ] = False
    ridge: Annotated[
        str | None, rare("--ridge", "λ of the maps (0: least squares) or auto.", HOW, "X")
    ] = None
    prefix_weight: Annotated[
        float | None,
        rare("--prefix-weight", "Of a prefix token in fits; patch tokens: 1.", HOW, "X"),
    ] = None
    repair: Annotated[str | None, rare("--repair", "none, mlp, mlp+attention.", HOW, "WHAT")] = None
    repair_ridge: Annotated[
        float | None,
        rare("--repair-ridge", "λ of the repairs, towards the original weights.", HOW, "X"),
    ] = None
    select: Annotated[
        str | None,
        rare("--select", "Choose spans by effect, mse, angular, first, last, random.", HOW, "HOW"),
    ] = None
    contiguous: Annotated[bool, rare("--contiguous", "One span only.", HOW)] = False
    views: Annotated[
        int | None,
        rare("--views", "Show each image so often, as crops; else 1 to 8.", HOW, "N"),
    ] = None
    cuts: Annotated[
        str | None,
        option("--cuts", "What may go, of blocks,mlp,values,keys.  [default: all]", HOW, "LIST"),
    ] = None
    uniform: Annotated[bool, rare("--uniform", "One width for all MLPs, and no maps.", HOW)] = False

    def check(self) -> None:
        """Refuse before any work what is no recipe."""
        self.chosen()

    def chosen(self) -> Recipe:
        """The recipe with all that changes it."""
        from blockfit.search.recipes import recipe_for

        return recipe_for(self.named(), **self.changes())

    def named(self) -> str | Recipe:
        """The recipe that ``--recipe``, ``--plain``, ``--select`` and ``--contiguous`` mean."""
        from blockfit.search.recipes import named_recipe

        if self.plain and self.recipe not in (None, "plain"):
            raise BlockfitError(
                f"--plain is --recipe plain; leave --plain or --recipe {self.recipe} out"
            )
        chosen = "plain" if self.plain else self.recipe or "default"
        changes: dict[str, Any] = {} if self.select is None else {"select": self.select}
        if self.contiguous:
            changes["contiguous"] = True
        return named_recipe(chosen, **changes) if changes else chosen

    def changes(self) -> dict[str, Any]:
        """What changes a recipe, by the names that ``compress`` has for it; ``None``: nothing."""
        names = ("map", "rank", "ridge", "prefix_weight", "repair", "repair_ridge", "views", "cuts")
        changed: dict[str, Any] = {name: getattr(self, name) for name in names}
        return {
            **changed,
            "per_token_type": self.per_token_type or None,
            "uniform": self.uniform,
        }


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise BlockfitError(f"cannot read {option} {text!r}; write block numbers, such as 3,6,9")
    return tuple(int(part) for part in parts)


@dataclass(frozen=True)
class Judging:
    """What the search must leave alone, and what it judges by."""

    protect: Annotated[
        str | None, rare("--protect", "Blocks that must stay, such as 3,6,9.", HOW, "LIST")
    ] = None
    whole: Annotated[str | None, rare("--whole", "Blocks that nothing may cut.", HOW, "LIST")] = (
        None
    )
    multiple_of: Annotated[
        int | None,
        rare("--multiple-of", "Widths of MLPs are multiples of it.  [default: 32]", HOW, "N"),
    ] = None
    hold_out: Annotated[
        float | None,
        rare("--hold-out", "Part of the images that chooses the plan: 0.2.", HOW, "PART"),
    ] = None
    final: Annotated[
        int | None,
        rare("--final", "Images for the final figures alone: 1000, or a fifth.", HOW, "N"),
    ] = None

    def check(self) -> None:
        """Refuse before any work what is no part and no number."""
        self.protected(), self.kept_whole()
        at_least(1, multiple_of=self.multiple_of)
        at_least(0, final=self.final)
        if not 0 < self.part() < 1:
            raise BlockfitError(f"hold_out= takes a part between 0 and 1, got {self.part():g}")

    def protected(self) -> tuple[int, ...]:
        """``--protect 3,6,9`` as numbers."""
        return _numbers("--protect", self.protect)

    def kept_whole(self) -> tuple[int, ...]:
        """``--whole 0,11`` as numbers."""
        return _numbers("--whole", self.whole)

    def how(self) -> dict[str, Any]:
        """By the names that ``compress`` has for it."""
        return {
            "protect": self.protected(),
            "whole": self.kept_whole(),
            "multiple_of": self.multiple_of,
            "hold_out": self.part(),
            "final": self.final,
        }

    def part(self) -> float:
        """The part of the images that chooses the plan."""
        from blockfit.search.setting import HOLD_OUT as usual

        return usual if self.hold_out is None else self.hold_out


@dataclass(frozen=True)
class Running:
    """What a long run keeps while it runs."""

    resume: Resume = False
    max_memory: Annotated[
        str | None, rare("--max-memory", "For sums and states above the model: 2GB.", HOW, "SIZE")
    ] = None

    def check(self) -> None:
        """Refuse before any work what is no memory."""
        if self.max_memory is not None:
            bytes_of(self.max_memory)

    def state(self, output: Path | None) -> Path | None:
        """Where progress is saved: beside the output, where ``--resume`` was given.

        Raises:
            BlockfitError: where there is no output to save it beside.
        """
        from blockfit.checkpoint import place_beside

        if self.resume and output is None:
            raise BlockfitError("--resume saves beside the output; name one with -o")
        return place_beside(output) if self.resume and output is not None else None


def short_names(names: list[str]) -> dict[str, str]:
    """What tables call each model: the last part of its path where that tells them apart."""
    short = [Path(name).name or name for name in names]
    return dict(zip(names, short if len(set(short)) == len(names) else names, strict=True))


def given(*groups: Any, **values: Any) -> dict[str, Any]:
    """Options by their names on the command line, those of groups among them."""
    merged = {name: value for group in groups for name, value in asdict(group).items()}
    return {f"--{name.replace('_', '-')}": value for name, value in {**values, **merged}.items()}


def refuse(options: dict[str, Any], why: str) -> None:
    """Refuse options that were given where they have no use."""
    for name, value in options.items():
        if value is not None and value is not False and value != []:
            raise BlockfitError(f"{name} {why}")


def opened(
    out: Output,
    model: str,
    images: str | None,
    reading: Reading,
    loading: Loading,
    calibrating: bool = False,
    written: Written | None = None,
) -> tuple[nn.Module, Images]:
    """A model and images for it, as the command line names them; both are told of.

    Args:
        calibrating: take as many images as a calibration does where nobody says how many.
        written: texts beside the images, or instead of them.
    """
    from blockfit.data.paths import check_there

    if images is not None:
        check_there(images)
    out.say(f"loading {model}")
    loaded = loading.load(model)
    given = pictures = (written or Written()).open(images, loaded, reading)
    if calibrating:
        from blockfit.search.setting import CALIBRATION_IMAGES

        pictures = given.draw(CALIBRATION_IMAGES, reading.seed)
    out.show_images(pictures, loading.place(), pictures is not given)
    return loaded, pictures
