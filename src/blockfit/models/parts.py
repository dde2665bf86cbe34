"""The parts of a block that can be narrowed, found by probing the block.

Nothing here knows a model by name. A layer belongs to a part because of what changes when its
output is changed; a part is accepted only where a block whose layers really are smaller computes
what the whole block computes with the same dimensions masked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.fit.plan import Narrowing, Rows
from blockfit.models.narrowed import Layer, is_depthwise, narrowed_block, rows_in
from blockfit.models.residual import RunBlock, Writer, input_of, owns
from blockfit.models.surgery import swapped

TOLERANCE = 1e-4
"""Largest relative difference between a narrowed block and the masked whole one, in float32."""


@dataclass(frozen=True)
class Parts:
    """What can be narrowed in one block.

    Args:
        whole: each part at its full size, by its name.
        refused: why the others cannot be, by their names.
    """

    whole: dict[str, Narrowing]
    refused: dict[str, str]


class _No(Exception):
    """A part cannot be narrowed; the message says why."""


def find_parts(
    block: nn.Module,
    number: int,
    writers: list[Writer],
    run: RunBlock,
    hidden: Tensor,
    shared: Collection[int] = (),
) -> Parts:
    """Find the parts of a block that can be narrowed.

    Args:
        writers: its layers that write into the residual stream, from ``find_writers``.
        hidden: a hidden state that reaches it, shape (batch, tokens, width), two tokens or more.
        shared: ids of parameters that something beside the block uses too; their layers stay.
    """
    whole: dict[str, Narrowing] = {}
    refused: dict[str, str] = {}
    probe = _Probe(block, number, run, hidden, shared)

    def look(name: str, find: Callable[[], Narrowing]) -> None:
        try:
            whole[name] = find()
        except _No as error:
            refused[name] = f"{error}{probe.foreign}"

    with torch.no_grad():
        if not writers:
            why = (
                "no linear layer (nn.Linear) of the block simply adds its output to the hidden "
                "state"
            )
            return Parts({}, dict.fromkeys(("mlp", "values", "keys"), why))
        look("mlp", lambda: _mlp(probe, writers[-1]))
        if len(writers) < 2:
            why = "no output projection of an attention simply adds to what the block returns"
            refused |= dict.fromkeys(("values", "keys"), why)
        else:
            look("values", lambda: _values(probe, writers[0]))
            look("keys", lambda: _keys(probe, writers[0]))
    return Parts(whole, refused)


class _Probe:
    """A block and the questions that are put to it."""

    def __init__(
        self,
        block: nn.Module,
        number: int,
        run: RunBlock,
        hidden: Tensor,
        shared: Collection[int],
    ) -> None:
        self.shared, self.foreign = shared, ""
        self.block, self.number, self.run, self.hidden = block, number, run, hidden
        self.tolerance = TOLERANCE if hidden.dtype == torch.float32 else 5e-2
        self.outputs: dict[str, int] = {}
        self.depthwise: dict[str, int] = {}
        self._segments: dict[str, list[_Segment]] = {}
        self._listen()

    def _listen(self) -> None:
        """The linear layers that run exactly once, in order, and how many outputs they have."""
        order: list[str] = []
        named = list(self.block.named_modules())
        linears = [n for n, m in named if type(m) is nn.Linear or is_depthwise(m)]
        foreign = [n for n in linears if not owns(self.layer(n), self.shared)]
        linears = [n for n in linears if n not in foreign]
        if foreign:
            self.foreign = f" ({', '.join(foreign)}: weights tied to others, or made at each call)"

        def note(name: str) -> Callable[..., None]:
            return lambda *_: order.append(name)

        with ExitStack() as undo:
            for name in linears:
                undo.enter_context(self.layer(name).register_forward_hook(note(name)))
            self.run(self.hidden)
        once = [n for n in order if order.count(n) == 1]
        self.outputs = {n: rows_in(self.layer(n)) for n in once if not is_depthwise(self.layer(n))}
        self.depthwise = {n: rows_in(self.layer(n)) for n in once if is_depthwise(self.layer(n))}

    def layer(self, name: str) -> Layer:
        found = self.block.get_submodule(name)
        assert isinstance(found, Layer)
        return found

    def linear(self, name: str) -> nn.Linear:
        found = self.block.get_submodule(name)
        assert isinstance(found, nn.Linear)
        return found

    def read(self, name: str) -> Tensor:
        """What a layer is given, shape (batch, tokens, inputs)."""
        return input_of(self.block, name, self.run, self.hidden)

    def changed(self, reader: str, layer: str, row: int, before: Tensor) -> Tensor:
        """Which inputs of ``reader`` change with one output row of ``layer``, at every other token.

        A key that changes alike at all tokens would change nothing.
        """

        channels_first = layer in self.depthwise

        def push(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            pushed = output.clone()
            if channels_first:
                pushed, output = pushed.movedim(1, -1), output.movedim(1, -1)
            size = output[..., row].abs().max() + 1
            pushed[..., ::2, row] += 3 * size
            return pushed.movedim(-1, 1) if channels_first else pushed

        with self.layer(layer).register_forward_hook(push):
            after = self.read(reader)
        if after.shape != before.shape:
            raise _No(f"the input of {reader} changes its shape")
        gap = (after - before).abs().amax(dim=tuple(range(before.ndim - 1)))
        return gap > 1e-5 * max(float(before.abs().max()), 1e-6)

    def same(self, found: Tensor, expected: Tensor) -> bool:
        """Whether two outputs are equal but for rounding."""
        base = self.hidden if expected.shape == self.hidden.shape else 0.0
        scale = (expected - base).abs().max().clamp_min(1e-6)
        return bool((found - expected).abs().max() <= self.tolerance * scale)

    def feeders(self, reader: str) -> list[_Segment]:
        """Runs of rows, as many as ``reader`` has inputs, and which inputs one row moves."""
        if reader in self._segments:
            return self._segments[reader]
        before = self.read(reader)
        size = before.shape[-1]
        found = []
        for layer, outputs in self.outputs.items():
            if layer == reader or outputs % size or outputs // size > 3:
                continue
            for start in range(0, outputs, size):
                places = (0, size // 2, size - 1)
                moved = [self.changed(reader, layer, start + row, before) for row in places]
                found.append(_Segment(Rows(layer, start), dict(zip(places, moved, strict=True))))
        self._segments[reader] = found
        return found

    def between(self, reader: str) -> list[Rows]:
        """Convolutions of single channels that each move the input of their own number alone."""
        before = self.read(reader)
        size = before.shape[-1]
        found = []
        for layer in (name for name, channels in self.depthwise.items() if channels == size):
            places = (0, size // 2, size - 1)
            moved = {row: self.changed(reader, layer, row, before) for row in places}
            segment = _Segment(Rows(layer, 0), moved)
            found += [segment.rows] if segment.alone() else []
        return found

    def accept(self, cut: Narrowing, masked: Callable[[Tensor], dict[str, Tensor]]) -> Narrowing:
        """``cut`` where a really narrowed block computes what the masked whole block does.

        Args:
            masked: what to put in place of layers' outputs or inputs, of a mask over dimensions.
        """
        keep = max(1, cut.size // 2)
        mask = torch.arange(cut.size) < keep
        with _masked(self.block, masked(mask.repeat(cut.heads)), cut.reader):
            expected = self.run(self.hidden)
        whole = self.run(self.hidden)
        try:
            with narrowed_block(self.block, [cut]):
                full = self.run(self.hidden)
            with narrowed_block(self.block, [replace(cut, kept=keep)]):
                found = self.run(self.hidden)
        except (RuntimeError, ValueError, TypeError, IndexError, BlockfitError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise _No(f"the block does not run with a narrower {cut.part} ({first})") from error
        if not torch.equal(full, whole):
            raise _No(f"the block computes something else with its {cut.part} laid out again")
        if not self.same(found, expected):
            raise _No(f"something between the layers of its {cut.part} mixes dimensions (a norm?)")
        return cut


@dataclass(frozen=True)
class _Segment:
    """A run of output rows, and which inputs of the reader its first, middle and last row move."""

    rows: Rows
    moved: dict[int, Tensor]

    def alone(self) -> bool:
        """Whether every row moves the input of its own number and no other."""
        return all(bool(moved[row]) and int(moved.sum()) == 1 for row, moved in self.moved.items())

    def head(self) -> int:
        """The size of the head whose inputs a row moves all; 0 where there is none."""
        first = int(self.moved[0].sum())
        size = len(self.moved[0])
        if first < 2 or size % first:
            return 0
        for row, moved in self.moved.items():
            start = row // first * first
            expected = torch.zeros_like(moved)
            expected[start : start + first] = True
            # An input that happens not to move is no reason against a head.
            outside = bool((moved & ~expected).any())
            if outside or int(moved.sum()) < 0.9 * first:
                return 0
        return first


@contextmanager
def _masked(block: nn.Module, masks: Mapping[str, Tensor], reader: str) -> Iterator[None]:
    """Multiply what ``reader`` reads, and the outputs of other layers, by masks."""
    with ExitStack() as undo:
        for name, mask in masks.items():
            layer = block.get_submodule(name)

            def before(module: nn.Module, args: Any, mask: Tensor = mask) -> Any:
                return (args[0] * mask.to(args[0]), *args[1:])

            def after(module: nn.Module, args: Any, output: Any, mask: Tensor = mask) -> Any:
                return output * mask.to(output)

            if name == reader:
                undo.enter_context(layer.register_forward_pre_hook(before))
            else:
                undo.enter_context(layer.register_forward_hook(after))
        yield


def _mlp(probe: _Probe, writer: Writer) -> Narrowing:
    size = probe.linear(writer.name).in_features
    if writer.name not in probe.outputs:
        raise _No(f"{writer.name} runs more than once")
    rows = tuple(s.rows for s in probe.feeders(writer.name) if s.alone())
    if not rows:
        raise _No(f"no linear layer makes the inputs of {writer.name} one by one")
    rows += tuple(probe.between(writer.name))
    cut = Narrowing(probe.number, "mlp", size, size, 1, rows, writer.name)
    return probe.accept(cut, lambda mask: {writer.name: mask})


def _heads(probe: _Probe, writer: Writer) -> tuple[list[Rows], int]:
    """The rows of queries and keys, and the size of a head."""
    sizes = [(s.rows, s.head()) for s in probe.feeders(writer.name)]
    found = [(rows, size) for rows, size in sizes if size]
    if not found:
        raise _No(f"no linear layers of queries and keys are found before {writer.name}")
    return [rows for rows, _ in found], found[0][1]


def _values(probe: _Probe, writer: Writer) -> Narrowing:
    inputs = probe.linear(writer.name).in_features
    rows = [s.rows for s in probe.feeders(writer.name) if s.alone()]
    if not rows and (shared := _grouped(probe, writer.name)):
        raise _No(shared)
    if len(rows) != 1:
        raise _No(f"no linear layer makes the values that {writer.name} reads, one by one")
    _, size = _heads(probe, writer)
    if size < 2:
        raise _No("its heads have one dimension")
    whole = probe.run(probe.hidden)
    turned = _turned(probe, [rows[0]], size, inputs // size) | _turned_columns(
        probe, writer.name, size, inputs // size
    )
    with swapped(probe.block, turned):
        if not probe.same(probe.run(probe.hidden), whole):
            raise _No(f"something between its values and {writer.name} is not linear (a norm?)")
    cut = Narrowing(probe.number, "values", size, size, inputs // size, tuple(rows), writer.name)
    return probe.accept(cut, lambda mask: {writer.name: mask})


def _grouped(probe: _Probe, reader: str) -> str:
    """Why nothing of an attention can be cut whose heads share keys and values in groups."""
    before = probe.read(reader)
    size = before.shape[-1]
    for layer, outputs in probe.outputs.items():
        if layer == reader or not 1 < outputs < size or size % outputs:
            continue
        moved = probe.changed(reader, layer, 0, before).nonzero().flatten()
        # Of the heads of a group one input each; inputs in a row are those of one head.
        if len(moved) == size // outputs < int(moved[-1] - moved[0]) + 1:
            return (
                f"{size // outputs} heads share each value of {layer} (grouped queries), and what "
                "one head can do without another may need"
            )
    return ""


def _keys(probe: _Probe, writer: Writer) -> Narrowing:
    inputs = probe.linear(writer.name).in_features
    rows, size = _heads(probe, writer)
    if len(rows) != 2:
        why = "queries and keys are not two layers of one size"
        raise _No(_grouped(probe, writer.name) or why)
    heads = inputs // size
    whole = probe.run(probe.hidden)
    with swapped(probe.block, _turned(probe, rows, size, heads)):
        if not probe.same(probe.run(probe.hidden), whole):
            raise _No("something stands between queries, keys and their product (RoPE, qk-norm)")
    cut = Narrowing(probe.number, "keys", size, size, heads, tuple(rows))

    def masks(mask: Tensor) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for one in rows:
            full = out.setdefault(one.layer, torch.ones(probe.outputs[one.layer]))
            full[one.start : one.start + inputs] = mask.to(full)
        return out

    return probe.accept(cut, masks)


def _rotation(size: int) -> Tensor:
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(noise).Q


def _turned(probe: _Probe, rows: list[Rows], size: int, heads: int) -> dict[str, Tensor]:
    """Weights and biases with these rows turned by one rotation inside every head."""
    rotation = _rotation(size)
    out: dict[str, Tensor] = {}
    for one in rows:
        for name, value in probe.linear(one.layer).named_parameters():
            new = out.setdefault(f"{one.layer}.{name}", value.detach().clone())
            piece = new[one.start : one.start + heads * size]
            shape = (heads, size, -1)
            turned = rotation.to(piece) @ piece.reshape(shape)
            new[one.start : one.start + heads * size] = turned.reshape(piece.shape)
    return out


def _turned_columns(probe: _Probe, name: str, size: int, heads: int) -> dict[str, Tensor]:
    weight = probe.linear(name).weight.detach()
    turned = weight.reshape(len(weight), heads, size) @ _rotation(size).to(weight).T
    return {f"{name}.weight": turned.reshape(weight.shape)}
