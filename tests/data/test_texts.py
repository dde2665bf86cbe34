"""Texts as data: files, tables and lists, tokenized batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import blockfit
from blockfit.errors import BlockfitError

LINES = [f"{'a' * (3 + n % 5)} {n}" for n in range(30)]


def letters(texts: Sequence[str]) -> Mapping[str, Tensor]:
    """A tokenizer of letters."""
    longest = max(map(len, texts))
    rows = [[1 + ord(c) % 38 for c in text] + [0] * (longest - len(text)) for text in texts]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def test_lines_of_a_file_are_texts_and_empty_ones_are_named(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(["one", "", "three", "  ", "five"]) + "\n", "utf-8")
    found = blockfit.texts(file, letters, batch_size=2)
    told = found.description()
    assert (len(found), told["total"], told["source"]) == (3, 3, str(file))
    assert told["left_out"] == {"line 2": "empty", "line 4": "empty"}
    shapes = [batch["input_ids"].shape for batch in found if isinstance(batch, Mapping)]
    assert shapes == [(2, 5), (1, 4)]


def test_arrays_and_columns_of_texts_are_lists_of_them() -> None:
    pandas = pytest.importorskip("pandas")
    expected = [batch.names for batch in blockfit.texts(LINES, letters).batches()]
    for source in (np.array(LINES), pandas.Series(LINES), pandas.DataFrame({"a": LINES})["a"]):
        found = blockfit.texts(source, letters)
        assert [batch.names for batch in found.batches()] == expected


def test_a_limit_draws_with_the_seed() -> None:
    def drawn(seed: int) -> list[str]:
        some = blockfit.texts(LINES, letters, limit=8, seed=seed, batch_size=8)
        return [name for batch in some.batches() for name in batch.names]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 8


def test_a_column_of_a_table_is_found_or_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": LINES, "other": LINES[::-1], "n": [*range(30)]})
    table.to_parquet(str(tmp_path / "t.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for source in (table, tmp_path / "t.parquet", str(tmp_path / "saved")):
        first: Any = blockfit.texts(source, letters, batch_size=4).first("read")
        assert torch.equal(first["input_ids"], letters(LINES[:4])["input_ids"])
    other: Any = blockfit.texts(table, letters, column="other", batch_size=4).first("read")
    assert torch.equal(other["input_ids"], letters(LINES[:-5:-1])["input_ids"])
    with pytest.raises(BlockfitError, match=r"'n' holds no texts.*text, other"):
        blockfit.texts(table, letters, column="n")
    with pytest.raises(BlockfitError, match="say which column"):
        blockfit.texts(table.rename_column("text", "one"), letters)


@pytest.mark.parametrize(
    ("source", "tokenizer", "message"),
    [
        ([], letters, "holds no texts"),
        (["", " "], letters, "holds no texts"),
        (7, letters, "a int is no source of texts"),
        (LINES, lambda some: [1, 2], "must return a mapping"),
        (LINES, "bert", "a tokenizer is one of transformers"),
        ("/nowhere/at/all.parquet", letters, "cannot read texts from"),
    ],
)
def test_what_is_no_text_or_no_tokenizer_is_refused(
    source: Any, tokenizer: Any, message: str
) -> None:
    with pytest.raises(BlockfitError, match=message):
        blockfit.texts(source, tokenizer)


def test_a_tokenizer_of_transformers_and_a_model_that_is_compressed(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(str(n) for n in range(30))]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, "a", "##a"]), "utf-8")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    config = transformers.ModernBertConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        vocab_size=40, max_position_embeddings=32, pad_token_id=0, cls_token_id=2, sep_token_id=3,
        bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    model = transformers.ModernBertModel(config).eval()
    found = blockfit.texts(LINES, tokenizer, batch_size=8)
    result = blockfit.compress(model, found, spans=["1:3"])
    assert [str(span) for span in result.plan.spans] == ["1:3"]
    inputs = tokenizer(LINES[:2], padding=True, return_tensors="pt")
    assert result.model(**inputs).last_hidden_state.shape[-1] == 32
