"""Models of texts, through the same mechanism: masks and positions reach the kept blocks, and
padding counts in nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import one_thread as one_thread
from torch import Tensor, nn

import blockfit
from blockfit.models.blocks import block_modules, find_chain
from blockfit.models.probe import Probe

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": 40, "max_position_embeddings": 32, "num_labels": 5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _maker(name: str, **options: Any) -> Callable[[], Any]:
    model_class = getattr(transformers, name)
    return lambda: model_class(model_class.config_class(**{**SIZES, **options}))


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "bert": (_maker("BertModel"), "encoder.layer"),
    "bert-classifier": (_maker("BertForSequenceClassification"), "bert.encoder.layer"),
    "distilbert": (
        _maker("DistilBertModel", dim=32, n_layers=4, n_heads=2, hidden_dim=64),
        "transformer.layer",
    ),
    "modernbert-classifier": (
        _maker("ModernBertForSequenceClassification", cls_token_id=1, sep_token_id=2),
        "model.layers",
    ),
    "llama": (_maker("LlamaForCausalLM", num_key_value_heads=1), "model.layers"),
    "qwen2": (_maker("Qwen2ForCausalLM", num_key_value_heads=1), "model.layers"),
    "clip-text": (_maker("CLIPTextModel"), "encoder.layers"),
}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name][0]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch(seed: int, count: int = 6) -> dict[str, Tensor]:
    """Texts of ten tokens, every second one of seven and padded."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 40, (count, 10), generator=generator)
    mask = torch.ones_like(tokens)
    tokens[:, 0] = 1
    tokens[1::2, 7:] = mask[1::2, 7:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


TEXTS = [batch(seed) for seed in range(6)]


def primary(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


@every_model
def test_blocks_are_found_and_their_maps_get_what_the_model_gives_them(name: str) -> None:
    model = build(name)
    blocks = find_chain(model, TEXTS[0])
    assert (blocks.path, blocks.depth, blocks.width) == (MODELS[name][1], 4, 32)
    result = blockfit.compress(model, blockfit.images(TEXTS), spans=["1:3"])
    by_hand = copy.deepcopy(model)
    modules = block_modules(by_hand, blocks)
    (linear,) = [m for m in block_modules(result.model, blocks)[2].modules() if is_map(m)]

    def stand_in(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return linear(hidden)

    modules[1].forward = lambda hidden, *args, **kwargs: hidden
    modules[2].forward = stand_in
    for inputs in TEXTS[:2]:
        expected = primary(by_hand, inputs)
        torch.testing.assert_close(primary(result.model, inputs), expected)
        assert not torch.allclose(expected, primary(model, inputs))


def is_map(module: nn.Module) -> bool:
    return type(module).__module__ == "blockfit.fit.maps"


@every_model
def test_texts_choose_a_span_and_the_small_model_is_saved_and_loaded(
    name: str, tmp_path: Path
) -> None:
    result = blockfit.compress(build(name), blockfit.images(TEXTS), remove=1)
    blockfit.save(result, tmp_path / "small")
    back = blockfit.load(tmp_path / "small")
    assert torch.equal(primary(back, TEXTS[0]), primary(result.model, TEXTS[0]))


def test_a_decoder_writes_the_same_with_and_without_its_cache() -> None:
    result = blockfit.compress(build("llama"), blockfit.images(TEXTS), spans=["1:3"])
    start = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": torch.ones(1, 4).long()}
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    small: Any = result.model
    with_cache = small.generate(**start, **how, use_cache=True)
    assert torch.equal(with_cache, small.generate(**start, **how, use_cache=False))
    assert with_cache.shape == (1, 12)


def test_padded_places_do_not_change_a_compressed_models_output() -> None:
    result = blockfit.compress(build("bert"), blockfit.images(TEXTS), spans=["1:3"])
    inputs = {key: value[1:2] for key, value in TEXTS[0].items()}
    short = {key: value[:, :7] for key, value in inputs.items()}
    torch.testing.assert_close(
        primary(result.model, inputs)[:, :7], primary(result.model, short), rtol=1e-4, atol=1e-5
    )


def longer(inputs: dict[str, Tensor], more: int = 9) -> dict[str, Tensor]:
    """The same texts, padded to a longer length with tokens that are not even the padding's."""
    count = len(inputs["input_ids"])
    tokens = torch.cat([inputs["input_ids"], torch.full((count, more), 17)], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more))
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("asked", [{"params": 0.7}, {"spans": ["1:3"]}], ids=str)
@every_model
def test_padding_to_a_longer_length_changes_no_plan_and_no_weight(
    name: str, asked: dict[str, Any]
) -> None:
    model = build(name)
    short = blockfit.compress(model, blockfit.images(TEXTS), **asked)
    long = blockfit.compress(model, blockfit.images([longer(t) for t in TEXTS]), **asked)
    assert long.plan == short.plan
    expected = short.model.state_dict()
    for key, value in long.model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=2e-3, atol=2e-4, msg=key)
    before = short.report["final"]["feature_error"]["value"]
    assert long.report["final"]["feature_error"]["value"] == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "parts", "refused"),
    [
        ("clip-text", {"mlp", "values", "keys"}, {}),
        ("modernbert-classifier", {"mlp", "values"}, {"keys": "RoPE"}),
        ("qwen2", {"mlp"}, {"values": "2 heads share", "keys": "grouped queries"}),
        ("bert", {"mlp", "values", "keys"}, {}),
        ("distilbert", {"mlp", "values", "keys"}, {}),
    ],
)
def test_what_can_be_narrowed_is_found_and_the_rest_is_refused_with_the_reason(
    name: str, parts: set[str], refused: dict[str, str]
) -> None:
    model = build(name)
    with torch.no_grad():
        found = Probe(model, find_chain(model, TEXTS[0]), TEXTS[0]).parts(1)
    assert set(found.whole) == parts
    assert found.refused.keys() == refused.keys()
    for part, words in refused.items():
        assert words in found.refused[part]
