"""What a machine does in a second: as somebody says, or measured here in about one."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from pared import process
from pared.errors import UsageError
from pared.inverses import DenseInverse
from pared.solves import Consumer
from pared.tensorfile import DTYPE_NAMES, TensorInfo, chunks, read_tensor

if TYPE_CHECKING:
    from pared.footprint import Footprint

# Operations of a product that is timed, the most columns of an inverse that is, and bytes of what is touched, read, written.
_PRODUCT, _COLUMNS, _BYTES = 4e9, 1536, 32 << 20


@dataclass(frozen=True)
class Hardware:
    """By the second: flops, operations in what blocks run in; solve_flops, in float64; invert, of them those of factors and
    inverses; read and write, bytes of the source and of the result; touch, bytes that elementwise work reads and writes;
    check, bytes that are hashed and looked through.

    start: seconds before a run begins.
    """

    flops: float
    solve_flops: float
    read: float
    write: float
    said: str
    invert: float
    touch: float = inf
    check: float = inf
    start: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Hardware:
        """ "60e12,20e12,2e9,1e9": the first four numbers. UsageError for anything else."""
        try:
            flops, solves, read, write = (float(part) for part in text.split(","))
            if min(flops, solves, read, write) <= 0:
                raise ValueError
        except ValueError as error:
            raise UsageError(
                f"{text!r} does not describe hardware",
                where="--hardware",
                fix="FLOPS,FP64_FLOPS,READ,WRITE, by the second: --hardware 60e12,20e12,2e9,1e9",
            ) from error
        return cls(flops, solves, read, write, "as given", solves)

    @classmethod
    def here(
        cls, dtype: torch.dtype, stored: torch.dtype, shape: tuple[int, int, int], device: str = "cpu", start: float = 0.0
    ) -> Hardware:
        """This machine. dtype: what blocks run in; stored: of the weights on disk; shape: tokens that run together, hidden size,
        width of the largest matrix. Other work at the same time does not count, nor does waiting for the disk."""
        at = torch.device(device)
        with tempfile.TemporaryDirectory(prefix="pared-") as folder:
            read, write, check = _disk(Path(folder), dtype, stored)
        products, touch = _products(dtype, shape, at), _touch(dtype, shape, at)
        invert, solve = _inverse(shape[2], at), _products(torch.float64, (*shape[:2], shape[2] // 2), at)
        return cls(products, solve, read, write, "measured here", invert, touch, check, start)

    def seconds(self, need: Footprint, spill: int = 0) -> float:
        """What a run takes."""
        work = need.flops / self.flops + need.touched / self.touch
        work += need.solves / self.solve_flops + need.inverted / self.invert
        moved = need.read / self.read + need.source / self.check + (need.written + spill) / self.write
        return self.start + work + moved


def _seconds(work: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """The least of several runs; on a CPU, of the time in which this thread ran."""

    def now() -> float:
        return time.thread_time() if device.type == "cpu" else process.now(device)

    found = []
    for _ in range(times):
        began = now()
        work()
        found.append(now() - began)
    return max(min(found), 1e-9)


def _products(dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> float:
    """Operations a second of what a block's largest matrix is multiplied with."""
    tokens, hidden, width = shape
    width = max(64, min(width, int(_PRODUCT / (2 * tokens * hidden))))
    x, w = (torch.ones(n, hidden, dtype=dtype, device=device) for n in (tokens, width))
    return 2.0 * tokens * hidden * width / _seconds(lambda: F.linear(x, w), device)


def _inverse(width: int, device: torch.device) -> float:
    """Operations a second of the inverse that columns are eliminated from."""
    n = min(width, _COLUMNS)
    c = torch.eye(n, dtype=torch.float64, device=device)
    return Consumer(n, 100 * n).inverted / _seconds(lambda: DenseInverse(c.clone, 1.0), device, 2)


def _touch(dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> float:
    """Bytes a second of a gate: two reads and writes, and a product of two."""
    tokens, _, width = shape
    x = torch.ones(max(tokens, _BYTES // (width * dtype.itemsize)), width, dtype=dtype, device=device)
    return 5.0 * x.numel() * dtype.itemsize / _seconds(lambda: F.silu(x) * x, device)


def _disk(folder: Path, dtype: torch.dtype, stored: torch.dtype) -> tuple[float, float, float]:
    """Bytes a second that are read, written and looked through, by way of a file in a folder."""
    cpu, path, again = torch.device("cpu"), folder / "one", folder / "two"
    data = torch.ones(_BYTES // stored.itemsize, dtype=stored)
    raw = data.view(torch.uint8).numpy().data
    info = TensorInfo("one", path.name, DTYPE_NAMES[stored], tuple(data.shape), _BYTES)

    def write() -> None:
        """As a shard is made: by way of a spool, hashed."""
        path.write_bytes(raw)
        digest = hashlib.sha256()
        with again.open("wb") as stream:
            for chunk in chunks(path):
                stream.write(chunk)
                digest.update(chunk)

    def look() -> None:
        hashlib.sha256(raw).digest()
        torch.stack(data.aminmax()).isfinite()

    writing = _seconds(write, cpu, 2)
    reading = _seconds(lambda: read_tensor(path, info, dtype), cpu)
    return _BYTES / reading, 2 * _BYTES / writing, _BYTES / _seconds(look, cpu)
