"""Tracing narrowed heads without the zeros that a block's own forward is handed.

``HeadRows`` pads heads to the size that the block expects, and ``HeadColumns`` reads the dimensions
that stayed. In between, zeros are carried through the attention, which changes nothing: they add
nothing to ``q · k``, and what they are as values is not read. While a model is traced in
``Unpadded``, what is made of padded heads is made of the heads without their padding as well, up
to where the zeros no longer matter; the padded ones are then used by nothing and leave the graph.
Where something else is done with them (a rotation, a norm), they are used as they are.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Heads:
    """Heads of ``size`` dimensions each, of which some at the end are zeros, without the zeros.

    Args:
        pieces: shape (…, kept); several (queries, keys and values) where one tensor holds them.
        size: of a head with its zeros.
        axis: of the head's dimensions, counted from the end; ``None`` where the padded tensor is
            flat: the last axis is that of all heads' dimensions, of one piece after the other.
        stack: the axis of the padded tensor along which the pieces stand; ``None`` where it is flat
            or there is one piece.
    """

    pieces: tuple[Tensor, ...]
    size: int
    axis: int | None = -1
    stack: int | None = None

    @property
    def single(self) -> bool:
        return len(self.pieces) == 1 and self.axis is not None

    def laid_out(self, heads: int, size: int) -> bool:
        """Whether the padded tensor is flat, of so many heads of this size a piece."""
        return self.axis is None and (self.pieces[0].shape[-2], self.size) == (heads, size)

    def reshaped(self, before: Sequence[int], shape: Sequence[int]) -> Heads | None:
        """The same after a view of the padded tensor of shape ``before`` as ``shape``."""
        count, heads = len(self.pieces), self.pieces[0].shape[-2]
        if self.axis is None:
            tail = (heads, self.size) if count == 1 else (count, heads, self.size)
            if tuple(shape[-len(tail) :]) != tail:
                return None
            outer = shape[: -len(tail)]
            pieces = tuple(p.reshape(*outer, heads, p.shape[-1]) for p in self.pieces)
            return Heads(pieces, self.size, -1, None if count == 1 else -3)
        if not self.single:
            return None
        (piece,), last = self.pieces, -self.axis
        flat = self.axis == -1 and len(before) > 1 and shape[-1] == before[-2] * self.size
        if flat and (before[-2] > 1 or len(shape) < len(before)):
            new = piece.reshape(*shape[:-1], before[-2], piece.shape[-1])
            return Heads((new,), self.size, None)
        if len(shape) >= last and tuple(shape[-last:]) == tuple(before[-last:]):
            new = piece.reshape(*shape[:-last], *piece.shape[-last:])
            return replace(self, pieces=(new,))
        return None

    def permuted(self, order: Sequence[int]) -> Heads | None:
        """The same after a permutation of the padded tensor's axes."""
        if self.axis is None:
            return None
        ndim = len(order)
        order = [place % ndim for place in order]
        axis, inner = order.index(self.axis % ndim) - ndim, order
        stack = self.stack
        if stack is not None:
            gone = stack % ndim
            inner = [place - (place > gone) for place in order if place != gone]
            stack = order.index(gone) - ndim
        return Heads(tuple(p.permute(inner) for p in self.pieces), self.size, axis, stack)

    def taken(self, ndim: int, dim: int, index: int) -> Heads | None:
        """One of the stacked pieces; ``None`` where ``dim`` is another axis."""
        if self.stack is None or self.axis is None or dim % ndim != self.stack % ndim:
            return None
        axis = self.axis + 1 if self.stack > self.axis else self.axis
        return Heads((self.pieces[index],), self.size, axis)


_IN_PLACE = re.compile(r"[a-z].*[^_]_|__setitem__|__i(?!nit__|nt__|ndex__|ter__|nvert__)\w+__")
"""Names of functions that change what they are given."""


class Unpadded(TorchFunctionMode):
    """Follows padded heads through what a model does with them."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Tensor, Heads]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _IN_PLACE.fullmatch(getattr(func, "__name__", "")) or kwargs.get("out") is not None:
            self._known.clear()  # what changes may share its memory with any of them
        instead, beside = _INSTEAD.get(func), _BESIDE.get(func)
        if instead is not None and _fits(instead, self, func, *args, **kwargs):
            made = instead(self, func, *args, **kwargs)
            if made is not None:
                return made
        out = func(*args, **kwargs)
        if beside is not None and _fits(beside, self, out, *args, **kwargs):
            found = beside(self, out, *args, **kwargs)
            return out if found is None else found
        return out

    def of(self, value: Any) -> Heads | None:
        """What is known of a tensor."""
        return self._known.get(id(value), (None, None))[1]

    def one(self, value: Any, axis: int) -> Tensor | None:
        """A tensor without zeros along ``axis``."""
        heads = self.of(value)
        return (
            heads.pieces[0] if heads is not None and heads.single and heads.axis == axis else None
        )

    def note(self, value: Tensor, heads: Heads | None) -> None:
        """``value`` are these heads with their zeros; it is kept, so that its id stays its own."""
        if heads is not None:
            self._known[id(value)] = (value, heads)

    def part(self, value: Tensor, heads: Heads | None) -> Tensor:
        """One of several pieces, as it is where it has no zeros."""
        if heads is not None and heads.axis is not None:
            (piece,) = heads.pieces
            if piece.shape[heads.axis] == heads.size:
                return piece
        self.note(value, heads)
        return value

    def padded(self, made: Tensor, size: int) -> Tensor:
        """What was made of narrow heads, for what may need whole ones."""
        out = F.pad(made, (0, size - made.shape[-1]))
        self.note(out, Heads((made,), size))
        return out


def _fits(rule: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether a rule knows this way of calling; otherwise nothing is known of what comes out."""
    try:
        inspect.signature(rule).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _pad(
    own: Unpadded,
    out: Tensor,
    /,
    input: Tensor,
    pad: Any,
    mode: str = "constant",
    value: Any = None,
) -> None:
    zeros = mode == "constant" and not value and len(pad) == 2 and pad[0] == 0 < pad[1]
    if zeros and input.ndim > 1:
        own.note(out, Heads((input,), out.shape[-1]))


def _view(own: Unpadded, out: Tensor, /, x: Tensor, *args: Any, **kwargs: Any) -> None:
    if (heads := own.of(x)) is not None:
        own.note(out, heads.reshaped(x.shape, out.shape))


def _transpose(own: Unpadded, out: Tensor, /, x: Tensor, dim0: int, dim1: int) -> None:
    if (heads := own.of(x)) is not None:
        order = list(range(x.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        own.note(out, heads.permuted(order))


def _permute(own: Unpadded, out: Tensor, /, x: Tensor, *dims: Any) -> None:
    if (heads := own.of(x)) is not None:
        own.note(out, heads.permuted(dims if isinstance(dims[0], int) else dims[0]))


def _same(own: Unpadded, out: Tensor, /, x: Tensor, *args: Any, **kwargs: Any) -> None:
    own.note(out, own.of(x))


def _scaled(own: Unpadded, out: Tensor, /, x: Any, other: Any, **kwargs: Any) -> None:
    heads = own.of(x)
    if heads is not None and heads.single and isinstance(other, int | float):
        own.note(out, replace(heads, pieces=(heads.pieces[0] * other,)))


def _cat(own: Unpadded, out: Tensor, /, tensors: Sequence[Tensor], dim: int = 0) -> None:
    flat = [heads for t in tensors if (heads := own.of(t)) and heads.axis is None]
    if not flat or dim % out.ndim != out.ndim - 1:
        return
    count, size = flat[0].pieces[0].shape[-2], flat[0].size
    pieces: list[Tensor] = []
    for tensor in tensors:
        heads = own.of(tensor)
        if heads is None and tensor.shape[-1] % (count * size) == 0:  # of heads that are whole
            pieces += tensor.unflatten(-1, (-1, count, size)).unbind(-3)
        elif heads is not None and heads.laid_out(count, size):
            pieces += heads.pieces
        else:
            return
    own.note(out, Heads(tuple(pieces), size, None))


def _unbind(
    own: Unpadded, out: Sequence[Tensor], /, x: Tensor, dim: int = 0
) -> tuple[Tensor, ...] | None:
    heads = own.of(x)
    if heads is None:
        return None
    return tuple(own.part(part, heads.taken(x.ndim, dim, n)) for n, part in enumerate(out))


def _item(own: Unpadded, out: Tensor, /, x: Tensor, index: Any) -> Tensor | None:
    heads = own.of(x)
    if heads is None or not isinstance(index, int):
        return None
    return own.part(out, heads.taken(x.ndim, 0, index))


def _chunk(own: Unpadded, out: Sequence[Tensor], /, x: Tensor, *args: Any, **kwargs: Any) -> None:
    heads = own.of(x)
    if heads is None or heads.axis is not None or len(out) != len(heads.pieces):
        return
    for part, piece in zip(out, heads.pieces, strict=True):
        if part.shape[:-1] == x.shape[:-1] and part.shape[-1] == piece.shape[-2] * heads.size:
            own.note(part, Heads((piece,), heads.size, None))


def _sliced(own: Unpadded, func: Any, /, x: Tensor, index: Any) -> Tensor | None:
    """The first dimensions of every head, which are those that were kept."""
    piece = own.one(x, -1)
    if piece is None or not isinstance(index, tuple) or len(index) != 2:
        return None
    first = index[0] is Ellipsis and index[1] == slice(None, piece.shape[-1], None)
    return piece if first else None


def _typed(own: Unpadded, func: Any, /, x: Tensor, other: Tensor) -> Tensor | None:
    """Of heads that are only asked for their dtype."""
    return None if own.of(other) is None else x.to(other.dtype)


def _matmul(own: Unpadded, func: Any, /, x: Tensor, y: Tensor) -> Tensor | None:
    left, right = own.one(x, -1), own.one(y, -2)
    if left is not None and right is not None and left.shape[-1] == right.shape[-2]:
        return func(left, right)
    right = own.one(y, -1)
    if right is None or left is not None:
        return None
    return own.padded(func(x, right), y.shape[-1])


def _attention(
    own: Unpadded,
    func: Any,
    /,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **more: Any,
) -> Tensor | None:
    left, right, values = (own.one(x, -1) for x in (query, key, value))
    if left is None or right is None or left.shape[-1] != right.shape[-1]:
        left, right = query, key
    if left is query and values is None:
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    given = value if values is None else values
    out: Tensor = func(left, right, given, attn_mask, dropout_p, is_causal, scale=scale, **more)
    return out if values is None else own.padded(out, value.shape[-1])


_BESIDE: dict[Any, Callable[..., Any]] = {
    F.pad: _pad,
    torch.transpose: _transpose, Tensor.transpose: _transpose,
    torch.permute: _permute, Tensor.permute: _permute,
    Tensor.contiguous: _same, torch.clone: _same, Tensor.clone: _same,
    torch.mul: _scaled, Tensor.mul: _scaled, Tensor.__mul__: _scaled, Tensor.__rmul__: _scaled,
    torch.cat: _cat,
    torch.unbind: _unbind, Tensor.unbind: _unbind,
    Tensor.__getitem__: _item,
    torch.chunk: _chunk, Tensor.chunk: _chunk, torch.split: _chunk, Tensor.split: _chunk,
    Tensor.view: _view, torch.reshape: _view, Tensor.reshape: _view,
    torch.flatten: _view, Tensor.flatten: _view, torch.unflatten: _view, Tensor.unflatten: _view,
}  # fmt: skip
"""What is noted after a call; what they return takes the place of what the call gave."""

_INSTEAD: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _sliced,
    Tensor.type_as: _typed,
    torch.matmul: _matmul, Tensor.matmul: _matmul, Tensor.__matmul__: _matmul,
    torch.bmm: _matmul, Tensor.bmm: _matmul,
    F.scaled_dot_product_attention: _attention,
}  # fmt: skip
"""What is called in a call's place; ``None`` where the call is to be made."""
