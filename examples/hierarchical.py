"""Train a small Swin and a small ConvNeXt, then narrow both, next to published recipes.

    python examples/hierarchical.py --train TRAIN.parquet --test TEST.parquet -o build/hierarchical

Images are a parquet file with the columns ``image`` and ``label``, or a folder with a folder per
class; they are read at 32 × 32. Each model has three stages and one to two million parameters (4 MB
in half precision), and learns from the labels for ``--minutes`` of processor time, half an hour
each. The learning rate follows the share of the time that has passed. A stopped run goes on where
it stopped: after the last finished epoch, then after the last finished row of the table. Test
images choose nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTImageProcessor,
)

import blockfit

SIZE, WARM_UP = 32, 0.08
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTHS, DEPTHS = (48, 96, 192), (2, 4, 2)
RECIPES, SIZES = ("default", "corp", "vbp"), (0.85, 0.7, 0.55)


@dataclass(frozen=True)
class Pictures:
    """Images (N, 3, 32, 32) of bytes and their labels (N,)."""

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]


def read(path: Path, limit: int | None = None) -> Pictures:
    """The images of a parquet file, or of a folder with a folder per class."""
    from datasets import load_dataset

    if path.is_dir():
        table = load_dataset("imagefolder", data_dir=str(path), split="train")
    else:
        table = load_dataset("parquet", data_files=str(path), split="train")
    if limit is not None:
        table = table.shuffle(seed=0).select(range(min(limit, len(table))))
    shown = [image.convert("RGB").resize((SIZE, SIZE), 3) for image in table["image"]]
    return Pictures(
        torch.from_numpy(np.stack([np.asarray(image) for image in shown])).permute(0, 3, 1, 2),
        torch.tensor(table["label"]),
        tuple(table.features["label"].names),
    )


def build(family: str, names: tuple[str, ...]) -> PreTrainedModel:
    """A model with random weights."""
    classes: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
    if family == "swin":
        heads = [width // 24 for width in WIDTHS]
        return SwinForImageClassification(
            SwinConfig(
                image_size=SIZE, patch_size=2, embed_dim=WIDTHS[0], depths=list(DEPTHS),
                num_heads=heads, window_size=4, drop_path_rate=0.05, **classes,
            )
        )  # fmt: skip
    return ConvNextForImageClassification(
        ConvNextConfig(
            image_size=SIZE, patch_size=2, num_stages=3, hidden_sizes=list(WIDTHS),
            depths=list(DEPTHS), layer_scale_init_value=0.1, drop_path_rate=0.05, **classes,
        )
    )  # fmt: skip


def normalise(pixels: Tensor) -> Tensor:
    """Bytes (B, 3, 32, 32) as the model takes them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def augmented(pixels: Tensor) -> Tensor:
    """Each image shifted by up to four pixels, half of them mirrored: (B, 3, 32, 32)."""
    wide = F.pad(pixels.float(), (4, 4, 4, 4), mode="reflect")
    across, down = torch.randint(9, (2,)).tolist()  # one shift a batch: batches are many
    shown = wide[:, :, down : down + SIZE, across : across + SIZE]
    flip = torch.rand(len(shown)) < 0.5
    return torch.where(flip[:, None, None, None], shown.flip(-1), shown)


def rate(share: float) -> float:
    """Linear warm-up, then a half cosine to zero at ``share`` = 1."""
    if share < WARM_UP:
        return share / WARM_UP + 0.01
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - WARM_UP) / (1 - WARM_UP))))


class Training:
    """A training that can be stopped and gone on with: weights, optimiser and the time spent.

    Args:
        model: is trained.
        folder: holds ``model.safetensors``, ``optimizer.safetensors`` and ``progress.json``.
        peak: the largest learning rate.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, peak: float) -> None:
        self.model, self.folder, self.peak = model, folder, peak
        self.optimizer = torch.optim.AdamW(model.parameters(), peak, weight_decay=0.05)
        self.log: list[dict[str, float]] = []
        if (folder / "progress.json").exists():
            self.log = json.loads((folder / "progress.json").read_text("utf-8"))
            model.load_state_dict(load_file(folder / "weights.safetensors"))
            moments = load_file(folder / "optimizer.safetensors")
            for number, parameter in enumerate(model.parameters()):
                names = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[parameter] = {n: moments[f"{number}.{n}"] for n in names}

    @property
    def seconds(self) -> float:
        """Spent so far."""
        return self.log[-1]["seconds"] if self.log else 0.0

    def keep(self, row: dict[str, float]) -> None:
        """Write where the training is; the row comes last: a stop loses an epoch at most."""
        self.log.append(row)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(self.model.state_dict(), self.folder / "weights.safetensors")
        moments = {
            f"{number}.{name}": value
            for number, parameter in enumerate(self.model.parameters())
            for name, value in self.optimizer.state[parameter].items()
        }
        save_file(moments, self.folder / "optimizer.safetensors")
        (self.folder / "progress.json").write_text(json.dumps(self.log), "utf-8")

    def run(self, pictures: Pictures, minutes: float, batch_size: int) -> None:
        """Train until so many minutes are spent, all runs together."""
        while self.seconds < 60 * minutes:
            begin, before = time.process_time(), self.seconds
            self.model.train()
            right = total = 0
            loss = torch.zeros(())
            for rows in torch.randperm(len(pictures.labels)).split(batch_size):
                share = (before + time.process_time() - begin) / (60 * minutes)
                if share >= 1 or len(rows) < min(batch_size, len(pictures.labels)):
                    break
                labels = pictures.labels[rows]
                said = self.model(pixel_values=normalise(augmented(pictures.pixels[rows]))).logits
                loss = F.cross_entropy(said, labels, label_smoothing=0.1)
                loss.backward()
                self.optimizer.param_groups[0]["lr"] = self.peak * rate(share)
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
                right, total = right + int((said.argmax(1) == labels).sum()), total + len(rows)
            seconds = before + time.process_time() - begin
            row = {
                "loss": float(loss.detach()),
                "train_top1": right / max(1, total),
                "seconds": seconds,
            }
            self.keep(row)
            print(f"epoch {len(self.log)}:", *(f"{k} {v:.4g}" for k, v in row.items()), flush=True)


def trained(family: str, pictures: Pictures, options: argparse.Namespace) -> Path:
    """The folder of a trained model, in half precision, as transformers writes it."""
    folder: Path = options.output / family
    if folder.exists():
        return folder
    torch.manual_seed(options.seed)
    model = build(family, pictures.names)
    print(f"{family}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    training = Training(model, options.output / f"{family}-training", options.rate)
    training.run(pictures, options.minutes, options.batch_size)
    unfinished = options.output / f"{family}-unfinished"
    ViTImageProcessor(
        size={"height": SIZE, "width": SIZE}, resample=3, image_mean=MEAN, image_std=STD
    ).save_pretrained(unfinished)
    model.half().save_pretrained(unfinished)
    return unfinished.rename(folder)


def measured(folder: Path, options: argparse.Namespace) -> list[str]:
    """Lines of the table of one model: every recipe at every size."""
    model = blockfit.load(folder).float()
    images = blockfit.images(str(options.train), model, limit=options.images, seed=options.seed)
    test = blockfit.images(str(options.test), model, limit=options.test_images, seed=options.seed)
    lines = []
    for size in options.sizes:
        for recipe in RECIPES:
            file = options.output / f"{folder.name}-{recipe}-{100 * size:.0f}.json"
            if not file.exists():
                try:
                    small = blockfit.compress(
                        model, images, params=size, recipe=recipe, final=0, seed=options.seed
                    )
                except blockfit.BlockfitError as error:
                    print(f"{folder.name} {recipe} {size:.0%}: {error}", flush=True)
                    continue
                worth = blockfit.evaluate(small.model, test, against=model, measure=False)
                file.write_text(json.dumps(worth.to_json()), "utf-8")
            lines.append(line(folder.name, recipe, json.loads(file.read_text("utf-8"))))
            print(lines[-1], flush=True)
    return lines


def line(name: str, recipe: str, told: dict[str, Any]) -> str:
    """One line of the table, from an evaluation's JSON."""
    before, after = told["original"], told["compressed"]
    kl = told["fidelity"]["kl"]
    cells = [
        name, recipe, f"{after['parameters'] / before['parameters']:.1%}",
        f"{after['top1']:.2%}", f"{before['top1']:.2%}", f"{kl:.4f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Train what is not trained, measure what is not measured, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--train", type=Path, required=True, help="to train and calibrate on")
    parser.add_argument("--test", type=Path, required=True, help="to measure on, with labels")
    parser.add_argument("--families", nargs="+", default=["swin", "convnext"])
    parser.add_argument(
        "--minutes", type=float, default=28.0, help="processor time of training, per model"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="the peak learning rate")
    parser.add_argument("--limit", type=int, help="images to train on; all by default")
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    parser.add_argument("--test-images", type=int, help="all by default")
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    pictures = read(options.train, options.limit)
    header = "| model | recipe | parameters | top-1 | top-1 of the original | KL |"
    rows = [header, "|---" * 6 + "|"]
    for family in options.families:
        rows += measured(trained(family, pictures, options), options)
    (options.output / "table.md").write_text("\n".join(rows) + "\n", "utf-8")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
