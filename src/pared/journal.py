"""The journal of a run: what it has done so far, durable step by step, so that the same command goes on where it was.

It lies in the output that is being made (OUT.partial). Every step is written to the disk before it is named as done, by
one rename; what a kill leaves half written is not looked at again. Several processes each write tensors of their own there;
the first one names a step as done when all have.
"""

from __future__ import annotations

import contextlib
import copy
import glob
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from pared.distributed import once, rank, together
from pared.distributed import size as size_of_all
from pared.durable import sync, sync_folder, write_whole
from pared.errors import Interrupted, UsageError
from pared.spill import Pool, States
from pared.tensorfile import DTYPE_NAMES, TensorInfo, make_header, read_header, read_tensor

FOLDER = ".pared-run"
# Names of the durable steps. PARED_FAULT=NAME[:N] kills the process at the N-th time that one is reached.
STEPS = (
    "claimed",
    "calibrated",
    "inputs of a block",
    "loss",
    "scores of a block",
    "scored",
    "iterated",
    "searched",
    "planned",
    "outside",
    "block",
    "files",
    "manifest",
    "renamed",
)
FAULT, REACHED, EVERY = "PARED_FAULT", "PARED_STEPS_REACHED", "PARED_EVERY_STEP"
# A step within a stage is made durable when it would cost at most this share of the time since the last one.
SHARE = 0.1
# What the record of a stage holds: how far it is, its tensors' file, its parts, what it was given, and by how many processes.
_STAGE = ("at", "tensors", "parts", "record", "processes")
# Fewer bytes than this take as long to write: the disk is mostly waited for.
FEW = 16 << 20

_counts: dict[str, int] = {}
_stop: list[int] = []  # the signal that asked to stop


def reached(step: str) -> None:
    """A durable step is done: the place where faults are injected, and where a run that was told to stop stops."""
    if step not in STEPS:
        raise ValueError(f"{step!r} is no durable step")
    _counts[step] = _counts.get(step, 0) + 1
    if (log := os.environ.get(REACHED)) and rank() == 0:
        with open(log, "a") as stream:
            stream.write(step + "\n")
    name, _, number = os.environ.get(FAULT, "").partition(":")
    if name == step and _counts[step] == int(number or 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if _stop and step != "renamed":
        raise Interrupted(_stop[0])


@contextlib.contextmanager
def stopping_at_steps() -> Iterator[None]:
    """SIGINT and SIGTERM end the run at the next durable step; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def asked(number: int, frame: FrameType | None) -> None:
        if _stop:
            raise Interrupted(number)
        _stop.append(number)
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write("finishing the step at hand, then stopping (once more: at once)\n")

    before = {s: signal.signal(s, asked) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _stop.clear()
        _counts.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


class Journal:
    """What one run has done. key: what it was asked, of which source, by which versions.

    reserve: bytes of the disk that checkpoints leave to what the run may still spill.
    """

    reserve = 0

    def __init__(self, folder: Path, key: Mapping[str, Any], *, restart: bool = False) -> None:
        """Open the journal in a claimed output, or begin one. UsageError where another run's is there: with the difference."""
        self.folder = folder / FOLDER
        self._prefix = ""
        self._saved = time.monotonic()
        self._cost, self._size = 0.0, 0
        key = json.loads(json.dumps(key))
        there = self.read("key")
        if there is not None and not restart and (odd := _differences(there, key)):
            more = f", and {len(odd) - 3} more" if len(odd) > 3 else ""
            raise UsageError(
                f"a run that was stopped lies here, and this one differs: {'; '.join(odd[:3])}{more}",
                where=folder,
                fix="run the command that began it, pass --restart to begin anew, or choose another -o",
            )
        self.resumed = there is not None and not restart
        if not self.resumed:
            self.clear()
            self.folder.mkdir(exist_ok=True)
            self.write("key", key)

    @classmethod
    def of_first(cls, folder: Path) -> Journal:
        """The journal that the first of several processes opened in an output, for another one, which writes no records."""
        other = object.__new__(cls)
        other.folder, other._prefix, other.resumed = folder / FOLDER, "", True
        other._saved, other._cost, other._size = time.monotonic(), 0.0, 0
        return other

    def clear(self) -> None:
        """Forget everything."""
        if self.folder.is_dir():
            key = self.folder / "key.json"
            key.unlink(missing_ok=True)  # first: without it the rest means nothing
            for path in self.folder.iterdir():
                path.unlink()

    def read(self, name: str) -> Any:
        """A record, None where there is none."""
        try:
            return json.loads(self._path(f"{name}.json").read_bytes())
        except FileNotFoundError:
            return None

    def write(self, name: str, record: Any) -> None:
        """Put a record in the place of the one of that name, durably: all of it or none."""
        write_whole(self._path(f"{name}.json"), json.dumps(record))

    def within(self, part: str) -> Journal:
        """The journal of one part of the run: records and tensors under names of its own."""
        other = copy.copy(self)
        other._prefix, other._saved, other._cost = f"{self._prefix}{part}.", time.monotonic(), 0.0
        return other

    def forget(self) -> None:
        """Remove everything of this part."""
        for path in sorted(self.folder.glob(f"{glob.escape(self._prefix)}*"), key=lambda p: p.suffix != ".json"):
            path.unlink()  # records first: without them the rest means nothing

    def forget_stages(self) -> None:
        """Remove all checkpoints of stages, in every part of the run; what else is noted stays."""
        for record in self.folder.glob("*.json"):
            found = json.loads(record.read_bytes())
            if isinstance(found, dict) and tuple(found) == _STAGE:
                record.unlink()
                for tensors in self.folder.glob(f"{glob.escape(record.stem)}-*.tensors"):
                    tensors.unlink()

    def write_tensors(self, name: str, tensors: Mapping[str, Sequence[Tensor]]) -> None:
        """Lists of tensors by name, durably, one tensor in memory at a time."""
        infos = _infos(tensors)
        path = self._path(f"{name}.tensors")
        with path.open("wb") as stream:
            stream.write(make_header(infos))
            for values in tensors.values():
                for t in values:
                    stream.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            sync(stream)
        sync_folder(self.folder)

    def read_tensors(self, name: str, pool: Pool | None = None, device: torch.device | str | None = None) -> dict[str, States]:
        """What `write_tensors` wrote, by name, in a pool. device: where it goes on being worked with."""
        path = self._path(f"{name}.tensors")
        pool = pool or Pool()
        out: dict[str, States] = {}
        for full, info in sorted(read_header(path, path.name).items()):
            out.setdefault(full.rpartition(".")[0], pool.store()).append(read_tensor(path, info).to(device))
        return out

    def checkpoint(
        self,
        stage: str,
        step: str,
        at: int,
        record: Any,
        tensors: Mapping[str, Sequence[Tensor]],
        *,
        parts: Mapping[str, Sequence[Tensor] | None] | None = None,
        last: bool = False,
    ) -> bool:
        """A stage has come so far. Made durable where the time since the last one warrants it; returns whether it was.

        All processes come here together; the record is that of the first.

        parts: what does not change any more and is written once, by name, for as long as it is among them. None: it was
        among them before, in this run or the one that it goes on from.
        """
        parts = parts or {}
        known = (self.read(stage) or {}).get("parts", []) if parts else []
        new = {name: values for name, values in parts.items() if name not in known and values is not None}
        if lost := [name for name, values in parts.items() if values is None and name not in known]:
            raise ValueError(f"the journal does not hold {', '.join(lost)} of {stage}")
        size = sum(t.nbytes for values in (tensors, *({n: v} for n, v in new.items())) for t in _infos(values))
        if not once(lambda: bool(last or _stop or os.environ.get(EVERY) or self._worth(size))):
            return False
        started = time.monotonic()
        before = self.read(stage)
        for part, values in new.items():
            self.write_tensors(_own(f"{stage}-{part}"), {part: values})
        name = f"{stage}-{at}"
        self.write_tensors(_own(name), tensors)
        together()
        if rank() == 0:
            what = record() if callable(record) else record
            self.write(stage, dict(zip(_STAGE, (at, name, [*parts], what, size_of_all()), strict=True)))
        together()
        gone = {before["tensors"], *(f"{stage}-{part}" for part in before["parts"])} if before is not None else set()
        for old in gone - {name, *(f"{stage}-{part}" for part in parts)}:
            self._path(f"{_own(old)}.tensors").unlink(missing_ok=True)
        self._saved = time.monotonic()
        self._cost, self._size = self._saved - started, size
        reached(step)
        return True

    def _worth(self, size: int) -> bool:
        """Whether the time since the last checkpoint is enough for one of so many bytes, and the disk has room for two."""
        room = shutil.disk_usage(self.folder).free - self.reserve
        cost = self._cost * max(FEW, size) / max(FEW, self._size)
        return (time.monotonic() - self._saved) * SHARE >= cost and 2 * size <= room

    def last(
        self, stage: str, pool: Pool | None = None, device: torch.device | str | None = None
    ) -> tuple[int, Any, dict[str, States]] | None:
        """How far a stage had come: what was given to its last durable checkpoint. None where it has not begun, or with
        another number of processes."""
        found = once(lambda: self.read(stage))
        if found is None or found["processes"] != size_of_all():
            return None
        return found["at"], found["record"], self.read_tensors(_own(found["tensors"]), pool, device)

    def part(self, stage: str, name: str, pool: Pool | None = None, device: torch.device | str | None = None) -> States:
        """One of the parts of a stage's last checkpoint."""
        return self.read_tensors(_own(f"{stage}-{name}"), pool, device)[name]

    def _path(self, name: str) -> Path:
        return self.folder / f"{self._prefix}{name}"


def _own(name: str) -> str:
    """What a file of tensors is called that each of several processes has one of."""
    return name if size_of_all() == 1 else f"{name}-of-{rank()}"


def _infos(tensors: Mapping[str, Sequence[Tensor]]) -> list[TensorInfo]:
    return [
        TensorInfo(f"{key}.{k:06d}", "", DTYPE_NAMES[t.dtype], tuple(t.shape), t.numel() * t.element_size())
        for key, values in tensors.items()
        for k, t in enumerate(shapes_of(values))
    ]


def shapes_of(values: Sequence[Tensor]) -> Iterable[Tensor]:
    """Tensors of the same shapes and dtypes, without their content where that waits on disk."""
    return values.like() if isinstance(values, States) else values


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [d for k in keys for d in _differences(before.get(k), now.get(k), f"{name}.{k}" if name else k)]
    return [] if before == now else [f"{name} was {before}, is {now}"]
