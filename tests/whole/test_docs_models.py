"""The tables in docs/models.md list the families that the contract tests run on, no more, no less.

``python tests/whole/test_docs_models.py`` prints the tables.
"""

from __future__ import annotations

from pathlib import Path

from families import EXPORTED, FAMILIES, Family
from families_stages import STAGED, Staged

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
HEADER = """\
| family | found | compressed | saved, reloaded | intermediate features intact | logits | exported |
|---|---|---|---|---|---|---|"""


def row(name: str, family: Family) -> str:
    facts = (True, True, True, family.intermediates is not None, family.heads > 0)
    exports = ", ".join(form for form, names in EXPORTED.items() if name in names)
    words = ["yes" if fact else "–" for fact in facts] + [exports or "–"]
    return f"| `{name}` | {' | '.join(words)} |"


def table() -> str:
    return "\n".join([HEADER, *(row(name, family) for name, family in FAMILIES.items())])


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


if __name__ == "__main__":
    print(table(), stages_table(), sep="\n\n")
