"""blockfit: pretrained vision transformers made smaller and faster without training.

Transformer Blocks Approximation (Cannistraci et al., arXiv 2410.04941): redundant runs of blocks
are replaced by maps that are fitted in closed form on a few hundred unlabelled images.
"""

from blockfit.api import Result, compress, images, load, save
from blockfit.errors import BlockfitError
from blockfit.fit.plan import Plan, Replacement, Span
from blockfit.models.blocks import Blocks, find_blocks
from blockfit.search.recipes import RECIPES, Recipe
from blockfit.search.solve import Options

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "BlockfitError",
    "Blocks",
    "Options",
    "Plan",
    "Recipe",
    "Replacement",
    "Result",
    "Span",
    "compress",
    "find_blocks",
    "images",
    "load",
    "save",
]
