"""The tables of families in docs/models.md and docs/deploy.md say what the tests run on, no more.

``python tests/whole/test_docs_models.py`` prints the tables.
"""

from __future__ import annotations

from pathlib import Path

from families import EXPORTED, FAMILIES, Family
from families_stages import STAGED, Staged
from families_timm import TIMM
from families_transformers import TRANSFORMERS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
HEADER = """\
| family | found | compressed | saved, reloaded | intermediate features intact | logits |
|---|---|---|---|---|---|"""


def row(name: str, family: Family) -> str:
    facts = (True, True, True, family.intermediates is not None, family.heads > 0)
    words = ["yes" if fact else "–" for fact in facts]
    return f"| `{name}` | {' | '.join(words)} |"


def table() -> str:
    return "\n".join([HEADER, *(row(name, family) for name, family in FAMILIES.items())])


DEPLOY = PAGE.with_name("deploy.md")
TESTS = {
    "stock": "formats/test_plain.py",
    "Hub": "formats/test_hub_folder.py",
    "ONNX": "formats/test_onnx_file.py",
    "torch.export": "formats/test_program.py",
    "int8": "evaluation/test_quantize.py",
}
"""By form, where a test runs on the families that ``EXPORTED`` lists for it."""

FORMS_HEADER = """\
| family | stock transformers | stock timm | other stock | Hub code | ONNX | torch.export | int8 |
|---|---|---|---|---|---|---|---|"""
LIBRARIES = {"transformers": TRANSFORMERS, "timm": TIMM}


def forms_row(name: str) -> str:
    stock = name in EXPORTED["stock"]
    of = next((library for library, names in LIBRARIES.items() if name in names), "other")
    facts = [stock and of == library for library in (*LIBRARIES, "other")]
    facts += [name in EXPORTED[form] for form in TESTS if form != "stock"]
    return f"| `{name}` | {' | '.join('yes' if fact else '–' for fact in facts)} |"


def forms_table() -> str:
    return "\n".join([FORMS_HEADER, *map(forms_row, FAMILIES)])


STAGES_HEADER = """\
| model | blocks (stages) | MLP | values | queries and keys | left of the parameters |
|---|---|---|---|---|---|"""


def stages_row(name: str, staged: Staged) -> str:
    parts = ["yes" if part in staged.parts else "–" for part in ("mlp", "values", "keys")]
    words = [f"{staged.depth} ({staged.stages})", *parts, f"{staged.kept:.0%}"]
    return f"| `{name}` | {' | '.join(words)} |"


def stages_table() -> str:
    return "\n".join([STAGES_HEADER, *(stages_row(*entry) for entry in STAGED.items())])


def test_the_page_holds_the_table_of_the_models_in_stages() -> None:
    text = PAGE.read_text(encoding="utf-8")
    start = text.index("| model | blocks")
    assert text[start:].split("\n\n")[0] == stages_table()


def test_the_page_holds_the_table_of_the_families_under_test() -> None:
    text = PAGE.read_text(encoding="utf-8")
    start = text.index("| family |")
    assert text[start:].split("\n\n")[0] == table()


def test_the_page_of_exports_says_what_the_tests_write_for_which_family() -> None:
    text = DEPLOY.read_text(encoding="utf-8")
    start = text.index("| family |")
    assert text[start:].split("\n\n")[0] == forms_table()
    assert TESTS.keys() == EXPORTED.keys()
    for form, path in TESTS.items():
        source = (Path(__file__).resolve().parents[1] / path).read_text(encoding="utf-8")
        assert f'parametrize("name", EXPORTED["{form}"])' in source, form


if __name__ == "__main__":
    print(table(), stages_table(), forms_table(), sep="\n\n")
