"""Where a run came from, a line each: the provenance of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from blockfit.fields import Values
from blockfit.models.source import Source
from blockfit.reports.content import Fact


def model_facts(source: Source) -> list[Fact]:
    """The original: its library, licence and preprocessing."""
    prepared = source.preprocessing
    return [
        Fact("model", source.name),
        Fact("library", source.library),
        Fact("licence of the weights", source.licence or ""),
        Fact("preprocessing", "" if prepared is None else prepared.describe()),
    ]


def run_facts(run: Values, calibration: Values, what: str = "calibration images") -> list[Fact]:
    """The images and settings of a run."""
    total, drawn = calibration.whole("total"), calibration.whole("drawn")
    drawn = calibration.whole("used") if drawn is None else drawn
    images = calibration.text("source") or ""
    if images and total is not None:
        images = f"{total if drawn is None else drawn} of {total} from {images}"
    fit, held_out = calibration.whole("fit"), calibration.whole("held_out")
    views = calibration.whole("views") or 1
    each = f" ({views} views of each)" if views > 1 else ""
    parts = "" if None in (fit, held_out) else f"{fit} fitted on{each}, {held_out} chose the plan"
    for key, use in (("judged", "judged the budget"), ("final", "for the final figures alone")):
        count = calibration.whole(key)
        parts += f", {count} {use}" if count else ""
    seed, budget, seconds = run.whole("seed"), run.text("budget"), run.number("seconds")
    skipped = calibration.texts("skipped")
    lost = f"{len(skipped)}: {', '.join(skipped[:5])}" if skipped else "none"
    return [
        Fact(what, images),
        Fact("images skipped", lost if images else ""),
        Fact("parts of the images", parts),
        Fact("seed", "" if seed is None else str(seed)),
        Fact("recipe", run.inner("recipe").text("name") or ""),
        Fact("budget", budget or ""),
        Fact("duration", "" if seconds is None else duration(seconds)),
    ]


def made_facts(made: Values) -> list[Fact]:
    """When, on what and with which versions a run was made."""
    versions = made.inner("versions")
    told = [f"{name} {versions.text(name)}" for name in versions.keys()]  # noqa: SIM118
    date = (made.text("date") or "").replace("T", " ").replace("+00:00", " UTC")
    return [
        Fact("date", date),
        Fact("machine", made.text("machine") or ""),
        Fact("versions", ", ".join(told)),
    ]


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def timing_facts(parts: Iterable[Values]) -> list[Fact]:
    """How latencies were measured."""
    told: dict[str, None] = {}
    for found in (part.inner("latency") for part in parts):
        size, threads = found.whole("batch_size"), found.whole("threads")
        if size is not None and threads is not None:
            what = f"{size} image{'s' * (size > 1)} per forward pass"
            told[f"{what}, {threads} thread{'s' * (threads > 1)}, {found.text('device')}"] = None
    return [Fact("latency measured with", "; ".join(told))]


def only_known(facts: Iterable[Fact]) -> tuple[Fact, ...]:
    """Without the lines that say nothing."""
    return tuple(fact for fact in facts if fact.value)


def written_with(versions: Mapping[str, str | None]) -> Fact:
    """The versions of a saved folder."""
    told = [f"{name} {value}" for name, value in versions.items() if value is not None]
    return Fact("written with", ", ".join(told))
