"""The linear layers that write into a block's residual stream, found by probing the block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.fit.numerics import exact
from blockfit.models.forward import Enough, forward_as

RunBlock = Callable[[Tensor], Tensor]
"""Runs one block on a hidden state with the arguments that its model gives it."""

Silenced = Mapping[str, Tensor | float]
"""What layers return instead of their own outputs, by their names."""


@dataclass(frozen=True)
class Writer:
    """A linear layer of a block whose output z enters the residual stream as ``gain ∘ z``.

    The sum is the block's output, or what a module in the block is given: where blocks normalise
    after the addition (BERT), normalise what they add (Swin v2), or go on with a convolution.

    Args:
        name: dotted path inside the block (``mlp.fc2``).
        gain: shape (width,); LayerScale's factors, ones where there is none.
        channels: the dimension of the block's hidden states that holds the channels.
        order: for every token of a hidden state the row of z that is added to it, of one image,
            shape (tokens,); ``None`` where z has the tokens in their order. The rows of windows,
            shifted or padded, have another.
        given_to: dotted path inside the block of the module that is given the sum, most often a
            norm; empty where the block's output is the sum.
    """

    name: str
    gain: Tensor
    channels: int = -1
    order: Tensor | None = None
    given_to: str = ""

    def linear(self, block: nn.Module) -> nn.Linear:
        """The layer in ``block``."""
        found = block.get_submodule(self.name)
        assert isinstance(found, nn.Linear)
        return found

    def tokens(self, hidden: Tensor) -> Tensor:
        """A hidden state of the block's layout as (images, tokens, width)."""
        if self.channels != -1:
            hidden = hidden.movedim(self.channels, -1)
        return hidden if hidden.ndim == 3 else hidden.flatten(1, -2)

    def sum(self, block: nn.Module, run: RunBlock, hidden: Tensor) -> Tensor:
        """The sum that z is a part of, in the block's layout: a hidden state's shape and dtype.

        Args:
            hidden: what the block is given.
        """
        return input_of(block, self.given_to, run, hidden) if self.given_to else run(hidden)

    def layout(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        """(images, tokens, width) as a hidden state of a shape in the block's layout."""
        if self.channels == -1:
            return tokens.reshape(shape)
        last = [*shape]
        last.append(last.pop(self.channels))
        return tokens.reshape(last).movedim(-1, self.channels).contiguous()

    def rows(self, x: Tensor, images: int) -> Tensor:
        """What the layer reads or returns by tokens, shape (images, tokens, inputs or width).

        Raises:
            BlockfitError: where the images have another size than those that were looked at.
        """
        if x.ndim != 3 or len(x) != images:
            x = x.reshape(images, -1, x.shape[-1])
        if self.order is None:
            return x
        if int(self.order.max()) >= x.shape[1]:
            raise BlockfitError(
                f"{self.name} works on windows of one size of image, and these images have "
                "another; give images of one size"
            )
        return x[:, self.order.to(x.device)]

    def effective(self, block: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight (width, inputs) and bias (width,) with the gain multiplied in, float64, CPU."""
        linear = self.linear(block)
        gain = self.gain.cpu().double()
        weight = linear.weight.detach().cpu().double() * gain[:, None]
        bias = None if linear.bias is None else linear.bias.detach().cpu().double() * gain
        return weight, bias

    def contribution(self, block: nn.Module, x: Tensor) -> Tensor:
        """What the layer adds to the hidden state when it is given ``x``.

        Args:
            block: the block, with the weights that count.
            x: shape (images, tokens, inputs).

        Returns:
            shape (images, tokens, width), the dtype of ``x``.
        """
        linear = self.linear(block)
        return self.gain.to(x) * nn.functional.linear(x, linear.weight, linear.bias)

    def stored(self, block: nn.Module, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Parameters of the layer that give the effective ``weight`` and ``bias``.

        Channels whose gain vanishes keep the parameters that they have.
        """
        linear = self.linear(block)
        gain = self.gain.cpu().double()
        usable = gain.abs() > 1e-6 * gain.abs().max()
        safe = torch.where(usable, gain, torch.ones_like(gain))
        old = linear.weight.detach()
        if old.shape != weight.shape:  # a narrowed layer has no old values to keep
            old = old.new_zeros(weight.shape)
        new = torch.where(usable[:, None], weight / safe[:, None], old.cpu().double())
        out = {f"{self.name}.weight": new.to(device=old.device, dtype=old.dtype)}
        if linear.bias is not None and bias is not None:
            shift = torch.where(usable, bias / safe, linear.bias.detach().cpu().double())
            out[f"{self.name}.bias"] = shift.to(device=old.device, dtype=old.dtype)
        return out


@contextmanager
def written(block: nn.Module, outputs: Mapping[str, Tensor | float]) -> Iterator[None]:
    """Let the named layers of ``block`` return these values instead of their own."""

    def replace_by(value: Tensor | float) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return value if isinstance(value, Tensor) else torch.full_like(output, value)

        return hook

    with ExitStack() as undo:
        for name, value in outputs.items():
            layer = block.get_submodule(name)
            undo.enter_context(layer.register_forward_hook(replace_by(value)))
        yield


def input_of(block: nn.Module, name: str, run: RunBlock, hidden: Tensor) -> Tensor:
    """What the named layer of ``block`` is given; the rest of the block is not run."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach())
        raise Enough

    with suppress(Enough), block.get_submodule(name).register_forward_pre_hook(hook):
        run(hidden)
        raise BlockfitError(f"the block did not run its layer {name}")
    return seen[0]


@dataclass(frozen=True)
class Skip:
    """A part of a block that can be left out: it then returns zeros without computing anything.

    Args:
        name: dotted path inside the block (``attn``).
        after: how many ``None`` follow the hidden state in the tuple that it returns; ``None``
            where it returns the hidden state alone.
    """

    name: str
    after: int | None


@contextmanager
def left_out(block: nn.Module, skip: Skip | None) -> Iterator[None]:
    """Leave a part of ``block`` out until the ``with`` ends."""
    if skip is None:
        yield
        return
    after = skip.after

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        hidden = next(v for v in given if isinstance(v, Tensor) and v.ndim == 3)
        zeros = torch.zeros_like(hidden)
        return zeros if after is None else (zeros, *[None] * after)

    with forward_as(block.get_submodule(skip.name), forward):
        yield


def find_attention(
    block: nn.Module, writers: tuple[Writer, Writer], run: RunBlock, hidden: Tensor
) -> Skip | None:
    """The largest part around the attention's writer without which the MLP can be fed directly.

    Given the state before the MLP's contribution instead of the block's input, and this part left
    out, the MLP's writer reads what it reads in the whole block. ``None`` where nothing is so, as
    in blocks whose MLP runs beside the attention.

    Args:
        writers: of its attention and of its MLP; silenced, the block returns its input.
        hidden: a hidden state that reaches it, shape (batch, tokens, width).
    """
    attention, mlp = writers
    with torch.no_grad():
        read = input_of(block, attention.name, run, hidden)
        middle = hidden + attention.contribution(block, read)
        expected = input_of(block, mlp.name, run, hidden)
        for skip in _parts_around(block, attention.name, run, hidden):
            if mlp.name.startswith(skip.name + "."):
                continue
            with left_out(block, skip):
                found = input_of(block, mlp.name, run, middle)
            tolerance = 1e-4 if hidden.dtype == torch.float32 else 5e-2
            if (found - expected).abs().max() <= tolerance * expected.abs().max():
                return skip
    return None


def _parts_around(block: nn.Module, name: str, run: RunBlock, hidden: Tensor) -> list[Skip]:
    """Parts of ``block`` around a layer that return a hidden state, largest first."""
    steps = name.split(".")
    outputs: dict[str, list[Any]] = {}
    with ExitStack() as undo:
        for count in range(1, len(steps)):
            around = ".".join(steps[:count])
            seen = outputs.setdefault(around, [])

            def hook(module: nn.Module, args: Any, output: Any, seen: list[Any] = seen) -> None:
                seen.append(output)

            undo.enter_context(block.get_submodule(around).register_forward_hook(hook))
        run(hidden)
    found = []
    for around, seen in outputs.items():
        if len(seen) != 1:
            continue
        several = isinstance(seen[0], tuple)
        first, *rest = seen[0] if several else seen
        same = isinstance(first, Tensor) and first.shape == hidden.shape
        if same and all(part is None for part in rest):
            found.append(Skip(around, len(rest) if several else None))
    return found


def outputs_of(
    block: nn.Module, names: Collection[str], run: RunBlock, hidden: Tensor
) -> dict[str, Tensor]:
    """What the named linear layers of ``block`` return; what comes after them is not run."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = output.detach()
            if len(seen) == len(names):
                raise Enough

        return hook

    with suppress(Enough), ExitStack() as undo:
        for name in names:
            undo.enter_context(block.get_submodule(name).register_forward_hook(note(name)))
        run(hidden)
        raise BlockfitError(f"the block did not run its layers {', '.join(names)}")
    return seen


@contextmanager
def inputs_of(block: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Listen to what the named linear layer of ``block`` is given."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach())

    with block.get_submodule(name).register_forward_pre_hook(hook):
        yield seen


def find_writers(
    block: nn.Module, run: RunBlock, hidden: Tensor, shared: Collection[int] = ()
) -> list[Writer]:
    """Find the linear layers that write into the residual stream, in order of execution.

    By probing: a layer counts where the block's output is ``base + gain ∘ z`` of the layer's
    output z, with one gain per channel for all tokens and images, once the layers that write
    after it are silenced; or else where what a module in the block is given is so (``_inside``).
    In a transformer these are the attention's output projection and the MLP's second layer; a
    block whose layers are applied otherwise (fused ``nn.MultiheadAttention``) has fewer or none.

    Args:
        hidden: a hidden state that reaches it, shape (batch, tokens, width), at least two tokens.
        shared: ids of parameters that something beside the block uses too; never solved.

    Returns:
        At most two writers: of the attention (first) and of the MLP (last).
    """
    width = hidden.shape[-1]
    linears = [
        name
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == width
    ]
    outputs = [one for one in _outputs(block, run, hidden, linears, shared) if _like(one, hidden)]
    return _last_two(_Block(block, run, hidden), outputs, _added)


def find_placed_writers(
    block: nn.Module, run: RunBlock, hidden: Tensor, shared: Collection[int] = ()
) -> list[Writer]:
    """``find_writers`` for a block of any layout: its hidden states may be maps, and the layers
    may work on windows of them, shifted, padded or in another order.

    Args:
        hidden: shape (batch, …), the channels last or first of the rest.
    """
    linears = [name for name, module in block.named_modules() if type(module) is nn.Linear]
    outputs = _outputs(block, run, hidden, linears, shared)
    return _last_two(_Block(block, run, hidden), outputs, _placed)


@dataclass(frozen=True)
class _Block:
    """A block, how to run it, and a hidden state that reaches it."""

    block: nn.Module
    run: RunBlock
    hidden: Tensor

    def up_to(self, module: str) -> _Block:
        """The same up to what one of its modules is given."""
        return replace(self, run=lambda hidden: input_of(self.block, module, self.run, hidden))


@dataclass(frozen=True)
class _Output:
    """What a layer returned, and whether it may be solved: it is a product alone."""

    name: str
    value: Tensor
    solvable: bool = False


FindWriter = Callable[[_Block, _Output, Silenced], Writer | None]
"""Tells whether a layer's output is added to what a block returns."""


def _like(output: _Output, hidden: Tensor) -> bool:
    return output.value.shape == hidden.shape


def _outputs(
    block: nn.Module,
    run: RunBlock,
    hidden: Tensor,
    linears: Collection[str],
    shared: Collection[int],
) -> list[_Output]:
    """What linear layers of a block return, in the order in which they run."""
    seen: list[_Output] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Linear, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                solvable = _solvable(module, shared) and _is_product(module, args, output)
                seen.append(_Output(name, output.detach().clone(), solvable))

        return hook

    with ExitStack() as undo, torch.no_grad():
        for name in linears:
            undo.enter_context(block.get_submodule(name).register_forward_hook(note(name)))
        run(hidden)
    return seen


def _last_two(block: _Block, outputs: Sequence[_Output], find: FindWriter) -> list[Writer]:
    """The last two layers that are writers once those after them are silenced."""
    names = [one.name for one in outputs]
    silenced: dict[str, Tensor | float] = {}
    found: list[Writer] = []
    for one in reversed(outputs):
        if names.count(one.name) != 1:
            continue
        writer = find(block, one, silenced)
        if writer is None and one.solvable:
            writer = _inside(block, one, silenced, find)
        if writer is None:
            continue
        silenced[one.name] = 0.0
        if one.solvable:
            found = [writer, *found]
            if len(found) == 2:
                break
    return found


def _inside(block: _Block, one: _Output, silenced: Silenced, find: FindWriter) -> Writer | None:
    """The writer that a layer is whose output is added to what a module in the block is given.

    The sum has to be of the residual stream: it holds something else of the block's input (norm
    after the addition), or what that module returns is added to what the block returns.
    """
    for leaf in _leaves(block, one.value.shape[-1]):
        given = block.up_to(leaf.name)
        writer = find(given, one, silenced)
        if writer is None:
            continue
        with torch.no_grad(), written(block.block, {**silenced, one.name: 0.0}):
            base, other = given.run(block.hidden), given.run(block.hidden.flip(1))
        if not torch.equal(base, other) or find(block, leaf, silenced) is not None:
            return replace(writer, given_to=leaf.name)
    return None


def _leaves(block: _Block, width: int) -> list[_Output]:
    """What the modules without submodules return that are given states of a width, once each."""
    seen: list[_Output] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            given = args[0] if len(args) == 1 else None
            if not isinstance(given, Tensor) or not isinstance(output, Tensor) or given.ndim < 3:
                return
            if given.shape == output.shape and width in (given.shape[-1], given.shape[1]):
                seen.append(_Output(name, output.detach().clone()))

        return hook

    with ExitStack() as undo, torch.no_grad():
        for name, module in block.block.named_modules():
            if name and not isinstance(module, nn.Linear) and not any(module.children()):
                undo.enter_context(module.register_forward_hook(note(name)))
        block.run(block.hidden)
    names = [one.name for one in seen]
    return [one for one in seen if names.count(one.name) == 1]


DIGITS = 32
"""Rows of a layer are told apart by numbers that are written into them, a digit at a time."""


def _with_output(
    block: _Block, name: str, silenced: Silenced
) -> Callable[[Tensor | float], Tensor]:
    """What the block returns, of what one of its layers returns."""

    def out(value: Tensor | float) -> Tensor:
        with torch.no_grad(), written(block.block, {**silenced, name: value}):
            return exact(block.run(block.hidden))

    return out


def _placed(block: _Block, one: _Output, silenced: Silenced) -> Writer | None:
    """The writer that a layer is, with the place of its rows; ``None`` where it is none."""
    name, output, hidden = one.name, one.value, block.hidden
    out = _with_output(block, name, silenced)
    base, width, images = out(0.0), output.shape[-1], len(hidden)
    if len(base) != images or output.numel() % (images * width) or base.ndim < 3:
        return None
    unit, slope, change, scale = _answer(out, base, output)
    if not torch.isfinite(scale) or scale == 0:
        return None
    tolerance = 2e-3 if hidden.dtype == torch.float32 else 5e-2
    for channels in (-1, 1):
        if base.shape[channels] != width or (channels == 1 and base.ndim < 4):
            continue
        writer = Writer(name, torch.ones(width), channels)
        each = writer.tokens(slope)
        gain = each.mean(dim=(0, 1))
        if (each - gain).abs().max() > tolerance * gain.abs().max():
            continue
        rows, wrote = exact(output).reshape(images, -1, width), writer.tokens(change)
        for ordered in (False, True):
            order = _order(out, base, output, writer, gain, unit) if ordered else None
            taken = rows if order is None else rows[:, order]
            fits = taken.shape == wrote.shape and (order is not None) == ordered
            if fits and (gain * taken - wrote).abs().max() <= tolerance * scale:
                return Writer(name, _factors(gain), channels, order)
    return None


def _answer(
    out: Callable[[Tensor | float], Tensor], base: Tensor, output: Tensor
) -> tuple[float, Tensor, Tensor, Tensor]:
    """How a block answers to one of its layers: a unit and the change with it, per unit; the change
    with the layer's own output, and its size.

    The unit is of the size of the state itself, so that the difference stands clear of rounding.
    """
    unit = float(base.abs().max().clamp_min(1.0))
    slope, change = (out(unit) - base) / unit, out(output) - base
    return unit, slope, change, change.abs().max()


def _factors(gain: Tensor) -> Tensor:
    """The gain, or ones: rounding must not look like a LayerScale."""
    return (torch.ones_like(gain) if (gain - 1).abs().max() < 1e-4 else gain).float()


def _order(
    out: RunBlock, base: Tensor, output: Tensor, writer: Writer, gain: Tensor, unit: float
) -> Tensor | None:
    """Which row of a layer's output reaches every token, of one image; ``None`` if none does."""
    rows = output.numel() // (len(base) * output.shape[-1])
    channel = int(gain.abs().argmax())
    number = torch.arange(rows).repeat(len(base))
    total, power = None, 1
    while power < rows or power == 1:
        digit = number // power % DIGITS
        value = (unit * digit / DIGITS).to(output).reshape(*output.shape[:-1], 1)
        moved = writer.tokens(out(value.expand_as(output)) - base)[..., channel]
        found = moved / gain[channel] / unit * DIGITS
        if (found - found.round()).abs().max() > 0.25:
            return None
        place = found.round().long() * power
        total, power = place if total is None else total + place, power * DIGITS
    assert total is not None
    same = bool((total == total[0]).all()) and int(total.min()) >= 0 and int(total.max()) < rows
    return total[0].cpu() if same else None


def owns(linear: nn.Linear | nn.Conv2d, shared: Collection[int] = ()) -> bool:
    """Whether weight and bias are the layer's own parameters, and no other's.

    They are not where they are made at each call (weight norm, pruning masks) or tied.
    """
    names = ["weight"] if linear.bias is None else ["weight", "bias"]
    return all(n in linear._parameters and id(linear._parameters[n]) not in shared for n in names)


def _solvable(linear: nn.Linear, shared: Collection[int]) -> bool:
    """Whether its weight is its own, and of a rank that the block's size asks for.

    The second factor of a low-rank correction (LoRA) adds to the hidden state, too, but the layer
    that it corrects is the one to solve.
    """
    return owns(linear, shared) and 2 * linear.in_features >= linear.out_features


def _is_product(linear: nn.Linear, args: tuple[Any, ...], output: Tensor) -> bool:
    """Whether a layer returned the product with its weight, and nothing that was added to it."""
    if len(args) != 1 or not isinstance(args[0], Tensor):
        return False
    product = nn.functional.linear(args[0], linear.weight, linear.bias)
    tolerance = 1e-3 if output.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((product - output).abs().max() <= tolerance * output.abs().max())


def _added(block: _Block, one: _Output, silenced: Silenced) -> Writer | None:
    """The writer that a layer is whose rows are in order; ``None`` where it is none."""
    out = _with_output(block, one.name, silenced)
    base = out(0.0)
    if base.shape != one.value.shape:
        return None
    _, slope, change, scale = _answer(out, base, one.value)
    gain = slope.mean(dim=(0, 1))
    if not torch.isfinite(scale) or scale == 0:
        return None
    tolerance = 2e-3 if block.hidden.dtype == torch.float32 else 5e-2
    if (gain * exact(one.value) - change).abs().max() > tolerance * scale:
        return None
    return Writer(one.name, _factors(gain))


def need_writer(writers: list[Writer], block: int, why: str) -> Writer:
    """The MLP's writer, or one clear sentence."""
    if not writers or writers[-1].given_to:
        raise BlockfitError(
            f"block {block} has no linear layer whose output is simply added to the hidden "
            f"state, which {why} needs; choose another map or repair=none"
        )
    return writers[-1]
