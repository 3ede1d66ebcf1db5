"""The safetensors format: reading headers with every claim checked against the file, and making them.

Weights are read with plain file reads: a mapped file would count against the resident memory of whoever streams it.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pared.errors import ModelError

CHUNK = 8 * 2**20
# The safetensors library refuses longer headers.
_MAX_HEADER = 100_000_000
_DAMAGED = "the file is damaged or was not fully downloaded: fetch it again"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: where it lies and what it is."""

    name: str
    file: str
    """Relative to the checkpoint's directory."""
    dtype: str
    """As safetensors calls it: "BF16"."""
    shape: tuple[int, ...]
    nbytes: int
    offset: int = 0
    """Of the first byte, from the start of the file."""


def read_header(path: Path, file: str) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, called `file` in them. ModelError if the header and the file do not agree."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise ModelError("a truncated shard: it is shorter than a header", where=path, fix=_DAMAGED)
        (length,) = struct.unpack("<Q", start)
        if length > _MAX_HEADER:
            raise ModelError(f"a malformed header: it claims {length} bytes", where=path, fix=_DAMAGED)
        if 8 + length > size:
            raise ModelError(f"a truncated shard: the header has {length} bytes, the file {size}", where=path, fix=_DAMAGED)
        raw = stream.read(length)
    entries = _parse(raw, path)
    tensors = [_entry(name, value, path, file, 8 + length) for name, value in entries.items()]
    end = 8 + length
    for info in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if info.offset != end:
            raise ModelError(f"a malformed header: the data of {info.name} overlaps or leaves a hole", where=path, fix=_DAMAGED)
        end += info.nbytes
    if end > size:
        raise ModelError(f"a truncated shard: {size} bytes where its header says {end}", where=path, fix=_DAMAGED)
    if end < size:
        raise ModelError(f"a malformed shard: {size} bytes where its header says {end}", where=path, fix=_DAMAGED)
    return {info.name: info for info in tensors}


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates) if raw[:1] == b"{" else None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"a malformed header: {error}", where=path, fix=_DAMAGED) from error
    if not isinstance(header, dict):
        raise ModelError("a malformed header: this is not a safetensors file", where=path, fix=_DAMAGED)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ModelError("a malformed header: __metadata__ must map strings to strings", where=path, fix=_DAMAGED)
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        raise ValueError("a name stands in it twice")
    return seen


def _entry(name: str, value: Any, path: Path, file: str, base: int) -> TensorInfo:
    def count(x: Any) -> bool:
        return type(x) is int and x >= 0

    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (
        isinstance(dtype, str)
        and isinstance(shape, list)
        and all(count(n) for n in shape)
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(count(n) for n in offsets)
    ):
        raise ModelError(f"a malformed header: the entry of {name} is not valid", where=path, fix=_DAMAGED)
    if dtype not in DTYPES:
        raise ModelError(
            f"{name} has dtype {dtype}, which is not read", where=path, fix="use a checkpoint in bf16, fp16 or fp32"
        )
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise ModelError(f"a malformed header: {name} of shape {shape} does not fit its offsets", where=path, fix=_DAMAGED)
    return TensorInfo(name, file, dtype, tuple(shape), nbytes, base + offsets[0])


def read_tensor(
    path: Path,
    info: TensorInfo,
    dtype: torch.dtype | None = None,
    see: Callable[[memoryview, Tensor], None] | None = None,
) -> Tensor:
    """A private copy of one tensor, as `dtype` where it holds numbers of floating point.

    Read a slice at a time, so that the file's own form and the other are never both whole. see: is shown each slice, as
    bytes and as a flat tensor of the file's dtype.
    """
    own = DTYPES[info.dtype]
    convert = dtype is not None and own.is_floating_point and dtype != own
    out = torch.empty(info.shape, dtype=dtype if convert else own)
    flat = out.reshape(-1)
    per = CHUNK // own.itemsize
    buffer = torch.empty(min(per, flat.numel()) if convert else 0, dtype=own)
    with path.open("rb", buffering=0) as stream:
        stream.seek(info.offset)
        for at in range(0, flat.numel(), per):
            part = flat[at : at + per]
            raw = buffer[: len(part)] if convert else part
            view = raw.view(torch.uint8).numpy().data
            done = 0
            while done < len(view):
                got = stream.readinto(view[done:])
                if not got:
                    raise ModelError(f"{info.name} can not be read: the file ends early", where=path, fix=_DAMAGED)
                done += got
            if see is not None:
                see(view, raw)
            if convert:
                part.copy_(raw)
    return out


def non_finite(path: Path, info: TensorInfo) -> str | None:
    """ "NaN" or "Inf" if a tensor holds such a value, read in chunks."""
    dtype = DTYPES[info.dtype]
    if not (dtype.is_floating_point or dtype.is_complex):
        return None
    for chunk in chunks(path, info.offset, info.nbytes):
        values = torch.frombuffer(bytearray(chunk), dtype=dtype)
        values = values.float() if dtype.itemsize == 1 else values
        if not bool(torch.isfinite(values).all()):
            return "NaN" if bool(torch.isnan(values).any()) else "Inf"
    return None


def chunks(path: Path, offset: int = 0, nbytes: int | None = None) -> Iterator[bytes]:
    """The bytes of a part of a file (all of it by default), CHUNK at a time."""
    left = path.stat().st_size - offset if nbytes is None else nbytes
    with path.open("rb") as stream:
        stream.seek(offset)
        while left > 0:
            chunk = stream.read(min(CHUNK, left))
            if not chunk:
                raise ModelError("the file ends early", where=path, fix=_DAMAGED)
            left -= len(chunk)
            yield chunk


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def make_header(tensors: Sequence[TensorInfo]) -> bytes:
    """Length and header of a file that holds these tensors one behind the other, in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
