"""Attention maps of a compressed model: one entry per block, ``None`` where a block went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor, nn


class PerBlock:
    """A forward hook that puts ``None`` among the attention maps of a model's output.

    transformers collects the maps of the blocks that ran, so those of later blocks would move up.

    Args:
        kept: of every block, whether it still computes attention.
    """

    def __init__(self, kept: Sequence[bool]) -> None:
        self.kept = tuple(kept)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Mapping):
            maps = output.get("attentions")
            if self._are_maps(maps):
                changed: Any = output
                changed["attentions"] = self._spread(maps)
            return output
        if type(output) is tuple and any(map(self._are_maps, output)):
            return tuple(self._spread(v) if self._are_maps(v) else v for v in output)
        return output

    def _are_maps(self, value: Any) -> TypeGuard[tuple[Tensor, ...]]:
        """Whether this is one square map per head of every block that ran."""
        return (
            isinstance(value, tuple)
            and len(value) == sum(self.kept)
            and all(isinstance(m, Tensor) and m.ndim == 4 for m in value)
            and all(m.shape[-1] == m.shape[-2] for m in value)
        )

    def _spread(self, maps: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        left = iter(maps)
        return tuple(next(left) if kept else None for kept in self.kept)


def follow(model: nn.Module, path: str, kept: Sequence[bool]) -> None:
    """Let every model of transformers around the blocks return one entry per block."""
    steps = path.split(".")
    for count in range(len(steps)):
        around = model.get_submodule(".".join(steps[:count]))
        if not hasattr(around, "config"):
            continue
        hooks = around._forward_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, PerBlock)]:
            del hooks[key]
        around.register_forward_hook(PerBlock(kept))


def asks_for_map(kwargs: Mapping[str, Any]) -> bool:
    """Whether a block is called to return its attention map instead of its hidden state."""
    return any(kwargs.get(name) is True for name in ("return_attention", "return_attn"))
