"""The shipped demo: a 12-block vision transformer for scikit-learn's 8 × 8 digits, and the digits.

The weights lie in ``demo_model/`` and were trained by ``examples/train_digits.py``. Nothing here
needs a network or an extra; ``digits`` reads the images that scikit-learn installs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from blockfit.errors import BlockfitError

WEIGHTS = Path(__file__).parent / "demo_model" / "digits_vit.safetensors"
"""The shipped weights, half precision."""


class Attention(nn.Module):
    """Multi-head self-attention over tokens, (B, N, width) → (B, N, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, (B, N, width) → (B, N, width)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One pre-norm transformer block, (B, N, width) → (B, N, width)."""

    def __init__(self, width: int, heads: int, hidden_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden_width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DigitsViT(nn.Module):
    """A plain vision transformer with a class token, for small square images.

    It maps images (B, ``num_channels``, ``image_size``, ``image_size``), as ``digits`` returns
    them, to logits (B, ``classes``). It is written the way a user writes a model: blockfit finds
    its blocks by looking and knows nothing of this class.
    """

    def __init__(
        self,
        *,
        image_size: int = 8,
        num_channels: int = 1,
        patch_size: int = 2,
        width: int = 64,
        depth: int = 12,
        heads: int = 4,
        hidden_width: int = 256,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.num_channels = num_channels
        patches = (image_size // patch_size) ** 2
        self.patch_embed = nn.Conv2d(num_channels, width, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden_width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        class_token = self.cls_token.expand(images.shape[0], -1, -1)
        hidden = torch.cat([class_token, patches], dim=1) + self.pos_embed
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden)[:, 0])


def demo_arguments() -> dict[str, Any]:
    """What ``DigitsViT`` must be called with to fit the shipped weights; plain JSON values."""
    return {
        "image_size": 8,
        "num_channels": 1,
        "patch_size": 2,
        "width": 64,
        "depth": 12,
        "heads": 4,
        "hidden_width": 256,
        "classes": 10,
    }


def load_demo(weights: str | Path = WEIGHTS) -> nn.Module:
    """The trained demo model in float32, on the CPU, in eval mode.

    Args:
        weights: a safetensors file of ``DigitsViT(**demo_arguments())``; the shipped one by
            default.

    Raises:
        BlockfitError: where the file is missing or unreadable, or where a tensor is missing,
            unknown or of another shape.
    """
    path = Path(weights)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BlockfitError(
            f"cannot read the demo model's weights at {path} ({error}); reinstall blockfit"
        ) from error
    with torch.device("meta"):
        model = DigitsViT(**demo_arguments())
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise BlockfitError(f"{path}: tensor {name} is missing; reinstall blockfit")
        if name not in expected:
            raise BlockfitError(f"{path}: unknown tensor {name}; reinstall blockfit")
        if tuple(tensors[name].shape) != expected[name]:
            raise BlockfitError(
                f"{path}: tensor {name} has shape {tuple(tensors[name].shape)}, "
                f"expected {expected[name]}; reinstall blockfit"
            )
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def digits(split: Literal["calibration", "test"]) -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits, as the demo model wants them.

    Every third of the 1797 images is a test image (599); the other 1198, which the model was
    trained on, serve as calibration images.

    Returns:
        Images (n, 1, 8, 8), float32 in [-1, 1], and labels (n,), int64.

    Raises:
        BlockfitError: where ``split`` is neither ``"calibration"`` nor ``"test"``.
    """
    if split not in ("calibration", "test"):
        raise BlockfitError(f"unknown split {split!r} of the digits; choose calibration or test")
    from sklearn.datasets import load_digits  # slow to import, and only the demo needs it

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(data.target).long()
    held_out = torch.arange(len(labels)) % 3 == 2
    chosen = held_out if split == "test" else ~held_out
    return images[chosen], labels[chosen]
