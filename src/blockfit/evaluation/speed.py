"""What a comparison of speeds holds: settings, rows of times, and their JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from blockfit.arguments import check_fields, one_of
from blockfit.errors import BlockfitError
from blockfit.evaluation.engines import DTYPES, ENGINES
from blockfit.fields import fields_written
from blockfit.models.cost import ROUNDS, Timing, paired_ratios

BATCH_SIZES = (1, 32)

ORIGINAL = "original"
"""The name of the model that the others were made from."""


@dataclass(frozen=True)
class Setting:
    """What one comparison is run with."""

    batch_size: int
    engine: str
    dtype: str

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.engine}, {self.dtype}"


@dataclass(frozen=True)
class Settings:
    """All that ``bench`` is to go through.

    Args:
        engines: of ``ENGINES``.
        dtypes: of ``DTYPES``.
        threads: on the CPU; torch's own number by default.
        rounds: timed passes of each model in each setting.
    """

    batch_sizes: Sequence[int] = BATCH_SIZES
    engines: Sequence[str] = ENGINES[:1]
    dtypes: Sequence[str] = DTYPES[:1]
    device: str = "cpu"
    threads: int = field(default_factory=torch.get_num_threads)
    rounds: int = ROUNDS

    def __post_init__(self) -> None:
        check_fields(self)
        for name, known, given in (
            ("engine", ENGINES, self.engines),
            ("dtype", DTYPES, self.dtypes),
        ):
            for one in given:
                one_of(name, one, known)
        for name, value, least in (
            ("batch size", min(self.batch_sizes, default=0), 1),
            ("number of threads", self.threads, 1),
            ("number of rounds", self.rounds, 2),
        ):
            if value < least:
                raise BlockfitError(f"the {name} must be at least {least}, got {value}")

    def each(self) -> Iterator[Setting]:
        """Every combination once."""
        for dtype in dict.fromkeys(self.dtypes):
            for engine in dict.fromkeys(self.engines):
                for size in dict.fromkeys(self.batch_sizes):
                    yield Setting(size, engine, dtype)


@dataclass(frozen=True)
class Shares:
    """Where the time of a forward pass goes, as fractions of the original's.

    Args:
        removed: the blocks that were cut, in the original.
        maps: what stands there now, in the compressed model.
        narrowed: whether some of these blocks are narrowed, not gone.
        heads: the linear layers of which heads keep fewer values, queries or keys: in the original
            and in the compressed model; ``None`` where there are none.
    """

    removed: float
    maps: float
    narrowed: bool = False
    heads: tuple[float, float] | None = None

    @property
    def promised(self) -> float:
        """The speed-up if all other parts take as long as before."""
        return 1 / (1 - self.removed + self.maps)


@dataclass(frozen=True)
class Row:
    """One compressed model against the original in one setting, measured in turn.

    Args:
        before: times of the original.
        after: times of the compressed model, in the same rounds.
        promised: speed-up by FLOPs: the original's over the compressed model's; ``None`` where they
            are unknown.
        memory: peak bytes of both; ``None`` where they cannot be had.
        shares: of the time; ``None`` where they were not measured.
        remarks: sentences on a gain that is missing or smaller than promised.
    """

    name: str
    setting: Setting
    before: Timing
    after: Timing
    promised: float | None
    memory: tuple[int | None, int | None] = (None, None)
    shares: Shares | None = None
    remarks: tuple[str, ...] = ()

    @property
    def measured(self) -> float:
        """How many times faster than the original: the median over rounds."""
        return statistics.median(paired_ratios(self.before, self.after))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between which the middle half of the rounds' speed-ups lies."""
        ratios = paired_ratios(self.before, self.after)
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values: times in milliseconds, memory in bytes, fractions."""
        low, high = self.quartiles
        before, after = (
            {**t.to_json(), "images_per_second": t.images_per_second, "peak_memory_bytes": memory}
            for t, memory in zip((self.before, self.after), self.memory, strict=True)
        )
        shares = self.shares
        return {
            "model": self.name,
            "batch_size": self.setting.batch_size,
            "engine": self.setting.engine,
            "dtype": self.setting.dtype,
            "original": before,
            "compressed": after,
            "speedup": {
                "measured": self.measured,
                "low": low,
                "high": high,
                "promised": self.promised,
                "of_promised": None if self.promised is None else self.measured / self.promised,
            },
            "time_shares": shares
            and {"removed": shares.removed, "maps": shares.maps, "heads": shares.heads},
            "remarks": list(self.remarks),
        }


@dataclass(frozen=True)
class Bench:
    """All comparisons, and what they were made on.

    Args:
        machine: device, threads, versions of libraries.
        models: by name: parameters, FLOPs per image, bytes of the weights file.
        skipped: why a setting was left out, a sentence each.
    """

    machine: dict[str, Any]
    rounds: int
    models: dict[str, dict[str, int | None]]
    rows: tuple[Row, ...]
    skipped: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return fields_written(self)
