"""Train a small CLIP on captions of class names, then narrow both towers under one budget.

    python examples/two_towers.py --train TRAIN.parquet \\
        --test TEST.parquet -o build/two_towers

Images are a parquet file with the columns ``image`` and ``label`` (the classes named), or a folder
with a folder per class; they are read at 32 × 32. The model is transformers' ``CLIPModel`` with two
and a half million parameters. It learns for ``--minutes`` on one CPU core to tell which of the
classes' captions, each by a template drawn anew, belongs to an image. Then its zero-shot accuracy
is measured before and after both towers are narrowed to each of ``--sizes``; and, for comparison,
the image tower alone, to as many parameters of the whole where that goes. The test images choose
nothing. A trained model in the output folder is used again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

import blockfit

SIZE, BATCH, WARM_UP = 32, 128, 0.05
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEMPLATES = (
    "a photo of a {}.", "a picture of the {}.", "this is a small {}.", "one {} in a photo.",
    "the {} is here.", "a bad photo of a {}.", "a good picture of one {}.", "here is the {}.",
)  # fmt: skip


def read(path: Path, limit: int) -> tuple[Tensor, Tensor, list[str]]:
    """Images (N, 3, 32, 32) of bytes, their labels (N,) and the names of the classes."""
    from datasets import load_dataset

    kind, where = ("imagefolder", "data_dir") if path.is_dir() else ("parquet", "data_files")
    table = load_dataset(kind, split="train", **{where: str(path)})
    table = table.shuffle(seed=0).select(range(min(limit, len(table))))
    shown = [image.convert("RGB").resize((SIZE, SIZE), 3) for image in table["image"]]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in shown]))
    return pixels.permute(0, 3, 1, 2), torch.tensor(table["label"]), table.features["label"].names


def tokenizer_for(names: list[str]) -> PreTrainedTokenizerFast:
    """Whole words of the templates and of the names, between a start and an end."""
    split = Whitespace()
    texts = [*(template.format("") for template in TEMPLATES), *names]
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    signs = ["[PAD]", "[START]", "[UNK]", "[END]", *sorted(words)]
    made = Tokenizer(WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="[UNK]"))
    made.pre_tokenizer = split
    made.post_processor = TemplateProcessing(
        single="[START] $A [END]", special_tokens=[("[START]", 1), ("[END]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", bos_token="[START]",
        eos_token="[END]", model_max_length=16,
    )  # fmt: skip


def build(words: int, depth: int, patch: int) -> CLIPModel:
    """A CLIP with random weights, whose text tower is as large as its image tower."""
    tower = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": depth,
        "num_attention_heads": 4,
    }  # fmt: skip
    text = {
        **tower, "vocab_size": words, "max_position_embeddings": 16, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 3,
    }  # fmt: skip
    image = {**tower, "image_size": SIZE, "patch_size": patch}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=64))


def augmented(pixels: Tensor) -> Tensor:
    """Images shifted by up to four pixels, half of them mirrored, as the model takes them."""
    wide = F.pad(pixels.float() / 255, (4, 4, 4, 4), mode="reflect")
    down, across = torch.randint(9, (2,)).tolist()
    shown = wide[:, :, down : down + SIZE, across : across + SIZE]
    shown = torch.where(torch.rand(len(shown), 1, 1, 1) < 0.5, shown.flip(-1), shown)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (shown - mean) / std


def train(
    model: CLIPModel,
    tokens: PreTrainedTokenizerFast,
    pixels: Tensor,
    labels: Tensor,
    names: list[str],
    minutes: float,
) -> None:
    """Which caption belongs to an image: softmax over the classes' captions, for some minutes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    started, steps, share = time.perf_counter(), 0, 0.0
    model.train()
    while share < 1:
        for rows in torch.randperm(len(pixels)).split(BATCH):
            share = (time.perf_counter() - started) / (60 * minutes)
            if share >= 1:
                break
            speed = min(1.0, share / WARM_UP) * 0.5 * (1 + np.cos(np.pi * share))
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * speed + 1e-6
            drawn = torch.randint(len(TEMPLATES), (len(names),)).tolist()
            captions = [TEMPLATES[n].format(name) for n, name in zip(drawn, names, strict=True)]
            texts = tokens(captions, padding=True, return_tensors="pt")
            out = model(
                pixel_values=augmented(pixels[rows]),
                input_ids=texts["input_ids"],
                attention_mask=texts["attention_mask"],
            )
            loss = F.cross_entropy(out.logits_per_image, labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps += 1
            if steps % 20 == 0:
                print(f"{share:4.0%} step {steps}, loss {float(loss):.3f}", flush=True)
    model.eval()


def zero_shot(small: Path, original: Path, test: Path, limit: int) -> dict[str, dict[str, float]]:
    """Accuracies and intervals, as ``blockfit evaluate`` measures them."""
    command = (
        sys.executable, "-m", "blockfit", "evaluate", small, "--against", original, "--images",
        test, "--limit", limit, "--protocol", "zero-shot", "--no-speed", "--json",
    )  # fmt: skip
    words = [str(word) for word in command]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE)  # noqa: S603
    judged = json.loads(done.stdout)["protocols"]["zero-shot"]
    found: dict[str, dict[str, float]] = judged["intervals"]
    return found


def percent(interval: dict[str, float]) -> str:
    value, low, high = (100 * interval[name] for name in ("value", "low", "high"))
    return f"{value:.2f}% ({low:.2f} to {high:.2f})"


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--train", type=Path, required=True)
    asked.add_argument("--test", type=Path, required=True)
    asked.add_argument("-o", "--output", type=Path, required=True)
    asked.add_argument("--minutes", type=float, default=10)
    asked.add_argument("--depth", type=int, default=6, help="blocks of each tower")
    asked.add_argument("--patch", type=int, default=4, help="pixels of a patch's side")
    asked.add_argument("--train-limit", type=int, default=50_000, help="images to learn from")
    asked.add_argument("--sizes", type=float, nargs="+", default=[0.85, 0.7, 0.55])
    asked.add_argument("--limit", type=int, default=512, help="calibration images")
    asked.add_argument("--test-limit", type=int, default=2000)
    options = asked.parse_args()
    torch.manual_seed(0)
    folder, captions = options.output / "clip", options.output / "captions.txt"
    if not folder.exists():
        pixels, labels, names = read(options.train, options.train_limit)
        tokens = tokenizer_for(names)
        model = build(len(tokens), options.depth, options.patch)
        train(model, tokens, pixels, labels, names, options.minutes)
        for part in (model, tokens):
            part.save_pretrained(folder)
        CLIPImageProcessor(
            size={"shortest_edge": SIZE}, crop_size=SIZE, image_mean=MEAN, image_std=STD
        ).save_pretrained(folder)
        lines = [template.format(name) for template in TEMPLATES for name in names]
        captions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    clip = blockfit.load(folder)
    total = sum(parameter.numel() for parameter in clip.parameters())
    images = blockfit.images(str(options.train), clip, limit=options.limit)
    rows = []
    for size in options.sizes:
        for towers, texts in (("both", str(captions)), ("image alone", None)):
            small = options.output / f"{towers.replace(' ', '-')}-{size:g}"
            try:
                result = blockfit.compress(clip, images, texts=texts, params=size, final=0)
            except blockfit.BlockfitError as error:
                rows.append(f"| {size:.0%} | {towers} | {error} | | |")
                continue
            blockfit.save(result, small, overwrite=True)
            found = zero_shot(small, folder, options.test, options.test_limit)
            left = result.report["parameters_after"] / total
            drop = found["drop"]
            lost = f"{drop['value']:.2f} ({drop['low']:.2f} to {drop['high']:.2f})"
            after = percent(found["compressed"])
            rows.append(
                f"| {left:.1%} | {towers} | {percent(found['original'])} | {after} | {lost} |"
            )
            print(rows[-1], flush=True)
    print("| parameters | towers | zero-shot before | after | points lost |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
