"""The library names parameters, the command line options: one sentence in two vocabularies."""

import ast
import inspect
import re
from pathlib import Path
from typing import Annotated

import pytest
import typer
from commandline import blockfit_command as run

import blockfit
from blockfit.commands import app as cli
from blockfit.commands import options as opt
from blockfit.commands.compress import compress
from blockfit.commands.export import export
from blockfit.commands.sweep import sweep
from blockfit.commands.wording import as_options, option_names
from blockfit.search.budget import Budget

NAMES = {"max_drop": "--max-drop", "limit": "--limit", "force": "--force", "spans": "--span"}


@pytest.mark.parametrize(
    ("library", "line"),
    [
        ("give limit=512", "give --limit 512"),
        ("give limit= or spans=", "give --limit or --span"),
        ("limit= takes a number", "--limit takes a number"),
        ("max_drop 0.5 takes 299 images", "--max-drop 0.5 takes 299 images"),
        ("limit 62% cannot be reached", "--limit 62% cannot be reached"),
        ("the limit 3 of all", "the limit 3 of all"),
        ("give force=True to go on", "give --force to go on"),
        ("unlimited limits, nolimit=3, --max-drop", "unlimited limits, nolimit=3, --max-drop"),
        ("no_max_drop and max_drops stay", "no_max_drop and max_drops stay"),
        ("name it with limit= (--limit)", "name it with --limit"),
    ],
)
def test_parameters_become_options_and_nothing_else_does(library, line):
    assert as_options(library, NAMES) == line


def test_a_command_knows_its_options_by_their_parameters():
    names = option_names(inspect.signature(compress).parameters.values())
    assert names["max_drop"] == "--max-drop"
    assert (names["output"], names["sweep_folder"]) == ("--output", "--from")
    assert names["spans"] == "--span"
    assert names["latency_images"] == "--measure-latency"  # of the sweep that --from names
    assert "model" not in names
    other = option_names(inspect.signature(sweep).parameters.values())
    assert other["latency_images"] == "--measure-latency"
    text = inspect.Parameter("x", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[int, 3])
    assert option_names([text]) == {}


def test_the_library_s_sentences_name_no_option():
    package = Path(blockfit.__file__).parent
    commands = typer.main.get_command(cli.app).commands
    options = {o for c in commands.values() for p in c.params for o in p.opts if o[:2] == "--"}
    assert {"--hub", "--limit", "--overwrite"} <= options
    wrong = []
    for path in package.rglob("*.py"):
        if {"commands", "reports"} & set(path.relative_to(package).parts):
            continue  # a report tells of commands
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):  # a whole command line, to be copied
            if isinstance(node, ast.FunctionDef) and "The command" in (
                ast.get_docstring(node) or ""
            ):
                docs |= {id(part) for part in ast.walk(node)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant | ast.JoinedStr) or id(node) in docs:
                continue
            text = ast.unparse(node)
            if "blockfit " not in text:
                found = set(re.findall(r"--[a-z][\w-]*", text)) & options
                wrong += [(path.name, node.lineno, text)] if found else []
    assert wrong == []


@pytest.mark.parametrize(
    ("library", "line"),
    [
        ("try another opset=, or export_program", "try another --opset, or --pt2"),
        ("cannot take any; give batch=N", "cannot take any; give --fixed-batch N"),
        ("use export_onnx or export_program", "use --onnx or --pt2"),
        ("dtype='float16' is known", "--weights 'float16' is known"),
    ],
)
def test_functions_and_parameters_of_other_names_become_options_of_export(library, line):
    names = option_names(inspect.signature(export).parameters.values())
    assert as_options(library, names) == line


@pytest.mark.parametrize("kind", ["params", "flops", "latency"])
def test_a_percentage_without_its_sign_is_asked_about(kind, tmp_path):
    with pytest.raises(blockfit.BlockfitError, match=rf"^{kind}= .*got 62; did you mean 62%\?$"):
        Budget.of(**{kind: "62"})
    done = run(
        "compress", "nowhere", "--images", "nowhere", f"--{kind}", "62", "-o", tmp_path / "a"
    )
    assert done.code == 2
    assert f"--{kind} takes the part that may remain" in done.error
    assert "did you mean 62%?" in done.error
    with pytest.raises(blockfit.BlockfitError) as wrong:
        Budget.of(**{kind: 620})
    assert "did you mean" not in str(wrong.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--params", "62%", "--flops", "0.5"), "not both --params and --flops"),
        (("--remove", "2", "--limit", "many"), "'many' is no number of images"),
        (("--remove", "2", "--force-budget"), "--force-budget has no use without --max-kl"),
        (("--remove", "2", "--map", "cubic"), "unknown map"),
        (("--remove", "2", "--repair", "all"), "repair"),
        (("--remove", "2", "--hold-out", "1.5"), "--hold-out"),
        (("--remove", "2", "--seed", "-1"), "--seed"),
        (("--remove", "2", "--final", "-1"), "--final"),
        (("--remove", "2", "--batch-size", "0"), "--batch-size"),
        (("--remove", "2", "--max-memory", "many"), "memory"),
        ((), "say what to remove"),
    ],
)
def test_options_are_checked_before_a_model_is_loaded(arguments, words, tmp_path, monkeypatch):
    monkeypatch.setattr(opt.Code, "load", never)
    done = run("compress", "demo", "--images", "digits", *arguments, "-o", tmp_path / "small")
    assert (done.code, "Traceback" in done.error) == (2, False)
    assert words in done.error
    assert not (tmp_path / "small").exists()


def never(*_, **__):
    raise AssertionError("a model was loaded")


def test_what_a_report_needs_is_checked_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(opt.Code, "load", never)
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    page = ("--report", tmp_path / "page.html")
    done = run(
        "compress", "demo", "--images", "digits", "--remove", "1", "-o", tmp_path / "s", *page
    )
    assert done.code == 2
    assert 'pip install "blockfit[report]"' in done.error
