"""What a model says of an image: the features that reach its head, and the head's logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.models.blocks import Batch, Blocks, block_modules, call
from blockfit.models.forward import evaluating, of_towers
from blockfit.models.padding import real_tokens, without_padding


@dataclass(frozen=True)
class Observation:
    """One forward seen from outside.

    Args:
        features: final features, shape (images, F): what the head's linear layers read, or the
            model's primary output flattened where it has no head.
        logits: shape (images, classes), ``None`` where the model has no head.
        shape: of the features before they were flattened: with a token or position axis or two
            where the model has no head and hands them out.
        no_head: why no head was recognised; empty where one was.
    """

    features: Tensor
    logits: Tensor | None
    shape: tuple[int, ...] = ()
    no_head: str = ""


def observe(model: nn.Module, blocks: Blocks, inputs: Batch) -> Observation:
    """Run one forward in eval mode without gradients and return final features and logits.

    A head is one or several ``nn.Linear`` outside the blocks, run after the last block, whose
    output is the model's primary output of shape (images, classes), or whose mean or sum is.
    Linear layers on the way there (poolers) and those that make image embeddings are no heads. A
    head whose columns are not classes of which one is right (one column, or a config that says so)
    has features but no logits.
    Without a head the features of padded tokens are zeros: they count in no difference.
    Of both towers of a model of images and texts the features are both embeddings, each of length
    1, side by side, and the logits of an image are its scaled similarities to the different texts
    of the batch: what zero-shot classification takes the softmax of.
    Both results are detached, in the model's dtype and on its device; modes, hooks and random
    state are as before.

    Raises:
        BlockfitError: where the model's output holds no tensor.
    """
    modules = block_modules(model, blocks)
    inside = {id(part) for block in modules for part in block.modules()}
    seen: list[tuple[Tensor, Tensor]] = []
    last_ran = False

    def after_last(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal last_ran
        last_ran = True

    def after_linear(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if last_ran and args and isinstance(output, Tensor):
            seen.append((args[0], output))

    with ExitStack() as undo:
        undo.enter_context(modules[-1].register_forward_hook(after_last))
        for module in model.modules():
            if isinstance(module, nn.Linear) and id(module) not in inside:
                undo.enter_context(module.register_forward_hook(after_linear))
        undo.enter_context(evaluating(model))
        undo.enter_context(torch.no_grad())
        output = call(model, inputs)
        if (both := of_towers(model, inputs)) is not None and len(embeddings_in(output)) == 2:
            return _of_both(model, both[1], *embeddings_in(output).values())
        primary = primary_output(output)
        found = embeddings_in(output).items()
        embeds = next((name for name, one in found if primary is one), "")
        heads = [] if embeds else _heads(primary, seen)
    if not heads:
        if primary.ndim > 2:
            primary = without_padding(primary, real_tokens(inputs, primary))
        flat = primary.detach().reshape(len(primary), -1)
        return Observation(flat, None, tuple(primary.shape), _why_none(primary, seen, embeds))
    features = torch.cat([read.flatten(1) for read in heads], dim=1)
    why = _no_classes(model, primary)
    logits = None if why else primary.detach()
    return Observation(features.detach(), logits, tuple(features.shape), why)


def embeddings_in(output: Any) -> dict[str, Tensor]:
    """The embeddings of images and of texts in a model's output, by their names."""
    found = {name: _member(output, name) for name in ("image_embeds", "text_embeds")}
    return {name: one for name, one in found.items() if isinstance(one, Tensor)}


def _of_both(
    model: nn.Module, tokens: Mapping[str, Any], images: Tensor, texts: Tensor
) -> Observation:
    """What both towers say of a batch with as many texts as images."""
    if images.ndim != 2 or images.shape != texts.shape:
        raise BlockfitError(
            f"the embeddings of images have shape {tuple(images.shape)}, those of texts "
            f"{tuple(texts.shape)}; both towers are judged together where both have shape "
            "(batch, features), so give images or texts alone"
        )
    image, text = (nn.functional.normalize(one.detach(), dim=-1) for one in (images, texts))
    features, scale = torch.cat([image, text], dim=1), getattr(model, "logit_scale", None)
    if not isinstance(scale, Tensor):
        told = "the output is embeddings of images and texts, and the model has no logit_scale"
        return Observation(features, None, tuple(features.shape), told)
    logits = scale.detach().exp() * image @ text[_different_rows(tokens)].T
    return Observation(features, logits, tuple(features.shape))


def _different_rows(tokens: Mapping[str, Any]) -> list[int]:
    """The first row of each different text of a batch."""
    whole = [v for v in tokens.values() if isinstance(v, Tensor) and v.ndim == 2]
    rows = zip(*(value.tolist() for value in whole), strict=True)
    first: dict[Any, int] = {}
    for place, row in enumerate(rows):
        first.setdefault(tuple(map(tuple, row)), place)
    return [*first.values()]


def primary_output(output: Any) -> Tensor:
    """The tensor of a model's output that matters most, batch first.

    ``logits`` before ``image_embeds`` before ``text_embeds`` before ``last_hidden_state`` before
    the first tensor; of a list of feature maps the last one, which is the deepest.

    Raises:
        BlockfitError: where there is none.
    """
    items: Iterable[Any] = (output,)
    if isinstance(output, Mapping):
        items = output.values()
    elif isinstance(output, (tuple, list)):
        items = output if isinstance(output, tuple) else reversed(output)
    names = ("logits", "image_embeds", "text_embeds", "last_hidden_state")
    telling = (_member(output, name) for name in names)
    for value in (*telling, *items):
        if isinstance(value, (tuple, list)) and value:
            value = value[-1]
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
    raise BlockfitError(
        f"the model returned {type(output).__name__}, which holds no tensor; "
        "give a model whose forward returns one, alone or in a tuple or mapping"
    )


def _member(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _heads(primary: Tensor, seen: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """What the linear layers read that made ``primary``; empty where none did."""
    if primary.ndim != 2 or not primary.is_floating_point():
        return []
    fitting = [(read, wrote) for read, wrote in seen if wrote.shape == primary.shape]
    for read, wrote in reversed(fitting):
        if _equal(primary, wrote):
            return [read]
    for count in range(2, len(fitting) + 1):
        several = torch.stack([wrote for _, wrote in fitting[-count:]])
        if _equal(primary, several.mean(0)) or _equal(primary, several.sum(0)):
            return [read for read, _ in fitting[-count:]]
    return []


def _no_classes(model: nn.Module, primary: Tensor) -> str:
    """Why a head's columns are not classes of which one is right; empty where they are."""
    if primary.shape[1] == 1:
        return "the head has one column, which is no choice between classes"
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        return f"the model's config says problem_type={problem!r}, and KL compares single classes"
    return ""


def _why_none(primary: Tensor, seen: list[tuple[Tensor, Tensor]], embeds: str) -> str:
    """Why an output is not taken for the logits of classes."""
    if embeds:
        return f"the output is {embeds.removesuffix('_embeds')} embeddings, which are features"
    if primary.ndim != 2:
        return f"the output has shape {tuple(primary.shape)}, not (images, classes)"
    if not seen:
        return "no linear layer (nn.Linear) runs after the last block"
    return "the output is not what a linear layer (nn.Linear) after the last block returns"


def _equal(left: Tensor, right: Tensor) -> bool:
    """Equal up to the rounding of the coarser dtype of the two."""
    coarse = max(torch.finfo(left.dtype).eps, torch.finfo(right.dtype).eps)
    common = torch.promote_types(left.dtype, right.dtype)
    left, right = left.to(common), right.to(common)
    finite = right[right.isfinite()]
    atol = coarse * float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(left, right, rtol=4 * coarse, atol=atol, equal_nan=True)


def right_answers(seen: Observation, labels: Tensor | None) -> tuple[int, int, int]:
    """Of a batch: right answers, images whose label is a class of the head, and other labels.

    A negative label means that there is none; one beyond the head's classes is not counted.
    """
    if seen.logits is None or labels is None:
        return 0, 0, 0
    inside = (labels >= 0) & (labels < seen.logits.shape[1])
    right = (seen.logits.argmax(1).to(labels.device) == labels) & inside
    return int(right.sum()), int(inside.sum()), int((labels >= 0).sum() - inside.sum())
