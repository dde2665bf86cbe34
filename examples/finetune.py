"""Fine-tune a compressed model: with labels, its original as a teacher, or both.

python examples/finetune.py small/ --teacher MODEL --train TRAIN --epochs 0.5 -o tuned/
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

import blockfit


def main() -> None:
    """Read the options, train, save, say what the loss did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("small", help="what compress wrote")
    parser.add_argument("--teacher", help="the original; without it labels alone teach")
    parser.add_argument("--train", required=True, help="images, as --images takes them")
    parser.add_argument("--epochs", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", required=True)
    asked = parser.parse_args()
    model = blockfit.load(asked.small)
    teacher = None if asked.teacher is None else blockfit.load(asked.teacher)
    images = blockfit.images(asked.train, model, batch_size=asked.batch_size, seed=asked.seed)
    steps = max(1, round(asked.epochs * -(-len(images) // asked.batch_size)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=asked.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    done, losses = 0, []
    while done < steps:
        for batch in images.batches():
            if done == steps:
                break
            logits = logits_of(model(batch.inputs))
            loss = logits.new_zeros(())
            if batch.labels is not None:
                loss = loss + F.cross_entropy(logits, batch.labels, ignore_index=-1)
            if teacher is not None:
                with torch.no_grad():
                    target = logits_of(teacher(batch.inputs)).log_softmax(-1)
                said = logits.log_softmax(-1)
                loss = loss + F.kl_div(said, target, reduction="batchmean", log_target=True)
            if not loss.requires_grad:
                parser.error("the images have no labels: give --teacher")
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            done += 1
    blockfit.save(model.eval(), asked.output)
    part = max(1, done // 4)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    print(f"{done} steps; mean loss of the first quarter {first:.4f}, of the last {last:.4f}")


def logits_of(output: object) -> torch.Tensor:
    """A model's logits: transformers returns them in an object, other libraries alone."""
    found = getattr(output, "logits", output)
    assert isinstance(found, torch.Tensor)
    return found


if __name__ == "__main__":
    main()
