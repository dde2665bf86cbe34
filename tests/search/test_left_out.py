"""A candidate that the model cannot be run with is left out and named; the search goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import one_thread  # noqa: F401
from small import WIDTH, SmallViT, small_images, small_pictures, small_vit
from torch import Tensor

import blockfit
from blockfit.fit.plan import Plan


class Needing(SmallViT):
    """Does not run where one of some blocks changes nothing."""

    needed: tuple[int, ...] = (3,)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for index, block in enumerate(self.blocks):
            before, x = x, block(x)
            if index in self.needed and torch.equal(before, x):
                raise RuntimeError(f"block {index} did nothing\nand more lines")
        return self.head(self.norm(x)[:, 0])


def needing(*blocks: int) -> Any:
    model = small_vit(6)
    model.__class__ = Needing
    model.needed = blocks
    return model


IDENTITY = {"recipe": "plain", "map": "identity"}


@pytest.mark.parametrize(
    "budget",
    [
        {"remove": 2},
        {"params": 0.7, "cuts": "blocks"},
        {"max_kl": 0.5, "force_budget": True, "cuts": "blocks"},
    ],
    ids=str,
)
def test_a_candidate_that_cannot_be_run_is_left_out_and_named(budget: dict[str, Any]) -> None:
    model, images = needing(3), small_images(32)
    small = blockfit.compress(model, images, **IDENTITY, **budget)
    assert 3 not in small.plan.removed_blocks
    assert torch.isfinite(small.model(small_pictures(2))).all()
    (line,) = (w for w in small.report["warnings"] if w.startswith("left out"))
    assert line.count("did nothing") == 3
    assert "more" in line
    kept = blockfit.compress(small_vit(6), images, **IDENTITY, **budget, protect=[3])
    assert kept.plan == small.plan
    assert not any(w.startswith("left out") for w in kept.report["warnings"])


@pytest.mark.parametrize("budget", [{"params": 0.6}, {"flops": 0.6}], ids=str)
def test_spans_that_cannot_be_run_are_left_out_beside_narrowed_parts(budget: Any) -> None:
    small = blockfit.compress(needing(3), small_images(32), map="identity", **budget)
    assert 3 not in small.plan.removed_blocks
    assert small.plan.narrowings
    assert torch.isfinite(small.model(small_pictures(2))).all()
    (line,) = (w for w in small.report["warnings"] if w.startswith("left out"))
    assert line.count("did nothing") == 3  # the three spans of one or two blocks that hold it


class Exact(SmallViT):
    """Does not run where an MLP of one block has fewer neurons."""

    def forward(self, x: Tensor) -> Tensor:
        if self.blocks[2].mlp.wide.out_features != 2 * WIDTH:
            raise RuntimeError("block 2 needs all its neurons")
        return super().forward(x)


def test_a_part_that_cannot_be_narrowed_in_the_model_is_left_out_and_named() -> None:
    model = small_vit(6)
    model.__class__ = Exact
    small = blockfit.compress(model, small_images(32), params=0.8, cuts="mlp")
    assert 2 not in {cut.block for cut in small.plan.narrowings}
    (line,) = (w for w in small.report["warnings"] if w.startswith("left out"))
    assert "block 2 needs all its neurons" in line


def test_a_sweep_goes_on_without_them(tmp_path: Path) -> None:
    recipe = blockfit.Recipe(maps=("identity",))
    found = blockfit.sweep(
        needing(3), small_images(32), tmp_path / "sweep", recipe=recipe, cuts="blocks"
    )
    plans = [Plan.from_json(point["plan"]) for point in found.points]
    assert [len(plan.removed_blocks) for plan in plans] == [1, 2, 3, 4]
    assert all(3 not in plan.removed_blocks for plan in plans)


def test_where_no_candidate_can_be_run_the_first_reason_is_told() -> None:
    model = needing(*range(6))
    with pytest.raises(blockfit.BlockfitError, match=r"no candidate can be run.*did nothing"):
        blockfit.compress(model, small_images(32), **IDENTITY, remove=1)


def test_spans_by_hand_that_cannot_be_run_are_refused_in_one_sentence() -> None:
    with pytest.raises(blockfit.BlockfitError) as refused:
        blockfit.compress(needing(3), small_images(32), spans=["2:4"], map="identity")
    assert str(refused.value) == (
        "the model cannot be run with 2:4 identity: block 3 did nothing; choose other spans"
    )
