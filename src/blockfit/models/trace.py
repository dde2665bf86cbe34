"""A batch of images as a model's blocks saw it, so that blocks can be run one by one again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.models.blocks import Batch, Blocks, block_modules, call, overridden
from blockfit.models.forward import Enough
from blockfit.models.padding import real_tokens


@dataclass
class Trace:
    """What one forward gave to every block.

    Args:
        inputs: the batch that the model was called with.
        calls: per block, the arguments beside the hidden state (masks, position embeddings), and
            whether the hidden state came first among the positional ones.
        states: l → h[l], shape (batch, tokens, width), for the boundaries that were kept: what
            block l was given, and what the last block returned.
        outputs: of blocks in stages: what the last of a stage returned.
        rests: of blocks in stages: what each returned beside its state; ``None`` for nothing.
        real: which tokens of padded texts are no padding, bool (texts, tokens); ``None``: all.
            Of two towers always those of the texts.
    """

    blocks: Blocks
    inputs: Batch
    calls: list[tuple[tuple[Any, ...], dict[str, Any], bool]]
    states: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    rests: dict[int, tuple[Any, ...] | None] = field(default_factory=dict)
    real: Tensor | None = None

    def real_in(self, index: int) -> Tensor | None:
        """``real`` of block ``index``; ``None`` where nothing that it reads is padding."""
        if not self.blocks.towers or self.real is None:
            return self.real
        texts = index >= self.blocks.first_of_texts
        return self.real if texts and not bool(self.real.all()) else None

    def after(self, index: int) -> Tensor | None:
        """What block ``index`` returned, where it was kept."""
        known = self.outputs.get(index)
        return self.states.get(index + 1) if known is None else known

    def given(
        self,
        model: nn.Module,
        index: int,
        functions: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """What the model gives to block ``index``; blocks before it may compute something else."""
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(self.blocks.hidden_in(args, kwargs).detach().clone())
            raise Enough

        block = block_modules(model, self.blocks)[index]
        others = overridden(model, self.blocks, functions or {}, self.rests)
        listening = block.register_forward_pre_hook(hook, with_kwargs=True)
        with suppress(Enough), listening, torch.no_grad(), others:
            call(model, self.inputs)
            raise BlockfitError(f"the model did not run its block {index}")
        return seen[0]

    def run(self, module: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Run ``module`` as block ``index`` was run, on another hidden state."""
        args, kwargs, first = self.calls[index]
        own = hidden.clone()  # blocks may write into their input, and kept states are handed in
        if first:
            return self.blocks.hidden_out(module(own, *args, **kwargs))
        return self.blocks.hidden_out(module(**kwargs, **{self.blocks.input_name: own}))

    def runner(self, module: nn.Module, index: int) -> Callable[[Tensor], Tensor]:
        """``run`` for one block."""
        return lambda hidden: self.run(module, index, hidden)


def trace(
    model: nn.Module,
    blocks: Blocks,
    inputs: Batch,
    keep: Iterable[int],
    names: Iterable[str] = (),
    hold: Callable[[Tensor], Tensor] | None = None,
) -> Trace:
    """Run one forward without gradients; keep the hidden states ``keep`` and every block's call.

    The model must be in eval mode. ``hold`` says where a kept state lies (``shelf.Shelf``).

    Raises:
        BlockfitError: where a hidden state is NaN or infinite; the message names the block and
            the image.
    """
    recorder = _Recorder(Trace(blocks, inputs, []), set(keep), list(names), hold)
    modules = block_modules(model, blocks)
    with ExitStack() as undo, torch.no_grad():
        for index, module in enumerate(modules if blocks.stages else ()):
            undo.enter_context(module.register_forward_hook(partial(recorder.in_stage, index)))
        for index, module in enumerate(modules):
            hook = partial(recorder.before, index)
            undo.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        undo.enter_context(modules[-1].register_forward_hook(recorder.after_last))
        call(model, inputs)
    return recorder.out


@dataclass
class _Recorder:
    """The hooks of one ``trace``: they write down what passes through the blocks.

    Args:
        out: what is written.
        wanted: boundaries whose states are kept.
        names: of the images, for messages.
        hold: where a kept state lies; a copy of it where ``None``.
    """

    out: Trace
    wanted: set[int]
    names: list[str]
    hold: Callable[[Tensor], Tensor] | None

    def before(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """What block ``index`` is given."""
        blocks = self.out.blocks
        hidden = blocks.hidden_in(args, kwargs)
        rest = {k: v for k, v in kwargs.items() if args or k != blocks.input_name}
        self.out.calls.append((args[1:], rest, bool(args)))
        self._keep_state(index, hidden)

    def after_last(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """What the last block returns."""
        blocks = self.out.blocks
        self._keep_state(blocks.depth, blocks.hidden_out(output))

    def in_stage(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """What block ``index`` of blocks in stages returns."""
        blocks = self.out.blocks
        several = isinstance(output, tuple)
        self.out.rests[index] = tuple(output[1:]) if several else None
        if index in blocks.ends and self.wanted:
            self.out.outputs[index] = self._held(blocks.hidden_out(output))

    def _keep_state(self, index: int, hidden: Tensor) -> None:
        out, blocks = self.out, self.out.blocks
        check_finite(hidden, index, self.names)
        if index == 0 and not blocks.stages:
            out.real = real_tokens(out.inputs, hidden)
        if blocks.towers and index == blocks.first_of_texts:
            found = real_tokens(out.inputs, hidden, of_texts=True)
            out.real = torch.ones_like(hidden[..., 0], dtype=torch.bool) if found is None else found
        if index in self.wanted:
            out.states[index] = self._held(hidden)

    def _held(self, hidden: Tensor) -> Tensor:
        own = hidden.detach().clone()
        return own if self.hold is None else self.hold(own)


def check_finite(hidden: Tensor, index: int, names: list[str]) -> None:
    """Refuse NaN and infinite hidden states, naming the block that made them and the image."""
    # A sum is NaN or infinite where any entry is, and costs one read.
    if torch.isfinite(hidden.sum(dtype=torch.float32)) or torch.isfinite(hidden).all():
        return
    bad = int((~torch.isfinite(hidden)).flatten(1).any(1).nonzero()[0])
    image = names[bad] if bad < len(names) else f"image {bad} of the batch"
    where = "the input of block 0" if index == 0 else f"the output of block {index - 1}"
    raise BlockfitError(
        f"{where} holds NaN or infinite values for {image}; "
        "check that image and the model's weights and dtype"
    )
