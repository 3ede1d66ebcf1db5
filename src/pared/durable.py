"""Files that survive a crash: forced to the disk, locked against a second run, removed so that a half-removed one is known."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pared.errors import ResourceError, UsageError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = "pared-manifest/1"
# The errors of a disk without room.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What tells a directory that a dead run left behind from one that is somebody's own.
OURS = ".pared-"


def sync(stream: IO[bytes]) -> None:
    """Force what was written to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Force the names in a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: str) -> None:
    """Write a file in the place of the one of that name, durably: all of it or none."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content.encode())
            sync(stream)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def locked(path: Path) -> int:
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


def ours(path: Path) -> bool:
    """Whether a run wrote this directory: an empty one was left by a kill before the spool was made."""
    if path.is_symlink() or not path.is_dir():
        return False
    names = {p.name for p in path.iterdir()}
    return (
        not names
        or any(n.startswith(OURS) for n in names)
        or (MANIFEST in names and MANIFEST_FORMAT.encode() in (path / MANIFEST).read_bytes())
    )


def remove(path: Path) -> None:
    """Delete a directory; what `ours` knows it by last, so that a half-deleted one is still known."""
    if path.is_symlink():
        path.unlink()
        return
    if not path.exists():
        return
    for child in path.iterdir():
        if child.name.startswith(OURS) or child.name == MANIFEST:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
    shutil.rmtree(path)


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Tell a full or forbidden disk from a bug."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise ResourceError(
                f"the disk is full: {error.strerror}", where=path, fix="free some space, or choose an -o on another disk"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise UsageError(f"the output can not be written: {error.strerror}", where=path, fix="choose another -o") from error
        raise
