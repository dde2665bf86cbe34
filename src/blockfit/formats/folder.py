"""The saved folder: JSON and safetensors, written whole or not at all, checked when read."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from blockfit.errors import BlockfitError, first_line
from blockfit.files import (
    PARTIAL,
    SAVED,
    FolderForm,
    check_target,
    expanded,
    new_folder,
    write_text,
)
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Plan
from blockfit.formats.int8 import put_int8
from blockfit.formats.manifest import FLOATING, Manifest, dumps, read_manifest
from blockfit.formats.own_model import RECORD, check_record, record
from blockfit.formats.rebuild import DIFFERS, check_outputs, example_outputs, settled
from blockfit.models.adapters import TO_SAVE, check_merged
from blockfit.models.blocks import Blocks
from blockfit.models.load import attach, load_model, read_dtype, skeleton, source_of
from blockfit.models.source import Source
from blockfit.models.surgery import apply_plan, removed_plan
from blockfit.models.tensors import (
    DTYPES,
    NARROWER,
    SCALE,
    dequantized,
    fill,
    held,
    int8_kind,
    int8_parts,
    kept_apart,
    meta_copy,
    named_tensors,
    on_grids,
    rows,
    storable,
    stored_dtype,
    tied,
    valueless,
)
from blockfit.models.wrappers import bare
from blockfit.provenance import installed_versions
from blockfit.untrusted import open_tensors

MARK = SAVED
WEIGHTS = "model.safetensors"
FILES = (MARK, WEIGHTS, "config.json", "preprocessor_config.json")
"""All that a saved folder may hold."""

_FOREIGN = "made by blockfit: read it with blockfit.load, or blockfit export --hub"

FORM = FolderForm(MARK, '"blockfit":', FILES)


@dataclass(frozen=True)
class Saved:
    """A model from a saved folder, and what the folder says of it.

    Args:
        model: in eval mode, its base's source attached.
        report: what the run that made it wrote down.
        versions: of the libraries that wrote it.
    """

    model: nn.Module
    blocks: Blocks
    plan: Plan
    report: dict[str, Any]
    source: Source
    versions: dict[str, str | None]


def is_saved(folder: str | Path) -> bool:
    """Whether ``folder`` is one that ``save`` wrote."""
    return (expanded(folder) / MARK).is_file()


def module_of(model: nn.Module | str | Path) -> nn.Module:
    """A module without wrappers; of a name, what ``save`` wrote there or ``load_model`` finds."""
    if isinstance(model, nn.Module):
        return bare(model)
    return load(model) if is_saved(model) else load_model(model)


def check_folder(folder: str | Path, overwrite: bool = False) -> None:
    """Refuse now what ``save`` would refuse at the end of a long run."""
    check_target(folder, FORM, overwrite)


def save(
    folder: str | Path,
    model: nn.Module,
    blocks: Blocks,
    plan: Plan,
    *,
    source: Source,
    report: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Write a compressed model to ``folder``: all of it, or nothing.

    The folder holds ``blockfit.json``, ``model.safetensors`` (every parameter and buffer that is
    left, float32 ones in half precision where that loses not one bit), and, where the base is a
    transformers model, its ``preprocessor_config.json`` and a ``config.json`` that no stock class
    takes for its own. A source that does not give the model as it is now is brought up to date
    (labels, a new head); a model that its library cannot rebuild is saved as a user's own class,
    with a warning that says why.

    Args:
        folder: new or empty.
        model: already compressed.
        blocks: where its blocks are.
        plan: what was removed from it.
        source: of the original model: ``source_of(original)``, taken before the surgery.
        report: JSON values that belong to the run: seed, calibration images, figures.
        overwrite: replace a folder that blockfit saved.

    Raises:
        BlockfitError: before anything is written, where ``folder`` is taken, the rebuilt model has
            other outputs on one batch, the model has adapters that are not merged, or the report
            is not JSON; later, where the file system refuses. ``folder`` is then as it was.
    """
    check_folder(folder, overwrite)
    check_merged(model, TO_SAVE)
    if (made_by := removed_plan(model, blocks)) != plan:
        raise BlockfitError(
            f"the model was compressed by the plan {made_by}, not by {plan}; give the plan that it "
            "was compressed by"
        )
    tensors = storable(model)
    source, bare = settled(model, tensors, source, partial(_rebuilt, blocks=blocks, plan=plan))
    if bare is not None:
        check_outputs(model, tensors, bare)
    elif (why := source.arguments.get(DIFFERS)) is not None:
        warnings.warn(
            f"{folder} is loaded with the model that it was made from, as for a class of your own "
            f"(blockfit.load(folder, model=...)): {why}",
            stacklevel=2,
        )
    if source.library == "module":
        told = {**source.arguments, RECORD: record(model, example_outputs)}
        source = replace(source, arguments=told)
    manifest = _manifest(tensors, blocks, plan, source, report)
    texts = {MARK: manifest.dumps(), **_library_files(source)}
    values = _stored(tensors, manifest)
    with new_folder(folder, FORM, overwrite) as unfinished:
        save_file(values, unfinished / WEIGHTS, metadata={"format": "blockfit"})
        for name in reversed(texts):  # the mark comes last: without it the folder does not load
            write_text(unfinished / name, texts[name])


def load(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """The model that ``save`` wrote, in eval mode: the same outputs, bit for bit.

    Neither the original weights are read nor random ones made.

    Args:
        folder: what ``save`` wrote.
        model: the original as your own code builds it, where blockfit cannot build it; it stays
            as it is.
        device: where to put the weights; the CPU by default.
        dtype: of the weights, such as ``"bfloat16"``; by default what was saved.

    Raises:
        BlockfitError: where the folder is none of blockfit's, or anything in it is unknown,
            missing or does not fit; file and key are named.
    """
    wanted = None if dtype is None else read_dtype(dtype)
    loaded = load_saved(folder, model=model, device=device).model
    return loaded if wanted is None else loaded.to(wanted)


def load_saved(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
) -> Saved:
    """``load`` with all that the folder says; the arguments are the same."""
    mark = _file(folder, MARK)
    weights = _file(folder, WEIGHTS)
    manifest = read_manifest(mark)
    source, blocks, plan = manifest.source, manifest.blocks, manifest.plan
    if model is None and source.library == "module":
        raise BlockfitError(
            f"{folder} was made from {source.name}, {_told(source)}; build it and load with "
            f"blockfit.load({str(folder)!r}, model=...)"
        )
    try:
        bare = skeleton(source) if model is None else meta_copy(model)
        put_plan(bare, blocks, plan)
    except BlockfitError as error:
        raise BlockfitError(f"{mark}: {error}") from error
    if (loose := valueless(bare)) is not None:
        raise BlockfitError(f"{mark}: {loose} of {source.name} has no values in a saved folder")
    values = _read(weights, bare, manifest, "cpu" if device is None else device)
    in_parts = (*manifest.int8, *manifest.int8_stored)
    parts = {name: (values[name], values.pop(name + SCALE)) for name in in_parts}
    fill(bare, values | {name: dequantized(*pair) for name, pair in parts.items()})
    if manifest.int8_kind is not None:
        put_int8(bare, {name: parts[name] for name in manifest.int8}, manifest.int8_kind)
    check_record(bare, source.arguments.get(RECORD), example_outputs, str(mark))
    attach(bare, source)
    bare.__dict__["blockfit_report"] = manifest.report
    return Saved(bare.eval(), blocks, plan, manifest.report, source, manifest.versions)


def _told(source: Source) -> str:
    """That a model is the user's own; where a library made it, why."""
    own = "a class of your own, which blockfit cannot build"
    why = source.arguments.get(DIFFERS)
    return own if why is None else f"changed since and so {own} ({why})"


def saved_of(model: nn.Module) -> Saved:
    """A compressed model in memory with what ``save`` needs to know of it, trained or not.

    Raises:
        BlockfitError: where nothing was taken out of the model.
    """
    blocks = getattr(model, "blockfit_blocks", None)
    plan = Plan() if blocks is None else removed_plan(model, blocks)
    if blocks is None or plan == Plan():
        raise BlockfitError(
            f"nothing was taken out of this {type(model).__name__}; compress it first, or save it "
            "as its own library does"
        )
    report = dict(getattr(model, "blockfit_report", {}))
    rebuild = partial(_rebuilt, blocks=blocks, plan=plan)
    source, _ = settled(model, named_tensors(model), source_of(model), rebuild)
    return Saved(model, blocks, plan, report, source, installed_versions())


def put_plan(bare: nn.Module, blocks: Blocks, plan: Plan) -> None:
    """Apply a plan on the meta device, where its maps take no memory either."""
    with torch.device("meta"):
        maps = [empty_map(entry, blocks.width, blocks.prefix_tokens) for entry in plan]
    apply_plan(bare, blocks, plan, maps)


def _rebuilt(source: Source, blocks: Blocks, plan: Plan) -> nn.Module:
    bare = skeleton(source)
    put_plan(bare, blocks, plan)
    return bare


def _manifest(
    tensors: Mapping[str, Tensor],
    blocks: Blocks,
    plan: Plan,
    source: Source,
    report: Mapping[str, Any],
) -> Manifest:
    names = {dtype: name for name, dtype in FLOATING.items()}
    floating = {n: names[t.dtype] for n, t in tensors.items() if t.is_floating_point()}
    usual = Counter(floating.values()).most_common(1)[0][0] if floating else "float32"
    aliases = tied(tensors)
    layout = {n: order for n, t in tensors.items() if n not in aliases and (order := _layout(t))}
    return Manifest(
        source=source,
        blocks=blocks,
        plan=plan,
        report=dict(report),
        dtype=usual,
        other_dtypes={name: dtype for name, dtype in floating.items() if dtype != usual},
        tied=aliases,
        layout=layout,
        versions=installed_versions(),
        int8=tuple(name for name, tensor in tensors.items() if int8_parts(tensor) is not None),
        int8_kind=int8_kind(tensors.values()),
        int8_stored=on_grids(tensors),
    )


def _layout(tensor: Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest; empty where that is their own order."""
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: strides[dim], reverse=True)
    dense = not tensor.is_contiguous() and tensor.permute(order).is_contiguous()
    return order if dense else []


def _library_files(source: Source) -> dict[str, str]:
    """Files of a transformers model for other tools: the image processor, and a config that stops
    them from making a model with random weights where blocks went."""
    if source.library != "transformers":
        return {}
    # No stock class can be made of this, neither by its type nor by the numbers of its layers.
    told = source.arguments["config"].items()
    config = {k: _FOREIGN for k, v in told if isinstance(v, int | float | list | Mapping)}
    files = {"config.json": dumps({**config, "model_type": "blockfit"}, "the config")}
    if (own := source.preprocessing) is not None and own.kind == "transformers":
        files["preprocessor_config.json"] = dumps(own.settings, "the preprocessing")
    return files


def _stored(tensors: Mapping[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """What the file holds; safetensors refuses views of one tensor, which are copied."""
    values = {
        name: tensor.detach().to(stored_dtype(tensor)).cpu().contiguous()
        for name, tensor in held(tensors, manifest.int8_stored).items()
        if name not in manifest.tied
    }
    seen = Counter(tensor.untyped_storage().data_ptr() for tensor in values.values())
    return {
        name: tensor.clone() if seen[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for name, tensor in values.items()
    }


def _file(folder: str | Path, name: str) -> Path:
    path = expanded(folder)
    if not path.is_dir():
        raise BlockfitError(f"there is no folder {folder}; check the path")
    real = Path(os.path.realpath(path))
    if real.name.endswith(PARTIAL) or not (path / MARK).is_file():
        raise BlockfitError(
            f"{folder} is no folder that blockfit saved: it has no finished {MARK}; "
            "give one that blockfit compress wrote"
        )
    found = Path(os.path.realpath(path / name))  # resolve() fails where links run in a circle
    inside = [real]
    if real.parent.name == "snapshots":  # the Hub's cache keeps the files beside its snapshots
        inside.append(real.parent.parent / "blobs")
    if found.parent not in inside:
        raise BlockfitError(f"{path / name} is a link that leads out of the folder; copy the file")
    if not found.is_file():
        raise BlockfitError(f"{path / name} is missing; copy the whole folder or save it again")
    return path / name


def _read(
    path: Path, bare: nn.Module, manifest: Manifest, device: torch.device | str
) -> dict[str, Tensor]:
    """Every tensor of ``bare`` from the file, after all of them were checked."""
    expected = _expected(bare, manifest, path.parent / MARK)
    try:
        with open_tensors(path) as file:
            _check_names(path, expected, set(file.keys()), manifest)
            apart = kept_apart(bare)
            for name in file.keys():  # noqa: SIM118
                entry = file.get_slice(name)
                _check_tensor(path, name, entry, expected[name], manifest, name in apart)
            dtypes = {name: _dtype(name, tensor, manifest) for name, tensor in expected.items()}
            # Copies in memory of torch's own alignment: the file's would change sums' last bits.
            values = {
                name: _arranged(
                    file.get_tensor(name).to(dtypes[name]), manifest.layout.get(name)
                ).to(device)
                for name in file.keys()  # noqa: SIM118
            }
    except RuntimeError as error:
        raise BlockfitError(
            f"cannot put {path} on {device}: {first_line(error)}; choose another"
        ) from error
    values.update({alias: values[name] for alias, name in manifest.tied.items()})
    return values


def _expected(bare: nn.Module, manifest: Manifest, mark: Path) -> dict[str, Tensor]:
    """All tensors that the file must hold or name, on the meta device."""
    expected = named_tensors(bare)
    for name in manifest.int8:
        weight = expected.get(name)
        if weight is None or weight.ndim != 2 or name in (*manifest.tied, *manifest.tied.values()):
            raise BlockfitError(f"{mark}: int8: the model has no matrix {name!r} of its own")
        expected[name] = torch.empty(weight.shape, dtype=torch.int8, device="meta")
        expected[name + SCALE] = torch.empty((len(weight), 1), device="meta")
    for name in manifest.int8_stored:
        tensor = expected.get(name)
        if tensor is None or name in (*manifest.tied, *manifest.tied.values()):
            raise BlockfitError(f"{mark}: int8: the model has no tensor {name!r} of its own")
        expected[name] = torch.empty(tensor.shape, dtype=torch.int8, device="meta")
        expected[name + SCALE] = torch.empty((len(rows(tensor)), 1), device="meta")
    return expected


def _arranged(tensor: Tensor, order: list[int] | None) -> Tensor:
    if not order:
        return tensor.clone(memory_format=torch.contiguous_format)
    back = [order.index(dim) for dim in range(len(order))]
    return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def _check_names(
    path: Path, expected: Mapping[str, Tensor], stored: set[str], manifest: Manifest
) -> None:
    mark = path.parent / MARK
    for key, names in (
        ("tied", {*manifest.tied, *manifest.tied.values()}),
        ("layout", manifest.layout),
        ("other_dtypes", manifest.other_dtypes),
    ):
        if unknown := sorted(set(names) - expected.keys()):
            raise BlockfitError(f"{mark}: {key}: the model has no tensor {unknown[0]!r}")
    for alias, name in manifest.tied.items():
        same_kind = isinstance(expected[alias], nn.Parameter) == isinstance(
            expected[name], nn.Parameter
        )
        if expected[alias].shape != expected[name].shape or not same_kind:
            raise BlockfitError(f"{mark}: tied: {alias} cannot be the same tensor as {name}")
    wanted = expected.keys() - manifest.tied.keys()
    if unknown := sorted(stored - wanted):
        raise BlockfitError(f"{path}: unknown tensor {unknown[0]!r}; the model has no place for it")
    if missing := sorted(wanted - stored):
        raise BlockfitError(f"{path}: tensor {missing[0]!r} is missing; save the model again")


def _dtype(name: str, expected: Tensor, manifest: Manifest) -> torch.dtype:
    """The dtype of a tensor in the model, which the file may hold in a narrower one."""
    if not expected.dtype.is_floating_point or name.removesuffix(SCALE) in (
        *manifest.int8,
        *manifest.int8_stored,
    ):
        return expected.dtype
    return FLOATING[manifest.other_dtypes.get(name, manifest.dtype)]


def _check_tensor(
    path: Path, name: str, entry: Any, expected: Tensor, manifest: Manifest, any_shape: bool
) -> None:
    shape = tuple(entry.get_shape())
    fits = len(shape) == expected.ndim if any_shape else shape == tuple(expected.shape)
    if not fits:
        raise BlockfitError(
            f"{path}: tensor {name!r} has shape {shape}, expected {tuple(expected.shape)}; "
            "save the model again"
        )
    dtype, stored = _dtype(name, expected, manifest), DTYPES.get(entry.get_dtype())
    if stored != dtype and stored not in NARROWER.get(dtype, ()):
        raise BlockfitError(
            f"{path}: tensor {name!r} is stored as {entry.get_dtype()}, expected {dtype}; "
            "save the model again"
        )
    order = manifest.layout.get(name)
    if order is not None and len(order) != len(shape):
        raise BlockfitError(
            f"{path.parent / MARK}: layout: {name} has {len(shape)} dimensions, not {len(order)}"
        )
