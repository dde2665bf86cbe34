"""What libraries put around a model without changing what it computes."""

from __future__ import annotations

import torch
from torch import nn

from blockfit.errors import BlockfitError

_HOLDS = ("_orig_mod", "module")
_LIBRARIES = ("torch", "timm", "accelerate", "lightning", "pytorch_lightning", "deepspeed")


def bare(model: nn.Module) -> nn.Module:
    """The model inside what libraries wrap around it, at any depth; any other as it is.

    Compiled models, those shared by several processes or devices, and averages of weights hold the
    model as their one module. A user's own class that does so may compute something around it, and
    stays.

    Raises:
        BlockfitError: for TorchScript, whose modules cannot be watched or changed.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise BlockfitError(
            "the model is TorchScript, whose blocks can be neither watched nor changed; give the "
            "nn.Module that it was made from"
        )
    while type(model).__module__.partition(".")[0] in _LIBRARIES and len(model._modules) == 1:
        ((name, inner),) = model._modules.items()
        if name not in _HOLDS or inner is None:
            break
        model = inner
    return model
