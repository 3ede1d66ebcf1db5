"""Writing a checkpoint so that a kill at any moment leaves either no OUT or a complete one.

Everything goes to OUT.partial, is hashed and fsynced there, and becomes OUT by one rename. Weights pass through a spool
file, never through memory: a shard is as large as the disk allows, the resident set is one tensor.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from pared.checkpoint import INDEX, SINGLE, TEMPLATES, place_of
from pared.errors import ModelError, ResourceError, UsageError
from pared.tensorfile import DTYPE_NAMES, TensorInfo, chunks, make_header

MANIFEST = "manifest.json"
ADAPTER = "adapter_model.safetensors"
MANIFEST_FORMAT = "pared-manifest/1"
# Also what tells a directory that a dead run left behind from one that is somebody's own.
_SPOOL = ".pared-spool"


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
    ) -> None:
        """Claim `out`. UsageError if it may not be written; nothing is touched then.

        source: the directory that is being read; `out` may not be in it, nor it in `out`.
        max_shard_bytes: of tensor data. A larger tensor gets a shard of its own.
        adapter: what is written is an adapter in PEFT's format: one file of weights, by its name.
        """
        # Not resolved: an OUT that is a link is replaced as a link, what it points to is left alone.
        self.out = Path(os.path.abspath(Path(out).expanduser()))
        self.partial = self.out.with_name(self.out.name + ".partial") if self.out.name else self.out
        self._aside = self.out.with_name(self.out.name + ".pared-old") if self.out.name else self.out
        self._overwrite, self._max = overwrite, sys.maxsize if adapter else max_shard_bytes
        self._single = ADAPTER if adapter else SINGLE
        self._names: set[str] = set()
        self._files: dict[str, dict[str, str | int]] = {}
        self._pending: list[TensorInfo] = []
        self._shards: list[list[TensorInfo]] = []
        self._made: list[Path] = []
        self._lock = -1
        self._claimed = self._committed = False
        if not self.out.name:
            raise UsageError("the output must be a directory of its own", where=self.out, fix="choose another -o")
        if source is not None:
            self._check_source(Path(source))
        try:
            with _disk(self.partial):
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
        with _disk(self.partial):
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
        if self._pending:
            self._flush()
        if not self._shards:
            raise ModelError("no tensors were written", where=self.out)
        with _disk(self.partial):
            self._name_shards()
            manifest = {"format": MANIFEST_FORMAT, "files": dict(sorted(self._files.items()))}
            with (self.partial / MANIFEST).open("xb") as stream:
                stream.write(_json_bytes(manifest))
                _sync(stream)
            for folder in {self.partial, *((self.partial / name).parent for name in self._files)}:
                _sync_folder(folder)
            self._spool.close()
            (self.partial / _SPOOL).unlink()
            _sync_folder(self.partial)
            self._check_out()
            self._rename()
        self._committed, self._claimed = True, False
        self._release()
        return self.out

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._committed:
            self.abort()

    def abort(self) -> None:
        """Remove everything that was written; OUT stays what it was."""
        if self._claimed:
            with contextlib.suppress(OSError):
                # Closing writes what is still buffered, which fails where the disk is full.
                self._spool.close()
            _remove(self.partial)
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
            _remove(self._aside)
        else:
            self._aside.rename(self.out)

    def _claim(self) -> None:
        parent = self.out.parent
        missing = [p for p in [parent, *parent.parents] if not p.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)
        if self.partial.exists() or self.partial.is_symlink():
            self._take_over()
        self.partial.mkdir()
        self._lock = _locked(self.partial)
        self._spool: BinaryIO = (self.partial / _SPOOL).open("w+b")
        self._claimed = True

    def _take_over(self) -> None:
        """Remove what a dead run left, after seeing that it is dead and that it was a run."""
        if not _ours(self.partial):
            what = "this is in the way and was not written by pared"
            raise UsageError(what, where=self.partial, fix="move it, or choose another -o")
        lock = _locked(self.partial)
        try:
            _remove(self.partial)
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
        with _disk(self.partial):
            (self.partial / folder).mkdir(exist_ok=True)
            with (self.partial / name).open("xb") as stream:
                for chunk in content:
                    stream.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                _sync(stream)
        self._files[name] = {"sha256": digest.hexdigest(), "bytes": size}

    def _flush(self) -> None:
        """Turn the spool into a shard. Larger dtypes go first, which keeps every tensor aligned; then by name."""
        order = sorted(self._pending, key=lambda t: (-_itemsize(t), t.name))
        self._shards.append(order)
        name = _temporary(len(self._shards))
        digest = hashlib.sha256()
        with _disk(self.partial):
            self._spool.flush()
            with (self.partial / name).open("xb") as stream:
                header = make_header(order)
                stream.write(header)
                digest.update(header)
                for t in order:
                    for chunk in chunks(self.partial / _SPOOL, t.offset, t.nbytes):
                        stream.write(chunk)
                        digest.update(chunk)
                _sync(stream)
            self._spool.seek(0)
            self._spool.truncate()
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
            _sync(stream)
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
        _sync_folder(self.out.parent)
        if replaced:
            _remove(self._aside)


def _temporary(number: int) -> str:
    return f".shard-{number:05d}"


def _itemsize(info: TensorInfo) -> int:
    return {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}[info.dtype]


def _json_bytes(data: object) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _locked(path: Path) -> int:
    """Hold a directory for as long as this process lives. -1 where the file system has no locks."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UsageError("another run is writing this output", where=path, fix="wait for it, or choose another -o") from error
    except OSError:
        os.close(handle)
        return -1
    return handle


def _ours(path: Path) -> bool:
    """Whether a run wrote this directory: an empty one was left by a kill before the spool was made."""
    if path.is_symlink() or not path.is_dir():
        return False
    names = {p.name for p in path.iterdir()}
    return not names or _SPOOL in names or (MANIFEST in names and MANIFEST_FORMAT.encode() in (path / MANIFEST).read_bytes())


def _remove(path: Path) -> None:
    """Delete a directory; what `_ours` knows it by last, so that a half-deleted one is still known."""
    if path.is_symlink():
        path.unlink()
        return
    if not path.exists():
        return
    for child in path.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name not in (_SPOOL, MANIFEST):
            child.unlink()
    shutil.rmtree(path)


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Tell a full or forbidden disk from a bug."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"the disk is full: {error.strerror}", where=path, fix="free some space, or choose an -o on another disk"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise UsageError(f"the output can not be written: {error.strerror}", where=path, fix="choose another -o") from error
        raise
