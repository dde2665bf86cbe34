"""What linear probes are worth on the features of small models, over draws of calibration images.

    python benchmarks/probes.py --params 0.62 --draws 5

The paper judges a model by a linear layer that is trained on the model's own features (Adam, 5
epochs, rate 1e-2, batches of 256; TBA, arXiv 2410.04941, section 4): ``probe-sgd``. ``probe`` is
the same question asked of a converged probe (L-BFGS), ``head`` is the model's own head, which
nothing trains. Every draw calibrates on other images and starts the paper's probe elsewhere, and
learns on the features of all training images, those that calibrated included. ``--cache`` keeps the
features: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import MODEL, TEST, TRAIN, say
from torch import nn

import blockfit
from blockfit.data.images import Images
from blockfit.evaluation.protocols import Features, linear_probe, linear_probe_sgd, vectors
from blockfit.models.head import observe

JUDGES = ("head", "probe-sgd", "probe", "probe-sgd of the original")


@dataclass(frozen=True)
class Seen:
    """Features to learn from and to be judged on, and the top-1 of the model's own head."""

    train: Features
    test: Features
    head: float


def seen(model: nn.Module, train: Images, test: Images, file: Path) -> Seen:
    """What a model makes of the images; from ``file`` where it has been there before."""
    if not file.exists():
        learn, judged = looked_at(model, train), looked_at(model, test)
        np.savez(file, train=learn[0], train_labels=learn[1], test=judged[0],
                 test_labels=judged[1], head=(judged[2] == judged[1]).mean())  # fmt: skip
    kept = np.load(file)
    return Seen(
        Features(kept["train"], kept["train_labels"]),
        Features(kept["test"], kept["test_labels"]),
        float(kept["head"]),
    )


def looked_at(model: nn.Module, images: Images) -> list[np.ndarray]:
    """Features (images, F), labels (images,) and the head's classes (images,)."""
    blocks, rows = blockfit.find_blocks(model), []
    for batch in images.batches():
        found = observe(model, blocks, batch.inputs)
        if found.logits is None or batch.labels is None:
            raise SystemExit("probes are compared with a head; give a classifier and its images")
        rows.append((vectors(found, blocks.prefix_tokens), batch.labels, found.logits.argmax(1)))
    return [torch.cat(parts).numpy() for parts in zip(*rows, strict=True)]


def accuracy(guesses: np.ndarray, test: Features) -> float:
    return float((guesses == test.labels).mean())


def judged(model: Seen, original: Seen, seed: int) -> dict[str, float]:
    """Top-1 of one model by every judge."""
    test = model.test
    return {
        "head": model.head,
        "probe-sgd": accuracy(linear_probe_sgd(model.train, seed)(test), test),
        "probe": accuracy(linear_probe(model.train)(test), test),
        "probe-sgd of the original": accuracy(linear_probe_sgd(original.train, seed)(test), test),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--images", default=TRAIN, help="to calibrate, and for probes to learn from"
    )
    parser.add_argument("--test", default=TEST)
    parser.add_argument("--limit", type=int, default=512, help="calibration images")
    parser.add_argument("--params", type=float, nargs="+", default=[0.62])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--train-limit", type=int)
    parser.add_argument("--test-limit", type=int)
    parser.add_argument("--cache", type=Path, default=Path("probes"))
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    args.cache.mkdir(parents=True, exist_ok=True)
    model = blockfit.load(args.model)
    train = blockfit.images(args.images, model, limit=args.train_limit)
    test = blockfit.images(args.test, model, limit=args.test_limit)
    original = seen(model, train, test, args.cache / "original.npz")
    say(f"{len(train):,} training and {len(test):,} test images; points of top-1 lost\n")
    say(f"| parameters | draw | {' | '.join(JUDGES)} |\n|{'---|' * (2 + len(JUDGES))}")
    whole = [judged(original, original, seed) for seed in range(args.draws)]
    for params in args.params:
        rows = []
        for seed in range(args.draws):
            file = args.cache / f"{params:g}-{args.limit}-{seed}.npz"
            small = seen(small_model(args, model, params, seed, file), train, test, file)
            before, after = whole[seed], judged(small, original, seed)
            rows.append([100 * (before[name] - after[name]) for name in JUDGES])
            say(f"| {params:.0%} | {seed} | {' | '.join(f'{lost:.2f}' for lost in rows[-1])} |")
        if args.draws > 1:
            middle, spread = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1)
            cells = (f"{m:.2f} ± {s:.2f}" for m, s in zip(middle, spread, strict=True))
            say(f"| {params:.0%} | mean ± standard deviation | {' | '.join(cells)} |")
    for seed, found in enumerate(whole):
        told = ", ".join(f"{name} {value:.2%}" for name, value in found.items())
        say(f"\nThe original, draw {seed}: {told}")


def small_model(
    args: argparse.Namespace, model: nn.Module, params: float, seed: int, file: Path
) -> nn.Module:
    """The model that this draw of calibration images makes; nothing is made where ``file`` is."""
    if file.exists():
        return model
    images = blockfit.images(args.images, model, limit=args.limit, seed=seed)
    return blockfit.compress(model, images, params=params, final=0, seed=seed).model


if __name__ == "__main__":
    main()
