"""Writing a checkpoint so that a kill at any moment leaves either no OUT or a complete one.

Everything goes to OUT.partial, is hashed and fsynced there, and becomes OUT by one rename. Weights pass through a spool
file, never through memory: a shard is as large as the disk allows, the resident set is one tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from pared.checkpoint import INDEX, SINGLE, TEMPLATES, place_of
from pared.durable import MANIFEST, MANIFEST_FORMAT, disk, locked, ours, remove, sync, sync_folder
from pared.errors import Interrupted, ModelError, ResourceError, UsageError
from pared.journal import FOLDER, reached
from pared.tensorfile import DTYPE_NAMES, TensorInfo, chunks, make_header

ADAPTER = "adapter_model.safetensors"
_SPOOL = ".pared-spool"
_RESUMABLE = (ResourceError, Interrupted, KeyboardInterrupt, SystemExit, MemoryError)


class CheckpointWriter:
    """Writes one checkpoint. Use it in a `with`: leaving it without `commit` removes what was written."""

    def __init__(
        self,
        out: str | Path,
        *,
        overwrite: bool = False,
        source: Path | None = None,
        max_shard_bytes: int = 4 * 2**30,
        adapter: bool = False,
        resumable: bool = False,
    ) -> None:
        """Claim `out`. UsageError if it may not be written; nothing is touched then.

        resumable: what an earlier run with a journal left is kept, for `restore` or `begin_anew`, and what this one has
        written is kept where it ends for want of memory or disk, or is told to stop.
        source: the directory that is being read; `out` may not be in it, nor it in `out`.
        max_shard_bytes: of tensor data. A larger tensor gets a shard of its own.
        adapter: what is written is an adapter in PEFT's format: one file of weights, by its name.
        """
        # Not resolved: an OUT that is a link is replaced as a link, what it points to is left alone.
        self.out = Path(os.path.abspath(Path(out).expanduser()))
        self.partial = self.out.with_name(self.out.name + ".partial") if self.out.name else self.out
        self._aside = self.out.with_name(self.out.name + ".pared-old") if self.out.name else self.out
        self._overwrite, self._max = overwrite, sys.maxsize if adapter else max_shard_bytes
        self._single, self._resumable = ADAPTER if adapter else SINGLE, resumable
        self._names: set[str] = set()
        self._files: dict[str, dict[str, str | int]] = {}
        self._pending: list[TensorInfo] = []
        self._shards: list[list[TensorInfo]] = []
        self._made: list[Path] = []
        self._lock = -1
        self._spool: BinaryIO = io.BytesIO()
        self._spool_path = self.partial
        self._claimed = self._committed = self._waiting = False
        if not self.out.name:
            raise UsageError("the output must be a directory of its own", where=self.out, fix="choose another -o")
        if source is not None:
            self._check_source(Path(source))
        try:
            with disk(self.partial):
                self._claim()
                self._finish_replacement()
                self._check_out()
        except BaseException:
            self.abort()
            raise

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor. It may be changed or freed afterwards."""
        if name in self._names:
            raise ModelError(f"the tensor {name} was written twice", where=self.out)
        if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_meta:
            raise ModelError(f"the tensor {name} can not be written: {tensor.dtype} on {tensor.device}", where=self.out)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if self._pending and sum(t.nbytes for t in self._pending) + data.numel() > self._max:
            self._flush()
        with disk(self.partial):
            offset = self._spool.tell()
            self._spool.write(data.numpy().data)
        self._names.add(name)
        self._pending.append(TensorInfo(name, "", DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), data.numel(), offset))

    def add_file(self, name: str, content: bytes | str) -> None:
        """Write a small file beside the weights."""
        data = content.encode() if isinstance(content, str) else content
        self._write(name, iter([data]))

    def copy_file(self, path: Path) -> None:
        """Carry a file over under its own name."""
        self._write(place_of(path), chunks(path))

    def commit(self) -> Path:
        """Make what was written the checkpoint OUT. Returns its path."""
        self.flush()
        if not self._shards:
            raise ModelError("no tensors were written", where=self.out)
        with disk(self.partial):
            self._name_shards()
            manifest = {"format": MANIFEST_FORMAT, "files": dict(sorted(self._files.items()))}
            with (self.partial / MANIFEST).open("xb") as stream:
                stream.write(_json_bytes(manifest))
                sync(stream)
            for folder in {self.partial, *((self.partial / name).parent for name in self._files)}:
                sync_folder(folder)
            self._spool.close()
            for spool in self.partial.glob(_SPOOL + "*"):
                spool.unlink()
            sync_folder(self.partial)
            reached("manifest")
            self._check_out()
            self._rename()
            reached("renamed")
            remove(self.out / FOLDER)
        self._committed, self._claimed = True, False
        self._release()
        return self.out

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._committed:
            if self._waiting or (self._resumable and kind is not None and issubclass(kind, _RESUMABLE)):
                self._leave()
            else:
                self.abort()

    def state(self) -> dict[str, Any]:
        """What has been written so far, made durable: `restore` goes on from there."""
        with disk(self.partial):
            sync(self._spool)
        return {
            "spool": self._spool_path.name,
            "pending": [list(dataclasses.astuple(t)) for t in self._pending],
            "shards": [[list(dataclasses.astuple(t)) for t in shard] for shard in self._shards],
            "files": self._files,
        }

    def forget_spools(self) -> None:
        """Remove what the shards were made from, once their state is recorded."""
        for path in self.partial.glob(_SPOOL + "*"):
            if path != self._spool_path:
                path.unlink()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of an earlier run; what it wrote after that is removed."""

        def info(fields: list[Any]) -> TensorInfo:
            name, file, dtype, shape, nbytes, offset = fields
            return TensorInfo(name, file, dtype, tuple(shape), nbytes, offset)

        self._waiting = False
        self._pending = [info(t) for t in state["pending"]]
        self._shards = [[info(t) for t in shard] for shard in state["shards"]]
        self._files = dict(state["files"])
        self._names = {t.name for shard in [*self._shards, self._pending] for t in shard}
        self._unname_shards()
        self._wipe({state["spool"], FOLDER, *self._files})
        self._spool_path = self.partial / state["spool"]
        with disk(self.partial):
            self._spool_path.touch()
            self._spool = self._spool_path.open("r+b")
            self._spool.truncate(sum(t.nbytes for t in self._pending))
            self._spool.seek(0, os.SEEK_END)

    def begin_anew(self) -> None:
        """Remove what was written here so far, by an earlier run or by this one, but for the journal."""
        self._waiting = False
        self._names, self._files, self._pending, self._shards = set(), {}, [], []
        self._spool.close()
        self._wipe({FOLDER})
        self._new_spool()

    def flush(self) -> None:
        """Turn what has been added into a shard, whatever its size."""
        if self._pending:
            self._flush()

    def _unname_shards(self) -> None:
        # The run may have been stopped after they had their final names.
        for path in self.partial.glob("model*.safetensors"):
            number = 1 if path.name == SINGLE else int(path.name.split("-")[1])
            path.rename(self.partial / _temporary(number))

    def _wipe(self, keep: set[str]) -> None:
        for path in self.partial.rglob("*"):
            name = str(path.relative_to(self.partial))
            if path.is_file() and name.split("/")[0] not in keep and name not in keep:
                path.unlink()

    def _new_spool(self) -> None:
        self._spool_path = self.partial / f"{_SPOOL}-{len(self._shards) + 1:05d}"
        self._spool = self._spool_path.open("w+b")

    def _leave(self) -> None:
        with contextlib.suppress(OSError):
            self._spool.close()
        self._claimed = False
        self._release()

    def abort(self) -> None:
        """Remove everything that was written; OUT stays what it was."""
        if self._claimed:
            with contextlib.suppress(OSError):
                # Closing writes what is still buffered, which fails where the disk is full.
                self._spool.close()
            remove(self.partial)
            self._claimed = False
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._release()

    # -- claiming OUT --------------------------------------------------------------------------------------------

    def _check_source(self, source: Path) -> None:
        real = source.resolve()
        for path in (self.out, self.partial, self._aside):
            target = path.resolve()
            if target == real or real in target.parents or target in real.parents:
                how = "lies in" if real in target.parents else "is" if target == real else "holds"
                what = f"the output {how} the source, which is never written to"
                raise UsageError(what, where=f"{path} and {source}", fix="choose another -o")

    def _check_out(self) -> None:
        if not (self.out.exists() or self.out.is_symlink()):
            return
        if (self.out / FOLDER).is_dir() and not self.out.is_symlink():
            remove(self.out / FOLDER)  # killed right after it was complete
        if not self._overwrite:
            raise UsageError("the output exists", where=self.out, fix="choose another -o, or pass --overwrite to replace it")
        if not self.out.is_dir():
            raise UsageError("the output exists and is not a directory", where=self.out, fix="choose another -o")
        # --overwrite deletes what was there: not a home directory for a slip of the fingers.
        if any(self.out.iterdir()) and not any((self.out / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
            raise UsageError("the output exists and is not a checkpoint", where=self.out, fix="choose another -o, or remove it")

    def _finish_replacement(self) -> None:
        """After a kill between the two renames of a replacement, put the old checkpoint back."""
        if not (self._aside.exists() or self._aside.is_symlink()):
            return
        if self.out.exists():
            remove(self._aside)
        else:
            self._aside.rename(self.out)

    def _claim(self) -> None:
        parent = self.out.parent
        missing = [p for p in [parent, *parent.parents] if not p.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)
        if self._resumable and not self.partial.is_symlink() and (self.partial / FOLDER / "key.json").exists():
            self._lock = locked(self.partial)
            self._waiting = True  # to be told whether to go on or to begin anew
        else:
            if self.partial.exists() or self.partial.is_symlink():
                self._take_over()
            self.partial.mkdir()
            self._lock = locked(self.partial)
            self._new_spool()
        self._claimed = True

    def _take_over(self) -> None:
        """Remove what a dead run left, after seeing that it is dead and that it was a run."""
        if not ours(self.partial):
            what = "this is in the way and was not written by pared"
            raise UsageError(what, where=self.partial, fix="move it, or choose another -o")
        lock = locked(self.partial)
        try:
            remove(self.partial)
        finally:
            if lock >= 0:
                os.close(lock)

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # -- files ---------------------------------------------------------------------------------------------------

    def _write(self, name: str, content: Iterator[bytes]) -> None:
        folder, _, leaf = name.rpartition("/")
        if name.startswith("/") or folder not in ("", TEMPLATES) or leaf in ("", ".", "..") or leaf.startswith(".pared"):
            raise ModelError(f"{name!r} is not a name for a file of a checkpoint", where=self.out)
        if name in self._files or name in (MANIFEST, INDEX) or name.endswith(".safetensors"):
            raise ModelError(f"the file {name} was written twice", where=self.out)
        digest, size = hashlib.sha256(), 0
        with disk(self.partial):
            (self.partial / folder).mkdir(exist_ok=True)
            with (self.partial / name).open("xb") as stream:
                for chunk in content:
                    stream.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                sync(stream)
        self._files[name] = {"sha256": digest.hexdigest(), "bytes": size}

    def _flush(self) -> None:
        """Turn the spool into a shard. Larger dtypes go first, which keeps every tensor aligned; then by name."""
        order = sorted(self._pending, key=lambda t: (-_itemsize(t), t.name))
        self._shards.append(order)
        name = _temporary(len(self._shards))
        digest = hashlib.sha256()
        with disk(self.partial):
            self._spool.flush()
            with (self.partial / name).open("xb") as stream:
                header = make_header(order)
                stream.write(header)
                digest.update(header)
                for t in order:
                    for chunk in chunks(self._spool_path, t.offset, t.nbytes):
                        stream.write(chunk)
                        digest.update(chunk)
                sync(stream)
            self._spool.close()
            before = self._spool_path
            self._new_spool()
            if not self._resumable:  # else it goes once the journal knows of the shard
                before.unlink()
        size = len(header) + sum(t.nbytes for t in order)
        self._files[name] = {"sha256": digest.hexdigest(), "bytes": size}
        self._pending = []

    def _name_shards(self) -> None:
        count = len(self._shards)
        names = [self._single] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            (self.partial / _temporary(i + 1)).rename(self.partial / name)
            self._files[name] = self._files.pop(_temporary(i + 1))
        if count == 1:
            return
        tensors = [t for shard in self._shards for t in shard]
        index = {
            "metadata": {
                "total_parameters": sum(t.nbytes // _itemsize(t) for t in tensors),
                "total_size": sum(t.nbytes for t in tensors),
            },
            "weight_map": dict(sorted((t.name, names[i]) for i, shard in enumerate(self._shards) for t in shard)),
        }
        data = _json_bytes(index)
        with (self.partial / INDEX).open("xb") as stream:
            stream.write(data)
            sync(stream)
        self._files[INDEX] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}

    def _rename(self) -> None:
        replaced = self.out.exists() or self.out.is_symlink()
        if replaced:
            self.out.rename(self._aside)
        try:
            self.partial.rename(self.out)
        except OSError:
            if replaced:
                self._aside.rename(self.out)
            raise
        sync_folder(self.out.parent)
        if replaced:
            remove(self._aside)


def _temporary(number: int) -> str:
    return f".shard-{number:05d}"


def _itemsize(info: TensorInfo) -> int:
    return {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}[info.dtype]


def _json_bytes(data: object) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
