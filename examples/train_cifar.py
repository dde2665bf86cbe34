"""Train a small plain ViT and a small DeiT on 10,000 images of CIFAR-10, on one CPU core each.

    python examples/train_cifar.py teacher
    python examples/train_cifar.py vit --minutes 35
    python examples/train_cifar.py deit --minutes 35

Both have 12 blocks of width 96, read 56 × 56 pixels in patches of 8, and learn from the labels and
from a teacher, the DINOv2-S classifier of ``../shared``. The teacher sees six augmented views of
every image once; its logits and tokens are kept in ``--cache``. (It may run beside the trainings,
which use the views that are ready.) 10,000 images are few for a transformer: the teacher's tokens
give one target per patch, and not one per image. The learning rate follows the share of
``--minutes`` that has passed, so that a busy machine trains less but ends as well. Test images
choose nothing.

A model is written in half precision every few epochs, as transformers' own ``save_pretrained``
does, with ``training.csv`` beside it.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

SIZE, PATCH, WIDTH, HEADS, DEPTH = 56, 8, 96, 3, 12
TEACHER_SIZE = 98  # 7 × 7 patches of 14: the teacher's patches are the student's
KEPT = 96  # principal components of the teacher's tokens that are kept as targets
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHT_DECAY, WARM_UP = 0.05, 0.08
COLUMNS = ["epoch", "loss", "token_loss", "train_top1", "test_top1", "test_images", "seconds"]


@dataclass(frozen=True)
class Pictures:
    """Images (N, 3, 32, 32) of float32 in 0 … 1 and their labels (N,)."""

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]


def read(path: Path) -> Pictures:
    """All images of a parquet file with the columns ``image`` and ``label``."""
    from datasets import load_dataset

    table = load_dataset("parquet", data_files=str(path), split="train")
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in table["image"]])
    return Pictures(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255,
        torch.tensor(table["label"]),
        tuple(table.features["label"].names),
    )


def draw_view(count: int, seed: int) -> Tensor:
    """Random crops of half the area or more, flips, brightness and contrast: (count, 6)."""
    generator = torch.Generator().manual_seed(seed)
    area, ratio, x, y, gain, offset, flip = torch.rand(7, count, generator=generator)
    side, shape = (0.5 + 0.5 * area).sqrt(), (0.85 + 0.3 * ratio).sqrt()
    wide, high = (side * shape).clamp(max=1), (side / shape).clamp(max=1)
    across, down = (1 - wide) * (2 * x - 1), (1 - high) * (2 * y - 1)
    mirrored = wide * torch.where(flip < 0.5, -1.0, 1.0)
    return torch.stack(
        [mirrored, high, across, down, 0.7 + 0.6 * gain, 0.3 * (offset - 0.5)], dim=1
    )


def render(pixels: Tensor, view: Tensor, size: int) -> Tensor:
    """Normalised images (B, 3, size, size) of a view's rows (B, 6)."""
    scale_x, scale_y, x, y, gain, offset = view.unbind(1)
    zero = torch.zeros_like(x)
    rows = [torch.stack([scale_x, zero, x], 1), torch.stack([zero, scale_y, y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [len(pixels), 3, size, size], align_corners=False)
    shown = F.grid_sample(pixels, grid, "bicubic", "reflection", align_corners=False)
    shown = (shown - 0.5) * gain[:, None, None, None] + 0.5 + offset[:, None, None, None]
    return normalise(shown.clamp(0, 1))


def normalise(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


@torch.inference_mode()
def ask(teacher: PreTrainedModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's tokens after its last norm, class token first, and its logits."""
    with torch.autocast("cpu", torch.bfloat16):
        tokens = teacher.base_model(pixels).last_hidden_state
        logits = teacher.classifier(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1))
    return tokens.float(), logits.float()


def teach(cache: Path, folder: Path, pictures: Pictures, views: int) -> None:
    """Write what the teacher says of every view: logits (N, 10), tokens (N, 50, KEPT) in fp16."""
    cache.mkdir(parents=True, exist_ok=True)
    teacher = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    for number in range(views):
        if (cache / f"tokens-{number}.npy").exists():
            continue
        view, begin = draw_view(len(pictures.labels), number), time.perf_counter()
        said, kept = [], []
        for rows in torch.arange(len(view)).split(100):
            pixels = render(pictures.pixels[rows], view[rows], TEACHER_SIZE)
            found, logits = ask(teacher, pixels)
            centre, axes = basis(cache / "basis.npz", found)
            said.append(logits)
            kept.append(((found - centre) @ axes).half())
        whole = torch.cat(said)
        np.save(cache / f"logits-{number}.npy", whole.numpy())
        np.save(cache / "partial.npy", torch.cat(kept).numpy())
        (cache / "partial.npy").rename(cache / f"tokens-{number}.npy")
        right = (whole.argmax(1) == pictures.labels).float().mean()
        print(
            f"view {number}: teacher {right:.2%}, {time.perf_counter() - begin:.0f} s", flush=True
        )


def basis(file: Path, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (384,) and principal axes (384, KEPT) of the first tokens (B, 50, 384) ever seen."""
    if not file.exists():
        _, spread, axes = torch.pca_lowrank(tokens.flatten(0, 1), KEPT, niter=4)
        scale = (spread.square().mean() / tokens[..., 0].numel()).sqrt()
        np.savez(file, centre=tokens.mean((0, 1)).numpy(), axes=(axes / scale).numpy())
    with np.load(file) as stored:
        return torch.from_numpy(stored["centre"]), torch.from_numpy(stored["axes"])


class Targets:
    """The views that the teacher has seen so far."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.logits: list[np.ndarray] = []
        self.tokens: list[np.ndarray] = []

    def refresh(self) -> int:
        """Their number now."""
        while (file := self.cache / f"tokens-{len(self.tokens)}.npy").exists():
            self.logits.append(np.load(file.with_name(f"logits-{len(self.logits)}.npy")))
            self.tokens.append(np.load(file, mmap_mode="r"))
        if not self.tokens:
            raise SystemExit(
                f"{self.cache} holds no view yet; run this script with 'teacher' first"
            )
        return len(self.tokens)


def build(family: str, names: tuple[str, ...]) -> PreTrainedModel:
    """A model with random weights."""
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH,
        "image_size": SIZE,
        "patch_size": PATCH,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
    if family == "vit":
        model: PreTrainedModel = ViTForImageClassification(ViTConfig(**sizes))
    else:
        model = DeiTForImageClassificationWithTeacher(DeiTConfig(**sizes))
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1 and "classifier" not in name:
            nn.init.xavier_uniform_(parameter.data.flatten(1))
        elif "position_embeddings" in name or name.endswith("_token"):
            nn.init.trunc_normal_(parameter.data, std=0.2)
    return model


Target = tuple[Tensor, Tensor, Tensor]
"""Labels (B,), the teacher's logits (B, 10) and tokens (B, 50, KEPT)."""


def prefix_heads(model: PreTrainedModel) -> list[nn.Linear]:
    """The classifiers on the first prefix tokens: one of a ViT, two of a DeiT."""
    if isinstance(model, DeiTForImageClassificationWithTeacher):
        return [model.cls_classifier, model.distillation_classifier]
    head = model.classifier
    return [head] if isinstance(head, nn.Linear) else []


def some_tokens(model: PreTrainedModel, pixels: Tensor, kept: Tensor) -> Tensor:
    """The final tokens of the prefix and of the ``kept`` patches: the others are never computed."""
    base = model.base_model
    hidden = base.embeddings(pixels)
    prefix = hidden.shape[1] - (SIZE // PATCH) ** 2
    hidden = torch.cat([hidden[:, :prefix], hidden[:, prefix:][:, kept]], 1)
    for layer in base.layers:
        hidden = layer(hidden)
    return base.layernorm(hidden)


def losses(
    model: PreTrainedModel, project: nn.Linear, pixels: Tensor, target: Target, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the logits, that of the tokens, and the logits (B, 10)."""
    labels, said, tokens = target
    with torch.autocast("cpu", torch.bfloat16):
        hidden = some_tokens(model, pixels, kept)
        heads = prefix_heads(model)
        logits = [head(hidden[:, i]).float() for i, head in enumerate(heads)]
        # The token that speaks for the teacher, then the patches.
        guessed = project(hidden[:, len(heads) - 1 :])
    wanted = torch.cat([tokens[:, :1], tokens[:, 1:][:, kept]], 1)
    token_loss = (guessed.float() - wanted).square().mean()
    by_label = F.cross_entropy(logits[0], labels, label_smoothing=0.1)
    if len(heads) == 2:  # DeiT: the second token learns the teacher's decision
        by_teacher = F.cross_entropy(logits[1], said.argmax(1))
    else:
        softer = F.log_softmax(said / 2, -1)
        by_teacher = 4 * F.kl_div(
            F.log_softmax(logits[0] / 2, -1), softer, reduction="batchmean", log_target=True
        )
    return (by_label + by_teacher) / 2, token_loss, torch.stack(logits).mean(0)


def rate(share: float) -> float:
    """One cycle: linear warm-up, then a half cosine to zero at ``share`` = 1."""
    if share < WARM_UP:
        return share / WARM_UP + 0.01
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - WARM_UP) / (1 - WARM_UP))))


def batches(count: int, batch_size: int, views: int) -> Iterator[tuple[int, Tensor]]:
    """(view, rows) of one epoch: every image once, each batch in one view."""
    for rows in torch.randperm(count).split(batch_size):
        if len(rows) == batch_size:
            yield int(torch.randint(views, ())), rows


@torch.inference_mode()
def accuracy(model: PreTrainedModel, pictures: Pictures, limit: int) -> float:
    """Top-1 of the first ``limit`` images as a fraction."""
    right = 0
    for rows in torch.arange(min(limit, len(pictures.labels))).split(200):
        inputs = F.interpolate(
            pictures.pixels[rows], size=(SIZE, SIZE), mode="bicubic", antialias=True
        )
        said = model(pixel_values=normalise(inputs.clamp(0, 1))).logits
        right += int((said.argmax(-1) == pictures.labels[rows]).sum())
    return right / min(limit, len(pictures.labels))


def save(model: PreTrainedModel, folder: Path, log: list[dict[str, Any]]) -> None:
    """The weights in half precision, the preprocessing, and the log so far."""
    halves = {key: value.half() for key, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=halves)
    ViTImageProcessor(
        size={"height": SIZE, "width": SIZE}, resample=3, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    with (folder / "training.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(log)


def optimizers(model: PreTrainedModel, project: nn.Linear) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, which learns from fewer steps; AdamW for all else."""
    matrices = [p for p in model.base_model.layers.parameters() if p.ndim == 2]
    ids = set(map(id, matrices))
    rest = [p for p in [*model.parameters(), *project.parameters()] if id(p) not in ids]
    return [
        torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY),
    ]


def train(
    model: PreTrainedModel, pictures: Pictures, test: Pictures, options: argparse.Namespace
) -> None:
    """Trains for ``options.minutes``, writing the model every ``options.save_every`` epochs."""
    # For so few tokens it is the fastest on a CPU; the saved model is free to use another.
    model.set_attn_implementation("eager")
    project, patches = nn.Linear(WIDTH, KEPT), (SIZE // PATCH) ** 2
    both = optimizers(model, project)
    given = Targets(options.cache)
    log: list[dict[str, Any]] = []
    begin, share = time.perf_counter(), 0.0
    while share < 1:
        model.train()
        sums, steps = torch.zeros(3), 0
        views = [draw_view(len(pictures.labels), number) for number in range(given.refresh())]
        for number, rows in batches(len(pictures.labels), options.batch_size, len(views)):
            share = (time.perf_counter() - begin) / (60 * options.minutes)
            if share >= 1:
                break
            pixels = render(pictures.pixels[rows], views[number][rows], SIZE)
            labels, index = pictures.labels[rows], rows.numpy()
            said, tokens = (
                torch.from_numpy(v[number][index]) for v in (given.logits, given.tokens)
            )
            # At last all patches, as the trained model will see them.
            seen = patches if share > 0.88 else math.ceil(patches * options.seen)
            kept = torch.randperm(patches)[:seen].sort().values
            loss, token_loss, logits = losses(
                model, project, pixels, (labels, said, tokens.float()), kept
            )
            (loss + options.token_weight * token_loss).backward()
            for optimizer in both:
                for group in optimizer.param_groups:
                    group["lr"] = options.rate * rate(share)
                optimizer.step()
                optimizer.zero_grad()
            right = (logits.argmax(1) == labels).float().mean()
            sums += torch.stack([loss.detach(), token_loss.detach(), right])
            steps += 1
        last = share >= 1
        means = [round(float(value) / max(1, steps), 4) for value in sums]
        tested = len(test.labels) if last else 500
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= {"epoch": len(log) + 1, "loss": means[0], "token_loss": means[1]}
        row |= {"train_top1": means[2], "seconds": round(time.perf_counter() - begin)}
        if last or len(log) % options.save_every == options.save_every - 1:
            if last:  # the figure is that of the file
                model.half().float()
            top1 = accuracy(model.eval(), test, tested)
            row |= {"test_top1": round(top1, 4), "test_images": tested}
        log.append(row)
        print(*(f"{key} {value}" for key, value in row.items()), flush=True)
        if row["test_images"]:
            save(model, options.output, log)


def main() -> None:
    """Train one of the two models and write its folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["teacher", "vit", "deit"])
    parser.add_argument("--output", type=Path, help="the folder to write: models/…-tiny-cifar10")
    parser.add_argument("--minutes", type=float, default=35.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--views", type=int, default=6)
    parser.add_argument("--token-weight", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=2e-3, help="the peak learning rate")
    parser.add_argument("--seen", type=float, default=0.35, help="share of the patches in training")
    parser.add_argument("--save-every", type=int, default=4, help="epochs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument(
        "--teacher", type=Path, default=Path("../shared/models/dinov2-small-cifar10")
    )
    parser.add_argument("--cache", type=Path, default=Path("build/train_cifar"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    pictures = read(options.data / "train.parquet")
    if options.what == "teacher":
        teach(options.cache, options.teacher, pictures, options.views)
        return
    options.output = options.output or Path("models") / f"{options.what}-tiny-cifar10"
    model = build(options.what, pictures.names)
    print(f"{options.what}: {sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, pictures, read(options.data / "test.parquet"), options)


if __name__ == "__main__":
    main()
