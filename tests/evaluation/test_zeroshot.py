"""Zero-shot classification, against transformers' and open_clip's own."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import blockfit_command
from families import FAMILIES
from families import one_thread as one_thread
from families_openclip import TEXT, config
from PIL import Image

import blockfit
from blockfit.errors import BlockfitError
from blockfit.evaluation.protocols import Features
from blockfit.evaluation.zeroshot import class_embeddings, read_names, zero_shot
from blockfit.models.load import source_of
from blockfit.models.text_tower import tokenizer

NAMES = ["cat", "dog", "red bird"]
PROMPTS = ["a {}.", "the photo of {}"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with a tokenizer of letters and a processor, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("zero") / "clip"
    signs = [*string.ascii_lowercase, ".", *(s + "</w>" for s in string.ascii_lowercase + ".")]
    vocabulary = {sign: i for i, sign in enumerate([*signs, "<|startoftext|>", "<|endoftext|>"])}
    own = transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
    own.save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(
        folder
    )
    end = vocabulary["<|endoftext|>"]
    text = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "vocab_size": len(vocabulary), "max_position_embeddings": 24,
        "eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end,
    }  # fmt: skip
    vision = FAMILIES["clip-two-towers"].build().config.vision_config.to_dict()
    settings = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(settings)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve noisy pictures in folders by class."""
    folder = tmp_path_factory.mktemp("zero") / "animals"
    rng = np.random.default_rng(0)
    for number in range(12):
        place = folder / NAMES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        colour = rng.integers(0, 255, 3)
        noise = rng.integers(-60, 60, (40, 50, 3))
        picture = np.clip(colour + noise, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(place / f"{number:02}.png")
    return folder


def by_transformers(clip: Path, animals: Path, prompts: list[str]) -> list[tuple[int, int]]:
    """(Class of the largest mean cosine, label) of every picture, by the model's own forward."""
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    out = []
    for label, name in enumerate(NAMES):
        for file in sorted((animals / name).iterdir()):
            total = torch.zeros(())
            for prompt in prompts:
                texts = [prompt.format(n) for n in NAMES]
                inputs = processor(
                    text=texts, images=Image.open(file), return_tensors="pt", padding=True
                )
                with torch.no_grad():
                    seen = model(**inputs)
                total = total + seen.text_embeds
            cosine = total / total.norm(dim=-1, keepdim=True) @ seen.image_embeds[0]
            out.append((int(cosine.argmax()), label))
    return out


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_the_command_gives_what_transformers_gives(
    clip: Path, animals: Path, prompts: list[str], tmp_path: Path
) -> None:
    pairs = by_transformers(clip, animals, prompts)
    assert len({guess for guess, _ in pairs}) > 1
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    more = [word for prompt in prompts for word in ("--prompt", prompt)]
    found = blockfit_command(
        "evaluate", clip, "--data", animals, "--protocol", "zero-shot", "--json",
        "--classes", tmp_path / "names.txt", *more,
    )  # fmt: skip
    accuracy = found.json["protocols"]["zero-shot"]["compressed"]
    assert accuracy == pytest.approx(np.mean([guess == label for guess, label in pairs]))


def test_a_compressed_model_takes_the_originals_text_tower_and_the_sets_own_names(
    clip: Path, animals: Path, tmp_path: Path
) -> None:
    model: Any = blockfit.load(clip)
    result = blockfit.compress(model, blockfit.images(str(animals), model), spans=["1:3"])
    blockfit.save(result, tmp_path / "small")
    found = blockfit_command(
        "evaluate", tmp_path / "small", "--data", animals, "--protocol", "zero-shot", "--json",
        "--against", clip, "--prompt", PROMPTS[0],
    )  # fmt: skip
    worth = found.json["protocols"]["zero-shot"]
    pairs = by_transformers(clip, animals, PROMPTS[:1])
    assert worth["original"] == pytest.approx(np.mean([g == label for g, label in pairs]))
    assert 0 <= worth["compressed"] <= 1


def test_class_embeddings_are_open_clips(tmp_path: Path) -> None:
    library = pytest.importorskip("open_clip")
    text = {**TEXT, "vocab_size": 49408, "context_length": 16}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config(text_cfg=text), "preprocess_cfg": {}})
    )
    torch.manual_seed(0)
    model = library.CLIP(**config(text_cfg=text)).eval()
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    loaded = blockfit.load(tmp_path)
    found = class_embeddings(loaded, tokenizer(loaded, source_of(loaded)), NAMES, PROMPTS)
    expected = library.build_zero_shot_classifier(
        model, library.get_tokenizer(f"local-dir:{tmp_path}"), NAMES,
        [lambda name, prompt=prompt: prompt.format(name) for prompt in PROMPTS],
    )  # fmt: skip
    torch.testing.assert_close(found, expected.T)


def test_wrong_calls_say_what_is_missing(clip: Path, tmp_path: Path) -> None:
    model = blockfit.load(clip)
    tokenize = tokenizer(model, source_of(model))
    with pytest.raises(BlockfitError, match="two classes or more, not 1"):
        class_embeddings(model, tokenize, ["cat"])
    with pytest.raises(BlockfitError, match=r"has no \{\} where the class name goes"):
        class_embeddings(model, tokenize, NAMES, ["a photo"])
    plain = FAMILIES["vit-classifier"].build()
    with pytest.raises(BlockfitError, match="has no text tower"):
        class_embeddings(plain, tokenize, NAMES)
    with pytest.raises(BlockfitError, match="without a tokenizer"):
        tokenizer(plain, source_of(FAMILIES["plain"].build()))
    images = Features(np.ones((2, 4), np.float32), np.array([0, 5]))
    with pytest.raises(BlockfitError, match="label 5, but there are 3 class names"):
        zero_shot(torch.ones(3, 4), images)
    with pytest.raises(BlockfitError, match="projects both into one space"):
        zero_shot(torch.ones(3, 6), images)
    names = tmp_path / "names.txt"
    names.write_text("cat\n\ndog\n")
    with pytest.raises(BlockfitError, match="line 2 is empty"):
        read_names(names)
    with pytest.raises(BlockfitError, match="cannot be read"):
        read_names(tmp_path / "nowhere.txt")
