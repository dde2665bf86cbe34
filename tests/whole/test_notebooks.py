"""The notebooks run from top to bottom, without a network, each in a kernel of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from docs_pages import ROOT

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def outputs(notebook: Any) -> list[list[str]]:
    """The kinds of output of every cell of code, without what goes to standard error."""
    return [
        sorted({o.output_type for o in cell.outputs if o.get("name") != "stderr"})
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_where_it_is_shown_to(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("BLOCKFIT_PROGRESS", "0")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, 4)
    shown = outputs(notebook)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=250, resources=where).execute()
    assert outputs(notebook) == shown


def test_the_notebooks_use_what_is_public_and_draw_nothing_by_hand() -> None:
    for path in NOTEBOOKS:
        cells = nbformat.read(path, 4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        assert "import blockfit" in code
        for inner in ("from blockfit", "blockfit._", "import matplotlib", "plt."):
            assert inner not in code, f"{path.name}: {inner}"
        assert ".plot(" in code


def test_the_notebooks_are_small_and_hold_no_path_of_their_maker() -> None:
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        text = path.read_text("utf-8")
        assert len(text) < 150_000
        assert "/home/" not in text
        assert "/tmp/" not in text  # noqa: S108
