"""blockfit: pretrained vision transformers made smaller and faster without training.

Transformer Blocks Approximation (Cannistraci et al., arXiv 2410.04941): redundant runs of blocks
are replaced by maps that are fitted in closed form on a few hundred unlabelled images.
"""

from blockfit.api import Result, compress, images, load, save
from blockfit.blocks import Blocks, find_blocks
from blockfit.errors import BlockfitError
from blockfit.recipes import RECIPES, Recipe
from blockfit.repair import Options
from blockfit.spans import Plan, Replacement, Span

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
