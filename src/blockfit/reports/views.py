"""What a report found as its page shows it: texts, rows and drawn plots, in reading order."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from blockfit.drawing import LOSSES, METRIC_WORDS
from blockfit.evaluation.side_by_side import TOKENS, SideBySide
from blockfit.fit.plan import PARTS as NARROWED
from blockfit.fit.plan import Narrowing
from blockfit.fit.similarity import Tables
from blockfit.reports import plots
from blockfit.reports.answer_views import classes_view, flips_view
from blockfit.reports.content import Candidate, Content, short_name
from blockfit.reports.glossary import GLOSSARY, READING
from blockfit.reports.headline import headline, headline_note
from blockfit.reports.plots import Plot
from blockfit.units import number, percent, share

View = dict[str, Any]

NOTHING = number(None)

PARTS = (
    ("summary", "Before and after", "headline"),
    ("warnings", "Warnings", "warnings"),
    ("frontier", "Frontier", "frontier"),
    ("chain", "Chain", "compressed"),
    ("errors", "Errors", "errors"),
    ("classes", "Classes", "classes"),
    ("flips", "Flips", "flips"),
    ("states", "Error after blocks", "state_plots"),
    ("similarity", "Similarity", "similarity"),
    ("experiments", "Experiments", "experiments"),
    ("samples", "Images", "samples"),
    ("pca", "Patches", "pca"),
    ("provenance", "Provenance", "facts"),
    ("glossary", "Glossary", "glossary"),
    ("missing", "Not known", "missing"),
)
"""Id, name in the navigation, and the value without which a part is left out."""


def views(content: Content) -> View:
    """Everything that the template asks for but its frame."""
    chosen, side = content.chosen, content.side
    measured = content.evaluation if chosen is None else content.test_of(chosen)
    answers = measured and measured.answers
    found: View = {
        "heading": short_name(content.model) if content.model else "A model",
        "subtitle": _subtitle(content, chosen),
        "headline": headline(chosen, measured),
        "headline_note": headline_note(chosen, measured, bool(content.frontier)),
        "warnings": content.warnings + (content.compressed.warnings if content.compressed else ()),
        "compressed": content.compressed and _candidate(content.compressed),
        "frontier": _frontier(content, chosen) if content.series else None,
        "classes": classes_view(answers) if answers and answers.classes else None,
        "flips": flips_view(answers, measured.images) if answers and measured else None,
        "glossary": GLOSSARY,
        "errors": (content.compressed is not None and not content.compressed.plan.narrowings)
        or bool(content.compressed and content.compressed.maps),
        "side": side,
        "state_plots": [_state_plot(side, kind) for kind in side.errors] if side else [],
        "state_rows": _state_rows(side) if side else [],
        "similarity": _similarity(content.similarity) if content.similarity else None,
        "experiments": content.experiments,
        "samples": side.samples if side else (),
        "samples_words": _samples_words(side) if side else "",
        "pca": [one for one in side.samples if one.components is not None] if side else [],
        "pca_words": _pca_words(side) if side else "",
        "facts": content.facts,
        "commands": content.commands,
        "missing": missing(content),
    }
    found["parts"] = [{"id": i, "name": name} for i, name, key in PARTS if found[key]]
    return found


def all_plots(content: Content) -> list[Plot]:
    """Every plot of the page, for files."""
    out: list[Plot | None] = []
    chosen = content.chosen
    if chosen is not None:
        out += [plots.chain(chosen), plots.map_errors(chosen, "map-errors")]
    for loss in LOSSES if content.series else ():
        out += [plots.frontier(content.series, size, loss) for size in plots.AXES]
    if content.similarity is not None:
        out += [plot for _, _, plot in _heat_maps(content.similarity)]
    if content.side is not None:
        out += [plots.state_errors(content.side, kind) for kind in content.side.errors]
        out.append(plots.components(content.side))
    return [plot for plot in out if plot is not None]


def _subtitle(content: Content, chosen: Candidate | None) -> str:
    if chosen is None and content.experiments:
        return "The paper's experiments on this model"
    if chosen is None:
        states = len(content.similarity.boundaries) if content.similarity else 0
        return f"An analysis of {states} hidden states" if states else ""
    if content.compressed is None:
        first, last = content.frontier[0], content.frontier[-1]
        return f"A sweep of {len(content.frontier)} plans: {first.name} to {last.name}"
    if chosen.plan.narrowings:
        changed, part = chosen.plan.changed(chosen.depth), chosen.share("parameters")
        return changed.capitalize() if part is None else f"{part:.0%} of the parameters; {changed}"
    return f"{_blocks(chosen.removed)} of {chosen.depth} replaced: {chosen.plan}"


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"


def _candidate(candidate: Candidate) -> View:
    plot = plots.map_errors(candidate, f"maps-{candidate.key}")
    return {
        "key": candidate.key,
        "title": candidate.name,
        "label": candidate.label,
        "plan": candidate.plan.brief,
        "figures": _figures(candidate),
        "chain": _chain(candidate),
        "chain_words": plots.chain_words(candidate),
        "repair_words": _repair_words(candidate),
        "command": candidate.command,
        "warnings": candidate.warnings,
        "map_plot": plot and {"plot": plot, "svg": plot.svg()},
        "map_rows": [
            {
                "span": entry.span,
                "map": entry.map,
                "numbers": [
                    number(value)
                    for value in (
                        entry.prefix, entry.identity_prefix, entry.patch, entry.identity_patch
                    )
                ],
            }
            for entry in candidate.maps
        ],
    }  # fmt: skip


def _figures(candidate: Candidate) -> str:
    fidelity = candidate.fidelity
    before, after = candidate.top1
    told = (
        ("{} of the parameters", candidate.share("parameters"), _part),
        ("{} of the FLOPs", candidate.share("flops"), _part),
        ("{} of the latency", candidate.share("latency"), _part),
        ("KL {}", fidelity.get("kl"), number),
        (f"top-1 {{}} (original {percent(before)})", after, percent),
        ("agreement {}", fidelity.get("agreement"), percent),
        ("feature error {}", fidelity.get("feature_relative_error"), number),
    )
    parts = [text.format(shown(value)) for text, value, shown in told if value is not None]
    return ", ".join(parts) + "." if parts else ""


def _part(value: float | None) -> str:
    return share(value, 1.0)


SHORT = {"parameters": "parameters", "flops": "FLOPs", "megabytes": "MB", "latency": "latency"}
"""Axes of the frontier, as its switch names them."""


def _interval(candidate: Candidate, loss: str, shown: Callable[[float | None], str]) -> str:
    found = candidate.tested(loss)
    if found is None:
        return NOTHING
    figure, images = found
    return f"{shown(figure.value)} ({shown(figure.low)}–{shown(figure.high)}), {images}"


COLUMNS: dict[str, Callable[[Candidate], str]] = {
    "Parameters": lambda c: _part(c.share("parameters")),
    "FLOPs": lambda c: _part(c.share("flops")),
    "Latency": lambda c: _part(c.share("latency")),
    "KL": lambda c: number(c.value("kl")),
    "Top-1": lambda c: percent(c.value("top1")),
    "Agreement": lambda c: percent(c.value("agreement")),
    "Feature error": lambda c: number(c.value("feature_relative_error")),
    "MB": lambda c: number(c.share("megabytes"), 1),
    "Test KL (95%), images": lambda c: _interval(c, "kl", number),
    "Test top-1 (95%), images": lambda c: _interval(c, "top1", percent),
}
"""Of the table of a sweep's plans; one that no plan has a value for is left out."""


def _chain(candidate: Candidate) -> list[View]:
    """Kept blocks one by one, removed ones by spans."""
    errors = {entry.span: entry for entry in candidate.maps}
    starts = {entry.span.start: entry for entry in candidate.plan}
    folded = {entry.span.start - 1 for entry in candidate.plan if entry.map == "folded"}
    out: list[View] = []
    block = 0
    while block < candidate.depth:
        entry = starts.get(block)
        if entry is None:
            state = "repaired" if block in (candidate.repaired or ()) else "kept"
            state = "holds a map" if block in folded else state
            cuts = candidate.plan.at(block)
            state = "narrowed" if cuts else state
            out.append({"span": False, "block": block, "state": state, "parts": _bars(cuts)})
            block += 1
            continue
        error = errors.get(str(entry.span))
        out.append(
            {
                "span": True,
                "blocks": list(entry.span.blocks),
                "map": str(entry).partition(" ")[2],
                "error": None if error is None else number(error.error, 3),
                "identity": None if error is None else number(error.identity_error, 3),
            }
        )
        block = entry.span.stop
    return out


def _bars(cuts: Mapping[str, Narrowing]) -> list[View]:
    """What is left of every part of a block; nothing where none is narrowed."""
    if not cuts:
        return []
    return [
        {
            "name": part,
            "left": 100 * (cuts[part].kept / cuts[part].size if part in cuts else 1.0),
            "words": f"{part} {cuts[part].kept} of {cuts[part].size}"
            if part in cuts
            else f"{part} whole",
        }
        for part in NARROWED
    ]


def _repair_words(candidate: Candidate) -> str:
    repaired = candidate.repaired
    if repaired is None:
        return "Which kept blocks were repaired was not written down."
    if not repaired:
        return "No kept block was repaired."
    return f"Repaired: {_blocks(len(repaired))} ({', '.join(map(str, repaired))})."


def _frontier(content: Content, chosen: Candidate | None) -> View:
    series = content.series
    candidates = [candidate for run in series for candidate in run.candidates]
    charts = []
    marks = {f"plan-{c.key}": _mark(c) for c in candidates}
    for loss, name in LOSSES.items():
        for size, words in plots.AXES.items():
            plot = plots.frontier(series, size, loss)
            if plot is not None:
                charts.append(
                    {
                        "loss": loss,
                        "size": size,
                        "svg": plot.svg(marks),
                        "caption": f"{name} against {words}",
                    }
                )
    images = candidates[0].fidelity.get("images")
    columns = {
        name: [shown(candidate) for candidate in candidates] for name, shown in COLUMNS.items()
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) != {NOTHING}}
    rows = zip(*columns.values(), strict=True)
    losses, sizes = ({chart[key] for chart in charts} for key in ("loss", "size"))
    opened = next((c.key for c in candidates if chosen and c.plan == chosen.plan), None)
    return {
        "charts": charts,
        "losses": [(k, v.partition(" (")[0]) for k, v in LOSSES.items() if k in losses],
        "sizes": [(k, SHORT[k]) for k in plots.AXES if k in sizes],
        "runs": [{"number": n, "name": run.name} for n, run in enumerate(series)],
        "first": "Removed" if candidates[0].target is None else "For",
        "header": list(columns),
        "tested": any(c.tested(loss) for c in candidates for loss in LOSSES),
        "timed": any(c.latency for c in candidates),
        "views": [
            {**_candidate(candidate), "run": series[candidate.series].name, "columns": row}
            for candidate, row in zip(candidates, rows, strict=True)
        ],
        "chosen": opened or candidates[0].key,
        "images": "" if images is None else f"{images:.0f}",
    }


def _mark(candidate: Candidate) -> str:
    words = f"{candidate.name}: {_figures(candidate)}"
    return (
        f'role="radio" tabindex="-1" aria-checked="false" data-plan="{candidate.key}" '
        f'aria-label="{words}"'
    )


def _state_plot(side: SideBySide, kind: str) -> View:
    plot = plots.state_errors(side, kind)
    return {"plot": plot, "svg": plot.svg(), "kind": kind, "identity": kind in side.identity}


def _state_rows(side: SideBySide) -> list[list[str]]:
    columns = [
        values[kind] for kind in TOKENS if kind in side.errors
        for values in (side.errors, side.identity) if kind in values
    ]  # fmt: skip
    return [[number(value) for value in row] for row in zip(*columns, strict=True)]


def _samples_words(side: SideBySide) -> str:
    """On how many images the models differ, and which are shown."""
    words = f"{len(side.samples)} of {side.images} images from {side.source}. "
    if side.differing is None:
        return words + "The model has no head, so that only features are compared."
    if not side.differing:
        return words + f"The two models name the same class first on all {side.images}."
    shown = sum(sample.differs for sample in side.samples)
    return words + (
        f"The two models name another class first on {side.differing} of the {side.images}; "
        f"the {shown} costliest of these come first, then others."
    )


def _pca_words(side: SideBySide) -> str:
    """How the colours come about."""
    part = "" if side.explained is None else f" ({side.explained:.0%} of their variance)"
    return (
        "The patch tokens after the last block: the original's first three principal components"
        f"{part} as red, green and blue. Both models are coloured on the same scale, so that the "
        "same colour means the same feature."
    )


def _metrics(tables: Tables) -> list[str]:
    """R² first: it says what a map can do."""
    return sorted(tables.values, key=lambda metric: metric != "r2")


def _heat_maps(tables: Tables) -> list[tuple[str, str, Plot]]:
    return [
        (metric, kind, plots.similarity(tables.boundaries, metric, kind, table))
        for metric in _metrics(tables)
        for kind, table in tables.values[metric].items()
    ]


def _similarity(tables: Tables) -> View:
    types = tables.token_types
    metrics = _metrics(tables)
    first_metric, first_type = metrics[0], types[-1]
    counts = [f"{count} {kind}" for kind, count in tables.tokens.items() if count]
    return {
        "boundaries": tables.boundaries,
        "tokens": f"From {' and '.join(counts)} tokens." if counts else "",
        "metrics": [{"key": key, "name": METRIC_WORDS[key]} for key in metrics],
        "types": types,
        "first_type": first_type,
        "maps": [
            {
                "metric": metric,
                "kind": kind,
                "first": (metric, kind) == (first_metric, first_type),
                "view": {"plot": plot, "svg": plot.svg()},
                "reading": READING[metric],
                "rows": [
                    ["–" if value is None else f"{value:.3g}" for value in row]
                    for row in tables.values[metric][kind]
                ],
            }
            for metric, kind, plot in _heat_maps(tables)
        ],
    }


def missing(content: Content) -> list[Mapping[str, str]]:
    """What the page cannot show, in a word each, and the command that finds it out."""
    model = shlex.quote(content.model or "MODEL")
    found: dict[str, str] = {}
    if content.chosen is None and not content.experiments:
        found["No small model and no sweep is in these runs, only the original."] = ""
    if content.similarity is None:
        what = "How alike the blocks are; report the analysis beside this run."
        found[what] = f"blockfit analyze {model} --images DATA -o analysis/"
    if content.chosen is not None and content.evaluation is None:
        what = "Accuracy, speed and memory on test images; report the file beside this run."
        line = f"blockfit evaluate small/ --against {model} --images DATA --json"
        found[what] = f"{line} > evaluation.json"
    if content.chosen is not None and content.side is None:
        what = "What both models say of single images, and what their patches see."
        found[what] = f"blockfit report RUN --against {model} --images DATA"
    side = content.side
    if side is not None and not any(s.components for s in side.samples):
        found["The patches as pictures: the patch tokens have no known grid."] = ""
    if not any(fact.name == "licence of the weights" for fact in content.facts):
        found["The licence of the weights: the checkpoint does not say."] = ""
    return [{"what": what, "line": line} for what, line in found.items()]
