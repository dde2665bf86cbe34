"""Adapters that are not yet part of a model's weights: LoRA and its like, found by their form."""

from __future__ import annotations

from torch import nn

from blockfit.errors import BlockfitError

_PAIRS = (("lora_A", "lora_B"), ("lora_down", "lora_up"))


def adapters_in(model: nn.Module) -> list[str]:
    """The paths of the layers that add a trained correction to a weight that stays beside it.

    Known by their form: a layer around a ``base_layer`` (PEFT), or one with the two factors of
    LoRA (loralib, diffusers).
    """
    return [path for path, module in model.named_modules() if _is_adapter(module)]


TO_COMPRESS = "compress what that gives, and put new adapters on the small model"
TO_SAVE = "save what that gives, or the adapters by themselves (save_pretrained in PEFT)"


def check_merged(model: nn.Module, then: str = TO_COMPRESS) -> None:
    """Refuse a model with adapters: their layers must not be solved in the place of the model's.

    Args:
        model: any.
        then: what to do once they are merged.
    """
    found = adapters_in(model)
    if not found:
        return
    how = "model.merge_and_unload()" if hasattr(model, "merge_and_unload") else "merge_and_unload()"
    count = f"{len(found)} layers, the first is {found[0]}"
    raise BlockfitError(
        f"the model has adapters (LoRA or the like) beside its weights ({count}); merge them "
        f"first ({how} in PEFT), {then}"
    )


def _is_adapter(module: nn.Module) -> bool:
    around = isinstance(getattr(module, "base_layer", None), nn.Module)
    factors = any(all(hasattr(module, name) for name in pair) for pair in _PAIRS)
    wrapped = around and (hasattr(module, "adapter_layer_names") or hasattr(module, "merge"))
    return factors or wrapped
