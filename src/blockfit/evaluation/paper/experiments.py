"""The paper's experiments (TBA, arXiv 2410.04941): each makes the rows of one table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from blockfit.evaluation.analysis import analyze
from blockfit.evaluation.paper.lab import Candidate, Lab, Row, thinned
from blockfit.evaluation.paper.translators import TRAINED, fit_per_position, train
from blockfit.fit.closed_form import fit_map
from blockfit.fit.moments import Moments
from blockfit.fit.plan import Plan, Replacement, Span
from blockfit.search.candidates import cheapest
from blockfit.search.solve import Options, Solution, solve

COMPARED = ("mse", "cosine", "cka")
"""The similarities of the paper."""

PAPER = Options(ridge=0.0, refit=False, repair="none")
"""Maps as in the paper: plain least squares, each span fitted on the original's hidden states."""

OWN = "own images"
"""What the data set's own training images are called among the sources."""

POSITION_RIDGE = 1e-1
"""λ of the second row of maps per token position: few images for many maps."""


@dataclass(frozen=True)
class Experiment:
    """One table of the paper.

    Args:
        name: of its files.
        title: for people.
        shows: one sentence on the question it answers.
        run: makes its rows; the first one is the original's where models are judged.
        needs: fields of ``Settings`` that its rows depend on, beside the seed.
    """

    name: str
    title: str
    shows: str
    run: Callable[[Lab], list[Row]]
    needs: tuple[str, ...]


EXPERIMENTS: list[Experiment] = []
"""All of them, in the order in which they are run."""


def experiment(
    title: str, *needs: str, spans: bool = True
) -> Callable[[Callable[[Lab], list[Row]]], Callable[[Lab], list[Row]]]:
    """Make a function an experiment of its name; its docstring is what the experiment shows.

    Args:
        needs: fields of ``Settings`` that its rows depend on.
        spans: whether they depend on the longest span as well.
    """

    def added(run: Callable[[Lab], list[Row]]) -> Callable[[Lab], list[Row]]:
        usual = ("calibration", "longest") if spans else ("calibration",)
        shows = run.__doc__ or ""
        EXPERIMENTS.append(Experiment(run.__name__, title, shows, run, (*usual, *needs)))
        return run

    return added


@experiment("Similarity of hidden states", spans=False)
def similarity(lab: Lab) -> list[Row]:
    """How alike the hidden states of all pairs of block boundaries are, by MSE, cosine and CKA."""
    tables = analyze(
        lab.model,
        lab.calibration(),
        blocks=lab.blocks.path,
        seed=lab.settings.seed,
        say=lab.say,
        progress=lab.progress,
    ).tables
    return [
        {"metric": metric, "token_type": tokens, "start": start, "stop": stop, "value": value}
        for metric, tokens, start, stop, value in tables.rows()
        if metric in COMPARED and (tokens != "all" or tables.token_types == ("all",))
    ]


@experiment("Which blocks can be replaced", "starts")
def spans(lab: Lab) -> list[Row]:
    """Accuracy with one span replaced by the linear map, by its length and its place."""
    chosen = thinned(lab.spans, lab.settings.starts)
    nearest = [lab.nearest(length) for length in range(1, lab.settings.longest + 1)]
    return lab.judged(
        (
            _known(span, "linear", mse=lab.distance(span), chosen=span in nearest),
            lab.solved(span, "linear", lab.moments),
        )
        for span in sorted({*chosen, *nearest}, key=lambda s: (len(s), s.start))
    )


@experiment("Several spans at once", "sets")
def several(lab: Lab) -> list[Row]:
    """Whether separate spans lose less than one span of as many blocks."""
    return lab.judged(_several(lab))


def _several(lab: Lab) -> Iterator[Candidate]:
    costs = {span: lab.distance(span) for span in lab.spans}
    for removed in range(2, lab.settings.longest + 1):
        one = lab.nearest(removed)
        known = _known(one, "linear", fitted="apart", mse=costs[one])
        yield known, lab.solved(one, "linear", lab.moments)
        sets = cheapest(lab.blocks.depth, removed, costs, lab.settings.sets + 1)
        for chosen in [spans for spans in sets if len(spans) > 1][: lab.settings.sets]:
            words = ", ".join(map(str, chosen))
            total = sum(costs[span] for span in chosen)
            for way in ("apart", "in turn"):
                known = {"removed": removed, "spans": words, "map": "linear", "fitted": way}
                yield {**known, "mse": total}, _many(lab, chosen, way == "in turn")


@experiment("Closed-form and trained maps", "compared", "steps", "tokens")
def translators(lab: Lab) -> list[Row]:
    """The linear map beside identity and beside networks that are trained with Adam."""
    return lab.judged(_translators(lab))


def _translators(lab: Lab) -> Iterator[Candidate]:
    settings = lab.settings
    for span, x, y in lab.states(lab.calibration(), lab.compared()):
        for kind in ("identity", "linear", "affine"):
            solution = lab.solved(span, kind, lab.moments)
            yield _worth(span, kind, False, solution.maps[0], x, y), solution
        for kind in TRAINED:
            lab.say(f"training {kind} for span {span}")
            done = train(
                kind,
                x,
                y,
                steps=settings.steps,
                tokens=settings.tokens,
                seed=settings.seed,
                device=lab.device,
            )
            yield _worth(span, kind, True, done.module, x, y), _with(span, done.module)


@experiment("Number of calibration images", "compared", "samples")
def samples(lab: Lab) -> list[Row]:
    """How many images the linear map needs."""
    spans = lab.compared()
    rows = lab.judged(
        (_known(span, "linear", images=images), lab.solved(span, "linear", moments))
        for images, moments in _growing(lab, lab.settings.samples, spans)
        for span in spans
    )
    return sorted(rows, key=_order)


@experiment("One map for all tokens, or one per position", "compared", "positions")
def positions(lab: Lab) -> list[Row]:
    """Whether every token position should have a map of its own."""
    return sorted(lab.judged(_positions(lab)), key=_order)


def _positions(lab: Lab) -> Iterator[Candidate]:
    spans, numbers = lab.compared(), lab.settings.positions
    for images, moments in _growing(lab, numbers, spans):
        for span in spans:
            yield _position(span, "all tokens", images, lab.solved(span, "linear", moments))
            if lab.blocks.prefix_tokens:
                entry = Replacement(span, "linear", per_token_type=True)
                split = Solution(Plan((entry,)), (fit_map(entry, moments, 0.0),))
                yield _position(span, "token type", images, split)
    most = lab.draw(max(numbers), lab.settings.seed)
    for span, x, y in lab.states(most, spans):
        lab.say(f"a map per token position for span {span}")
        for images in sorted({min(number, len(x)) for number in numbers}):
            for ridge in (0.0, POSITION_RIDGE):
                word = "position" if ridge == 0 else f"position, ridge {ridge:g}"
                fitted = fit_per_position(x[:images], y[:images], ridge)
                yield _position(span, word, images, _with(span, fitted))


@experiment("Maps fitted on other images", "compared")
def transfer(lab: Lab) -> list[Row]:
    """What is lost where the calibration images are of another data set than the test images."""
    return sorted(lab.judged(_transfer(lab)), key=lambda row: row["removed"])


def _transfer(lab: Lab) -> Iterator[Candidate]:
    spans, settings = lab.compared(), lab.settings
    for source, draw in {OWN: lab.draw, **lab.transfers}.items():
        images = draw(settings.calibration, settings.seed)
        moments = lab.moments if source == OWN else lab.calibrated(images, spans)
        for span in spans:
            known = _known(span, "linear", source=source, images=len(images))
            yield known, lab.solved(span, "linear", moments)
    for span in spans:
        known = _known(span, "identity", source="none", images=0)
        yield known, lab.solved(span, "identity", lab.moments)


@experiment("Mean over seeds", "seeds")
def seeds(lab: Lab) -> list[Row]:
    """Accuracy over several draws of the calibration images, with its standard deviation."""
    spans = [lab.nearest(length) for length in range(1, lab.settings.longest + 1)]
    runs = []
    for number in range(lab.settings.seeds):
        seed = lab.settings.seed + number
        moments = lab.moments
        if number:
            moments = lab.calibrated(lab.draw(lab.settings.calibration, seed), spans)
        solved = [(_known(s, "linear"), lab.solved(s, "linear", moments)) for s in spans]
        runs.append(lab.judged(solved, seed))
    out = []
    for same in zip(*runs, strict=True):
        row = {name: same[0][name] for name in ("removed", "spans", "map")}
        for column in ("top1", "change"):
            values = [run[column] for run in same]
            row[column] = statistics.fmean(values)
            row[f"{column}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        row["each"] = " ".join(f"{run['top1']:.4f}" for run in same)
        out.append(row)
    return out


def _known(span: Span, kind: str, **more: object) -> Row:
    return {"removed": len(span), "spans": str(span), "map": kind, **more}


def _with(span: Span, module: nn.Module) -> Solution:
    """A solution that puts any module in a span's place; only judging takes such modules."""
    return Solution(Plan((Replacement(span, "linear"),)), (module,))


def _many(lab: Lab, chosen: Sequence[Span], refit: bool) -> Solution:
    plan = Plan.of(chosen, "linear")
    if not refit:
        maps = tuple(fit_map(entry, lab.moments, 0.0) for entry in plan)
        return Solution(plan, maps)
    lab.say(f"fitting {plan} in turn")
    return solve(lab.originals, plan, Options(ridge=0.0, refit=True, repair="none"))


def _worth(
    span: Span, kind: str, trained: bool, module: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> Row:
    """Size and local error of a translator: its mean squared error per element on its images."""
    with torch.no_grad():
        total = sum(
            float((module(a) - b).double().square().sum())
            for a, b in zip(x.split(64), y.split(64), strict=True)
        )
    size = sum(p.numel() for p in module.parameters())
    return _known(span, kind, trained=trained, parameters=size, fit_mse=total / y.numel())


def _position(span: Span, per: str, images: int, solution: Solution) -> Candidate:
    size = sum(tensor.numel() for tensor in solution.maps[0].state_dict().values())
    return _known(span, "linear", per=per, images=images, parameters=size), solution


def _order(row: Row) -> tuple[int, int]:
    return row["removed"], row["images"] or 0


def _growing(
    lab: Lab, numbers: Sequence[int], spans: Sequence[Span]
) -> Iterator[tuple[int, Moments]]:
    """Moments of the first n of the same draw of images, for growing n; each image is run once.

    Numbers beyond those that there are end at the number of images. The moments that are handed
    out go on growing: use them before asking for the next.
    """
    images = lab.draw(max(numbers), lab.settings.seed)
    most = len(images)
    total: Moments | None = None
    done = 0
    for number in sorted({min(n, most) for n in numbers}):
        part = lab.calibrated(images.between(done, number), spans)
        if total is None:
            total = part
        else:
            total.merge(part)
        done = number
        yield number, total
