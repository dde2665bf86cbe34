"""Both towers of models of images and texts, under one budget: found, narrowed, saved, loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from families import FAMILIES
from families import one_thread as one_thread
from families_openclip import OPENCLIP
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import blockfit
from blockfit.errors import BlockfitError
from blockfit.models.head import observe
from blockfit.models.stages import find_blocks

transformers = pytest.importorskip("transformers")

IMAGES = 60
TEXT: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96,
    "vocab_size": 60, "max_position_embeddings": 24, "eos_token_id": 2, "bos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
LINES = [f"{'ab' * (n % 4)} photo {n}" for n in range(40)]


def letters(texts: Sequence[str], more: int = 0) -> Mapping[str, Tensor]:
    """A tokenizer of letters, padded to the longest and ``more``."""
    longest = max(map(len, texts)) + more
    rows = [[1, *(3 + ord(c) % 50 for c in t), 2, *[0] * (longest - len(t))] for t in texts]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def _towers(name: str, **more: Any) -> nn.Module:
    """A CLIP or SigLIP of transformers whose towers differ in depth and width."""
    own = FAMILIES["clip-two-towers"].build().config.vision_config.to_dict()
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "image_size", "patch_size", "num_channels",
    )  # fmt: skip
    vision = {n: own[n] for n in names}
    text = {**TEXT, "projection_size": vision["hidden_size"]}
    config = getattr(transformers, f"{name}Config")
    model: nn.Module = getattr(transformers, f"{name}Model")(
        config(text_config=text, vision_config={**vision, **more}, projection_dim=16)
    )
    return model


def _patches(count: int) -> dict[str, Tensor]:
    """Images as SigLIP 2 takes them: patches in rows, and how many there are each way."""
    generator = torch.Generator().manual_seed(2)
    return {
        "pixel_values": torch.randn(count, 16, 192, generator=generator),
        "pixel_attention_mask": torch.ones(count, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * count),
    }


MODELS: dict[str, Callable[[], nn.Module]] = {
    "clip": lambda: _towers("CLIP"),
    "siglip": lambda: _towers("Siglip"),
    "siglip2": lambda: _towers("Siglip2", num_patches=16, patch_size=8),
    "open_clip": lambda: OPENCLIP["open_clip"].make(),
}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def of_open_clip(texts: Sequence[str]) -> Mapping[str, Tensor]:
    return {"text": torch.tensor([[18, *(ord(c) % 17 for c in t[-6:]), 19] for t in texts])}


def texts_for(name: str, lines: Sequence[str] = LINES) -> Any:
    return blockfit.texts(list(lines), of_open_clip if name == "open_clip" else letters)


def pictures(name: str, count: int = IMAGES) -> Any:
    if name == "siglip2":
        whole = _patches(count)
        each: Any = [{k: v[i] for k, v in whole.items()} for i in range(count)]
        return blockfit.images(DataLoader(each))
    generator = torch.Generator().manual_seed(1)
    return blockfit.images(torch.randn(count, 3, 32, 32, generator=generator))


def batch_of(name: str, model: Any, count: int = 20) -> dict[str, Tensor]:
    both = blockfit.pairs(pictures(name, count), texts_for(name), model)
    inputs = next(iter(both))
    assert isinstance(inputs, dict)
    return inputs


def embeddings(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of images and of texts, by the model's own forward, of length 1."""
    with torch.no_grad():
        out = model(**inputs)
    if isinstance(out, tuple):  # of open_clip
        return out[0], out[1]
    return out.image_embeds, out.text_embeds


@every_model
def test_the_blocks_of_both_towers_are_found_where_both_are_given(name: str) -> None:
    model = build(name)
    inputs = batch_of(name, model)
    both = find_blocks(model, inputs)
    names = {"text": "text"} if name == "open_clip" else {"input_ids": "", "attention_mask": ""}
    texts = {key: value for key, value in inputs.items() if key in names}
    images = {key: value for key, value in inputs.items() if key not in names}
    chains = [find_blocks(model, images), find_blocks(model, texts)]
    assert both.towers
    assert [len(stage) for stage in both.stages] == [one.depth for one in chains]
    for stage, chain in zip(both.stages, chains, strict=True):
        assert stage[0] == f"{chain.path}.0"
        assert not chain.stages
    assert blockfit.Blocks.from_json(both.to_json()) == both


@every_model
def test_what_is_observed_are_the_models_own_embeddings_and_similarities(name: str) -> None:
    model = build(name)
    inputs = batch_of(name, model)
    seen = observe(model, find_blocks(model, inputs), inputs)
    image, text = embeddings(model, inputs)
    torch.testing.assert_close(seen.features, torch.cat([image, text], 1), rtol=1e-5, atol=1e-5)
    assert seen.logits is not None
    expected = model.logit_scale.exp() * image @ text.T
    torch.testing.assert_close(seen.logits, expected, rtol=1e-4, atol=1e-4)


@every_model
def test_both_towers_are_narrowed_saved_and_loaded_to_the_same_bits_elsewhere(
    name: str, tmp_path: Path
) -> None:
    model = build(name)
    result = blockfit.compress(model, pictures(name), texts=texts_for(name), params=0.7)
    left = sum(p.numel() for p in result.model.parameters())
    assert left <= 0.7 * sum(p.numel() for p in model.parameters())
    split = result.blocks.first_of_texts
    assert {block < split for block in result.plan.narrowed_blocks} == {True, False}
    assert result.report["held_out"]["kl"] is not None
    blockfit.save(result, tmp_path / "small")
    inputs = batch_of(name, model)
    save_file({k: v.contiguous() for k, v in inputs.items()}, tmp_path / "inputs")
    code = (
        "import sys, torch, blockfit\n"
        "from safetensors.torch import load_file, save_file\n"
        "torch.set_num_threads(1)\n"
        "model, inputs = blockfit.load('small'), load_file('inputs')\n"
        "with torch.no_grad(): out = model(**inputs)\n"
        "one, other = out[:2] if isinstance(out, tuple) else (out.image_embeds, out.text_embeds)\n"
        "save_file({'images': one.contiguous(), 'texts': other.contiguous()}, 'outputs')\n"
    )
    fresh.python("-c", code, cwd=tmp_path)
    found = load_file(tmp_path / "outputs")
    images, texts = embeddings(result.model, inputs)
    assert torch.equal(found["images"], images)
    assert torch.equal(found["texts"], texts)
    before = embeddings(model, inputs)
    assert not torch.equal(before[0], images)
    assert not torch.equal(before[1], texts)


def test_the_kl_is_that_of_the_softmax_over_the_different_texts_of_a_batch() -> None:
    model = build("clip")
    lines = [f"photo {n % 5}" for n in range(16)]
    few = pictures("clip", 16)
    small = blockfit.compress(model, pictures("clip"), texts=texts_for("clip"), params=0.75).model
    worth = blockfit.evaluate(
        small, few, texts=texts_for("clip", lines), against=model, measure=False
    )
    inputs = next(iter(blockfit.pairs(few, texts_for("clip", lines), model)))
    assert isinstance(inputs, dict)
    with torch.no_grad():
        p, q = (m(**inputs).logits_per_image[:, :5].double() for m in (model, small))
    expected = nn.functional.kl_div(
        q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert worth.fidelity is not None
    assert worth.fidelity.kl == pytest.approx(float(expected), rel=1e-3)
    same = (p.argmax(1) == q.argmax(1)).double().mean()
    assert worth.fidelity.agreement == pytest.approx(float(same))


@pytest.mark.parametrize("quiet", ["vision_model", "text_model"])
def test_the_tower_that_matters_less_gives_more(quiet: str) -> None:
    """One knapsack over both: of a tower whose blocks add next to nothing, all goes first."""
    model = build("clip")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(quiet) and ("fc2" in name or "out_proj" in name):
                parameter.mul_(1e-3)
    result = blockfit.compress(model, pictures("clip"), texts=texts_for("clip"), params=0.85)
    split, gone = result.blocks.first_of_texts, {True: 0, False: 0}
    for cut in result.plan.narrowings:
        gone[cut.block < split] += (cut.size - cut.kept) * cut.heads
    assert gone[quiet == "vision_model"] > 10 * gone[quiet != "vision_model"]


@pytest.mark.parametrize("given", ["both", "texts"])
def test_padding_counts_in_nothing(given: str) -> None:
    model = build("clip")
    results = []
    for more in (0, 7):
        # A batch's own length is that of its longest text, and so is here.
        written = blockfit.texts(
            [line[:8].ljust(8, "x")[: 4 + n % 5] for n, line in enumerate(LINES)],
            lambda some, more=more: letters(some, more),
        )
        some = pictures("clip") if given == "both" else None
        results.append(blockfit.compress(model, some, texts=written, params=0.8))
    short, long = results
    assert short.plan == long.plan
    inputs = batch_of("clip", model)
    pairs = zip(embeddings(short.model, inputs), embeddings(long.model, inputs), strict=True)
    for one, other in pairs:  # weights of heads whose values hardly vary differ by more
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    before = short.report["final"]["feature_error"]["value"]
    assert long.report["final"]["feature_error"]["value"] == pytest.approx(before, rel=2e-2)


@every_model
@pytest.mark.parametrize("given", ["images", "texts"])
def test_one_kind_alone_leaves_the_other_tower_as_it_is(name: str, given: str) -> None:
    model = build(name)
    some = {"images": pictures(name)} if given == "images" else {"texts": texts_for(name)}
    result = blockfit.compress(model, params=0.85, **some)
    assert not result.blocks.stages
    inputs = batch_of(name, model)
    (image, text), (old_image, old_text) = (embeddings(m, inputs) for m in (result.model, model))
    assert torch.equal(text, old_text) == (given == "images")
    assert torch.equal(image, old_image) == (given == "texts")


def test_a_sweep_serves_any_budget_of_both_towers(tmp_path: Path) -> None:
    model = build("clip")
    both = blockfit.pairs(pictures("clip"), texts_for("clip"), model)
    frontier = blockfit.sweep(model, both, tmp_path / "sweep", points=[0.9, 0.8])
    assert len(frontier.points) == 2
    one = blockfit.from_sweep(frontier.folder, params=0.8, model=model)
    other = blockfit.from_sweep(frontier.folder, params=0.85, model=model, images=both)
    for result, most in ((one, 0.8), (other, 0.85)):
        assert result.blocks.towers
        assert result.report["parameters_after"] <= most * result.report["parameters_before"]


def test_a_folder_for_the_hub_holds_both_towers_and_other_exports_the_image_tower(
    tmp_path: Path,
) -> None:
    model = build("clip")
    model.save_pretrained(tmp_path / "clip")
    loaded = blockfit.load(tmp_path / "clip")
    inputs = batch_of("clip", model)
    how: dict[str, Any] = {"texts": texts_for("clip"), "params": 0.8, "cuts": "mlp,values,keys"}
    both = blockfit.compress(loaded, pictures("clip"), **how)
    blockfit.export_hub(both, tmp_path / "hub")
    back = transformers.AutoModel.from_pretrained(tmp_path / "hub", trust_remote_code=True)
    for one, other in zip(embeddings(both.model, inputs), embeddings(back, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    found = blockfit.export_onnx(both, tmp_path / "image.onnx")
    assert found.outputs == ("image_embeds",)
    text = blockfit.compress(loaded, **how)
    with pytest.raises(BlockfitError, match="its text tower alone was made smaller; use export_h"):
        blockfit.export_onnx(text, tmp_path / "text.onnx")


def test_what_does_not_go_together_is_said() -> None:
    model = build("clip")
    some, written = pictures("clip"), texts_for("clip")
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("give images, texts= or both", lambda: blockfit.compress(model, params=0.8)),
        ("an image tower and a text tower are two",
         lambda: blockfit.compress(model, some, texts=written, remove=1)),
        ("an image tower and a text tower are two",
         lambda: blockfit.compress(model, some, texts=written, spans=["1:2"])),
        ("holds one text",
         lambda: blockfit.pairs(some, blockfit.texts(["a"] * 9, letters), model)),
        ("a batch of one has one text; give images with batch_size=2",
         lambda: blockfit.pairs(replace(some, batch_size=1), written, model)),
        ("takes no texts: it has no text tower",
         lambda: blockfit.compress(FAMILIES["vit-classifier"].build(), some, texts=written,
                                   params=0.8)),
    ]  # fmt: skip
    for words, call in refused:
        with pytest.raises(BlockfitError, match=words):
            call()
    half = blockfit.compress(model, texts=written, params=0.85)
    with pytest.raises(BlockfitError, match="another part of the model is compressed already"):
        blockfit.compress(half.model, some, params=0.9)
