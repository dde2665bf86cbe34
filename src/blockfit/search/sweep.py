"""The frontier: one calibration, the best plan for every size, models made from it in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from blockfit import drawing
from blockfit import processes as ranks
from blockfit.arguments import at_least, checked, one_of
from blockfit.checkpoint import forget
from blockfit.data.images import Images, prepared_images
from blockfit.errors import BlockfitError, tell
from blockfit.fields import fields_written, read, written
from blockfit.files import expanded
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Replacement
from blockfit.models.blocks import Batch, Blocks
from blockfit.models.cost import runs_on
from blockfit.models.forward import first_images
from blockfit.models.head import Observation
from blockfit.models.load import load_model, source_with
from blockfit.models.preprocessing import Given
from blockfit.models.tensors import fingerprint
from blockfit.models.wrappers import bare
from blockfit.progress import Progress, Say, told
from blockfit.provenance import command_line, made
from blockfit.search import summaries
from blockfit.search.budget import Budget
from blockfit.search.cuts import Share
from blockfit.search.final import (
    APART,
    FINAL_IMAGES,
    Parts,
    final_of,
    outcomes,
    set_apart,
)
from blockfit.search.latency import latency_of, way_of
from blockfit.search.loss_budget import Judged, Verdict, beyond_bound
from blockfit.search.plan_judge import Point
from blockfit.search.recipes import Recipe, recipe_for
from blockfit.search.report import Entry, Report
from blockfit.search.run import Result, checkpoint_of, entry_of, original_of, run_json
from blockfit.search.session import Session
from blockfit.search.setting import (
    CALIBRATION_IMAGES,
    HOLD_OUT,
    Setting,
    check_stages,
    check_whole,
)
from blockfit.search.solve import Solution
from blockfit.search.span_search import most_removed
from blockfit.search.sweep_file import (
    MARK,
    Run,
    SweepFile,
    check_sweep_folder,
    read_point_file,
    read_sweep_file,
    write_point_file,
    write_sweep_file,
)
from blockfit.summary import Summary, frame
from blockfit.units import bytes_of

POINTS = (0.95, 0.90, 0.84, 0.78, 0.70, 0.62, 0.55, 0.50, 0.45, 0.40)
"""Parts of the parameters that the plans of a sweep leave."""

UNKNOWN = {
    "flops": "does not know FLOPs, which cannot be counted for its model; use remove or params",
    "latency": "holds no latencies; give the same sweep again with latency_images=1, "
    "or compress from images",
    "max_kl": "holds no KL that was judged apart: the model has no head, or the sweep is of an "
    "earlier version; use remove, params or flops, or sweep into a new folder",
    "max_drop": "holds no accuracy that was judged apart; sweep labelled images of the classes of "
    "the model's own head into a new folder, or use max_kl",
}
"""Why no point of a sweep can be chosen by a kind of budget, and what to do."""


@dataclass(repr=False)
class Frontier:
    """What a sweep folder holds.

    Args:
        folder: where it lies.
        content: of ``sweep.json``: the run, the original's figures, one entry per size.
    """

    folder: Path
    content: SweepFile

    verbs: ClassVar[dict[str, Callable[..., Any]]] = {}
    """As those of ``Result``."""

    @property
    def data(self) -> dict[str, Any]:
        """The content as JSON values."""
        return fields_written(self.content)

    @property
    def points(self) -> list[dict[str, Any]]:
        """One entry per plan as JSON values, the gentlest first."""
        return [fields_written(entry) for entry in self.entries]

    @property
    def entries(self) -> list[Entry]:
        """The plans with their figures, the gentlest first."""
        return sorted(self.content.points, key=lambda e: (-(e.share or 1.0), e.removed))

    @property
    def narrows(self) -> bool:
        """Whether its plans are of parts of the parameters, not of numbers of removed blocks."""
        return any(entry.share is not None for entry in self.content.points)

    def __repr__(self) -> str:
        entries = self.entries
        ends = f", {entries[0].named()} to {entries[-1].named()}" if entries else ""
        plans = f"{len(entries)} plan{'' if len(entries) == 1 else 's'}"
        return f"Frontier({plans}{ends}, {self.folder.name!r})"

    def summary(self) -> Summary:
        """The table that the command prints: size, fidelity and plan of every point."""
        return Summary.of(summaries.frontier(self.points, self.data["original"]))

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def to_frame(self) -> Any:
        """A ``pandas.DataFrame`` with a row per plan, the gentlest first.

        What remains of parameters, FLOPs and latency (``…_left``, fractions), the figures of the
        held-out images, those of the final ones with their intervals (``final_…``), the plan in few
        words. Points of top-1 lost are points, all else of accuracy are fractions.

        Raises:
            BlockfitError: where pandas is not installed.
        """
        return frame(summaries.point_row(point, self.data["original"]) for point in self.points)

    def plot(self, size: str = "parameters", loss: str | None = None, ax: Any = None) -> Any:
        """Draw what the plans cost against what they leave.

        The final figures with their intervals where the sweep has them, else the held-out ones.

        Args:
            size: ``parameters``, ``flops`` or ``latency``.
            loss: ``kl``, ``agreement``, ``top1`` or ``feature_relative_error``; the first that is
                known by default.
            ax: matplotlib's axes; a new figure by default.

        Returns:
            The axes.

        Raises:
            BlockfitError: where the sweep does not know the figures, or without matplotlib.
        """
        for name, value, known in (("size", size, drawing.SIZES), ("loss", loss, drawing.LOSSES)):
            if value is not None:
                one_of(name, value, known)
        original = self.data["original"]
        losses = ["kl", "feature_relative_error"] if loss is None else [loss]
        curves = [(one, summaries.curve_of(self.points, original, size, one)) for one in losses]
        shown, found = next(((one, found) for one, found in curves if found), (losses[0], []))
        if not found:
            raise BlockfitError(f"the sweep {self.folder} does not know {size} and {shown}")
        axis = drawing.axes_of(ax)
        whole = original.get("top1") if shown == "top1" else None
        drawing.curve(axis, found, size, shown, whole)
        return axis

    def compress(
        self,
        budget: Budget | None = None,
        model: nn.Module | str | Path | None = None,
        force_budget: bool = False,
        images: Any = None,
        **more: Any,
    ) -> Result:
        """Make the model of the best plan for one budget, or with images one for the budget itself.

        Args:
            budget: what has to be reached; or one of ``more``.
            model: the original; loaded by the name that the sweep wrote down where ``None``.
            force_budget: as in ``blockfit.compress``.
            images: as in ``blockfit.from_sweep``.
            more: a budget by its name: ``params``, ``flops``, ``latency``, ``max_kl``, ``max_drop``
                or ``remove``; with images also the options of ``blockfit.from_sweep``.

        Raises:
            BlockfitError: where no plan meets the budget or the model is not the sweep's.
        """
        if images is not None:
            how: dict[str, Any] = {"force_budget": force_budget, "images": images, **more}
            return self.verbs["from_sweep"](self.folder, budget, model, **how)
        result = from_sweep(self, Budget.one(budget, **more), model, force_budget)
        tell(result.report["warnings"])
        return result

    def best(
        self,
        budget: Budget | None = None,
        force: bool = False,
        *,
        remove: int | None = None,
        params: float | str | None = None,
        flops: float | str | None = None,
        latency: float | str | None = None,
        max_kl: float | None = None,
        max_drop: float | None = None,
    ) -> Entry:
        """The plan of smallest held-out loss that meets one budget.

        For ``max_kl`` and ``max_drop``, the last one up to which all keep it by the upper end of
        their interval. Of sizes, a plan that removes more at a smaller loss is preferred, so the
        loss never falls from one budget to a larger one.

        Args:
            budget: what has to be reached; or one of the others.
            force: go by the loss that was measured instead of the bound.
            remove: of sweeps over whole blocks; this and the others as in ``blockfit.compress``.
            latency: of plans that were timed.

        Raises:
            BlockfitError: where no plan meets it, or the sweep does not hold what it needs.
        """
        budget = Budget.one(
            budget,
            remove=remove,
            params=params,
            flops=flops,
            latency=latency,
            max_kl=max_kl,
            max_drop=max_drop,
        )
        if budget.kind in ("max_kl", "max_drop"):
            return self._furthest(budget, force)
        if budget.kind == "remove" and self.narrows:
            raise BlockfitError(
                f"the plans of the sweep {self.folder} narrow parts of blocks, and were found for "
                "parts of the parameters; use params, or sweep with cuts='blocks' into a new folder"
            )
        entries = self.entries
        sizes = [(entry, entry.fractions(self.content.original)) for entry in entries]
        known = [(entry, fractions) for entry, fractions in sizes if budget.kind in fractions]
        if not known:
            raise BlockfitError(f"the sweep {self.folder} {UNKNOWN[budget.kind]}")
        fitting = [entry for entry, fractions in known if budget.met_by_size(fractions)]
        if fitting:
            return min(fitting, key=lambda entry: (entry.held_out.loss, entry.removed))
        first, last = (entry.named(gerund=True) for entry in (entries[0], entries[-1]))
        raise BlockfitError(
            f"no plan of the sweep {self.folder} meets {budget}; they go from {first} to {last}"
        )

    def _furthest(self, budget: Budget, force: bool) -> Entry:
        best, verdict = None, None
        for entry in self.entries:
            verdict = None if entry.judged is None else entry.judged.verdict(budget, force)
            if verdict is None:
                raise BlockfitError(f"the sweep {self.folder} {UNKNOWN[budget.kind]}")
            if not verdict.kept:
                break
            best = entry
        if best is not None:
            return best
        assert verdict is not None
        least = f"{self.entries[0].named(gerund=True)} costs {verdict.value:.3g}"
        if verdict.value > budget.value:
            raise BlockfitError(
                f"no plan of the sweep {self.folder} keeps {budget}: {least} already; ask for more"
            )
        raise BlockfitError(
            f"the {verdict.images} images that the sweep {self.folder} was judged on cannot show "
            f"{budget}: {least} on them, and up to {verdict.bound:.3g} remain possible; sweep more "
            "images into a new folder, allow a larger loss, or give force_budget=True"
        )

    def original(self, model: nn.Module | str | Path | None = None) -> nn.Module:
        """The model that was swept.

        Args:
            model: it, or its name; loaded by the name that the sweep wrote down where ``None``.

        Raises:
            BlockfitError: where it is another one.
        """
        model = _name(self.content) if model is None else model
        found = bare(model) if isinstance(model, nn.Module) else load_model(model)
        if fingerprint(found) != self.content.run.model:
            raise BlockfitError(
                f"the model is not the one that the sweep {self.folder} was made with; give that "
                "model"
            )
        return found

    def keep(self, **changes: Any) -> None:
        """Change fields of the content and write it, by the first process."""
        self.content = replace(self.content, **changes)
        if ranks.is_first():
            write_sweep_file(self.folder / MARK, self.content)


@checked
@told
def sweep(
    model: nn.Module | str | Path,
    images: Any,
    folder: str | Path,
    *,
    recipe: str | Recipe = "default",
    cuts: Iterable[str] | str | None = None,
    points: Iterable[float] = POINTS,
    protect: Iterable[int] = (),
    whole: Iterable[int] = (),
    multiple_of: int | None = None,
    blocks: str | None = None,
    hold_out: float = HOLD_OUT,
    final: int | None = None,
    seed: int = 0,
    preprocessing: Given | None = None,
    say: Say | None = None,
    progress: Progress | bool | None = None,
    resume: str | Path | None = None,
    max_memory: int | str | None = None,
    latency_images: int | None = None,
) -> Frontier:
    """Find the best plans from gentle to small, from one calibration.

    Where parts of blocks may be narrowed, one plan for each of ``points``; where only whole blocks
    may go (``cuts="blocks"``, ``recipe="paper"``), one for every number of them, to all but two.
    Every finished plan is written at once (by the first process, where there are several); a sweep
    that was stopped goes on where it was when it is called again with the same arguments.

    What is not named here is as in ``compress``.

    Args:
        folder: new, empty, or of the same sweep.
        points: parts of the parameters that the plans leave; those that cannot be reached are
            left out.
        final: images for the final figures, which every plan has.
        resume: goes on also within the calibration and within a size.
        latency_images: measure the latency of every plan against the original's, in turn, with
            this many images per forward pass. A finished sweep is measured without being run
            again, and only plans that were not measured with as many images and threads.

    Raises:
        BlockfitError: for anything that cannot be done, and where ``folder`` holds another sweep.
    """
    assert say is not None  # functions, whatever the caller gave
    assert callable(progress)
    target = check_sweep_folder(folder)
    at_least(0, seed=seed)
    at_least(1, latency_images=latency_images)
    room = None if max_memory is None else bytes_of(str(max_memory), "max_memory")
    at_least(1, multiple_of=multiple_of)
    chosen, shares = recipe_for(recipe, cuts=cuts), shares_of(points)
    chosen.check_use("a sweep")
    model = bare(model) if isinstance(model, nn.Module) else load_model(model)
    images = prepared_images(images, model, preprocessing, seed).draw(CALIBRATION_IMAGES, seed)
    parts = parts_of_sweep(images, final, seed)
    run = run_json(model, parts, chosen, protect, hold_out, seed)
    if chosen.narrows:
        run |= {"whole": sorted(set(whole)), "multiple_of": multiple_of, "shares": shares}
    asked = read(Run, run, "the run")
    stored = ranks.agreed(lambda: written(_resume(target, asked)))
    before = None if stored is None else read(SweepFile, stored, str(target / MARK))
    setting = Setting.of(model, parts.calibration, blocks, hold_out, seed)
    check_whole(whole, setting.blocks.depth)
    check_stages(setting.blocks, chosen)
    if before is not None and command_line() is not None:
        before = replace(before, command=command_line())
    if before is not None and _complete(before, setting):
        frontier = Frontier(target, before)
    else:
        checkpoint = checkpoint_of(resume, run, parts.calibration, setting.blocks)
        session = Session(
            setting, chosen, protect, seed, say, progress, checkpoint, room, whole, multiple_of
        )
        frontier = Frontier(target, before or _begun(session, asked))
        looks = _Looks(setting, parts, seed, say, progress)
        go = _go_through_shares if session.narrows() else _go_through
        go(frontier, session, looks)
    if resume is not None:
        forget(Path(resume))  # also what a run left that was stopped right here
    if latency_images is not None:
        few = replace(images, batch_size=latency_images)
        inputs = first_images(next(iter(few)), latency_images)
        _measure(frontier, setting, inputs, say)
    return frontier


def shares_of(points: Iterable[float]) -> list[float]:
    """Parts of the parameters, the largest first.

    Raises:
        BlockfitError: where one is not between 0 and 1, or there is none.
    """
    shares = sorted({float(point) for point in points}, reverse=True)
    if not shares or not all(0 < share < 1 for share in shares):
        raise BlockfitError(
            f"points must be parts between 0 and 1, such as 0.9 and 0.62, got {shares or 'none'}"
        )
    return shares


def _complete(content: SweepFile, setting: Setting) -> bool:
    """Whether a sweep has all of its plans."""
    done = {entry.size for entry in content.points}
    if "shares" in content.search:
        return done >= set(content.search["shares"])
    return done >= set(range(1, most_removed(setting.blocks.depth, content.run.protect) + 1))


def parts_of_sweep(images: Images, final: int | None, seed: int) -> Parts:
    """Images for the final figures of every plan, and as many to judge budgets of loss later.

    Where little lies beyond the calibration images, the final figures have to do for both.
    """
    half = len(images.beyond) // 2
    if final is None and half >= APART * (len(images.positions) + len(images.beyond)):
        final = min(FINAL_IMAGES, 2 * len(images.positions), half)
    alone = set_apart(images, final, False, seed)
    if alone.final is None:
        return alone
    count = len(alone.final.positions)
    if len(images.beyond) < 2 * count:
        return alone
    rest, judge = alone.calibration.apart(count, seed)
    return replace(alone, calibration=rest, judge=judge)


class _Looks:
    """Looks at every plan of a sweep on images that did not choose it."""

    def __init__(
        self,
        setting: Setting,
        parts: Parts,
        seed: int,
        say: Say,
        progress: Progress,
    ) -> None:
        self._setting, self._parts, self._seed = setting, parts, seed
        self._say, self._progress = say, progress
        self._original: list[dict[int, Observation]] = [{}, {}]

    def at(self, point: Point) -> dict[str, Any]:
        """``final`` and ``judged`` of an entry: figures, and what budgets of loss are judged by."""
        parts = self._parts
        if parts.final is None:
            return {"final": None}
        self._say(f"final figures of {point.solution.plan}")
        model, blocks = self._setting.model, self._setting.blocks
        small = point.solution.built(model, blocks, own=False)
        found = [
            outcomes(model, small, blocks, images, self._progress, kept)
            for images, kept in zip((parts.final, parts.judge), self._original, strict=True)
            if images is not None
        ]
        source = f"{parts.final.records.source}, {parts.apart}"
        return {
            "final": final_of(found[0], source, self._seed).to_json(),
            "judged": Judged.of(found[-1], parts.judge is not None, self._seed),
        }


def _begun(session: Session, run: Run) -> SweepFile:
    """The content of ``sweep.json`` before there is a plan."""
    setting = session.setting
    source, blocks = source_with(setting.model, setting.fit.preprocessing), setting.blocks
    original = original_of(session)
    written = made(runs_on(session.setting.model))
    return SweepFile(run, source, blocks, original, (), {}, command=command_line(), made=written)


def _go_through(frontier: Frontier, session: Session, looks: _Looks) -> None:
    """Find, and write at once, the plans that are not there yet."""
    search = session.search()
    search.restore(frontier.content.search)
    done = {entry.removed for entry in frontier.content.points}
    _know_top1(frontier, session)
    if not (frontier.folder / MARK).exists():
        frontier.keep()  # a run that is killed leaves a folder that it knows
    for size in range(1, search.largest + 1):
        if size in done:
            continue
        started = time.perf_counter()
        session.say(f"size {size} of {search.largest}")
        point = search.solved(size)
        _keep(frontier, session, point, looks, started, search.state())


def _go_through_shares(frontier: Frontier, session: Session, looks: _Looks) -> None:
    """Find, and write at once, the plans for parts of the parameters that are not there yet."""
    cuts, run = session.cuts, frontier.content.run
    _know_top1(frontier, session)
    cuts.restore(frontier.content.search)
    cuts.check_reach(Share("params", max(run.shares or (1.0,))))
    smallest = cuts.smallest(Share("params", 1.0))
    shares = [share for share in run.shares or () if share > smallest]
    if not shares:
        raise BlockfitError(
            f"with all gone that may go, {smallest:.1%} of the parameters remain, more than any of "
            "the points; give larger ones, or allow more kinds of cuts"
        )
    if ranks.is_first():
        frontier.folder.mkdir(parents=True, exist_ok=True)
    done = {entry.share for entry in frontier.content.points}
    for share in shares:
        if share in done:
            continue
        started = time.perf_counter()
        session.say(f"{share:.0%} of the parameters")
        point = cuts.point(cuts.plan(Share("params", share)))
        search = {**cuts.state(), "shares": shares}
        _keep(frontier, session, point, looks, started, search, share)


def _know_top1(frontier: Frontier, session: Session) -> None:
    """Sweeps of earlier versions lack the original's top-1."""
    content = frontier.content
    if content.original.top1 is None:
        original = replace(content.original, top1=session.held_out.top1)
        frontier.content = replace(content, original=original)


def _keep(
    frontier: Frontier,
    session: Session,
    point: Point,
    looks: _Looks,
    started: float,
    search: dict[str, Any],
    share: float | None = None,
) -> None:
    """Write one plan and what the search found so far."""
    more, name = looks.at(point), ""
    stem = f"removed-{point.removed:02d}" if share is None else f"params-{100 * share:g}"
    if ranks.is_first():
        name = write_point_file(frontier.folder, stem, _tensors(point.solution))
    entry = replace(
        entry_of(session, point),
        share=share,
        file=name or f"{stem}.safetensors",
        seconds=round(time.perf_counter() - started, 3),
        **more,
    )
    frontier.keep(points=(*frontier.content.points, entry), search=search)


def _measure(frontier: Frontier, setting: Setting, inputs: Batch, say: Say) -> None:
    """Time every plan that was not timed in the same way, from what lies in the folder.

    The first of several processes does it, one plan after the other, so that none waits long.
    """

    def missing() -> list[str]:
        now = way_of(setting.model, inputs).items()
        timed = ((e.file, {} if e.latency is None else asdict(e.latency)) for e in frontier.entries)
        return [file for file, latency in timed if not now <= latency.items()]

    def timed(file: str) -> None:
        points = list(frontier.content.points)
        at = next(place for place, entry in enumerate(points) if entry.file == file)
        solution = _read_point(frontier.folder, points[at], setting.blocks)
        latency = latency_of(setting.model, setting.blocks, solution, inputs)
        points[at] = replace(points[at], latency=latency)
        frontier.keep(points=tuple(points))

    for file in ranks.agreed(missing):
        say(f"latency of {Path(file).stem}")
        ranks.agreed(partial(timed, file))


def read_sweep(folder: str | Path) -> Frontier:
    """Read a sweep folder.

    Raises:
        BlockfitError: where it is none, or is damaged.
    """
    target = expanded(folder)
    path = target / MARK
    if not path.is_file():
        raise BlockfitError(f"{folder} is no sweep folder (it has no {MARK}); make one with sweep")
    content = read_sweep_file(path)
    if not content.points:
        raise BlockfitError(f"{folder} holds an unfinished sweep without a plan; run it again")
    return Frontier(target, content)


@checked
def from_sweep(
    sweep: str | Path | Frontier,
    budget: Budget,
    model: nn.Module | str | Path | None = None,
    force_budget: bool = False,
) -> Result:
    """``blockfit.from_sweep`` without images, of a folder or of what was read from it."""
    started = time.perf_counter()
    frontier = sweep if isinstance(sweep, Frontier) else read_sweep(sweep)
    content, folder = frontier.content, frontier.folder
    entry = frontier.best(budget, force_budget)
    verdict = None
    if budget.kind in ("max_kl", "max_drop") and entry.judged is not None:
        verdict = entry.judged.verdict(budget)
    given = isinstance(model, nn.Module)
    original, blocks = frontier.original(model), content.blocks
    solution = _read_point(frontier.folder, entry, blocks)
    source = source_with(original, content.source.preprocessing)
    if given:
        small = solution.built(original, blocks)
    else:
        small = original
        solution.apply(small, blocks)
    report = Report.of(
        content.original,
        entry,
        budget,
        verdict,
        tuple(_warnings(entry, budget, verdict)),
        recipe=content.run.recipe,
        seed=content.run.seed,
        calibration=content.run.calibration,
        sweep=str(folder),
        command=command_line(),
    )
    seconds = round(time.perf_counter() - started, 3)
    values = {**fields_written(report), "made": made(runs_on(small)), "seconds": seconds}
    return Result(small, solution.plan, values, blocks, source)


def _warnings(entry: Entry, budget: Budget, verdict: Verdict | None) -> list[str]:
    """What to tell of a plan that was chosen by its loss."""
    if verdict is None or entry.judged is None:
        return []
    told = beyond_bound(budget, verdict)
    if not entry.judged.apart:
        told.append(
            f"the {verdict.images} images of the final figures also judged {budget}, for the sweep "
            "had no others; evaluate the small model on images of your own"
        )
    return told


def _name(content: SweepFile) -> str:
    name = content.source.loads_as
    if name is None:
        raise BlockfitError("the sweep's model was built by the user; give it as MODEL (model=)")
    return name


def _tensors(solution: Solution) -> dict[str, Tensor]:
    """Solved weights and maps under the names that ``_read_point`` takes."""
    tensors = {f"weights.{name}": value for name, value in solution.weights.items()}
    for number, module in enumerate(solution.maps):
        tensors |= {f"maps.{number}.{name}": v for name, v in module.state_dict().items()}
    return tensors


def _read_point(folder: Path, entry: Entry, blocks: Blocks) -> Solution:
    tensors, path = read_point_file(folder, entry.file), folder / entry.file
    maps = []
    for number, replacement in enumerate(entry.plan):
        prefix = f"maps.{number}."
        own = {k[len(prefix) :]: tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}
        maps.append(_filled(replacement, own, blocks, path))
    weights = {k.removeprefix("weights."): v for k, v in tensors.items()}
    return Solution(entry.plan, tuple(maps), weights)


def _filled(entry: Replacement, values: dict[str, Tensor], blocks: Blocks, path: Path) -> nn.Module:
    module = empty_map(entry, blocks.width, blocks.prefix_tokens)
    wanted = {k: v.shape for k, v in module.state_dict().items()}
    if wanted != {k: v.shape for k, v in values.items()}:
        raise BlockfitError(
            f"{path}: the map of span {entry.span} has other tensors; run the sweep again"
        )
    module.load_state_dict(values)
    return module


def _resume(target: Path, run: Run) -> SweepFile | None:
    """What a stopped sweep of the same run left; refuses a folder of anything else."""
    if not (check_sweep_folder(target) / MARK).is_file():
        return None
    content = read_sweep_file(target / MARK)
    if different := content.run.differences(run):
        raise BlockfitError(
            f"{target} holds a sweep with another {' and '.join(different)}; choose a new folder"
        )
    return content
