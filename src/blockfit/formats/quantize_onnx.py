"""ONNX files in int8, by onnxruntime: the blocks' matrix products with integers."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from blockfit.data.images import Images
from blockfit.errors import BlockfitError, first_line
from blockfit.files import check_file, new_file
from blockfit.formats.folder import Saved
from blockfit.formats.onnx_file import FORM, SUFFIX, Session, export_onnx

ONNX_KINDS = ("onnx-dynamic", "onnx-static")
"""``onnx-dynamic`` scales activations as they come, ``onnx-static`` by calibration images."""

OPERATORS = ("MatMul", "Gemm")
"""What is brought to int8 where one factor is a weight."""


def quantize_onnx(
    saved: Saved,
    path: str | Path,
    kind: str,
    images: Images | None = None,
    *,
    overwrite: bool = False,
) -> int:
    """Write a compressed model as an ONNX file in int8; returns its size in bytes.

    The float32 file is exported and compared with the model first. Weights are rounded per output
    channel.

    Args:
        saved: from ``store.load_saved``.
        path: ends in ``.onnx``.
        kind: of ``ONNX_KINDS``.
        images: that activations are calibrated on, for ``onnx-static``.

    Raises:
        BlockfitError: where the kind is unknown, images are missing, the export fails, or the file
            is taken.
    """
    target = check_file(path, FORM, overwrite)
    if kind not in ONNX_KINDS:
        raise BlockfitError(f"unknown int8 kind {kind!r}; choose {' or '.join(ONNX_KINDS)}")
    if kind == "onnx-static" and images is None:
        raise BlockfitError("onnx-static needs calibration images; give some")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / f"whole{SUFFIX}"
        export_onnx(saved, whole)
        with new_file(path, FORM, overwrite) as partial:
            try:
                with _quiet():
                    _rounded(whole, partial, kind, images)
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                raise BlockfitError(
                    f"onnxruntime cannot bring {saved.source.name} to int8: {first_line(error)}"
                ) from error
            _keep_metadata(whole, partial)
            Session(partial)  # refuses what it cannot run
    return target.stat().st_size


def _rounded(whole: Path, target: Path, kind: str, images: Images | None) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    how: dict[str, Any] = {
        "op_types_to_quantize": list(OPERATORS),
        "per_channel": True,
        "weight_type": QuantType.QInt8,
    }
    if images is None or kind == "onnx-dynamic":
        quantize_dynamic(whole, target, **how)
    else:
        quantize_static(whole, target, _Reader(whole, images), **how)


class _Reader:
    """Hands calibration images to onnxruntime, batch by batch."""

    def __init__(self, path: Path, images: Images) -> None:
        self.name = Session(path).input
        self.batches = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        if batch is None:
            return None
        if not isinstance(batch, Tensor):
            raise BlockfitError("an exported model takes images alone; give plain images")
        return {self.name: batch.float().numpy()}


def _keep_metadata(whole: Path, target: Path) -> None:
    """The plan and the preprocessing are known of the int8 file, too."""
    import onnx

    told = onnx.load(whole, load_external_data=False).metadata_props
    made = onnx.load(target)
    onnx.helper.set_model_props(made, {entry.key: entry.value for entry in told})
    onnx.save(made, target)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime advises to prepare the model, which torch's exporter has done."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
