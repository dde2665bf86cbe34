"""Case 21: every argument of the public functions, given something of another type."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from families import one_thread as one_thread
from small import small_images, small_pictures, small_vit

import blockfit
from blockfit.fit.plan import Plan
from blockfit.search.budget import Budget

TEXT, WHOLE, NUMBER, FLAG, LIST, PATH, CODE, THING = (
    ["text"], [2.5, "a", True, [3], -1], ["a", [1], None, float("nan")], ["yes", 1, None],
    ["3,6", 3, ["a"], [2.5], None, {"a": 1}], [3, b"x", None, ["a"]], ["print", 3],
    [None, 3, "x", [1], object()],
)  # fmt: skip
"""What is no text, no whole number, … as wrong values."""

COMMON: dict[str, list[Any]] = {
    "final": [2.5, "a", [3], -1],
    "model": [None, 3, object(), [1], int],
    "images": [None, 3, object(), {}, lambda: None],
    "recipe": [3, None, ["default"], "unknown"],
    "protect": LIST,
    "blocks": [3, ["a"], b"x"],
    "hold_out": [*NUMBER, 0, 1, -0.5],
    "seed": [*WHOLE, None],
    "say": CODE,
    "progress": CODE,
    "resume": [3, b"x", ["a"]],
    "max_memory": [2.5, [3], "much", -1],
}
CUTS: dict[str, list[Any]] = {
    "cuts": [3, "x", ["mlp", "x"], [3], []],
    "multiple_of": [2.5, "a", [3], 0, -1],
    "whole": ["3,6", 3, [2.5], ["a"], [99]],
}
BUDGETS: dict[str, list[Any]] = {
    "remove": ["a", [1], {}, 1.5, -1, 0, 99],
    "params": ["a", [1], {}, 0, -1, 62],
    "flops": ["a", [1], {}, 0, -1, 62],
    "latency": ["a", [1], {}, 0, -1, 62],
    "max_kl": ["a", [1], {}, -1, float("nan")],
    "max_drop": ["a", [1], {}, -1, float("nan")],
}
VIEWS = [2.5, "a", [3], 0, -1, 65, True]
NAME = [None, 3, object(), [1], b"x"]
TEXTS = [3, object(), [1], "x.txt"]
"""Wrong for every model that takes images alone."""

EXPORT = {"small": NAME, "folder": PATH, "images": [3, object(), {}], "overwrite": FLAG}
CARD = {"base_model": [3, "no name", ["a/b"]], "license": [3, "", ["mit"]]}
WRONG: dict[str, dict[str, list[Any]]] = {
    "calibrate": {k: v for k, v in COMMON.items() if k != "resume"} | CUTS | {
        "views": VIEWS,
        "judge": FLAG, "preprocessing": CODE, "texts": TEXTS,
    },
    "compress": COMMON | BUDGETS | CUTS | {
        "views": VIEWS,
        "preprocessing": CODE, "texts": TEXTS,
        "spans": ["2:4", 3, [3], [(1,)], [("a", 2)], [(2, 1)], [(1, 2, 3)], [None], [], {"a": 1}],
        "map": [3, ["affine"], "unknown"],
        "rank": [2.5, "a", [3], 0, -1],
        "per_token_type": ["yes", 1, [True]],
        "ridge": ["a", [1], -1, float("nan")],
        "prefix_weight": ["a", [1], 0, -1, float("nan")],
        "repair": [3, True, "unknown", ["mlp"]],
        "repair_ridge": ["a", [1], -1, float("nan")],
        "inplace": FLAG, "force_budget": FLAG, "uniform": FLAG, "plan": [3, "x", [1], Plan()],
    },
    "sweep": COMMON | CUTS | {
        "points": [3, "a", [2.5], ["a"], [], [0]], "folder": PATH,
        "latency_images": [2.5, "a", [3], 0, -1], "preprocessing": CODE,
    },
    "from_sweep": BUDGETS | {
        "folder": PATH, "budget": ["remove", 3, object()], "model": [3, object(), [1], int],
        "force_budget": FLAG, "images": [3, object(), {}, lambda: None], "preprocessing": CODE,
        **{k: COMMON[k] for k in ("final", "say", "progress", "max_memory")},
    },
    "evaluate": {
        "compressed": NAME, "data": [None, 3, object(), {}], "against": [3, b"x", [1]],
        "blocks": [3, "blocks", [1]], "measure": FLAG, "progress": CODE,
        "checkpoint": [3, "x", [1]], "preprocessing": CODE, "texts": TEXTS,
    },
    "compare": {
        "models": [None, 3, "x", [3], {"a": 3, "b": 3}], "data": [None, 3, object(), {}],
        "against": [3, "x", [1]], "progress": CODE,
    },
    "analyze": {
        "model": NAME, "images": [None, 3, object(), {}], "folder": [3, b"x"], "overwrite": FLAG,
        "preprocessing": CODE,
        **{k: COMMON[k] for k in ("blocks", "seed", "say", "progress", "resume", "max_memory")},
    },
    "bench": {
        "original": NAME, "smalls": [None, 3, "x", [3], {"x": 3}], "settings": [3, {}],
        "blocks": [3, []], "say": CODE,
    },
    "export_plain": EXPORT | CARD | {"dtype": [3, b"x", ["a"], "int8"]},
    "export_hub": EXPORT | CARD,
    "export_onnx": {"small": NAME, "path": PATH}, "export_program": {"small": NAME, "path": PATH},
    "push_to_hub": CARD
    | {"small": NAME, "repository": [3, None], "private": FLAG, "overwrite": FLAG},
    "report": {"runs": [3, None, [3]], "path": PATH, "pictures": [3, b"x"]},
    "reproduce": {
        "model": NAME, "data": [3, b"x", ["a"]], "folder": PATH, "train": [3], "test": [3],
        "transfer": ["a", 3, [3]], "experiments": [3, ["a"]], "quick": FLAG, "judge": [3, ["a"]],
        "limit": [2.5, "a"], "samples": [3, "a", ["a"]], "seeds": [2.5, "a"],
        "train_limit": [2.5, "a"], "test_limit": [2.5, "a"], "seed": [2.5, "a", None],
        "blocks": [3, ["a"]], "say": ["print", 3, None], "progress": ["print", 3, None],
        "note": ["print", 3, None], "warn": ["print", 3, None], "reads": ["print", 3, None],
    },
    "save": {"model": THING, "folder": PATH, "overwrite": FLAG},
    "load": {"name": PATH, "model": [3, "x", [1]]},
    "images": {
        "source": [None, 3, object(), {}, lambda: None], "model": [3, "x", [1]],
        "limit": [2.5, "a", [3], 0, -1], "seed": [*WHOLE, None],
        "batch_size": [*WHOLE, 0, None], "preprocessing": [3, "x", [1]],
        "image_column": [3, ["a"]], "label_column": [3, ["a"]], "split": [3, ["a"]],
        "workers": [*WHOLE, None], "max_pixels": [2.5, "a", [3], 0, -1],
    },
    "texts": {
        "source": [None, 3, object(), {}, [1]], "tokenizer": [None, 3, "x", [1]],
        "column": [3, ["a"], "a"], "split": [3, ["a"], "a"], "limit": [2.5, "a", [3], 0, -1],
        "seed": [*WHOLE, None], "batch_size": [*WHOLE, 0, None],
    },
    "pairs": {
        "images": [None, 3, "x", [1]], "texts": [None, 3, object(), {}, [1]],
        "model": [None, 3, "x", [1]], "tokenizer": [3, "x", [1]],
    },
    "find_blocks": {
        "model": [None, 3, "x", [1]], "example": [3, "x", [1]], "path": [3, ["a"]],
        "prefix_tokens": [2.5, "a", [1], -1, 99],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Every function with arguments that are right."""
    folder = tmp_path_factory.mktemp("right")
    model, images = small_vit(3), small_images(16)
    small = blockfit.compress(model, images, spans=["1:2"])
    blockfit.sweep(model, images, folder / "sweep", cuts="blocks")
    blockfit.save(small, folder / "small")
    right: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "calibrate": (blockfit.calibrate, {"model": model, "images": images, "cuts": "blocks"}),
        "push_to_hub": (blockfit.push_to_hub, {"small": small, "repository": "me/small"}),
        "compress": (blockfit.compress, {"model": model, "images": images, "spans": [(1, 2)]}),
        "sweep": (
            blockfit.sweep,
            {"model": model, "images": images, "folder": folder / "sweep", "cuts": "blocks"},
        ),
        "from_sweep": (
            blockfit.from_sweep,
            {"folder": folder / "sweep", "budget": Budget("remove", 1), "model": model},
        ),
        "evaluate": (blockfit.evaluate, {"compressed": small, "data": images, "measure": False}),
        "compare": (
            blockfit.compare, {"models": {"small": small, "model": model}, "data": images},
        ),
        "analyze": (blockfit.analyze, {"model": model, "images": images}),
        "bench": (blockfit.bench, {"original": model, "smalls": {"small": small}}),
        "export_plain": (blockfit.export_plain, {"small": small, "folder": folder / "plain"}),
        "export_hub": (blockfit.export_hub, {"small": small, "folder": folder / "hub"}),
        "export_onnx": (blockfit.export_onnx, {"small": small, "path": folder / "x.onnx"}),
        "export_program": (blockfit.export_program, {"small": small, "path": folder / "x.pt2"}),
        "report": (blockfit.report, {"runs": folder / "sweep", "path": folder / "report.html"}),
        "reproduce": (
            blockfit.reproduce, {"model": model, "data": "digits", "folder": folder / "paper"},
        ),
        "save": (blockfit.save, {"model": small, "folder": folder / "small"}),
        "load": (blockfit.load, {"name": folder / "small", "model": model}),
        "images": (blockfit.images, {"source": small_pictures(8)}),
        "texts": (
            blockfit.texts,
            {
                "source": ["one", "two"],
                "tokenizer": lambda texts: {"input_ids": torch.ones(len(texts), 3).long()},
            },
        ),
        "pairs": (
            blockfit.pairs,
            {
                "images": blockfit.images(torch.zeros(8, 3, 32, 32)),
                "texts": ["one", "two"],
                "model": FAMILIES["clip-two-towers"].build(),
                "tokenizer": lambda texts: {"input_ids": torch.ones(len(texts), 3).long()},
            },
        ),
        "find_blocks": (blockfit.find_blocks, {"model": model, "example": small_pictures(2)}),
    }  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yield right
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_are_refused_by_the_name_of_their_parameter(
    name: str, calls: dict[str, Any]
) -> None:
    function, right = calls[name]
    parameters = inspect.signature(function).parameters.values()
    named = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    assert sorted(WRONG[name]) == sorted(named)
    quiet: list[str] = []
    for parameter, values in WRONG[name].items():
        for value in values:
            given = {**right, parameter: value}
            if parameter in ("remove", "params", "flops", "latency", "max_kl", "max_drop"):
                given.pop("spans", None)
                given.pop("budget", None)
            what = f"{parameter}={value!r:.40}"
            try:
                function(**given)
            except blockfit.BlockfitError as refused:
                said = str(refused).replace("_", " ")
                if parameter.replace("_", " ").removesuffix("s") not in said:
                    quiet.append(f"{what}: {refused}")
            else:
                quiet.append(f"{what} is taken")
    assert quiet == []


def test_spans_may_be_pairs_and_numbers_numpys() -> None:
    model, images = small_vit(6), small_images(16)
    by_pair, by_text = (
        blockfit.compress(model, images, spans=spans, seed=np.int64(3), protect=np.array([5]))
        for spans in ([(3, 5)], ["3:5"])
    )  # fmt: skip
    assert by_pair.plan == by_text.plan
    assert str(by_pair.plan) == "3:5 affine"
    pictures = small_pictures(4)
    assert torch.equal(by_pair.model(pictures), by_text.model(pictures))
    with pytest.raises(blockfit.BlockfitError, match=r"tuples, but holds range\(3, 5\)"):
        blockfit.compress(model, images, spans=[range(3, 5)])


def test_protected_blocks_that_come_from_a_generator_are_kept(tmp_path: Path) -> None:
    """An iterator is used up where it is read first; the others must not find it empty."""
    model, images = small_vit(4), small_images(16)
    small = blockfit.compress(model, images, remove=1, protect=(n for n in (0, 1, 2)))
    assert small.report["protect"] == [0, 1, 2]
    assert small.plan.removed_blocks == (3,)
    found = blockfit.sweep(
        model, images, tmp_path / "sweep", cuts="blocks", protect=iter([0, 1, 2])
    )
    assert {tuple(p["plan"][0].values())[:2] for p in found.points} == {(3, 4)}


def test_every_public_function_is_here() -> None:
    functions = {n for n in blockfit.__all__ if inspect.isfunction(getattr(blockfit, n))}
    assert functions == set(WRONG)
