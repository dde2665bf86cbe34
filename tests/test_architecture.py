"""The shape of the house: who may import whom, what no file may do, what an import leaves alone.

The imports are read with ``ast``, those inside functions too. When this test fails, move the code
to where it belongs; a new module gets its place in ``ROWS``.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "blockfit"

ROWS = (
    ("errors", "numerics", "untrusted", "amounts", "ranks", "resume", "values", "doctor"),
    ("spans",),
    ("maps",),
    ("moments",),
    ("fit",),
    ("similarity",),
    (
        "probe",
        "watch",
        "blocks",
        "surgery",
        "head",
        "residual",
        "trace",
        "tensors",
        "int8",
        "measure",
    ),
    (
        "described",
        "preprocess",
        "source",
        "hub",
        "libraries",
        "openclip",
        "models",
        "texts",
        "demo",
    ),
    ("decode", "records", "tables", "shards", "lists", "layouts", "ready", "paths"),
    ("classes", "stream", "data", "splits"),
    ("shelf", "calibrate"),
    ("rows", "beginnings", "originals", "repair"),
    ("fidelity", "recipes", "budget", "latency", "heldout", "candidates", "search", "session"),
    ("evaluate", "protocols", "zeroshot", "dense", "samples"),
    ("atomic", "manifest", "store", "sweepfile"),
    ("analysis",),
    ("parity", "passport", "traced"),
    ("card", "export_folder", "export_plain", "export_hub", "export_program", "export_onnx"),
    ("engines", "speed", "speed_report", "shortfall", "bench"),
    ("quantize", "quantize_onnx", "precision"),
    (
        "content",
        "plots",
        "headline",
        "image_views",
        "views",
        "report",
        "charts",
        "pages",
        "findings",
    ),
    ("translators", "judge", "laboratory", "experiments", "reproduce"),
    ("api", "sweep", "command_lines", "facts", "runs"),
    ("__init__",),
    ("interrupts", "console", "options", "reporter"),
    (
        "command_protocols",
        "commands",
        "command_bench",
        "command_check",
        "command_doctor",
        "command_quantize",
        "command_report",
        "command_reproduce",
        "command_export",
        "command_push",
        "cli",
        "__main__",
    ),
)
"""Each row may import from the rows above it; modules of one row from one another, in no circle."""

ROW_OF = {module: number for number, row in enumerate(ROWS) for module in row}

LIBRARIES_OF_MODELS = {"timm", "transformers", "torchvision", "open_clip"}
EXTRAS = LIBRARIES_OF_MODELS | {
    "datasets",
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "torchao",
}
KNOW_MODELS = {
    "preprocess",
    "libraries",
    "openclip",
    "models",
    "texts",
    "export_plain",
    "export_hub",
}
"""The only modules that may import a library of models; all others see any ``nn.Module``."""

UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
LONGEST_FILE = 400


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that is imported anywhere in ``tree``; members as ``module.member``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "blockfit" if node.level else ""  # the package is flat
            base = ".".join(part for part in (base, node.module) if part)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__", "_library")
        ):
            yield from (
                a.value
                for a in node.args
                if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )


def own_imports(tree: ast.AST) -> set[str]:
    """The modules of the package that ``tree`` imports; its other names count as ``__init__``."""
    parts = [name.split(".") for name in imported(tree)]
    second = {part[1] if len(part) > 1 else "__init__" for part in parts if part[0] == "blockfit"}
    known = ROW_OF.keys() | {path.stem for path in modules()}
    return {name if name in known else "__init__" for name in second}


def libraries(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imported(tree)}


def arrow_faults(module: str, tree: ast.AST) -> list[str]:
    """What ``module`` imports from rows that are not above it, as sentences."""
    return [
        f"{module}.py imports {other}.py, which is not above it in DESIGN.md's table"
        for other in sorted(own_imports(tree))
        if other in ROW_OF and (ROW_OF[other] > ROW_OF[module] or other == module)
    ]


def at_import(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: without functions and ``if TYPE_CHECKING``."""

    class Pruned(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            if ast.unparse(node.test).endswith("TYPE_CHECKING"):
                return None
            return self.generic_visit(node)

    pruned = Pruned().visit(ast.parse(ast.unparse(tree)))
    assert isinstance(pruned, ast.Module)
    return pruned


def unsafe_calls(tree: ast.AST) -> list[str]:
    """Calls that may run code hidden in data, as ``eval`` and an unguarded ``torch.load`` do."""
    faults = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in ("eval", "exec"):
            faults.append(f"line {node.lineno}: {name}(")
        if name == "torch.load" and options.get("weights_only") != "True":
            faults.append(f"line {node.lineno}: torch.load( without weights_only=True")
        if options.get("allow_pickle") == "True":
            faults.append(f"line {node.lineno}: allow_pickle=True")
    return faults


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {module_name(p): ast.parse(p.read_text("utf-8"), str(p)) for p in modules()}


def test_every_module_has_its_place_in_the_table(trees: dict[str, ast.Module]) -> None:
    unknown = sorted(trees.keys() - ROW_OF.keys())
    assert not unknown, (
        f"src/blockfit has modules without a place: {', '.join(unknown)}; "
        "add each to ROWS in tests/test_architecture.py, below all that it imports"
    )


def test_modules_import_only_from_rows_above(trees: dict[str, ast.Module]) -> None:
    known = {name: tree for name, tree in trees.items() if name in ROW_OF}
    assert [fault for name, tree in known.items() for fault in arrow_faults(name, tree)] == []


def test_modules_import_one_another_in_no_circle(trees: dict[str, ast.Module]) -> None:
    try:
        TopologicalSorter({name: own_imports(tree) for name, tree in trees.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"modules import one another in a circle: {' -> '.join(error.args[1])}")


def test_only_modules_that_know_models_import_their_libraries(
    trees: dict[str, ast.Module],
) -> None:
    found = {
        name: sorted(libraries(tree) & LIBRARIES_OF_MODELS)
        for name, tree in trees.items()
        if name not in KNOW_MODELS
    }
    assert {name: names for name, names in found.items() if names} == {}


def test_extras_are_imported_only_inside_functions(trees: dict[str, ast.Module]) -> None:
    found = {name: sorted(libraries(at_import(tree)) & EXTRAS) for name, tree in trees.items()}
    assert {name: names for name, names in found.items() if names} == {}


def test_no_module_runs_code_hidden_in_data(trees: dict[str, ast.Module]) -> None:
    faults = {name: unsafe_calls(tree) for name, tree in trees.items()}
    for name, tree in trees.items():
        faults[name] += [f"import {m}" for m in sorted(libraries(tree) & UNSAFE_MODULES)]
    assert {name: found for name, found in faults.items() if found} == {}


def test_files_are_short_enough_to_read() -> None:
    lengths = {module_name(p): len(p.read_text("utf-8").splitlines()) for p in modules()}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("spans", "from blockfit.maps import Linear"),
        ("moments", "def late():\n    from blockfit import blocks"),
        ("fit", "import blockfit.api"),
        ("store", "import blockfit"),
        ("evaluate", "from blockfit import load"),
        ("data", "from .calibrate import calibrate"),
        ("search", "import importlib\nimportlib.import_module('blockfit.cli')"),
    ],
)
def test_an_import_against_the_arrows_is_seen(module: str, source: str) -> None:
    assert len(arrow_faults(module, ast.parse(source))) == 1


def test_an_import_along_the_arrows_is_allowed() -> None:
    assert arrow_faults("maps", ast.parse("from blockfit.spans import Span")) == []
    assert arrow_faults("surgery", ast.parse("from blockfit.blocks import Blocks")) == []
    assert arrow_faults("cli", ast.parse("import blockfit\nfrom blockfit import api")) == []


def test_unsafe_calls_are_seen_and_a_models_eval_is_not() -> None:
    assert unsafe_calls(ast.parse("model.eval()\ntorch.load(f, weights_only=True)")) == []
    for source in (
        "eval(text)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
    ):
        assert len(unsafe_calls(ast.parse(source))) == 1


def test_an_import_inside_a_function_is_not_at_import() -> None:
    lazy = "if TYPE_CHECKING:\n    import timm\nclass A:\n    def f(self):\n        import timm\n"
    assert "timm" not in libraries(at_import(ast.parse(lazy)))
    assert "timm" in libraries(at_import(ast.parse("try:\n    import timm\nexcept E:\n    pass")))


WATCH_IMPORT = """
import json, logging, pkgutil, importlib, random, sys, warnings
import numpy, torch, safetensors.torch, PIL.Image, rich.console, typer

def state():
    root = logging.getLogger()
    own = logging.getLogger("blockfit")
    return {
        "torch random state": torch.get_rng_state().tolist(),
        "numpy random state": repr(numpy.random.get_state()),
        "python random state": repr(random.getstate()),
        "root logger": [root.level, root.disabled, repr(root.handlers), repr(root.filters)],
        "own logger": [own.level, [type(h).__name__ for h in own.handlers
                                   if not isinstance(h, logging.NullHandler)]],
        "logging.disable": logging.root.manager.disable,
        "warning filters": repr(warnings.filters),
        "threads": torch.get_num_threads(),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "gradients": torch.is_grad_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cuda started": torch.cuda.is_initialized(),
    }

before = state()
import blockfit
names = [m.name for m in pkgutil.iter_modules(blockfit.__path__) if m.name != "__main__"]
for name in names:
    importlib.import_module(f"blockfit.{name}")
after = state()
print(json.dumps({
    "imported": names,
    "changed": [key for key in before if before[key] != after[key]],
    "loaded": sorted({name.split(".")[0] for name in sys.modules}),
}))
"""


@pytest.fixture(scope="module")
def fresh_import() -> dict[str, Any]:
    """What importing every module of the package did in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", WATCH_IMPORT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_blockfit_loads_no_extra(fresh_import: dict[str, Any]) -> None:
    assert EXTRAS.isdisjoint(fresh_import["loaded"])


def test_importing_blockfit_changes_no_global_state(fresh_import: dict[str, Any]) -> None:
    assert "errors" in fresh_import["imported"]
    assert fresh_import["changed"] == []
