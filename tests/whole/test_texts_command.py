"""``--texts`` on the command line: text encoders, and both towers of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import blockfit_command
from families import FAMILIES
from families import one_thread as one_thread
from PIL import Image

import blockfit

transformers = pytest.importorskip("transformers")

NAMES = ["cat", "dog", "bird"]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "photo",
    "of",
    *NAMES,
    *(f"w{n}" for n in range(40)),
]
LINES = [f"a photo of {NAMES[n % 3]} w{n % 40} w{n * 7 % 40}" for n in range(50)]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": len(WORDS), "max_position_embeddings": 16, "pad_token_id": 0, "cls_token_id": 2,
    "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip


def _shaken(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder, a model of images and texts, their tokenizer, texts and pictures."""
    folder = tmp_path_factory.mktemp("texts")
    transformers.utils.logging.disable_progress_bar()
    (folder / "vocab.txt").write_text("\n".join(WORDS), "utf-8")
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = _shaken(transformers.ModernBertModel(transformers.ModernBertConfig(**SIZES)))
        vision = FAMILIES["clip-two-towers"].build().config.vision_config.to_dict()
        text = {k: v for k, v in SIZES.items() if k not in ("cls_token_id", "sep_token_id")}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        clip = _shaken(transformers.CLIPModel(config))
    for name, model in {"encoder": encoder, "clip": clip, "bare": encoder}.items():
        model.save_pretrained(folder / name)
        if name != "bare":
            tokenizer.save_pretrained(folder / name)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    processor.save_pretrained(folder / "clip")
    (folder / "texts.txt").write_text("\n".join(LINES) + "\n", "utf-8")
    rows = "\n".join(f'{n},"{line}"' for n, line in enumerate(LINES))
    (folder / "table.csv").write_text(f"number,caption\n{rows}\n", "utf-8")
    rng = np.random.default_rng(0)
    for number in range(48):
        place = folder / "pictures" / NAMES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        picture = rng.integers(0, 255, (40, 40, 3)).astype(np.uint8)
        Image.fromarray(picture).save(place / f"{number:02}.png")
    return folder


def test_a_text_encoder_is_compressed_and_evaluated(world: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    how = ("--texts", world / "texts.txt", "--json")
    made = blockfit_command(
        "compress", world / "encoder", *how, "--params", "70%", "--cuts", "mlp,values", "-o", small
    )
    parts = {cut["part"] for cut in made.json["plan"]}
    assert parts == {"mlp", "values"}
    assert made.json["parameters_after"] <= 0.7 * made.json["parameters_before"]
    (data,) = made.json["data"]
    assert (data["source"], data["used"]) == (str(world / "texts.txt"), 50)
    model, original = blockfit.load(small), blockfit.load(world / "encoder")
    tokens = transformers.AutoTokenizer.from_pretrained(world / "tokenizer")
    inputs = tokens(LINES[:9], padding=True, return_tensors="pt")
    with torch.no_grad():
        gaps = [m(**inputs).last_hidden_state for m in (model, original)]
    assert 0 < float((gaps[0] - gaps[1]).norm() / gaps[1].norm()) < 1
    worth = blockfit_command("evaluate", small, "--against", world / "encoder", *how, "--no-speed")
    error = worth.json["fidelity"]["feature_relative_error"]
    assert worth.json["images"] == 50
    assert error == pytest.approx(made.json["final"]["feature_error"]["value"], rel=0.5)


def test_a_column_of_a_table_gives_what_a_file_gives(world: Path, tmp_path: Path) -> None:
    plans = []
    for name in ("texts.txt", "table.csv"):
        done = blockfit_command(
            "compress", world / "encoder", "--texts", world / name, "--params", "80%", "--json",
            "-o", tmp_path / name,
        )  # fmt: skip
        plans.append(done.json["plan"])
    assert plans[0] == plans[1]


def test_a_sweep_and_an_analysis_of_texts(world: Path, tmp_path: Path) -> None:
    how = ("--texts", world / "texts.txt", "--json")
    done = blockfit_command(
        "sweep", world / "encoder", *how, "--points", "90,80", "-o", tmp_path / "sweep"
    )
    assert len(done.json["points"]) == 2
    found = blockfit_command("analyze", world / "encoder", *how)
    assert len(found.json["similarity"]["boundaries"]) == 5


def test_both_towers_and_their_zero_shot_accuracy(world: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    both = ("--images", world / "pictures", "--texts", world / "texts.txt")
    made = blockfit_command(
        "compress", world / "clip", *both, "--params", "75%", "-o", small, "--json"
    )
    blocks = {cut["block"] for cut in made.json["plan"]}
    depth = len(json.loads((small / "blockfit.json").read_text("utf-8"))["blocks"]["stages"][0])
    assert min(blocks) < depth <= max(blocks)
    worth = blockfit_command(
        "evaluate", small, "--against", world / "clip", "--images", world / "pictures",
        "--protocol", "zero-shot", "--no-speed", "--json",
    ).json["protocols"]["zero-shot"]  # fmt: skip
    expected, right = {}, {}
    for name, folder in {"original": world / "clip", "compressed": small}.items():
        model: Any = blockfit.load(folder)
        images = blockfit.images(str(world / "pictures"), blockfit.load(world / "clip"))
        tokens = transformers.AutoTokenizer.from_pretrained(world / "tokenizer")
        texts = tokens([f"a photo of a {n}." for n in sorted(NAMES)], return_tensors="pt")
        right[name] = []
        for batch in images.batches():
            with torch.no_grad():
                seen = model(pixel_values=batch.inputs, **texts).logits_per_image.argmax(1)
            assert batch.own_labels is not None
            right[name] += (seen == batch.own_labels).tolist()
        expected[name] = np.mean(right[name])
    assert {name: worth[name] for name in expected} == pytest.approx(expected)
    ends = worth["intervals"]["compressed"]
    assert ends["low"] < expected["compressed"] < ends["high"]
    lost = 100 * (expected["original"] - expected["compressed"])
    assert worth["intervals"]["drop"]["value"] == pytest.approx(lost)
    fidelity = blockfit_command(
        "evaluate", small, "--against", world / "clip", *both, "--no-speed", "--json"
    ).json["fidelity"]
    assert fidelity["kl"] > 0


def test_what_is_wrong_with_texts_is_one_sentence(world: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n", "utf-8")
    texts = ("--texts", world / "texts.txt")
    budget = ("--params", "80%", "-o", tmp_path / "small")
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("demo", *texts), "takes no texts"),
        (("demo", "--images", "digits", *texts), "takes no texts"),
        ((world / "encoder", "--texts", tmp_path / "empty.txt"), "holds no texts; give some"),
        ((world / "encoder", "--texts", tmp_path / "nowhere.txt"), "cannot read texts from"),
        ((world / "bare", *texts), "name a tokenizer with --tokenizer"),
        ((world / "bare", *texts, "--tokenizer", tmp_path), "there is no tokenizer"),
        ((world / "encoder", "--images", world / "pictures", *texts), "is no model of an image"),
        ((world / "encoder", *texts, "--report", tmp_path / "r.html"), "cannot show --texts"),
        ((world / "encoder", "--images", "digits", "--tokenizer", "x"), "no use without --texts"),
        ((world / "encoder", "--texts", world / "table.csv", "--text-column", "number"),
         "with --text-column"),
        ((world / "encoder",), "give a model and --images"),
    ]  # fmt: skip
    for words, sentence in cases:
        assert sentence in blockfit_command("compress", *words, *budget).error, words
    assert not (tmp_path / "small").exists()
    alone = blockfit_command("evaluate", world / "encoder").error
    assert "give --images DATA; or --texts DATA" in alone
    done = blockfit_command(
        "compress", world / "bare", *texts, "--tokenizer", world / "tokenizer", *budget, "--json"
    )
    assert done.json["parameters_after"] < done.json["parameters_before"]
