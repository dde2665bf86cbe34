"""What a part of an epoch of plain fine-tuning gives back, to blockfit's models and to baselines.

    python benchmarks/finetune.py --sizes 62 50 40 --recipes blockfit corp spans --cache finetune/

Every model is compressed once and then trained as all others are: the same images in the same
order, labels alone (``--teacher`` adds the original's answers), AdamW, a warm-up and a cosine. The
original is trained, too: what it gains, no small model has to thank its own size for. ``--cache``
keeps the small models, every cell, and the training every few steps: a run that was stopped goes
on. Top-1 with its 95% interval (Wilson) and KL from the original as it came, on test images.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import MODEL, TEST, TRAIN, say
from quality import METHODS, TestSet
from torch import Tensor, nn
from torch.nn import functional as F

import blockfit
from blockfit.models.forward import placed

HEAD = "| parameters | recipe | top-1 before | KL before | top-1 after | KL after | gained |"
WARM_UP = 0.05
"""Part of the steps in which the learning rate rises."""

SETTINGS = ("model", "images", "test", "limit", "test_limit", "train_limit", "epochs", "lr",
            "batch_size", "weight_decay", "teacher", "seed")  # fmt: skip


class Training:
    """One way to train, the same for every model.

    Args:
        args: the options.
        teacher: the original, with ``--teacher``.
    """

    def __init__(self, args: argparse.Namespace, teacher: nn.Module) -> None:
        self.args = args
        images = blockfit.images(args.images, teacher, batch_size=args.batch_size)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
        order = order[: args.train_limit]
        count = max(1, round(args.epochs * len(order)))
        rounds = [order] * math.ceil(count / len(order))
        self.images, self.order = images, torch.cat(rounds)[:count]
        self.steps = math.ceil(count / args.batch_size)
        self.wanted = self._answers(teacher) if args.teacher else None

    def _answers(self, teacher: nn.Module) -> Tensor:
        """The teacher's log-probabilities of the images in their order, from the cache or made."""
        kept = self.args.cache / "teacher.pt"
        if not kept.exists():
            made = []
            for batch in replace(self.images, positions=self.order.numpy()).batches():
                with torch.no_grad():
                    logits = logits_of(teacher, placed(teacher, batch.inputs))
                made.append(logits.log_softmax(-1).cpu())
            torch.save(torch.cat(made), kept.with_suffix(".part"))
            kept.with_suffix(".part").replace(kept)
        wanted: Tensor = torch.load(kept, weights_only=True)
        return wanted

    def rate(self, step: int) -> float:
        """The learning rate's factor at a step."""
        warm = max(1, round(WARM_UP * self.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def run(self, model: nn.Module, kept: Path) -> list[float]:
        """Train a model in place; goes on from ``kept``. The loss of every step."""
        args = self.args
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.lr, weight_decay=args.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        losses: list[float] = []
        if kept.exists():
            state = torch.load(kept, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            losses = state["losses"]
        torch.manual_seed(args.seed + len(losses))
        left = self.order[len(losses) * args.batch_size :]
        model.train()
        for batch in replace(self.images, positions=left.numpy()).batches():
            loss = self.loss(model, batch.inputs, batch.labels, len(losses))
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if len(losses) % args.keep == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                         "schedule": schedule.state_dict(), "losses": losses}  # fmt: skip
                torch.save(state, kept.with_suffix(".part"))
                kept.with_suffix(".part").replace(kept)
                say(f"  step {len(losses)} of {self.steps}, loss {losses[-1]:.4f}")
        model.eval()
        return losses

    def loss(self, model: nn.Module, inputs: Any, labels: Tensor | None, step: int) -> Tensor:
        """Cross-entropy of the labels, and the divergence from the teacher where there is one."""
        if labels is None:
            raise SystemExit("the training images have no labels; give labelled ones")
        inputs = placed(model, inputs)
        logits = logits_of(model, inputs)
        loss = F.cross_entropy(logits, labels.to(logits.device), ignore_index=-1)
        if self.wanted is not None:
            wanted = self.wanted[step * self.args.batch_size :][: len(logits)].to(logits)
            own = logits.log_softmax(-1)
            loss = loss + F.kl_div(own, wanted, reduction="batchmean", log_target=True)
        return loss


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    found: Tensor = getattr(output, "logits", output)
    return found


def small_model(args: argparse.Namespace, model: nn.Module, recipe: str, size: float) -> nn.Module:
    """The compressed model of one cell, from the cache or made now."""
    folder = args.cache / f"{recipe}-{size:g}"
    if not folder.exists():
        images = blockfit.images(args.images, model, limit=args.limit, seed=args.seed)
        how: dict[str, Any] = {"recipe": METHODS[recipe], "final": 0, "seed": args.seed}
        result = blockfit.compress(model, images, params=size / 100, **how)
        blockfit.save(result, folder)
    return blockfit.load(folder, device=args.device)


def cell(
    args: argparse.Namespace, name: str, model: nn.Module, training: Training, test: Test
) -> dict[str, Any]:
    """One model before and after its training."""
    started = time.perf_counter()
    before = test.figures(model)
    parameters = sum(p.numel() for p in model.parameters())
    losses = training.run(model, args.cache / f"{name}.training")
    part = max(1, len(losses) // 10)
    return {
        "name": name, "parameters": parameters, "before": before, "after": test.figures(model),
        "steps": len(losses), "first_loss": sum(losses[:part]) / part,
        "last_loss": sum(losses[-part:]) / part, "seconds": time.perf_counter() - started,
    }  # fmt: skip


class Test:
    """Test images, and what the original as it came says of them."""

    def __init__(self, args: argparse.Namespace, original: nn.Module) -> None:
        self._set = TestSet(args.test, original, args.test_limit)
        self.count = self._set.count
        self._original = self._logits(original)

    def figures(self, model: nn.Module) -> dict[str, Any]:
        return self._set.figures(self._original, self._logits(model))

    def _logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return self._set.logits(model, blockfit.find_blocks(model)).float().cpu()


def line(row: dict[str, Any], whole: int) -> str:
    def top1(figures: dict[str, Any]) -> str:
        low, high = figures["interval"]
        return f"{figures['top1']:.2%} ({low:.2%} to {high:.2%})"

    before, after = row["before"], row["after"]
    cells = [
        f"{row['parameters'] / whole:.1%}", row["name"].partition("-")[0], top1(before),
        f"{before['kl']:.4f}", top1(after), f"{after['kl']:.4f}",
        f"{100 * (after['top1'] - before['top1']):+.2f} points",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--images", default=TRAIN, help="to calibrate and to train on")
    parser.add_argument("--test", default=TEST)
    parser.add_argument("--limit", type=int, default=512, help="calibration images")
    parser.add_argument("--test-limit", type=int, default=10_000, help="the first so many")
    parser.add_argument("--train-limit", type=int, help="images of an epoch; all by default")
    parser.add_argument("--sizes", type=float, nargs="+", default=[62, 50, 40])
    parser.add_argument(
        "--recipes", nargs="+", choices=list(METHODS), default=["blockfit", "corp", "spans"]
    )
    parser.add_argument("--epochs", type=float, default=0.5, help="a part of one, or several")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--teacher", action="store_true", help="learn from the original, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=int, default=100, help="steps between two saved states")
    parser.add_argument("--cache", type=Path, default=Path("finetune"))
    return parser.parse_args()


def check_cache(args: argparse.Namespace) -> None:
    """Refuse a cache of other settings."""
    args.cache.mkdir(parents=True, exist_ok=True)
    file = args.cache / "settings.json"
    settings = {name: getattr(args, name) for name in SETTINGS}
    if file.exists() and json.loads(file.read_text()) != settings:
        raise SystemExit(f"{args.cache} is of another run ({file.read_text()}); name another")
    file.write_text(json.dumps(settings))


def main() -> None:
    args = parsed()
    check_cache(args)
    original = blockfit.load(args.model, device=args.device)
    training, test = Training(args, original), Test(args, original)
    whole = sum(p.numel() for p in original.parameters())
    say(f"{test.count} test images; {training.steps} steps of {args.batch_size} images\n\n{HEAD}")
    say("|---" * HEAD.count(" | ") + "|---|")
    wanted = [*((r, size) for size in args.sizes for r in args.recipes), ("original", 100.0)]
    for recipe, size in wanted:
        name = f"{recipe}-{size:g}"
        file = args.cache / f"{name}.json"
        if not file.exists():
            try:
                model = copy.deepcopy(original) if recipe == "original" else (
                    small_model(args, original, recipe, size)
                )  # fmt: skip
            except blockfit.BlockfitError as error:
                say(f"| {size:g}% | {recipe} | refused: {error} |")
                continue
            file.write_text(json.dumps(cell(args, name, model, training, test), indent=1))
            (args.cache / f"{name}.training").unlink(missing_ok=True)
        say(line(json.loads(file.read_text()), whole))


if __name__ == "__main__":
    main()
