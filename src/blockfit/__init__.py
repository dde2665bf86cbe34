"""blockfit: pretrained vision transformers made smaller and faster without training.

Transformer Blocks Approximation (Cannistraci et al., arXiv 2410.04941) replaces redundant runs of
blocks by maps; blockfit also narrows what is redundant inside blocks. All of it is solved in closed
form on a few hundred unlabelled images.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; each name is imported when it is first used
    from blockfit.api import (
        Calibration,
        Result,
        analyze,
        bench,
        calibrate,
        compare,
        compress,
        evaluate,
        export_hub,
        export_onnx,
        export_plain,
        export_program,
        from_sweep,
        images,
        load,
        push_to_hub,
        report,
        reproduce,
        save,
        sweep,
    )
    from blockfit.data.texts import pairs, texts
    from blockfit.errors import BlockfitError, BlockfitWarning
    from blockfit.evaluation.analysis import Analysis
    from blockfit.evaluation.evaluate import Evaluation
    from blockfit.feature_extractor import FeatureExtractor
    from blockfit.fit.plan import Narrowing, Plan, Replacement, Span
    from blockfit.models.blocks import Blocks
    from blockfit.models.preprocessing import Preprocessing
    from blockfit.models.stages import find_blocks
    from blockfit.search.recipes import RECIPES, Recipe
    from blockfit.search.solve import Options
    from blockfit.search.sweep import Frontier

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "Analysis",
    "BlockfitError",
    "BlockfitWarning",
    "Blocks",
    "Calibration",
    "Evaluation",
    "FeatureExtractor",
    "Frontier",
    "Narrowing",
    "Options",
    "Plan",
    "Preprocessing",
    "Recipe",
    "Replacement",
    "Result",
    "Span",
    "analyze",
    "bench",
    "calibrate",
    "compare",
    "compress",
    "evaluate",
    "export_hub",
    "export_onnx",
    "export_plain",
    "export_program",
    "find_blocks",
    "from_sweep",
    "images",
    "load",
    "pairs",
    "push_to_hub",
    "report",
    "reproduce",
    "save",
    "sweep",
    "texts",
]

_ELSEWHERE = {
    "RECIPES": "search.recipes",
    "Analysis": "evaluation.analysis",
    "BlockfitError": "errors",
    "BlockfitWarning": "errors",
    "Blocks": "models.blocks",
    "Evaluation": "evaluation.evaluate",
    "FeatureExtractor": "feature_extractor",
    "Frontier": "search.sweep",
    "Narrowing": "fit.plan",
    "Options": "search.solve",
    "Plan": "fit.plan",
    "Preprocessing": "models.preprocessing",
    "Recipe": "search.recipes",
    "Replacement": "fit.plan",
    "Span": "fit.plan",
    "find_blocks": "models.stages",
    "pairs": "data.texts",
    "texts": "data.texts",
}
"""Modules of the public names that are not in ``api``."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: torch is not loaded before (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"blockfit.{_ELSEWHERE.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
