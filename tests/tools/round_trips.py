"""What was saved is what loads, in another process, for every family of the tests.

    python tests/tools/round_trips.py --seed 0

Every family is compressed, saved, and loaded by a process that did not save it. Then the same with
one part of the model that is no tensor changed at random (a number, a switch, a text, a function,
an activation, a value of the config) before it is compressed. Outputs are equal bit for bit, or
``compress``, ``save`` or ``load`` refuses in one sentence. A folder that wants the user's own model
is loaded twice more: with the changed model, whose outputs must be equal, and with the unchanged
one, which must be equal or refused (or, where only images other than the saved ones' show a
difference of last bits, warned of). ``test_round_trips.py`` does it for a few families.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from families import FAMILIES
from families_more import MORE
from family import Family
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import blockfit
from blockfit.errors import BlockfitError

EVERY: dict[str, Family] = {**FAMILIES, **MORE}

BUDGETS: tuple[dict[str, Any], ...] = (
    {"spans": ["1:2"]},
    {"spans": ["0:1", "2:4"], "map": "identity"},
    {"params": 0.8, "final": 0},
)

_LEFT_ALONE = frozenset((*nn.Module().__dict__, "blockfit_source"))


def new_python(*arguments: object) -> object:
    """Run Python with these arguments."""
    return subprocess.run([sys.executable, *map(str, arguments)], check=True)


READER: Callable[..., object] = new_python
"""What runs this file to load what was saved."""

TRIES = 100
"""Draws of one change: some leave a model unable to run, many change no output."""


KINDS = ("equal", "own", "warned", "refused", "fault")

ANY, MATTERS = "any", "matters"
"""Kinds of draws: any change after which the model runs, or one that changes its outputs."""


# -- changes ------------------------------------------------------------------------------------


def places(model: nn.Module) -> list[tuple[str, str]]:
    """All (path of an object, name of its attribute) that are no tensors and no modules but
    activations; ``path`` may end in ``config``."""
    found = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _LEFT_ALONE and changed(value, 0) is not None:
                found.append((path, name))
        for name, child in module.named_children():
            if isinstance(child, (nn.GELU, nn.ReLU, nn.SiLU)):
                found.append((path, name))
    config = getattr(model, "config", None)
    if config is not None:
        found += [("config", name) for name, v in vars(config).items() if changed(v, 0) is not None]
    return found


def changed(value: Any, draw: int) -> Any:
    """Another value of the same kind; ``None`` where this kind of value is not changed."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return (value + 1, value * 2, max(0, value - 1))[draw % 3]
    if isinstance(value, float):
        return (value * 3 + 1e-3, value / 2 + 1e-4, -value)[draw % 3]
    if isinstance(value, str):
        return ("", value + "x", "relu", "avg", "eager")[draw % 5]
    if isinstance(value, tuple) and value and all(isinstance(v, (int, float)) for v in value):
        return tuple(changed(one, draw) for one in value)
    if isinstance(value, types.FunctionType):
        return negated if draw % 2 else torch.tanh
    if isinstance(value, (nn.GELU, nn.ReLU, nn.SiLU)):
        return nn.Tanh() if draw % 2 else nn.LeakyReLU(0.3)
    return None


def negated(value: Tensor, *_: Any, **__: Any) -> Tensor:
    """A function in the place of another one."""
    return -value


def change(model: nn.Module, path: str, name: str, draw: int) -> None:
    """Change one attribute; the same in every process."""
    where: Any = model.config if path == "config" else model.get_submodule(path)
    setattr(where, name, changed(getattr(where, name), draw))


def outputs(family: Family, model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(_flat(family.run(model, images)))


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _flat(item)


def drawn(name: str, seed: int, matters: bool = False) -> tuple[str, str, int]:
    """A change after which the model still runs, and with ``matters`` to other outputs."""
    family, random_ = EVERY[name], random.Random(f"{name} {seed}")
    before = outputs(family, family.build(), family.images())
    for _ in range(TRIES):
        model = family.build()
        path, attribute = random_.choice(places(model))
        draw = random_.randrange(30)
        try:
            change(model, path, attribute, draw)
            after = outputs(family, model, family.images())
            if after and not (matters and same(before, after)):
                return path, attribute, draw
        except Exception:  # noqa: S112  the model does not run so: another draw
            continue
    raise SystemExit(f"{name}: none of {TRIES} changes will do")


# -- the process that saves ---------------------------------------------------------------------


def saved(name: str, seed: int, altered: str | None, folder: Path) -> dict[str, Any]:
    """Compress and save one family; what the other process has to know."""
    family = EVERY[name]
    case: dict[str, Any] = {"name": name, "folder": str(folder), "change": None}
    model = family.build()
    if altered is not None:
        case["change"] = drawn(name, seed, altered == MATTERS)
        before = outputs(family, model, family.images())
        change(model, *case["change"])
        case["matters"] = not same(before, outputs(family, model, family.images()))
    budget = random.Random(f"budget {name} {seed}").choice(BUDGETS)
    try:
        result = blockfit.compress(model, family.images(12, seed=5), **budget, progress=False)
        blockfit.save(result, folder)
    except BlockfitError as error:
        return {**case, "refused": str(error)}
    found = outputs(family, result.model, family.images())
    tensors = {str(number): tensor.contiguous().clone() for number, tensor in enumerate(found)}
    save_file(tensors, folder.with_suffix(".outputs"))
    return case


# -- the process that loads ---------------------------------------------------------------------


def loaded(case: dict[str, Any]) -> tuple[str, str]:
    """``equal``, ``refused``, ``own`` (equal with the user's model, and no other is taken),
    ``warned`` (another is taken, with a warning) or ``fault``, and why."""
    family, folder = EVERY[case["name"]], Path(case["folder"])
    wanted = load_file(folder.with_suffix(".outputs"))
    expected = [wanted[str(number)] for number in range(len(wanted))]

    def outcome(**given: Any) -> tuple[str, str]:
        try:
            model = blockfit.load(folder, **given)
        except BlockfitError as error:
            return "refused", str(error)
        equal = same(expected, outputs(family, model, family.images()))
        return ("equal", "") if equal else ("fault", f"other outputs with {sorted(given)}")

    result, why = outcome()
    if result != "refused" or "model=" not in why:
        return result, why
    own, plain = family.build(seed=5), family.build(seed=6)
    if case["change"] is not None:
        change(own, *case["change"])
    result, why = outcome(model=own)
    if result != "equal":
        return "fault", f"with the model that it was made from: {why or result}"
    if case["change"] is None:
        return "own", why
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        without = outcome(model=plain)[0]
    if without != "fault":
        return "own", why
    if any(case["change"][1] in str(one.message) for one in caught):
        return "warned", why
    return "fault", "loads with a model that lacks the change, and has other outputs"


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Equal bit for bit, NaN included."""
    return len(one) == len(other) > 0 and all(
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.nan_to_num(7e7), right.nan_to_num(7e7))
        for left, right in zip(one, other, strict=True)
    )


def read_all(listed: Path) -> None:
    """Load every folder of the list, and write what came of it."""
    rows = []
    for case in json.loads(listed.read_text(encoding="utf-8")):
        try:
            rows.append(loaded(case))
        except Exception as error:  # anything but a refusal is a fault
            rows.append(("fault", f"{type(error).__name__}: {error}"[:300]))
    listed.with_suffix(".read").write_text(json.dumps(rows))


def fresh(cases: list[dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
    """What a new process says of the folders."""
    listed = folder / "cases.json"
    listed.write_text(json.dumps(cases))
    READER(__file__, "--read", listed)
    return [tuple(row) for row in json.loads(listed.with_suffix(".read").read_text())]


# -- all of it ----------------------------------------------------------------------------------


def round_trips(names: list[str], seed: int, altered: str | None, folder: Path) -> Counter[str]:
    """Save in this process, load in a new one; faults are printed with their change.

    Args:
        names: of families.
        seed: of changes and budgets.
        altered: ``ANY`` or ``MATTERS``; nothing is changed where ``None``.
        folder: for the saved models.
    """
    tally: Counter[str] = Counter()
    cases = []
    for number, name in enumerate(names):
        try:
            case = saved(name, seed, altered, folder / f"{number}")
        except Exception as error:  # anything but a refusal is a fault
            _say(tally, "fault", name, None, f"saving: {type(error).__name__}: {error}"[:300])
            continue
        if "refused" in case:
            # Every family is taken: an unchanged one that is refused has lost something.
            _say(
                tally,
                "fault" if altered is None else "refused",
                name,
                case["change"],
                case["refused"],
            )
        else:
            cases.append(case)
    for case, (result, why) in zip(cases, fresh(cases, folder), strict=True):
        kind = "fault" if altered is None and result == "refused" else result
        _say(tally, kind, case["name"], case["change"], why)
        tally["changed outputs"] += bool(case.get("matters"))
    return tally


def _say(tally: Counter[str], kind: str, name: str, told: Any, why: str) -> None:
    tally[kind] += 1
    if kind == "fault":
        print(f"fault: {name} {told or ''}: {why}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("unchanged", "any change", "a change of outputs"))
    parser.add_argument("--families", nargs="*", default=list(EVERY), metavar="NAME")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.read is not None:
        read_all(args.read)
        return
    faults = 0
    words = {None: "unchanged", ANY: "any change", MATTERS: "a change of outputs"}
    for altered, word in words.items():
        if args.only is not None and args.only != word:
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            tally = round_trips(args.families, args.seed, altered, Path(folder))
        counts = ", ".join(f"{tally[kind]} {kind}" for kind in KINDS)
        more = "" if altered is None else f"; {tally['changed outputs']} changed outputs"
        took = time.perf_counter() - started
        print(f"{len(args.families)} families, {word}: {counts}{more}; {took:.0f} s", flush=True)
        faults += tally["fault"]
    raise SystemExit(faults > 0)


if __name__ == "__main__":
    main()
