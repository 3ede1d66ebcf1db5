"""Several processes on one job (torchrun): the calibration is split by rows, sums over it are summed over the processes,
what follows from them is decided once. In a single process all of this does nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pared.errors import ParedError, UsageError

T = TypeVar("T")
# The others wait while the first one decides and writes, which may take longer than the minutes that are the default. One
# that dies is not waited for: torchrun then ends them all.
WAIT = datetime.timedelta(days=1)


def size() -> int:
    """How many processes work on this."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; the first one decides and writes."""
    return dist.get_rank() if size() > 1 else 0


@contextlib.contextmanager
def joined(device: str | None = None) -> Iterator[None]:
    """Join the processes that torchrun started, where it did. device: where they compute, which is how they talk."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or size() > 1:
        yield
        return
    on_gpu = str(device or "cpu").startswith("cuda")
    if on_gpu:
        own, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if device != "cuda":
            raise UsageError("each process has a device of its own", where=f"--device {device}", fix="--device cuda")
        if own >= here:
            raise UsageError(
                f"there are {here} devices here, and more processes", where="torchrun", fix=f"--nproc-per-node {here}"
            )
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def total(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the processes, in place."""
    if size() == 1:
        return
    for tensor in tensors:
        if dist.get_backend() == "nccl" and tensor.device.type == "cpu":
            moved = tensor.cuda()
            dist.all_reduce(moved)
            tensor.copy_(moved)
        else:
            dist.all_reduce(tensor)


def total_of(value: float) -> float:
    """The sum of a number over the processes."""
    if size() == 1:
        return value
    box = torch.tensor([value], dtype=torch.float64)
    total(box)
    return float(box)


def together() -> None:
    """Wait until all processes are here."""
    total_of(0.0)


def total_by_name(found: dict[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """The same for named tensors that some processes may lack: those are zero there. like: all names, with shapes."""
    if size() == 1:
        return
    here = torch.tensor([float(n in found) for n in like])
    total(here)
    for name, count in zip(like, here.tolist(), strict=True):
        if count:
            mine = found.setdefault(name, torch.zeros_like(like[name], dtype=torch.float32))
            total(mine)


def once(make: Callable[[], T]) -> T:
    """What the first process makes of it, in all of them; an error that a user can act on is raised in all as well."""
    if size() == 1:
        return make()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = make()
        except ParedError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def own_rows(rows: Sequence[T]) -> Sequence[T]:
    """This process's part of some rows, in their order; all of them where there are fewer than processes.

    Statistics are ratios of sums, so rows that every process has count as they would once.
    """
    n = len(rows)
    return rows if n < size() else rows[first_row(n) : first_row(n, rank() + 1)]


def first_row(rows: int, of: int | None = None) -> int:
    """The number of this process's first row among so many; of: of another process's."""
    return 0 if rows < size() else rows * (rank() if of is None else of) // size()


@dataclass(frozen=True)
class Share:
    """Which of some batches' rows a process has. rows: the number of each among those of all processes.

    parts: the number of each batch of which it has rows, in their order, and how much of that batch they are: 1 over all
    processes. batches: how many there are.
    """

    rows: Sequence[int]
    parts: Mapping[int, float]
    batches: int


def own_parts(rows: Sequence[int]) -> tuple[dict[int, slice], Share]:
    """This process's rows of each batch that it has some of, where all work on the same batch together. rows: of each batch.

    Where a process would have none of any, each has all of them, and they count for so many times less.
    """
    n = size()

    def parts(of: int) -> dict[int, slice]:
        found = {}
        for b, count in enumerate(rows):
            at = (of + b) % n  # batches of fewer rows than processes come to each in turn
            found[b] = slice(count * at // n, count * (at + 1) // n)
        return {b: s for b, s in found.items() if s.stop > s.start}

    every = [parts(r) for r in range(n)]
    mine, share = (every[rank()], 1.0) if all(every) else ({b: slice(0, k) for b, k in enumerate(rows)}, 1 / n)
    first = [sum(rows[:b]) for b in range(len(rows))]
    numbers = [first[b] + k for b, s in mine.items() for k in range(s.start, s.stop)]
    return mine, Share(numbers, {b: share * (s.stop - s.start) / rows[b] for b, s in mine.items()}, len(rows))
