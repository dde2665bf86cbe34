"""The shape of the house: who may import whom, what no file may do, what an import leaves alone.

The imports are read with ``ast``, those inside functions too. When this test fails, move the code
to where it belongs; a new package gets its place in ``FLOORS``.
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

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "blockfit"

FLOORS = (
    "ground",
    "fit",
    "models",
    "data",
    "search formats",
    "evaluation",
    "reports",
    "api",
    "commands",
)
"""The tower: a package may import only from the floors below its own."""

FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor.split()}

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
    "models.preprocessing",
    "models.libraries",
    "models.from_open_clip",
    "models.load",
    "models.text_tower",
    "formats.plain",
    "formats.hub_folder",
}
"""The only modules that may import a library of models; all others see any ``nn.Module``."""

UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
LONGEST_FUNCTION = 60


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
            ("import_module", "__import__", "need")
        ):
            yield from (
                a.value
                for a in node.args[:1]
                if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )


def floor(module: str) -> str:
    """The package of a module; the modules beside the packages are the ground, but for two."""
    if module in ("api", "calibration", "feature_extractor", "__init__"):
        return "api"
    if module == "__main__":
        return "commands"
    return module.split(".")[0] if "." in module else "ground"


def own_imports(tree: ast.AST, known: set[str]) -> set[str]:
    """The modules of the package that ``tree`` imports."""
    found = set()
    for name in imported(tree):
        parts = name.split(".")
        if parts[0] != "blockfit":
            continue
        ends = range(len(parts), 1, -1)
        dotted = (".".join(parts[1:end]) for end in ends)
        found.add(next((one for one in dotted if one in known), "__init__"))
    return found


def libraries(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imported(tree)}


def arrow_faults(module: str, tree: ast.AST, known: set[str]) -> list[str]:
    """What ``module`` imports from packages that are not below its own, as sentences."""
    own = floor(module)
    others = {(other, floor(other)) for other in own_imports(tree, known) if other != "__init__"}
    return [
        f"{module} imports {other}; {own} may not import from {package}"
        for other, package in sorted(others)
        if package != own and FLOOR_OF[package] >= FLOOR_OF[own]
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


def test_every_package_has_its_floor(trees: dict[str, ast.Module]) -> None:
    assert {floor(name) for name in trees} == set(FLOOR_OF)


def test_packages_import_only_from_floors_below(trees: dict[str, ast.Module]) -> None:
    faults = [f for name, tree in trees.items() for f in arrow_faults(name, tree, set(trees))]
    assert faults == []


def test_modules_import_one_another_in_no_circle(trees: dict[str, ast.Module]) -> None:
    arrows = {name: own_imports(tree, set(trees)) for name, tree in trees.items()}
    try:
        TopologicalSorter(arrows).prepare()
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


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_are_short_enough_to_read(trees: dict[str, ast.Module]) -> None:
    lengths = {
        f"{name}.{node.name}": code_lines(node)
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fit.maps", "from blockfit.models.blocks import Blocks"),
        ("search.solve", "def f():\n    from blockfit.formats import folder"),
        ("formats.folder", "import blockfit.search.solve"),
        ("errors", "from blockfit.fit.plan import Span"),
    ],
)
def test_an_import_against_the_arrows_is_seen(
    trees: dict[str, ast.Module], module: str, source: str
) -> None:
    assert len(arrow_faults(module, ast.parse(source), set(trees))) == 1


def test_an_import_along_the_arrows_is_allowed(trees: dict[str, ast.Module]) -> None:
    for module, source in (
        ("fit.maps", "from blockfit.fit.plan import Span"),
        ("models.surgery", "from blockfit.fit.plan import Plan"),
        ("commands.app", "import blockfit\nfrom blockfit import api"),
    ):
        assert arrow_faults(module, ast.parse(source), set(trees)) == []


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
import numpy, torch, safetensors.torch, sklearn.base, PIL.Image, rich.console, typer

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
found = pkgutil.walk_packages(blockfit.__path__, "blockfit.")
names = [m.name for m in found if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
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
    assert "blockfit.errors" in fresh_import["imported"]
    assert fresh_import["changed"] == []
