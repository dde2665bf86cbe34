"""Train the demo model that blockfit ships: a 12-block ViT on scikit-learn's 8 × 8 digits.

    python examples/train_digits.py [--output digits_vit.safetensors]

Runs on one CPU core in some five to ten minutes, prints a log, and writes the weights in half
precision. The test images are read once, after training. There is no stochastic depth: with it,
dropping blocks would cost next to nothing, and the demo would show little of what maps do.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from blockfit.models.demo import WEIGHTS, DigitsViT, demo_arguments, digits, load_demo

PEAK_LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
EMA_DECAY = 0.995


def initialise(model: DigitsViT) -> None:
    """Xavier weights, zero biases, and positions as large as the embedded patches.

    With timm's standard deviation of 0.02 positions drown in patches of 2 × 2 pixels, and the
    loss starts to fall many epochs later.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(model.pos_embed, std=0.5)
    nn.init.trunc_normal_(model.cls_token, std=0.5)


def augment(images: Tensor) -> Tensor:
    """Each image (B, 1, 8, 8) turned by up to 12°, scaled by up to 10%, moved by up to 1 pixel."""
    count = len(images)
    angle = (torch.rand(count) * 2 - 1) * math.radians(12)
    scale = 1 + (torch.rand(count) * 2 - 1) * 0.1
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = (torch.rand(count, 2) * 2 - 1) * 2 / images.shape[-1]
    rows = [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    # The background is -1 and grid_sample pads with 0.
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first 5% of the steps, then a half cosine to zero."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def train(epochs: int, batch_size: int, seed: int) -> DigitsViT:
    """A trained model: the running average of the weights after the last epoch."""
    torch.manual_seed(seed)
    images, labels = digits("calibration")
    model = DigitsViT(**demo_arguments())
    initialise(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99))
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps)
    )
    begin = time.perf_counter()
    for epoch in range(epochs):
        losses = []
        for rows in torch.randperm(len(images)).split(batch_size):
            if len(rows) < batch_size:
                continue
            logits = model(augment(images[rows]))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            losses.append(loss.item())
        if epoch % 5 == 4 or epoch == epochs - 1:
            print(
                f"epoch {epoch + 1:3d}  loss {sum(losses) / len(losses):.4f}  "
                f"train top-1 {accuracy(average.module, images, labels):7.2%}  "
                f"{time.perf_counter() - begin:5.0f} s",
                flush=True,
            )
    trained = average.module
    if not isinstance(trained, DigitsViT):
        raise TypeError("the averaged model is of another class than the trained one")
    return trained


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy as a fraction."""
    return (model.eval()(images).argmax(-1) == labels).float().mean().item()


def main() -> None:
    """Train, write the weights, and read them back for the final figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="the file to write")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = train(options.epochs, options.batch_size, options.seed)
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, options.output, metadata={"format": "pt"})
    images, labels = digits("test")
    print(
        f"{options.output}: {options.output.stat().st_size / 1e6:.2f} MB, "
        f"test top-1 {accuracy(load_demo(options.output), images, labels):.2%} "
        f"on {len(images)} images"
    )


if __name__ == "__main__":
    main()
