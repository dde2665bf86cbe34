"""What ``--help`` says can be chosen is what the code knows, in its order."""

from __future__ import annotations

import re

import pytest
import typer

from blockfit.commands import app as cli
from blockfit.evaluation.engines import DTYPES, ENGINES
from blockfit.evaluation.paper.judge import JUDGES
from blockfit.evaluation.paper.lab import FULL
from blockfit.evaluation.paper.study import BY_NAME
from blockfit.evaluation.precision import HALVES
from blockfit.evaluation.protocols import PROTOCOLS
from blockfit.evaluation.speed import BATCH_SIZES
from blockfit.fit.plan import MAP_KINDS
from blockfit.formats.onnx_file import OPSET
from blockfit.formats.quantize_onnx import ONNX_KINDS
from blockfit.models.cost import ROUNDS
from blockfit.models.tensors import INT8_KINDS
from blockfit.search.recipes import RECIPES, SELECTIONS
from blockfit.search.setting import HOLD_OUT
from blockfit.search.solve import REPAIRS

COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
CHOICES = {
    ("compress", "--recipe"): RECIPES,
    ("compress", "--map"): MAP_KINDS,
    ("compress", "--repair"): REPAIRS,
    ("compress", "--select"): SELECTIONS,
    ("compress", "--hold-out"): [HOLD_OUT],
    ("evaluate", "--protocol"): PROTOCOLS,
    ("bench", "--engine"): ENGINES,
    ("bench", "--dtype"): DTYPES,
    ("check", "--dtype"): HALVES,
    ("quantize", "--int8"): (*INT8_KINDS, *ONNX_KINDS),
    ("export", "--opset"): [OPSET],
    ("reproduce", "--judge"): JUDGES,
    ("reproduce", "--experiments"): BY_NAME,
    ("reproduce", "--limit"): [FULL.calibration],
    ("reproduce", "--seeds"): [FULL.seeds],
}


def parameter(command: str, option: str) -> typer.core.TyperOption:
    (found,) = (p for p in COMMANDS[command].params if option in p.opts)
    return found


@pytest.mark.parametrize(("command", "option"), CHOICES, ids=" ".join)
def test_help_names_every_choice(command: str, option: str) -> None:
    text = ", ".join(map(str, CHOICES[command, option]))
    told = re.sub(r",\s*", ", ", parameter(command, option).help or "")
    assert text in told


def test_defaults_of_bench_are_those_of_the_library() -> None:
    assert parameter("bench", "--rounds").default == ROUNDS
    help = parameter("bench", "--batch-size").help or ""
    assert " and ".join(map(str, BATCH_SIZES)) in help
