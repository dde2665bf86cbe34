"""Python programs in processes of their own that do not import torch and its kin again.

Each is a fork of one process per test process that has imported the large libraries and nothing
else: no blockfit, no test, no state of theirs. Programs that look at what is imported, or at what
libraries read when they are imported, start Python instead.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

LIBRARIES = [
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "transformers.modeling_utils",
    "transformers.image_processing_utils_fast",
    "safetensors.torch",
]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(LIBRARIES)
_ENVIRONMENT = dict(os.environ)  # not what the first test that asks has put there


def python(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
    timeout_s: float = 280.0,
    alone: bool = False,
) -> subprocess.CompletedProcess[str]:
    """What ``subprocess.run`` returns for Python with these arguments.

    Args:
        arguments: ``-c`` and code, ``-m`` and a module, or a script; then its own.
        env: the whole environment; this process's where ``None``.
        cwd: where it runs; here where ``None``.
        check: raise where it does not end with 0, as ``subprocess.run`` does.
        timeout_s: seconds after which it is killed.
        alone: without blockfit, which cannot be imported, and without what is beside the tests.
    """
    words = [str(word) for word in arguments]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "out", Path(folder) / "err"]
        told = (words, dict(os.environ if env is None else env), str(cwd or Path.cwd()))
        process = _CONTEXT.Process(
            target=_child, args=(*told, [str(file) for file in files], alone)
        )
        with mock.patch.dict(os.environ, _ENVIRONMENT, clear=True):
            process.start()
        process.join(timeout_s)
        process.kill()
        process.join()
        out, err = (file.read_text("utf-8") if file.exists() else "" for file in files)
    assert process.exitcode is not None
    done = subprocess.CompletedProcess(["python", *words], process.exitcode, out, err)
    if check and done.returncode:
        sys.stderr.write(err)
        done.check_returncode()
    return done


def _child(
    words: Sequence[str],
    environment: Mapping[str, str],
    cwd: str,
    files: Sequence[str],
    alone: bool,
) -> None:
    assert "blockfit" not in sys.modules
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    random.seed()
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    kind, *rest = words
    first = "" if kind in ("-c", "-m") else str(Path(kind).resolve().parent)
    sys.path[:] = [first, *paths, *(path for path in sys.path if path not in ("", first))]
    if alone:
        _forget_blockfit()
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(kind, run_name="__main__")


def _forget_blockfit() -> None:
    """Leave Python's own folders and what is installed; no editable install of blockfit."""
    own = (sys.prefix, sys.base_prefix)
    sys.path[:] = [path for path in sys.path if path.startswith(own)]
    importlib.invalidate_caches()
    assert importlib.util.find_spec("blockfit") is None
