"""One run on several processes: who this one is, and the sums and values that all share.

``torchrun`` or ``accelerate launch`` starts the processes and names them in the environment;
torch.distributed carries everything between them (gloo; NCCL for sums that lie on a CUDA device).
Values travel as JSON, never as pickles. Alone, every function here returns what it was given.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from blockfit.errors import BlockfitError
from blockfit.units import seconds_set

if TYPE_CHECKING:  # torch is imported where it is used: the command line asks for ranks without it
    import torch
    from torch import Tensor

TIMEOUT_S = 600.0
"""How long a process waits for another one that is there but says nothing."""

TIMEOUT_NAME = "BLOCKFIT_TIMEOUT"
"""The environment variable that changes ``TIMEOUT_S``."""

_PIECE = 1 << 26  # elements of one transfer

_joined = False
_fast: torch.device | None = None  # where NCCL sums

T = TypeVar("T")


def launched() -> tuple[int, int]:
    """Rank and number of processes, as the launcher wrote them into the environment.

    Raises:
        BlockfitError: where the environment contradicts itself.
    """
    words = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if not words["WORLD_SIZE"] or words["WORLD_SIZE"] == "1":
        return 0, 1
    numbers = [int(word) if word.isdecimal() else -1 for word in words.values()]
    if not 0 <= numbers[0] < numbers[1] or not os.environ.get("MASTER_ADDR"):
        raise BlockfitError(
            f"the environment says WORLD_SIZE={words['WORLD_SIZE']}, but RANK={words['RANK']!r} "
            f"and MASTER_ADDR={os.environ.get('MASTER_ADDR', '')!r} do not go with it; start "
            "several processes with torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    return numbers[0], numbers[1]


def rank() -> int:
    """The number of this process; 0 alone."""
    if not _joined:
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def count() -> int:
    """How many processes share the run; 1 alone."""
    if not _joined:
        return 1
    import torch.distributed as dist

    return dist.get_world_size()


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def own_device(name: str) -> str:
    """The device that this process should use where the user named ``name``.

    ``cuda`` means another GPU for each process of a machine; sums then go through NCCL.
    """
    global _fast
    local = os.environ.get("LOCAL_RANK", "")
    if name != "cuda" or count() == 1 or not local.isdecimal():
        return name
    import torch

    if torch.cuda.is_available():
        _fast = torch.device("cuda", int(local))
    return f"cuda:{local}"


@contextmanager
def joined(timeout_s: float | None = None) -> Iterator[None]:
    """Take part in the run that the launcher started, for the duration; alone, do nothing.

    Args:
        timeout_s: how long to wait for a silent process; ``BLOCKFIT_TIMEOUT`` or ``TIMEOUT_S``
            by default.

    Raises:
        BlockfitError: where the others cannot be reached.
    """
    global _joined
    if launched()[1] == 1 or _joined:
        yield
        return
    import torch
    import torch.distributed as dist

    wait = seconds_set(TIMEOUT_NAME, TIMEOUT_S, 1e-3) if timeout_s is None else timeout_s
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _told_of_stops(), _reaching():
        dist.init_process_group(backend, timeout=timedelta(seconds=wait))
    _joined = True
    try:
        with _told_of_stops():
            yield
        dist.destroy_process_group()  # not after an error: the others would hear of it first
    finally:
        _joined = False


def reduce(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; the same bits on all."""
    if count() == 1:
        return
    import torch.distributed as dist

    for tensor in tensors:
        assert tensor.is_contiguous()
        for piece in tensor.view(-1).split(_PIECE):
            sums = piece if _fast is None else piece.to(_fast)
            with _reaching():
                dist.all_reduce(sums)
            if sums is not piece:
                piece.copy_(sums)


def share(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by that of the first process, in place."""
    if count() == 1:
        return
    for tensor in tensors:
        own = tensor.contiguous()
        for piece in own.view(-1).split(_PIECE):
            _share(piece)
        if own is not tensor:
            tensor.copy_(own)


def gathered(value: Any) -> list[Any]:
    """A JSON value of every process, by rank, on all of them."""
    if count() == 1:
        return [value]
    import torch
    import torch.distributed as dist

    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count())]
    with _reaching():
        dist.all_gather(sizes, torch.tensor([len(data)]))
    longest = int(max(sizes))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = data
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    with _reaching():
        dist.all_gather(texts, padded)
    return [
        json.loads(text[: int(size)].numpy().tobytes())
        for text, size in zip(texts, sizes, strict=True)
    ]


def agreed(make: Callable[[], T]) -> T:
    """What ``make`` returns on the first process, on all; a JSON value. Others do not call it."""
    if count() == 1:
        return make()
    import torch

    data = torch.empty(0, dtype=torch.uint8)
    if is_first():
        data = torch.frombuffer(bytearray(json.dumps(make()).encode()), dtype=torch.uint8)
    size = torch.tensor([len(data)])
    _share(size)
    if not is_first():
        data = torch.empty(int(size), dtype=torch.uint8)
    _share(data)
    return json.loads(data.numpy().tobytes())


def spread(
    tasks: Sequence[T], work: Callable[[T], Any], owner: Callable[[T], int] | None = None
) -> list[Any]:
    """Do every task on one process; the JSON results of all come back in order, on all.

    Args:
        tasks: the same on all processes.
        owner: the rank that must do it; in turn by default.
    """
    own = {
        number: work(task)
        for number, task in enumerate(tasks)
        if (number if owner is None else owner(task)) % count() == rank()
    }
    if count() == 1:
        return list(own.values())
    found = {int(number): value for part in gathered(own) for number, value in part.items()}
    return [found[number] for number in range(len(tasks))]


def _share(tensor: Tensor) -> None:
    import torch.distributed as dist

    with _reaching():
        dist.broadcast(tensor, src=0)


@contextmanager
def _reaching() -> Iterator[None]:
    """torch.distributed's errors as one sentence."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # its own errors are RuntimeErrors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BlockfitError(
            "another process of this run ended or cannot be reached, so the run stops here; what "
            f"it says stands above or in its own output ({reason[:200]})"
        ) from error


@contextmanager
def _told_of_stops() -> Iterator[None]:
    """A launcher that ends the run because another process died makes the first one say so."""
    if launched()[0] != 0 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise BlockfitError(
            "the launcher ended this process: another process of the run died or was stopped"
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
