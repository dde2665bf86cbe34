"""The tables equal independent computations on stored activations, per token type and together."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import one_thread as one_thread
from PIL import Image
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from torch import Tensor

from blockfit.errors import BlockfitError
from blockfit.fit.moments import Moments
from blockfit.fit.plan import Span, spans_up_to
from blockfit.fit.similarity import METRICS, merged, part, tables

DEPTH, WIDTH, PREFIX, TOKENS = 3, 5, 2, 9


def states(prefix: int = PREFIX, images: int = 40, seed: int = 0) -> list[Tensor]:
    """h[0] … h[3], each a nonlinear step from the one before; far from the origin."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    out = [noise(images, prefix + TOKENS, WIDTH) * torch.arange(1.0, WIDTH + 1) + 3]
    for _ in range(DEPTH):
        step = torch.tanh(out[-1] @ noise(WIDTH, WIDTH)) + 0.3 * noise(*out[-1].shape)
        out.append(out[-1] + step + noise(WIDTH))
    return out


def moments_of(
    hidden: list[Tensor],
    prefix: int = PREFIX,
    longest: int = DEPTH,
    patches: int | None = None,
) -> Moments:
    moments = Moments(spans_up_to(DEPTH, longest), WIDTH, prefix)
    for batch in range(0, len(hidden[0]), 16):
        rows = {b: hidden[b][batch : batch + 16] for b in moments.boundaries}
        moments.add(rows, patches)
    return moments


def rows(hidden: Tensor, token_type: str) -> np.ndarray:
    tokens = {"prefix": slice(0, PREFIX), "patch": slice(PREFIX, None), "all": slice(None)}
    return hidden[:, tokens[token_type]].reshape(-1, WIDTH).double().numpy()


def by_hand(metric: str, x: np.ndarray, y: np.ndarray) -> float:
    """The metric from its textbook definition, with numpy and scikit-learn."""
    if metric == "mse":
        return float(np.mean((x - y) ** 2))
    if metric == "r2":
        fitted = LinearRegression().fit(x, y).predict(x)
        return float(r2_score(y, fitted, multioutput="variance_weighted"))
    if metric == "cka":
        centre = np.eye(len(x)) - 1 / len(x)

        def hsic(a: np.ndarray, b: np.ndarray) -> float:
            return float(np.trace(centre @ a @ a.T @ centre @ b @ b.T))

        return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    return float(np.mean(cosine if metric == "cosine" else np.arccos(cosine.clip(-1, 1)) / np.pi))


@pytest.mark.parametrize("token_type", ["prefix", "patch", "all"])
@pytest.mark.parametrize("metric", METRICS)
def test_every_value_equals_its_definition_on_stored_activations(
    metric: str, token_type: str
) -> None:
    hidden = states()
    found = tables(moments_of(hidden))
    for start in range(DEPTH + 1):
        for stop in range(start, DEPTH + 1):
            expected = by_hand(
                metric, rows(hidden[start], token_type), rows(hidden[stop], token_type)
            )
            value = found.at(metric, start, stop, token_type)
            tolerance = 1e-7 if metric == "angular" else 1e-10  # arccos is steep at 1
            assert value == pytest.approx(expected, rel=1e-10, abs=tolerance)


@pytest.mark.parametrize("metric", ["mse", "cosine", "angular", "cka"])
def test_symmetric_metrics_give_symmetric_tables(metric: str) -> None:
    found = tables(moments_of(states()))
    for token_type in found.token_types:
        table = np.array(found.values[metric][token_type], dtype=float)
        assert np.array_equal(table, table.T)


def test_r2_goes_from_earlier_to_later_states_only() -> None:
    found = tables(moments_of(states()))
    assert found.at("r2", 0, 2) is not None
    assert found.at("r2", 2, 0) is None
    assert all(start <= stop for metric, _, start, stop, _ in found.rows() if metric == "r2")


def test_half_of_the_patch_tokens_stand_for_all_of_them() -> None:
    hidden = states()
    doubled = [torch.cat([h, h[:, PREFIX:]], dim=1) for h in hidden]
    expected = tables(moments_of(doubled))
    found = tables(moments_of(hidden, patches=2 * (hidden[0].shape[1] - PREFIX)))
    for metric in METRICS:
        for token_type in ("prefix", "patch", "all"):
            got = np.array(found.values[metric][token_type], dtype=float)
            want = np.array(expected.values[metric][token_type], dtype=float)
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_cka_ignores_rotation_and_scale_where_mse_does_not() -> None:
    hidden = states()
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))[0].float()
    hidden[2] = 3 * hidden[1] @ rotation + 1
    found = tables(moments_of(hidden))
    assert found.at("cka", 1, 2) == pytest.approx(1, abs=1e-6)
    assert found.at("r2", 1, 2) == pytest.approx(1, abs=1e-6)
    mse = found.at("mse", 1, 2)
    assert mse is not None
    assert mse > 1


def test_a_prefix_token_that_is_always_the_same_has_no_cka_and_explains_nothing() -> None:
    hidden = states(prefix=1)
    hidden[0][:, :1] = torch.randn(WIDTH)
    found = tables(moments_of(hidden, prefix=1))
    assert found.at("cka", 0, 0, "prefix") is None
    assert found.at("cka", 0, 2, "prefix") is None
    assert found.at("r2", 0, 2, "prefix") == pytest.approx(0, abs=1e-9)
    assert found.at("r2", 1, 2, "prefix") is not None
    assert found.at("cka", 0, 2, "patch") is not None


def test_a_model_without_prefix_tokens_has_tables_of_patch_and_all_tokens() -> None:
    found = tables(moments_of(states(prefix=0), prefix=0))
    assert found.token_types == ("patch", "all")
    assert found.values["mse"]["patch"] == found.values["mse"]["all"]
    with pytest.raises(BlockfitError, match="no mse of prefix tokens"):
        found.at("mse", 0, 1, "prefix")


def test_parts_of_different_pairs_merge_into_the_whole() -> None:
    hidden = states()
    whole = tables(moments_of(hidden))
    parts = []
    for spans in ([Span(0, 1), Span(0, 2)], [Span(0, 3), Span(1, 2), Span(1, 3), Span(2, 3)]):
        moments = Moments(spans, WIDTH, PREFIX)
        moments.add({b: hidden[b] for b in moments.boundaries})
        parts.append(part(moments))
    for (*cell, value), (*other, expected) in zip(merged(parts).rows(), whole.rows(), strict=True):
        assert cell == other
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_pairs_without_moments_stay_empty() -> None:
    found = tables(moments_of(states(), longest=1))
    assert found.at("mse", 0, 1) is not None
    assert found.at("mse", 0, 2) is None


def test_moments_without_tokens_are_refused() -> None:
    with pytest.raises(BlockfitError, match="no tokens"):
        tables(Moments(spans_up_to(2, 2), WIDTH, 1))


def test_csv_is_long_format_and_reads_back_exactly(tmp_path: Path) -> None:
    hidden = states(prefix=1)
    hidden[0][:, :1] = 1.0
    found = tables(moments_of(hidden, prefix=1))
    found.write_csv(tmp_path / "similarity.csv")
    with (tmp_path / "similarity.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["metric", "token_type", "start", "stop", "value"]
    read = [
        (r["metric"], r["token_type"], int(r["start"]), int(r["stop"]),
         float(r["value"]) if r["value"] else None)
        for r in lines
    ]  # fmt: skip
    assert read == list(found.rows())
    assert ("cka", "prefix", 0, 0, None) in read


def test_json_is_plain_and_holds_no_nan() -> None:
    hidden = states(prefix=1)
    hidden[0][:, :1] = 1.0
    found = tables(moments_of(hidden, prefix=1))
    read = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert read["boundaries"] == [0, 1, 2, 3]
    assert read["tokens"] == {"prefix": 40, "patch": 40 * TOKENS}
    assert read["metrics"]["mse"]["all"][0][1] == found.at("mse", 0, 1)


def test_picture_is_a_png_with_a_panel_per_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tables(moments_of(states())).draw(tmp_path / "similarity.png", "a model")
    with Image.open(tmp_path / "similarity.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 500


def test_without_matplotlib_the_picture_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(BlockfitError, match=r"blockfit\[plots\]"):
        tables(moments_of(states())).draw(tmp_path / "similarity.png")
    assert not list(tmp_path.iterdir())
