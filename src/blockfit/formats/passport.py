"""What an exported model says of itself: its base, its plan, how its images are prepared."""

from __future__ import annotations

import json
from pathlib import Path

from blockfit.formats.folder import Saved
from blockfit.models.load import label_names
from blockfit.provenance import installed_versions


def passport(saved: Saved) -> dict[str, str]:
    """Texts by name, such as ``blockfit.plan``; structured ones are JSON.

    Versions, base model, licence, library, plan (empty for an original), preprocessing, and the
    names of the classes; what is not known is left out.
    """
    own = saved.source.preprocessing
    facts = {
        "versions": {k: v for k, v in installed_versions().items() if v is not None},
        "base_model": public(saved.source.name),
        "library": saved.source.library,
        "licence": saved.source.licence,
        "plan": saved.plan.to_json(),
        "removed_blocks": list(saved.plan.removed_blocks),
        "preprocessing": None if own is None else own.to_json(),
        "labels": label_names(saved.model),
    }
    return {
        f"blockfit.{name}": value if isinstance(value, str) else json.dumps(value)
        for name, value in facts.items()
        if value is not None
    }


def public(name: str) -> str:
    """The name of a model or of images without the folders of the machine where they lie."""
    local = Path(name).is_absolute() or name.startswith((".", "~"))
    return Path(name).name if local else name
