"""``blockfit compare``: any number of models side by side on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from blockfit.commands import options as opt
from blockfit.commands import outlook
from blockfit.commands.command import command
from blockfit.commands.output import Output
from blockfit.errors import BlockfitError

if TYPE_CHECKING:
    from blockfit.evaluation.compare import Entrant

Models = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Folders that compress wrote, or models.")
]
Against = Annotated[
    str | None,
    opt.option("--against", "Tell differences from it; else the largest.", opt.DATA, "MODEL"),
]


@command(
    "Look", "blockfit compare small/ smaller/ MODEL --images TEST_IMAGES", {"--data": "--images"}
)
def compare(
    out: Output,
    models: Models,
    images: opt.Pictures,
    reading: opt.Reading,
    loading: opt.Loading,
    against: Against = None,
) -> None:
    """Compare models on the same images: intervals, classes, flips."""
    from blockfit.data.paths import check_there
    from blockfit.evaluation.compare import compare as compare_models

    names = list(dict.fromkeys([*models, *([] if against is None else [against])]))
    if len(names) < 2:
        raise BlockfitError("there is one model; give two or more to compare")
    check_there(images)
    shown = opt.short_names(names)
    out.expect(outlook.of_pass("comparing"))
    with out.working():
        entrants = _entrants(out, shown, images, reading, loading)
        reference = None if against is None else shown[against]
        found = compare_models(entrants, reference, out.count)
    out.show(found.summary(out.verbose).parts)
    out.result(found.to_json())


def _entrants(
    out: Output,
    names: Mapping[str, str],
    images: str,
    reading: opt.Reading,
    loading: opt.Loading,
) -> dict[str, Entrant]:
    from blockfit.evaluation.compare import Entrant, preparing

    models, places = {}, {}
    for name, shown in names.items():
        out.say(f"loading {name}")
        models[shown], places[shown] = loading.load_small(name)
    prepared, told = preparing(models), set[str]()
    found = {}
    for name, model in models.items():
        pictures = reading.open(images, prepared[name])
        how = pictures.description()
        if (line := f"{how['preprocessing']} {how['labels']}") not in told:
            out.show_images(pictures, None if told else loading.place())
            told.add(line)
        found[name] = Entrant(model, pictures, places[name])
    out.say(f"comparing {len(found)} models")
    return found
