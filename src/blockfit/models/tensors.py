"""Every tensor of a model by name: its parameters and all its buffers, non-persistent ones too."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError, first_line

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""The names that safetensors files give to dtypes, in the order of the files."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

NARROWER = {torch.float32: (torch.float16, torch.bfloat16)}
"""Dtypes → those that a file may hold them in, where every value survives; tried in this order."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, non-persistent ones too; a shared one under each of its names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def kept_apart(model: nn.Module) -> set[str]:
    """Names of buffers outside the state dict: what modules work out, perhaps of the inputs' size.

    Their shape may change with the first forward.
    """
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }


def every_tensor(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that modules keep as plain attributes."""
    yield from named_tensors(model).values()
    for module in model.modules():
        yield from (value for _, value in _attributes(module) if isinstance(value, Tensor))


INT8_KINDS = ("weight-only", "dynamic")
"""``weight-only`` computes in the activations' dtype; ``dynamic`` brings every token to int8."""

SCALE = ".scale"
"""After the name of an int8 weight: the name of its factors."""


def int8_parts(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Integers (rows, columns) and factors (rows, 1) of torchao's int8 weights; else ``None``."""
    if type(tensor).__name__ != "Int8Tensor":
        return None
    weight: Any = tensor
    return weight.qdata, weight.scale


def int8_kind(tensors: Iterable[Tensor]) -> str | None:
    """How the int8 weights among tensors compute; ``None`` where there are none."""
    for tensor in tensors:
        if int8_parts(tensor) is not None:
            weight: Any = tensor
            return "weight-only" if weight.act_quant_kwargs is None else "dynamic"
    return None


def held(tensors: Mapping[str, Tensor], grids: Iterable[str] = ()) -> dict[str, Tensor]:
    """Tensors as memory holds them: an int8 weight is its integers and its factors.

    Args:
        tensors: by name.
        grids: names of those that are in two parts as well, as a file holds them.
    """
    out: dict[str, Tensor] = {}
    split = set(grids)
    for name, tensor in tensors.items():
        parts = grid_parts(tensor) if name in split else int8_parts(tensor)
        if parts is None:
            out[name] = tensor
        else:
            out[name], out[name + SCALE] = parts
    return out


def on_grids(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of ordinary tensors of a model in int8 that a file holds as integers and factors."""
    if int8_kind(tensors.values()) is None:
        return ()
    shared = tied(tensors)
    alone = tensors.keys() - shared.keys() - set(shared.values())
    return tuple(
        name
        for name, tensor in tensors.items()
        if name in alone
        and int8_parts(tensor) is None
        and tensor.is_contiguous()
        and grid_parts(tensor) is not None
    )


def dequantized(integers: Tensor, factors: Tensor) -> Tensor:
    """The weight as ordinary numbers, in the factors' dtype; a factor per row, see ``rows``."""
    return (rows(integers).to(factors.dtype) * factors).view(integers.shape)


def rows(tensor: Tensor) -> Tensor:
    """A matrix of it: along the first dimension of several entries; (1, tokens, d) by token."""
    long = next((size for size in tensor.shape if size > 1), 1)
    return tensor.reshape(long, -1)


GRID_BITS = 12
"""Of a grid's factor: 127 times it is exact in float32, so that the factor can be found again."""


GRID_LEAST = 4096
"""Entries from which on a tensor is worth it."""


def on_grid(tensor: Tensor) -> Tensor:
    """The nearest whole multiples, -127 to 127, of one factor per row; float32, exact."""
    matrix = rows(tensor.detach())
    mantissa, exponent = torch.frexp(matrix.abs().amax(1, keepdim=True) / 127)
    factors = torch.ldexp((mantissa * 2**GRID_BITS).ceil() / 2**GRID_BITS, exponent)
    return dequantized(_integers(matrix, factors), factors).view(tensor.shape)


def _integers(matrix: Tensor, factors: Tensor) -> Tensor:
    nonzero = torch.where(factors > 0, factors, 1)
    return (matrix / nonzero).round().clamp(-127, 127).to(torch.int8)


def grid_parts(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Integers and factors (rows, 1) of what ``on_grid`` made; ``None`` where a bit would be lost.

    A tensor that is not ``worth_a_grid`` is not looked at.
    """
    own = tensor.detach()
    if own.dtype != torch.float32 or own.is_meta or not worth_a_grid(own):
        return None
    matrix = rows(own)
    factors = matrix.abs().amax(1, keepdim=True) / 127
    integers = _integers(matrix, factors).view(own.shape)
    again = dequantized(integers, factors)
    bits = (again.contiguous().view(torch.int32), own.contiguous().view(torch.int32))
    return (integers, factors) if torch.equal(*bits) else None


def worth_a_grid(tensor: Tensor) -> bool:
    """Whether integers and a factor per row take much less room than half precision does."""
    return tensor.numel() >= GRID_LEAST and rows(tensor).shape[1] >= 16


def tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Later names of one and the same tensor → its first name."""
    first: dict[Any, str] = {}
    out = {}
    for name, tensor in tensors.items():
        key: Any = id(tensor)
        if not tensor.is_meta and tensor.numel() and int8_parts(tensor) is None:
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            key = (*place, isinstance(tensor, nn.Parameter))
        if first.setdefault(key, name) != name:
            out[name] = first[key]
    return out


def storable(model: nn.Module) -> dict[str, Tensor]:
    """``named_tensors`` of a model that a safetensors file can hold.

    Raises:
        BlockfitError: names the first tensor or module that it cannot hold.
    """
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise BlockfitError(
                f"module {path or 'model'!r} keeps state that is no tensor (get_extra_state), "
                "which a saved folder cannot hold"
            )
    tensors = named_tensors(model)
    for name, tensor in tensors.items():
        plain = type(tensor) in (Tensor, nn.Parameter) or type(tensor).__name__ == "Buffer"
        plain = plain or int8_parts(tensor) is not None
        if nn.parameter.is_lazy(tensor):
            problem = "has no values yet; run the model once"
        elif tensor.is_meta:
            problem = "is on the meta device and has no values; load the weights first"
        elif not plain or tensor.layout != torch.strided or tensor.dtype not in _NAMES:
            problem = f"is a {type(tensor).__name__} of {tensor.dtype}, not a plain tensor"
        else:
            continue
        raise BlockfitError(f"{name} {problem}; a saved folder cannot hold it")
    return tensors


def stored_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a file holds the tensor in: a narrower one where that loses not one bit.

    So weights that were published in half precision take no more room than there, whatever dtype
    they were loaded in. Tensors without values keep their own.
    """
    if tensor.is_meta or not tensor.numel():
        return tensor.dtype
    narrower = NARROWER.get(tensor.dtype, ())
    return next((dtype for dtype in narrower if _survives(tensor, dtype)), tensor.dtype)


def _survives(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether every value, the signs of zeros too, comes back from ``dtype``; a NaN never does."""
    own = tensor.detach()
    if own.dtype == dtype:
        return True
    bits = _BITS[own.element_size()]
    same = torch.equal(own.to(dtype).to(own.dtype).view(bits), own.view(bits))
    return same and not bool(own.isnan().any())


def file_bytes(model: nn.Module) -> int:
    """The size in bytes of the ``model.safetensors`` that the model is saved as.

    Every tensor once, in its ``stored_dtype``, and the file's header.
    """
    named = named_tensors(model)
    order, aliases, tensors = list(DTYPES), tied(named), held(named, on_grids(named))
    dtypes = {name: stored_dtype(t) for name, t in tensors.items() if name not in aliases}
    header: dict[str, Any] = {"__metadata__": {"format": "blockfit"}}
    end = 0
    for name in sorted(dtypes, key=lambda name: (-order.index(_NAMES[dtypes[name]]), name)):
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * dtypes[name].itemsize
        header[name] = {
            "dtype": _NAMES[dtypes[name]],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + len(text) + -len(text) % 8 + end


def narrowest(model: nn.Module) -> torch.dtype | None:
    """The half precision that holds every floating parameter exactly; ``None`` where none does."""
    floats = [p for p in model.parameters() if p.dtype == torch.float32]
    halves = NARROWER[torch.float32] if floats else ()
    return next((half for half in halves if all(_survives(p, half) for p in floats)), None)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device; takes no memory for them.

    Int8 weights become ordinary ones, and nobody brings tensors to other devices any more.

    Raises:
        BlockfitError: where the model cannot be copied.
    """

    def bare(tensor: Tensor) -> Tensor:
        if int8_parts(tensor) is None:
            return tensor.detach().to("meta")
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return _copy_with(model, bare)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy that holds the same values without memory of its own: for looking, never for writing.

    Int8 weights become ordinary ones, and nobody brings tensors to other devices any more.

    Raises:
        BlockfitError: where the model cannot be copied.
    """

    def same(tensor: Tensor) -> Tensor:
        parts = int8_parts(tensor)
        return tensor.detach() if parts is None else dequantized(*parts).to(tensor.dtype)

    return _copy_with(model, same)


def _copy_with(model: nn.Module, other: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy with ``other(tensor)`` in the place of every parameter and buffer."""
    memo: dict[int, Any] = {}
    for tensor in named_tensors(model).values():
        made = other(tensor)
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = made
    return _copied(model, memo)


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        made = copy.deepcopy(model, memo)
        for module in made.modules():
            if module.__dict__.pop("_hf_hook", None) is not None:  # accelerate's
                for name in ("forward", "_old_forward"):
                    module.__dict__.pop(name, None)
        return made
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise BlockfitError(
            f"{type(model).__name__} cannot be copied ({first_line(error)}); "
            "give a model as its class builds it"
        ) from error


def valueless(model: nn.Module) -> str | None:
    """The name of a tensor without values that is neither parameter nor buffer, if there is one."""
    known = {id(tensor) for tensor in named_tensors(model).values()}
    for path, module in model.named_modules():
        for name, value in _attributes(module):
            if isinstance(value, Tensor) and value.is_meta and id(value) not in known:
                return f"{path}.{name}".lstrip(".")
    return None


def fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put ``values`` in the place of all parameters and buffers, as they are, in place.

    Args:
        model: on the meta device.
        values: one per name in ``named_tensors``; the same object under two names becomes one
            shared parameter.

    Raises:
        BlockfitError: where ``model`` shares a module that gets two different values.
    """
    made: dict[int, Tensor] = {}
    renewed: dict[int, Tensor] = {}
    olds = named_tensors(model)  # kept alive, so that no id is given out twice
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            entries = cast(dict[str, Any], table)
            for key, old in entries.items():
                if old is None:
                    continue
                new = values[f"{path}.{key}" if path else key]
                if isinstance(old, nn.Parameter):
                    trains = old.requires_grad and new.is_floating_point()
                    new = made.setdefault(id(new), nn.Parameter(new, requires_grad=trains))
                entries[key] = renewed[id(old)] = new
    for module in model.modules():
        for key, value in module.__dict__.items():
            if isinstance(value, Tensor) and id(value) in renewed:
                module.__dict__[key] = renewed[id(value)]
    filled = named_tensors(model)
    for name in olds:
        if filled[name].data_ptr() != values[name].data_ptr():
            raise BlockfitError(f"{name} is shared with another module and has two values")


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        yield name, value
        if isinstance(value, list | tuple):
            yield from ((f"{name}[{index}]", item) for index, item in enumerate(value))
        elif isinstance(value, dict):
            yield from ((f"{name}[{key!r}]", item) for key, item in value.items())


def fingerprint(model: nn.Module) -> str:
    """A short hash of a model's parameters: names, shapes, and some of the values."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        few = value.detach().flatten()[:: max(1, value.numel() // 256)][:256]
        digest.update(few.cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]
