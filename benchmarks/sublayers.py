"""Would a map in the place of one attention or one MLP pay in addition to narrowing?

For every sublayer, the effect (KL on held-out images) of its mean in its place, and of an affine
map of its normed input; then the knapsack with that sublayer gone against the knapsack without such
a cut, at the same number of parameters. Effects are summed as the knapsack sums them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import MODEL, TRAIN, say
from torch import Tensor, nn

import blockfit
from blockfit.fit.closed_form import fit_affine
from blockfit.fit.moments import Regression
from blockfit.models.forward import evaluating
from blockfit.models.head import observe
from blockfit.search.choose import Choice, Priced, choose
from blockfit.search.curves import Curve
from blockfit.search.fidelity import FidelityMeter, compared
from blockfit.search.recipes import RECIPES
from blockfit.search.session import Session
from blockfit.search.setting import Setting

RIDGE = 0.3
SUBLAYERS = {"attention": ("values", "keys"), "mlp": ("mlp",)}


@contextmanager
def replaced(
    block: nn.Module, first: str, writer: str, weight: Tensor, bias: Tensor
) -> Iterator[None]:
    """Let ``writer`` return an affine map of what ``first`` is given, until the ``with`` ends."""
    given: list[Tensor] = []

    def before(module: nn.Module, args: Any) -> None:
        given[:] = [args[0]]

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return nn.functional.linear(given[0], weight.to(output), bias.to(output))

    handles = [
        block.get_submodule(first).register_forward_pre_hook(before),
        block.get_submodule(writer).register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sums(session: Session, index: int, first: str, writer: str) -> Regression:
    """Of what a sublayer's first layer is given and its writer returns, over the fit images."""
    block = session.originals.modules[index]
    seen: dict[str, Any] = {}
    handles = [
        block.get_submodule(first).register_forward_pre_hook(
            lambda module, args: seen.update(x=args[0])
        ),
        block.get_submodule(writer).register_forward_hook(
            lambda module, args, out: seen.update(y=out)
        ),
    ]
    total: Regression | None = None
    for batch, traced in enumerate(session.originals.traces):
        traced.run(block, index, session.originals.state(batch, index))
        one = Regression.of(seen["x"], seen["y"])
        total = one if total is None else total + one
    for handle in handles:
        handle.remove()
    assert total is not None
    return total


def effect(session: Session, index: int, how: tuple[str, str, Tensor, Tensor]) -> float:
    """KL on the held-out images with the map in place."""
    held, meter = session.held_out, FidelityMeter()
    with replaced(session.originals.modules[index], *how):
        for number, traced in enumerate(held.images.traces):
            found = observe(held.model, held.blocks, traced.inputs)
            meter.add_sums(compared(held.original[number], found))
    return meter.result().loss


def without(
    session: Session, index: int, parts: tuple[str, ...], saved: float, to_save: float
) -> Choice | None:
    """The knapsack over all else, once a sublayer is gone."""
    curves: list[Curve] = [
        c for c in session.cuts.curves if not (c.whole.block == index and c.whole.part in parts)
    ]
    spans = [
        Priced(p.replacements[0], e, 1 - session.sizes.known_fraction(p, "params"))
        for p, e in session.cuts.spans
        if index not in p.removed_blocks
    ]
    units = {
        (c.whole.block, c.whole.part): c.unit / session.sizes.parameters
        for c in session.cuts.curves
    }
    depth = session.setting.blocks.depth
    return choose(curves, spans, depth, max(to_save - saved, 1e-9), units)


def maps(
    session: Session, index: int, place: int
) -> Iterator[tuple[str, float, tuple[str, str, Tensor, Tensor]]]:
    """Kind, part of the parameters that it saves, and layers with weights: of one sublayer."""
    block, width = session.originals.modules[index], session.setting.blocks.width
    writer = session.originals.probe.writers(index)[place]
    parts = session.originals.probe.parts(index).whole
    rows = [rows for kind in [*SUBLAYERS.values()][place] for rows in parts[kind].rows]
    problem = sums(session, index, rows[0].layer, writer.name)
    layers = {*(one.layer for one in rows), writer.name}
    size = sum(p.numel() for name in layers for p in block.get_submodule(name).parameters())
    zero = torch.zeros(width, width)
    fitted = fit_affine(problem, RIDGE, prior=zero)
    for kind, weight, bias, left in (
        ("mean", zero, problem.sum_y / problem.count, width),
        ("affine", fitted.weight, fitted.bias, width * width + width),
    ):
        saved = (size - left) / session.sizes.parameters
        yield kind, saved, (rows[0].layer, writer.name, weight, bias)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--images", default=TRAIN)
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--sizes", type=float, nargs="*", default=[0.84, 0.7, 0.62, 0.5, 0.4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = blockfit.load(args.model)
    images = blockfit.images(args.images, model, limit=args.limit, seed=0, batch_size=32)
    session = Session(Setting.of(model, images), RECIPES["default"])
    session.cuts.measure()
    base = {size: without(session, -1, (), 0.0, 1 - size) for size in args.sizes}
    gains: dict[tuple[str, str, float], list[float]] = {}
    with evaluating(model), torch.no_grad():
        for index in range(session.setting.blocks.depth):
            for place, name in enumerate(SUBLAYERS):
                for kind, saved, how in maps(session, index, place):
                    loss, told = effect(session, index, how), []
                    for size, whole in base.items():
                        rest = without(session, index, SUBLAYERS[name], saved, 1 - size)
                        if whole is not None and rest is not None:
                            ratio = (rest.effect + loss) / whole.effect
                            gains.setdefault((name, kind, size), []).append(ratio)
                            told.append(f"{size:.0%} {ratio:.2f}")
                    say(f"block {index} {name} → {kind}: KL {loss:.4f}, saves {saved:.2%}")
                    say(f"  summed effects, narrowing's = 1: {', '.join(told)}")
    for (name, kind, size), ratios in gains.items():
        pays = sum(ratio < 1 for ratio in ratios)
        say(
            f"{name} → {kind} at {size:.0%}: best {min(ratios):.2f} × narrowing's summed effects; "
            f"pays in {pays} of {len(ratios)} blocks"
        )


if __name__ == "__main__":
    main()
