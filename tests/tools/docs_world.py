"""The files that the documentation speaks of, small: a model, photos, the folder ``../shared``.

They bear the names that the pages use, so that every command runs as it is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

CLASSES = ("ant", "bee", "cat", "dog")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}


def pictures(count: int, seed: int) -> list[tuple[Image.Image, int]]:
    """Noise on one of four motifs, 24 × 24, with its class."""
    random = np.random.default_rng(seed)
    motifs = np.random.default_rng(7).integers(0, 200, (len(CLASSES), 24, 24, 3))
    made = []
    for i in range(count):
        pixels = motifs[i % len(CLASSES)] + random.integers(0, 56, (24, 24, 3))
        made.append((Image.fromarray(pixels.astype(np.uint8)), i % len(CLASSES)))
    return made


def photos(folder: Path, count: int, seed: int) -> None:
    """One folder per class."""
    for i, (picture, label) in enumerate(pictures(count, seed)):
        (folder / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        picture.save(folder / CLASSES[label] / f"{i:03d}.png")


def table(file: Path, count: int, seed: int) -> None:
    """A parquet file with the columns image and label."""
    datasets = pytest.importorskip("datasets")
    made = pictures(count, seed)
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    rows = {"image": [p for p, _ in made], "label": [label for _, label in made]}
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(file)


def model(folder: Path, name: str, **options: Any) -> None:
    """A model of transformers with random weights, and its preprocessing."""
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = cls(cls.config_class(**options))
    made.save_pretrained(folder)
    side = {"height": SIZES["image_size"], "width": SIZES["image_size"]}
    transformers.ViTImageProcessor(size=side).save_pretrained(folder)


def classifier(folder: Path, name: str) -> None:
    names = dict(enumerate(CLASSES))
    model(folder, name, **SIZES, id2label=names, label2id={v: k for k, v in names.items()})


def clip(folder: Path) -> None:
    """A model of images and texts that knows a few words."""
    transformers, tokenizers = (
        pytest.importorskip("transformers"),
        pytest.importorskip("tokenizers"),
    )
    words = ["[PAD]", "[UNK]", "a", "photo", "of", *CLASSES]
    texts = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": len(words),
        "max_position_embeddings": 16,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    model(folder, "CLIPModel", text_config=texts, vision_config=SIZES, projection_dim=16)
    table = {word: number for number, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


def depth_estimator(folder: Path) -> None:
    """A dense head on a DINOv2, which reads the states behind blocks 2, 5, 8 and 11."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.Dinov2Config(
        **SIZES,
        out_features=["stage3", "stage6", "stage9", "stage12"],
        reshape_hidden_states=False,
    )
    sizes = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
    model(folder, "DPTForDepthEstimation", backbone_config=backbone, **sizes)


def world(folder: Path) -> Path:
    """All of it below ``folder``; where the commands are to be run."""
    here = folder / "here"
    here.mkdir(parents=True)
    classifier(here / "MODEL", "ViTForImageClassification")
    for seed, (name, count) in enumerate({"PHOTOS": 48, "TRAIN": 24, "TEST": 16}.items()):
        photos(here / name, count, seed)
    array = np.repeat(np.arange(4, dtype=np.uint8), 64).reshape(4, 8, 8)
    np.savez(here / "digits.npz", images=array, labels=[0, 1, 0, 1])
    model(here / "facebook" / "dinov2-small", "Dinov2Model", **SIZES)
    clip(here / "openai" / "clip-vit-base-patch32")
    depth_estimator(here / "facebook" / "dpt-dinov2-small-nyu")
    shared = folder / "shared"
    classifier(shared / "models" / "dinov2-small-cifar10", "Dinov2ForImageClassification")
    table(shared / "data" / "cifar10" / "train.parquet", 48, 3)
    table(shared / "data" / "cifar10" / "test.parquet", 16, 4)
    return here
