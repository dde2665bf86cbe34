"""A user's own model in a saved folder: whether the one that it is loaded with is the one that was
saved."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError, tell
from blockfit.models.attributes import first_unlike, recorded

RECORD = "record"
"""The argument of a module's source that tells its parts and its outputs for one batch."""

_KEPT = 64
"""Values of every output that are kept, evenly spaced."""

_ROOM = {"float16": 2e-2, "bfloat16": 2e-2}
"""By dtype, how far outputs of another machine may be; 1e-3 otherwise."""

Outputs = Callable[[nn.Module], list[Tensor] | None]
"""A model → its outputs for the example that it says it takes; ``None`` where it does not say."""


def record(model: nn.Module, outputs: Outputs) -> dict[str, Any]:
    """What a folder keeps of the model beside its tensors, as JSON values."""
    found = outputs(model)
    told = None if found is None else [_told(output) for output in found]
    return {"parts": recorded(model), "outputs": told}


def check_record(model: nn.Module, kept: object, outputs: Outputs, where: str) -> None:
    """Compare a loaded model with what ``record`` kept of the one that was saved.

    The same outputs are enough; of a part that differs all the same there is a warning, for other
    images may show it. Outputs as near as another machine's are enough where no part differs.
    """
    if not isinstance(kept, dict) or not isinstance(kept.get("outputs"), list):
        return  # of an earlier version, or a model that does not say what it takes
    found = outputs(model)
    if found is None:
        return
    told = [_told(output) for output in found]
    why = first_unlike(kept.get("parts"), model)
    if [_digest(one) for one in told] == [_digest(one) for one in kept["outputs"]]:
        if why is not None:
            tell([f"{where}: in the model that was given, {why}; outputs may differ in last bits"])
        return
    if why is None and _near(told, kept["outputs"]):
        return
    raise BlockfitError(
        f"{where}: the model that was given is not the one that was saved: "
        f"{why or 'its outputs differ'}; build it as it was built then"
    )


def _told(output: Tensor) -> dict[str, Any]:
    values = output.detach().to("cpu")
    plain = values.nan_to_num() if values.is_floating_point() else values
    number = plain.to(torch.float64).flatten()
    step = max(1, -(-number.numel() // _KEPT))
    raw = values.contiguous().flatten().view(torch.uint8) if values.numel() else values
    return {
        "dtype": str(values.dtype).removeprefix("torch."),
        "shape": list(values.shape),
        "digest": hashlib.sha256(raw.numpy().tobytes()).hexdigest(),
        "values": number[::step].tolist(),
    }


def _digest(one: object) -> object:
    return one.get("digest") if isinstance(one, dict) else None


def _near(found: list[dict[str, Any]], kept: list[Any]) -> bool:
    if len(found) != len(kept):
        return False
    for one, other in zip(found, kept, strict=True):
        if not isinstance(other, dict) or one["shape"] != other.get("shape"):
            return False
        try:
            values = torch.tensor(other["values"], dtype=torch.float64)
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
            return False
        room = _ROOM.get(str(other.get("dtype")), 1e-3)
        own = torch.tensor(one["values"], dtype=torch.float64)
        if own.shape != values.shape or not torch.allclose(own, values, rtol=room, atol=room):
            return False
    return True
