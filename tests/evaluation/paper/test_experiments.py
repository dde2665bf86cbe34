"""Every experiment's rows, on a small model, beside independent computations."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from families import one_thread as one_thread
from small import small_vit
from test_lab import FEW, draw, hidden_states, lab_of

from blockfit.evaluation.paper import experiments
from blockfit.evaluation.paper.charts import draw as draw_picture
from blockfit.evaluation.paper.experiments import EXPERIMENTS, _growing
from blockfit.evaluation.paper.lab import Lab, Row
from blockfit.evaluation.paper.pages import as_csv, as_table, similarity_table
from blockfit.evaluation.paper.study import reproduce
from blockfit.evaluation.paper.writeup import finding
from blockfit.fit.maps import Linear
from blockfit.fit.plan import Plan, Span
from blockfit.search.solve import Solution

ALL = [experiment.name for experiment in EXPERIMENTS]


@pytest.fixture(scope="module")
def lab() -> Lab:
    return lab_of(small_vit())


@pytest.fixture(scope="module")
def tables(lab: Lab) -> dict[str, list[Row]]:
    return {experiment.name: experiment.run(lab) for experiment in EXPERIMENTS}


@pytest.mark.parametrize("name", ALL)
def test_rows_share_their_columns_and_can_be_written_and_drawn(
    name: str, tables: dict[str, list[Row]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("matplotlib")
    rows = tables[name]
    assert all(list(row) == list(rows[0]) for row in rows)
    assert as_csv(rows).count("\n") == len(rows) + 1
    assert len(finding(name, rows)) > 30
    table = similarity_table(rows) if name == "similarity" else as_table(rows)
    assert len(table.splitlines()) == (6 if name == "similarity" else len(rows)) + 2
    picture = tmp_path_factory.mktemp(name) / "picture.png"
    draw_picture(name, rows, picture, "title")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_similarity_is_that_of_the_hidden_states(tables: dict[str, list[Row]]) -> None:
    states = hidden_states(small_vit(), torch.cat(list(draw(24, 0))))
    found = {(r["metric"], r["token_type"], r["start"], r["stop"]): r["value"]
             for r in tables["similarity"]}  # fmt: skip
    assert {key[:2] for key in found} == {
        (metric, tokens) for metric in ("mse", "cosine", "cka") for tokens in ("prefix", "patch")
    }
    x, y = states[2][:, 1:].double(), states[5][:, 1:].double()
    assert found["mse", "patch", 2, 5] == pytest.approx(float((x - y).square().mean()), rel=1e-4)
    cosine = torch.cosine_similarity(x, y, dim=-1).mean()
    assert found["cosine", "patch", 2, 5] == pytest.approx(float(cosine), rel=1e-4)


def applied_top1(model: torch.nn.Module, span: str, weight: np.ndarray, lab: Lab) -> float:
    small = copy.deepcopy(model)
    module = Linear(16, bias=False)
    module.weight.data = torch.from_numpy(weight).float()
    Solution(Plan.of([span], "linear"), (module,)).apply(small, lab.blocks)
    right = total = 0
    for batch in lab.judge._test.images.batches():
        assert batch.labels is not None
        with torch.no_grad():
            right += int((small(batch.inputs).argmax(1) == batch.labels).sum())
        total += len(batch.labels)
    return right / total


def test_spans_are_judged_with_the_papers_linear_map(
    lab: Lab, tables: dict[str, list[Row]]
) -> None:
    model = small_vit()
    states = hidden_states(model, torch.cat(list(draw(24, 0))))
    rows = {row["spans"]: row for row in tables["spans"]}
    assert len(rows) == 1 + 6 + 5 + 4  # the original, and all spans of up to three blocks
    for span in ("2:4", "1:4", "5:6"):
        start, stop = map(int, span.split(":"))
        x, y = (states[b].double().reshape(-1, 16).numpy() for b in (start, stop))
        weight = np.linalg.lstsq(x, y, rcond=None)[0].T
        assert rows[span]["top1"] == pytest.approx(applied_top1(model, span, weight, lab))
    for length in (1, 2, 3):
        chosen = [r["spans"] for r in rows.values() if r["removed"] == length and r["chosen"]]
        assert chosen == [str(lab.nearest(length))]


def test_several_spans_compare_sets_of_the_same_size(tables: dict[str, list[Row]]) -> None:
    rows = tables["several"]
    for removed in (2, 3):
        here = [row for row in rows if row["removed"] == removed]
        separate = [row for row in here if "," in row["spans"]]
        assert len(here) == len(separate) + 1
        assert {row["fitted"] for row in separate} == {"apart", "in turn"}
        assert len({row["spans"] for row in separate}) == 2
        for row in separate:
            spans = [Span.parse(text) for text in row["spans"].split(", ")]
            assert sum(map(len, spans)) == removed
    # The later map knows what the earlier one does: its features are nearer to the original's.
    found = {(row["spans"], row["fitted"]): row["feature_error"] for row in rows}
    pairs = [(found[s, "in turn"], found[s, "apart"]) for s, way in found if way == "in turn"]
    assert math.fsum(turn for turn, _ in pairs) < math.fsum(apart for _, apart in pairs)


def test_the_affine_map_fits_its_images_best_of_the_closed_forms_and_training_is_marked(
    tables: dict[str, list[Row]],
) -> None:
    rows = [row for row in tables["translators"] if row["removed"]]
    for span in {row["spans"] for row in rows}:
        found = {row["map"]: row for row in rows if row["spans"] == span}
        errors = [found[kind]["fit_mse"] for kind in ("affine", "linear", "identity")]
        assert errors == sorted(errors)
        assert [kind for kind, row in found.items() if row["trained"]] == [
            "mlp", "res-mlp", "scaled-mlp",
        ]  # fmt: skip
        assert found["linear"]["parameters"] == 256
        assert found["mlp"]["parameters"] == 2 * 16 * 8 + 8 + 16


def test_growing_moments_are_those_of_the_first_images_of_one_draw(lab: Lab) -> None:
    span = Span(1, 3)
    for count, moments in _growing(lab, (8, 20, 9999), [span]):
        assert count in (8, 20, 64)
        states = hidden_states(small_vit(), torch.cat(list(draw(64, 0)))[:count])
        x = states[1].double().reshape(-1, 16)
        assert torch.allclose(moments.regression(span).xx, x.T @ x, rtol=1e-5)


def test_positions_have_a_map_each(tables: dict[str, list[Row]]) -> None:
    rows = {(r["spans"], r["images"], r["per"]): r for r in tables["positions"] if r["removed"]}
    assert {key[1] for key in rows} == {8, 24}
    sizes = {per: row["parameters"] for (_, _, per), row in rows.items()}
    assert sizes == {
        "all tokens": 256, "token type": 512, "position": 2560, "position, ridge 0.1": 2560,
    }  # fmt: skip


def test_transfer_names_its_sources_and_the_same_images_give_the_same_map(
    tables: dict[str, list[Row]],
) -> None:
    rows = {(row["spans"], row["source"]): row for row in tables["transfer"] if row["removed"]}
    assert {source for _, source in rows} == {"own images", "other", "none"}
    for span in {span for span, _ in rows}:  # "other" draws from the same images
        own, other = rows[span, "own images"], rows[span, "other"]
        assert own["kl"] == pytest.approx(other["kl"], rel=1e-4)
        assert rows[span, "none"]["kl"] > own["kl"]


def test_means_and_deviations_over_seeds_are_those_of_the_single_runs(
    lab: Lab, tables: dict[str, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    singles = []
    for seed in range(3):
        images = draw(FEW.calibration, seed)
        span = lab.nearest(2)
        moments = lab.calibrated(images, [span])
        row = lab.judged([({"removed": 2}, lab.solved(span, "linear", moments))], seed)[1]
        singles.append(row["top1"])
    row = next(row for row in tables["seeds"] if row["removed"] == 2)
    assert row["top1"] == pytest.approx(np.mean(singles))
    assert row["top1_sd"] == pytest.approx(np.std(singles, ddof=1))
    assert [float(value) for value in row["each"].split()] == pytest.approx(singles, abs=1e-4)
    assert tables["seeds"][0]["top1_sd"] == 0  # the original does not depend on the draw


def test_a_model_of_two_blocks_skips_what_needs_more(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    warned: list[str] = []
    few = dataclasses.replace(FEW, seeds=1, steps=1)
    about = {"model": {"name": "two", "depth": 2, "width": 16, "parameters": 1}}
    about |= {"train": {"source": "a", "total": 64}, "test": {"source": "b", "images": 32}}
    about |= {"judge": "head", "preprocessing": "none"}
    lab = lab_of(small_vit(2), few.fitting(2))
    done = reproduce(lab, tmp_path / "out", about, warn=warned.append)
    assert set(done["experiments"]) == set(ALL) - {"several"}
    assert warned == ["several was skipped: it needs a model of three blocks or more"]
    assert all(r["top1_sd"] is None for r in done["experiments"]["seeds"]["rows"])


def test_every_name_has_its_picture_and_its_sentence() -> None:
    from blockfit.evaluation.paper.charts import _PANELS
    from blockfit.evaluation.paper.writeup import _FINDINGS

    assert {*_PANELS, "similarity"} == set(_FINDINGS) == set(ALL)
    assert experiments.COMPARED == ("mse", "cosine", "cka")
