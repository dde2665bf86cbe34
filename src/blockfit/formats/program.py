"""torch.export programs (``.pt2``): one file that runs with torch alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockfit.arguments import checked
from blockfit.data.images import Images
from blockfit.errors import BlockfitError
from blockfit.files import FileForm, check_file, new_file
from blockfit.formats.folder import Saved
from blockfit.formats.int8 import check_no_int8
from blockfit.formats.parity import Parity, Pictures, Run, compare
from blockfit.formats.passport import passport
from blockfit.formats.traced import (
    Bare,
    Resolution,
    bare_at,
    by_name,
    patch_size,
    primary,
    run,
    trace,
)
from blockfit.models.head import observe

SUFFIX = ".pt2"
FORM = FileForm(SUFFIX, "blockfit.versions")


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Args:
        size: height and width that it takes, in pixels; ``None`` for any.
        batch: number of images that it takes at a time; ``None`` for any.
    """

    path: Path
    blocks: int
    size: tuple[int, int] | None
    batch: int | None
    outputs: tuple[str, ...]
    parity: Parity

    @property
    def size_bytes(self) -> int:
        """Of the file, with the weights that lie beside it where it has any."""
        beside = self.path.with_name(f"{self.path.name}.data")
        return sum(file.stat().st_size for file in (self.path, beside) if file.exists())

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "blocks": self.blocks,
            "resolution": "dynamic" if self.size is None else list(self.size),
            "batch": "dynamic" if self.batch is None else self.batch,
            "outputs": list(self.outputs),
            "size_bytes": self.size_bytes,
            "parity": self.parity.to_json(),
        }


@dataclass(frozen=True)
class Setting:
    """What an export starts from, worked out once.

    Args:
        bare: the same, as it is traced.
        size: height and width of the export; ``None`` for any.
        batch: the only number of images at a time; ``None`` for any.
        classes: the output that tells the class.
    """

    saved: Saved
    bare: Bare
    pictures: Pictures
    size: tuple[int, int] | None
    sizes: tuple[tuple[int, int], ...]
    batch: int | None
    outputs: tuple[str, ...]
    classes: str | None

    @classmethod
    def of(
        cls, saved: Saved, images: Images | None, resolution: Resolution | None, batch: int | None
    ) -> Setting:
        """Look at the images, and run the model once.

        Raises:
            BlockfitError: where the model cannot take the images or the resolution.
        """
        check_no_int8(saved.model, "exported")
        if batch is not None and batch < 1:
            raise BlockfitError(f"a fixed batch holds at least 1 image, not {batch}")
        pictures = Pictures.of(saved.model, saved.source, images)
        first = next(iter(pictures))
        native = (int(first.shape[-2]), int(first.shape[-1]))
        bare = bare_at(saved, native, resolution)
        size = native if resolution is None else resolution.size
        high, wide = patch_size(bare)
        around = (native, (native[0] + high, native[1] + 2 * wide), (native[0], native[1] + wide))
        sizes = around if size is None else (size,)
        if resolution is not None and size is not None and (size[0] % high or size[1] % wide):
            raise BlockfitError(
                f"{size[0]} × {size[1]} pixels are no multiple of the model's patches of "
                f"{high} × {wide}; give one, such as {high * max(1, size[0] // high)}"
                f"x{wide * max(1, size[1] // wide)}"
            )
        out = run(bare, next(pictures.portions(1, sizes[0])))
        classes = None
        if observe(saved.model, saved.blocks, first[:1]).logits is not None:
            classes = primary(out)
        return cls(saved, bare, pictures, size, sizes, batch, tuple(out), classes)

    def example(self) -> Tensor:
        """Images to trace with: not of the native size where any size is taken."""
        images = next(self.pictures.portions(self.batch or 2, self.sizes[len(self.sizes) // 2]))
        like = next(p for p in self.bare.parameters() if p.is_floating_point())
        return images.to(like)

    def traced(self, unpadded: bool = False) -> torch.export.ExportedProgram:
        """The graph; see ``traced.trace``."""
        return trace(
            self.bare,
            self.example(),
            any_batch=self.batch is None,
            any_size=self.size is None,
            unpadded=unpadded,
        )

    def images(self) -> Iterator[Tensor]:
        """All images at all sizes, one alone first."""
        return itertools.chain.from_iterable(
            self.pictures.portions(self.batch, size) for size in self.sizes
        )

    def held_in(self, dtype: torch.dtype | None) -> Setting:
        """The same with weights of another dtype, of a copy of the model."""
        if dtype is None:
            return self
        return replace(self, bare=copy.deepcopy(self.bare).to(dtype))

    def compare(self, found: Run, what: str, dtype: torch.dtype | None = None) -> Parity:
        """Compare with the model.

        Args:
            dtype: of its weights; by default the model's.
        """
        source = self.pictures.source
        if len(self.sizes) > 1:
            source += " at " + ", ".join(f"{high} × {wide}" for high, wide in self.sizes)
        parity = compare(
            lambda images: run(self.bare, images), found, self.images(), source, self.classes
        )
        own = next(p.dtype for p in self.bare.parameters() if p.is_floating_point())
        parity.check(what, dtype or own)
        return parity

    def exported(self, path: Path, parity: Parity) -> Exported:
        """What was written to ``path``."""
        kept = self.saved.blocks.depth - len(self.saved.plan.removed_blocks)
        return Exported(path, kept, self.size, self.batch, self.outputs, parity)


@checked
def export_program(
    saved: Saved,
    path: str | Path,
    *,
    images: Images | None = None,
    resolution: Resolution | None = None,
    batch: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model as a ``.pt2`` file that ``torch.export.load`` reads where blockfit is not.

    The program takes images (B, C, H, W) and returns what the model returns: one tensor, or a
    dictionary of them. It is read back and compared with the model before the file takes its name.

    Args:
        saved: from ``store.load_saved``; an original model has an empty plan.
        path: ends in ``.pt2``.
        images: to compare on; see ``parity.Pictures``.
        resolution: height and width; by default those of the model's preprocessing.
        batch: take this many images only, instead of any number.
        overwrite: replace the file.

    Raises:
        BlockfitError: where torch.export cannot follow the model, its outputs differ, or the file
            is taken. Nothing is left behind then.
    """
    target = check_file(path, FORM, overwrite)
    if resolution is not None and resolution.size is None:
        raise BlockfitError(
            "a .pt2 program takes one resolution: give it and export once for each, or use "
            "export_onnx"
        )
    setting = Setting.of(saved, images, resolution, batch)
    program = setting.traced()
    with new_file(path, FORM, overwrite) as partial:
        torch.export.save(program, partial, extra_files=passport(saved))
        again: Any = torch.export.load(partial).module()
        like = setting.example()

        def found(batch: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                return by_name(again(batch.to(like)))

        parity = setting.compare(found, "program")
    return setting.exported(target, parity)
