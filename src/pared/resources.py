"""What a run may use, and what it makes of it: the batch, what stays in memory, what spills, whether it reads ahead."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pared.errors import ResourceError, UsageError
from pared.footprint import Footprint, parse_size, show_size
from pared.process import device_bytes, resident_bytes
from pared.recipe import Recipe
from pared.spill import Pool

# On a CPU more tokens at once are no faster, and what runs through a block is as large as they are many.
TOKENS = 1024
# Below this a block is read sooner than a thread is woken.
_WORTH_AHEAD = 16 << 20
# Operations of a thread for each byte that is read, above which reading is a twentieth of the work at most.
_BUSY = 1500


@dataclass(frozen=True)
class Limits:
    """What was asked for. memory, device_memory: bytes, None without a bound. spill: where hidden states go beyond them."""

    memory: int | None = None
    device_memory: int | None = None
    spill: Path | None = None

    @classmethod
    def parse(
        cls, max_memory: str | int | None = None, max_gpu_memory: str | int | None = None, spill: str | Path | None = None
    ) -> Limits:
        """From sizes as people write them. UsageError for what is no size, or where there is nothing to bound."""
        if spill is not None and max_memory is None and max_gpu_memory is None:
            raise UsageError("without a bound nothing spills", where="--spill", fix="--max-memory 4GiB, or leave it out")
        sizes: list[int | None] = []
        for flag, text in (("--max-memory", max_memory), ("--max-gpu-memory", max_gpu_memory)):
            try:
                sizes.append(None if text is None else parse_size(text))
            except UsageError as error:
                raise UsageError(error.what, where=flag, fix=error.fix) from error
        return cls(sizes[0], sizes[1], None if spill is None else Path(spill).expanduser())


@dataclass(frozen=True)
class Resources:
    """What a run works with. room, device_room: bytes of hidden states in memory and on the device; None: all of them.

    peak: the predicted peak of resident memory.
    """

    batch: int
    room: int | None = None
    device_room: int | None = None
    spill: Path | None = None
    ahead: bool = False
    peak: int = 0

    def pool(self) -> Pool:
        return Pool(self.room, self.spill, self.device_room)

    def smaller(self) -> Resources:
        """The same with half the batch."""
        return replace(self, batch=max(1, self.batch // 2))


def largest_batch(recipe: Recipe, samples: int, seq_len: int) -> int:
    """Sequences that may run together, but in steps of gradient descent, whose number is asked for."""
    batch = min(recipe.batch, samples)
    on_cpu = torch.device(recipe.device).type == "cpu"
    return min(batch, max(1, TOKENS // seq_len)) if on_cpu else batch


def choose(
    need: Footprint, limits: Limits, batch: int, *, device: str = "cpu", beside: Path | None = None, check: bool = True
) -> Resources:
    """The largest batch up to `batch`, and the most kept in memory, under which the run stays within the limits.

    beside: where to spill if nothing else was named. check: see whether the disk has room. Raises ResourceError, which says what the least would be, before
    anything is computed.
    """
    on_device = torch.device(device).type != "cpu"
    bound = limits.device_memory if on_device else limits.memory
    worth = on_device or need.flops + need.solves < _BUSY * torch.get_num_threads() * need.read
    block = max(s.block for s in need.stages) if worth else 0
    if bound is None:
        rooms: tuple[int | None, int | None] = (limits.memory and limits.memory - need.base, None)
        where = limits.spill or beside if limits.memory is not None else None
        return Resources(batch, rooms[0], rooms[1], where, block >= _WORTH_AHEAD, need.peak(batch, None, ahead=block > 0))
    need = replace(need, base=device_bytes(device)) if on_device else need  # a live model may lie there
    least = need.peak(1, 0)
    if bound < least:
        raise ResourceError(
            f"this run needs at least {show_size(least)}: {show_size(need.worst.fixed + need.worst.row)} for the stage "
            f"{need.worst.name!r}, {show_size(need.base)} for the program",
            where=f"--max-{'gpu-' if on_device else ''}memory {show_size(bound)}",
            fix="a larger bound, a shorter --seq-len, --reconstruct 0, --dtype bfloat16, or --criterion l2 --compensate none",
        )
    while batch > 1 and need.room(bound, batch) < 0:
        batch //= 2
    room = need.room(bound, batch)
    most = max(s.states for s in need.stages)
    ahead = block >= _WORTH_AHEAD and need.room(bound, batch, ahead=True) >= min(most, need.room(bound, batch) // 2)
    room = need.room(bound, batch, ahead=ahead)
    where = limits.spill or beside or Path(tempfile.gettempdir())
    spilled = need.spill(room)
    if spilled and check and not on_device:
        check_disk(
            where, spilled, "hidden states that spill", "--spill DIR on another disk, fewer --samples, or a larger bound"
        )
    host = limits.memory and limits.memory - need.base - (256 << 20)
    pool = (host, room) if on_device else (room, None)
    return Resources(batch, pool[0], pool[1], where, ahead, need.peak(batch, room, ahead=ahead))


def check_disk(folder: Path, nbytes: int, what: str, fix: str) -> None:
    """ResourceError where a disk has less free space than will be needed."""
    existing = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise ResourceError(f"{what} need {show_size(nbytes)}, and {show_size(free)} are free", where=folder, fix=fix)


def used(need: Footprint, resources: Resources, pools: Sequence[Pool], source_read: int) -> dict[str, Any]:
    """What was predicted and what it came to, for the report: bytes."""
    return {
        "batch": resources.batch,
        "predicted_peak": resources.peak,
        "peak": resident_bytes("VmHWM"),
        "predicted_spill": need.spill(resources.room),
        "spilled": max((p.most_spilled for p in pools), default=0),
        "predicted_read": need.read,
        "source_read": source_read,
        "predicted_written": need.written,
    }
