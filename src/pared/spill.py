"""Where tensors wait for their turn: on the device while it has room, in memory while that has, on disk beyond both.

What comes back is bit for bit what was put in. The disk part is one file without a name, so nothing is left of it
whatever ends the process.
"""

from __future__ import annotations

import bisect
import os
import tempfile
from collections.abc import Iterable, Iterator, MutableSequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from pared import process
from pared.durable import FULL
from pared.errors import ResourceError

# What is freed on the way lies between the tensors that stay, and is given back each time that so many bytes of them came.
TIDY = 16 << 20


class Pool:
    """Room for tensors. room: bytes that may stay in memory, device_room: on an accelerator; None: without limit.

    folder: where the rest goes; None where nothing may.
    """

    def __init__(self, room: int | None = None, folder: str | Path | None = None, device_room: int | None = None) -> None:
        self.room, self.device_room = room, device_room
        self.folder = None if folder is None else Path(folder)
        self.held = self.device_held = self.spilled = 0
        self.most_spilled = self.written = self.read = 0
        self._file = -1
        self._came = 0
        self._end = 0
        self._free: list[tuple[int, int]] = []  # (offset, bytes) of the file's gaps, ascending

    def store(self, tensors: Iterable[Tensor] = ()) -> States:
        """A sequence of tensors, each kept where there is room when it comes."""
        return States(self, tensors)

    def put(self, tensor: Tensor) -> _Kept:
        """Keep one tensor (detached). It may not be changed afterwards."""
        tensor = tensor.detach()
        nbytes = tensor.numel() * tensor.element_size()
        if tensor.device.type == "cpu":
            self._came += nbytes
            if self._came >= TIDY:
                self._came = 0
                process.return_freed_memory()
            if self.room is None or self.held + nbytes <= self.room:
                return _Kept(self, tensor, nbytes, "held")
            return self._to_disk(tensor, nbytes)
        if self.device_room is None or self.device_held + nbytes <= self.device_room:
            return _Kept(self, tensor, nbytes, "device_held")
        locked = 1 << max(0, nbytes - 1).bit_length()  # torch gives page-locked memory out in powers of two
        if self.room is None or self.held + locked <= self.room:
            # Page-locked, so that the way back overlaps with what the device is doing.
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor)
            return _Kept(self, host, locked, "held", device=tensor.device)
        return self._to_disk(tensor, nbytes)

    def _to_disk(self, tensor: Tensor, nbytes: int) -> _Kept:
        if self.folder is None:
            raise ResourceError(
                "hidden states need more memory than they may have, and there is nowhere to spill them to",
                where="--max-memory",
                fix="--spill DIR on a disk with room, or fewer --samples",
            )
        data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        offset = self._allocate(nbytes)
        try:
            done = 0
            while done < nbytes:
                done += os.pwrite(self._open(), data[done:], offset + done)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise ResourceError(
                f"the disk is full: {error.strerror}", where=self.folder, fix="free some space, or --spill to another disk"
            ) from error
        self.written += nbytes
        return _Kept(self, None, nbytes, "spilled", offset=offset, like=tensor)

    def _open(self) -> int:
        if self._file < 0:
            assert self.folder is not None
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".pared-spill-", dir=self.folder)
            os.unlink(name)
            self._file = handle
        return self._file

    def _allocate(self, nbytes: int) -> int:
        for k, (offset, size) in enumerate(self._free):
            if size >= nbytes:
                self._free[k : k + 1] = [(offset + nbytes, size - nbytes)] if size > nbytes else []
                return offset
        self._end += nbytes
        return self._end - nbytes

    def _release(self, offset: int, nbytes: int) -> None:
        k = bisect.bisect(self._free, (offset, nbytes))
        self._free.insert(k, (offset, nbytes))
        for j in (k, k - 1):  # join with the neighbours
            if 0 <= j < len(self._free) - 1 and sum(self._free[j]) == self._free[j + 1][0]:
                self._free[j : j + 2] = [(self._free[j][0], self._free[j][1] + self._free[j + 1][1])]

    def _load(self, kept: _Kept) -> Tensor:
        out = torch.empty(kept.shape, dtype=kept.dtype)
        view = out.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < kept.nbytes:
            got = os.preadv(self._file, [view[done:]], kept.offset + done)
            if not got:
                raise ResourceError("the spilled hidden states can not be read back", where=self.folder)
            done += got
        self.read += kept.nbytes
        return out

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


class _Kept:
    """One tensor in a pool; its place is given back when nothing refers to it any more."""

    __slots__ = ("device", "dtype", "kind", "nbytes", "offset", "pool", "shape", "tensor")

    def __init__(
        self,
        pool: Pool,
        tensor: Tensor | None,
        nbytes: int,
        kind: str,
        *,
        offset: int = -1,
        like: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        like = tensor if like is None else like
        assert like is not None
        self.pool, self.tensor, self.nbytes, self.kind, self.offset = pool, tensor, nbytes, kind, offset
        self.shape, self.dtype, self.device = like.shape, like.dtype, device or like.device
        setattr(pool, kind, getattr(pool, kind) + nbytes)
        pool.most_spilled = max(pool.most_spilled, pool.spilled)

    def get(self) -> Tensor:
        tensor = self.pool._load(self) if self.tensor is None else self.tensor
        return tensor if tensor.device == self.device else tensor.to(self.device, non_blocking=True)

    def __del__(self) -> None:
        setattr(self.pool, self.kind, getattr(self.pool, self.kind) - self.nbytes)
        if self.kind == "spilled":
            self.pool._release(self.offset, self.nbytes)


class States(MutableSequence[Tensor]):
    """Tensors in a pool, one for each batch. A slice shares them; `drain` gives each place back as it goes."""

    def __init__(self, pool: Pool, tensors: Iterable[Tensor] = ()) -> None:
        self.pool = pool
        self._kept: list[_Kept | None] = []
        self.extend(tensors)

    @overload
    def __getitem__(self, at: int) -> Tensor: ...
    @overload
    def __getitem__(self, at: slice) -> States: ...
    def __getitem__(self, at: int | slice) -> Tensor | States:
        if isinstance(at, slice):
            part = States(self.pool)
            part._kept = self._kept[at]
            return part
        kept = self._kept[at]
        if kept is None:
            raise LookupError("this tensor was given up")
        return kept.get()

    def __setitem__(self, at: Any, value: Any) -> None:
        self._kept[at] = None  # its place is free for the new one
        self._kept[at] = self.pool.put(value)

    def __delitem__(self, at: int | slice) -> None:
        del self._kept[at]

    def __len__(self) -> int:
        return len(self._kept)

    def insert(self, at: int, value: Tensor) -> None:
        self._kept.insert(at, self.pool.put(value))

    def __add__(self, other: States) -> States:
        both = self[:]
        both._kept += other._kept
        return both

    def like(self) -> Iterator[Tensor]:
        """Tensors of the same shapes and dtypes that hold nothing (on the meta device)."""
        for kept in self._kept:
            if kept is not None:
                yield torch.empty(kept.shape, dtype=kept.dtype, device="meta")

    def free(self, at: int) -> None:
        """Give one place back; the tensor can not be had again."""
        self._kept[at] = None

    def drain(self) -> Iterator[Tensor]:
        """Each tensor in turn; its place is given back when the next one is asked for."""
        for at in range(len(self)):
            yield self[at]
            self.free(at)
