"""ONNX files, by torch's own exporter, compared with the model in onnxruntime before they stay."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockfit.arguments import checked
from blockfit.data.images import Images
from blockfit.errors import BlockfitError, first_line, need
from blockfit.fields import fields_written
from blockfit.files import FileForm, check_file, new_file
from blockfit.formats.folder import Saved
from blockfit.formats.parity import Parity, compare
from blockfit.formats.passport import passport
from blockfit.formats.program import Exported, Setting
from blockfit.formats.traced import Resolution, draws, input_name, run
from blockfit.models.cost import alternate
from blockfit.models.load import read_dtype

SUFFIX = ".onnx"
FORM = FileForm(SUFFIX, "blockfit.versions", (".data",))
OPSET = 18
"""Widely read, and the lowest that torch's exporter writes without converting."""

ONE_FILE = 2**31 - 2**20
"""Bytes of weights that one protocol-buffer file can hold; more go into a file beside it."""

LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
"""onnxruntime's graph optimisation levels; ``all`` is its default."""


@dataclass(frozen=True)
class Level:
    """One way of running an ONNX file.

    Args:
        name: a key of ``LEVELS``, ``openvino``, or ``pytorch`` for the model itself.
        latency_ms: median time of one image.
        spread_ms: the range that the middle half of the times fell into.
    """

    name: str
    latency_ms: float
    spread_ms: float
    parity: Parity | None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return fields_written(self)


@dataclass(frozen=True)
class ExportedOnnx(Exported):
    """An ONNX file that was written.

    Args:
        opset: version of the operator set.
        dtype: of the weights and the input, such as ``float32``.
    """

    opset: int
    input: str
    dtype: str
    levels: tuple[Level, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        levels = [level.to_json() for level in self.levels]
        own = {"opset": self.opset, "input": self.input, "dtype": self.dtype}
        return {**super().to_json(), **own, "levels": levels}


def onnx_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of an ONNX file's weights; ``None`` for the model's own.

    Raises:
        BlockfitError: where onnxruntime does not run it on the CPU.
    """
    if dtype is None:
        return None
    found = read_dtype(dtype)
    if found not in (torch.float32, torch.float16):
        name = str(dtype).removeprefix("torch.")
        raise BlockfitError(
            f"an ONNX file holds float32 or float16 weights, not {name}; give one as dtype="
        )
    return found


@checked
def export_onnx(
    saved: Saved,
    path: str | Path,
    *,
    images: Images | None = None,
    resolution: Resolution | None = None,
    batch: int | None = None,
    opset: int = OPSET,
    dtype: torch.dtype | str | None = None,
    compare_levels: bool = False,
    overwrite: bool = False,
) -> ExportedOnnx:
    """Write a model as an ONNX file; onnxruntime must give the same outputs before it is kept.

    The file says in its ``metadata_props`` what it was made from (see ``passport``). Weights of
    more than 2 GiB lie beside it in ``NAME.onnx.data``.

    Args:
        saved: from ``store.load_saved``; an original model has an empty plan.
        path: ends in ``.onnx``.
        images: to compare on; see ``parity.Pictures``.
        resolution: height and width, or any; by default those of the model's preprocessing.
        batch: take this many images only, instead of any number.
        opset: version of the ONNX operator set.
        dtype: of the weights, the input and the outputs: ``"float16"`` or ``"float32"``; by default
            the model's. In float16 the outputs may differ by rounding.
        compare_levels: time and compare all graph optimisation levels, and OpenVINO if installed.
        overwrite: replace the file.

    Raises:
        BlockfitError: where the exporter cannot follow the model or write the opset, the outputs
            differ, or the file is taken. Nothing is left behind then.
    """
    target = check_file(path, FORM, overwrite)
    wanted = onnx_dtype(dtype)
    for name in ("onnx", "onnxscript", "onnxruntime"):
        need(name, "onnx")
    setting = Setting.of(saved, images, resolution, batch)
    held = setting.held_in(wanted)
    kind = held.example().dtype
    if kind == torch.bfloat16:
        raise BlockfitError(
            "onnxruntime runs no bfloat16 on the CPU; load the model in float32 or float16"
        )
    name = input_name(saved.model)
    program = _converted(held, name, opset)
    with new_file(path, FORM, overwrite) as partial:
        weights = sum(p.numel() * p.element_size() for p in held.bare.parameters())
        program.save(partial, external_data=weights > ONE_FILE)
        session = Session(partial)
        parity = setting.compare(session.outputs, "ONNX file", wanted)
        levels = tuple(_levels(setting, partial)) if compare_levels else ()
        del session
    done = setting.exported(target, parity)
    held_as = str(kind).removeprefix("torch.")
    return ExportedOnnx(**vars(done), opset=opset, input=name, dtype=held_as, levels=levels)


def _converted(setting: Setting, name: str, opset: int) -> Any:
    """The ONNX program with named axes and metadata."""
    axes: dict[int, str] = {} if setting.batch is not None else {0: "batch"}
    graph = setting.traced(unpadded=True)
    if draws(graph):
        raise BlockfitError(
            f"{setting.saved.source.name} draws random numbers in each forward, and no runtime "
            "draws those that torch does; use export_program"
        )
    try:
        # A fused kernel's strides allow views that its formula forbids (BEiT's attention).
        with _silent(), sdpa_kernel(SDPBackend.MATH):
            program: Any = torch.onnx.export(
                graph,
                (setting.example(),),
                dynamo=True,
                opset_version=opset,
                input_names=[name],
                output_names=list(setting.outputs),
                verbose=False,
            )
    except Exception as error:  # the exporter's errors have no common class
        raise BlockfitError(
            f"torch's ONNX exporter cannot convert {setting.saved.source.name} to opset {opset}: "
            f"{first_line(error)}; try another opset=, or export_program"
        ) from error
    model = program.model
    found = model.opset_imports.get("")
    if found != opset:
        raise BlockfitError(
            f"this model cannot be written in opset {opset}, only in {found}; give opset={found}"
        )
    shape = model.graph.inputs[0].shape
    program.rename_axes({str(shape[axis]): called for axis, called in axes.items()})
    model.metadata_props.update(passport(setting.saved))
    return program


class Session(nn.Module):
    """An ONNX file in onnxruntime on the CPU, with as many threads as torch has.

    Args:
        level: a key of ``LEVELS``.
    """

    def __init__(self, path: Path, level: str = "all") -> None:
        super().__init__()
        ort = need("onnxruntime", "onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[level])
        options.log_severity_level = 3
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]
        (only,) = self.session.get_inputs()
        self.input = only.name
        self.narrow = "float16" in only.type

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """All outputs by name, of images (B, C, H, W)."""
        array = images.to(torch.float16 if self.narrow else torch.float32).numpy()
        values = self.session.run(None, {self.input: array})
        return dict(zip(self.names, map(torch.from_numpy, values), strict=True))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The same, so that it can be timed as models are."""
        return self.outputs(images)


class OpenVino(nn.Module):
    """An ONNX file in OpenVINO on the CPU, in float32, with as many threads as torch has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        openvino = need("openvino", "openvino")
        core = openvino.Core()
        limits = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self.compiled = core.compile_model(core.read_model(path), "CPU", limits)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """All outputs by name, of images (B, C, H, W)."""
        values = self.compiled([images.float().numpy()])
        return {out.any_name: torch.from_numpy(values[out].copy()) for out in self.compiled.outputs}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The same, so that it can be timed as models are."""
        return self.outputs(images)


def _levels(setting: Setting, path: Path) -> Iterator[Level]:
    """Every way of running the file, all timed in turn on one image."""
    ways: dict[str, Any] = {level: Session(path, level) for level in LEVELS}
    with contextlib.suppress(BlockfitError):
        ways["openvino"] = OpenVino(path)
    image = next(setting.pictures.portions(setting.batch or 1, setting.sizes[0]))
    times = alternate({"pytorch": setting.bare, **ways}, image)
    for name, timing in times.items():
        parity = None
        if name in ways:
            parity = compare(
                lambda images: run(setting.bare, images),
                ways[name].outputs,
                setting.images(),
                setting.pictures.source,
                setting.classes,
            )
        yield Level(name, timing.median_ms, timing.spread_ms, parity)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter prints and logs its steps; only errors are of use."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
