"""A GGUF file from a checkpoint, block by block: the memory needed is that of one block.

Written beside its name, read back, compared byte for byte with what was meant, and renamed only then.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pared import modeling
from pared.checkpoint import Checkpoint
from pared.durable import sync
from pared.errors import MissingError, ModelError, ResourceError, UsageError
from pared.export import kquants
from pared.export.architectures import Target, choose, outside
from pared.export.tokens import Tokens, read_tokens
from pared.modeling import Weights

# Name of a quantisation -> that of the type of its matrices. Without one, the checkpoint's own.
QUANTIZATIONS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_k_m": "Q4_K"}
_OWN = {torch.float32: "f32", torch.float64: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
# What llama.cpp calls the whole file.
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q4_k_m": 15, "bf16": 32}


@dataclass(frozen=True)
class Exported:
    """What was written. types: of the tensors, how many of each; narrow: matrices whose rows do not fill the type's blocks."""

    path: Path
    architecture: str
    quantization: str
    nbytes: int
    types: dict[str, int]
    narrow: list[str]
    notes: list[str]


def export_gguf(
    model: str | Path, out: str | Path | None = None, *, quantize: str | None = None, overwrite: bool = False
) -> Exported:
    """Write a checkpoint, uniform or per-layer, as a GGUF file for llama.cpp.

    out: by default a file beside the checkpoint, MODEL-f16.gguf and the like. quantize: one of QUANTIZATIONS; by default
    the checkpoint's own type. Matrices are quantised, vectors stay fp32; a matrix whose rows do not fill the blocks of the
    type (32 entries, 256 for K-quants) is kept wider and named in `narrow`. Raises ModelError with the reason for a model
    that llama.cpp can not hold, MissingError without the packages, UsageError for an unknown quantisation or a file that
    is there.
    """
    gguf = require_gguf()
    checkpoint = Checkpoint.open(model)
    name = quantize or _OWN[modeling.checkpoint_dtype(checkpoint)]
    if name not in QUANTIZATIONS:
        raise UsageError(f"unknown quantisation {name!r}", where="--quantize", fix=f"one of {', '.join(QUANTIZATIONS)}")
    path = Path(out) if out is not None else checkpoint.path.parent / f"{checkpoint.path.name}-{name}.gguf"
    if path.exists() and (path.is_dir() or not overwrite):
        raise UsageError("there is something at the place of the result", where=path, fix="give another --out, or --overwrite")
    if not path.parent.is_dir():
        raise UsageError("the folder for the result does not exist", where=path.parent, fix="make it")
    library = kquants.require() if name == "q4_k_m" else None
    config, per_layer = modeling.make_config(checkpoint.config)
    skeleton = modeling.skeleton(config, per_layer, dtype=modeling.checkpoint_dtype(checkpoint))
    target = choose(config, per_layer, skeleton)
    tokens = read_tokens(checkpoint.path, config, int(config.vocab_size), _ends(checkpoint.path))
    # K-quants are made by llama.cpp, from a file without loss.
    stage = name if library is None else _OWN[modeling.checkpoint_dtype(checkpoint)]
    partial, whole = path.with_name(path.name + ".partial"), path.with_name(path.name + ".whole.partial")
    try:
        first = whole if library is not None else partial
        writer = _Writer(gguf, first, target, tokens, checkpoint.path.name, stage)
        for tensor_name, tensor in _tensors(Weights(checkpoint, skeleton), target, meta=True):
            writer.announce(tensor_name, tensor)
        writer.begin()
        for tensor_name, tensor in _tensors(Weights(checkpoint, skeleton), target, meta=False):
            writer.write(tensor_name, tensor)
        writer.end()
        _read_back(gguf, first, writer)
        if library is not None:
            kquants.quantize(library, whole, partial, _FILE_TYPES[name])
        types = _types(gguf, partial)
        with open(partial, "rb+") as stream:
            sync(stream)
        partial.replace(path)
    except OSError as error:
        raise ResourceError(
            f"the file can not be written: {error.strerror}", where=path, fix="free space, or another --out"
        ) from error
    finally:
        for leftover in (partial, whole):
            with contextlib.suppress(FileNotFoundError):
                leftover.unlink()
    wanted = QUANTIZATIONS[name]
    narrow = [n for n, t in types.items() if t in _WIDER.get(wanted, ())] if wanted in _WIDER else []
    counts = dict(sorted(Counter(types.values()).items()))
    return Exported(path, target.arch, name, path.stat().st_size, counts, narrow, tokens.notes)


# What a matrix is written as whose rows do not fill the blocks of a type.
_WIDER = {"Q8_0": ("F16",), "Q4_0": ("F16",), "Q4_K": ("Q5_0", "Q5_1", "Q8_0", "F16")}


def require_gguf() -> Any:
    """The package gguf. MissingError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        fix = "pip install 'pared[gguf]'"
        raise MissingError("GGUF files are written with the package gguf, which is not installed", fix=fix) from error
    return gguf


def _ends(path: Path) -> list[int]:
    """All tokens that end a text, as the generation config says."""
    file = path / "generation_config.json"
    ends = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    return [ends] if isinstance(ends, int) else list(ends or [])


def _tensors(weights: Weights, target: Target, *, meta: bool) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the file in their order, as shapes alone or with their values, a block in memory at a time."""
    model = weights.model
    prefix, blocks = modeling.blocks(model)
    names = list(outside(model))
    if not meta:
        weights.load(names)
    yield from target.rest({n: model.get_parameter_or_buffer(n) for n in names}).items()
    weights.unload([] if meta else names)
    for index, layer in enumerate(target.layers):
        local = list(blocks[layer].state_dict())
        names = [f"{prefix}.{layer}.{n}" for n in local]
        if not meta:
            weights.load(names)
        own = dict(zip(local, (model.get_parameter_or_buffer(n) for n in names), strict=True))
        yield from target.block(own, index).items()
        weights.unload([] if meta else names)


class _Writer:
    """A GGUF file in the making: all tensors are announced, then written in the same order."""

    def __init__(self, gguf: Any, path: Path, target: Target, tokens: Tokens, name: str, quantization: str) -> None:
        self.gguf, self.wanted = gguf, gguf.GGMLQuantizationType[QUANTIZATIONS[quantization]]
        self.file = gguf.GGUFWriter(path, target.arch)
        self.sums: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.file.add_name(name)
        self.file.add_file_type(_FILE_TYPES[quantization])
        self.file.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in target.entries.items():
            getattr(self.file, f"add_{key}")(gguf.RopeScalingType(value) if key == "rope_scaling_type" else value)
        _add_tokens(self.file, tokens)

    def type_of(self, name: str, shape: tuple[int, ...]) -> Any:
        """The type that a tensor is written in."""
        kinds = self.gguf.GGMLQuantizationType
        if len(shape) == 1:
            return kinds.F32
        wanted = self.wanted
        if wanted == kinds.Q4_0 and name in ("token_embd.weight", "output.weight"):
            wanted = kinds.Q8_0  # what reads and writes tokens bears four bits badly, and is small in a large model
        block, _ = self.gguf.GGML_QUANT_SIZES[wanted]
        return wanted if shape[-1] % block == 0 else kinds.F16

    def announce(self, name: str, tensor: Tensor) -> None:
        shape = tuple(tensor.shape)
        kind = self.type_of(name, shape)
        block, size = self.gguf.GGML_QUANT_SIZES[kind]
        nbytes = tensor.numel() // block * size
        plain = {"F32": "float32", "F16": "float16"}.get(kind.name)
        stored = shape if plain else (*shape[:-1], shape[-1] // block * size)
        self.shapes[name] = shape
        self.file.add_tensor_info(name, stored, _dtype(plain or "uint8"), nbytes, raw_dtype=kind)

    def begin(self) -> None:
        self.file.write_header_to_file()
        self.file.write_kv_data_to_file()
        self.file.write_ti_data_to_file()

    def write(self, name: str, tensor: Tensor) -> None:
        kind = self.type_of(name, tuple(tensor.shape))
        values = tensor.detach().float().contiguous()
        if kind.name == "F16" and float(values.abs().max()) > torch.finfo(torch.float16).max:
            raise ModelError(f"{name} has values that fp16 can not hold", fix="--quantize bf16, f32 or q8_0")
        data = self.gguf.quants.quantize(values.numpy(), kind)
        self.sums[name] = zlib.crc32(data.tobytes())
        self.file.write_tensor_data(data)

    def end(self) -> None:
        self.file.close()


def _dtype(name: str) -> Any:
    import numpy

    return numpy.dtype(name)


def _add_tokens(file: Any, tokens: Tokens) -> None:
    add = {
        "model": file.add_tokenizer_model,
        "pre": file.add_tokenizer_pre,
        "tokens": file.add_token_list,
        "token_type": file.add_token_types,
        "merges": file.add_token_merges,
        "scores": file.add_token_scores,
        "bos_token_id": file.add_bos_token_id,
        "eos_token_id": file.add_eos_token_id,
        "eot_token_id": file.add_eot_token_id,
        "unknown_token_id": file.add_unk_token_id,
        "padding_token_id": file.add_pad_token_id,
        "add_bos_token": file.add_add_bos_token,
        "add_eos_token": file.add_add_eos_token,
        "add_space_prefix": file.add_add_space_prefix,
        "chat_template": file.add_chat_template,
    }
    for key, value in tokens.entries.items():
        add[key](value)


def _read_back(gguf: Any, path: Path, writer: _Writer) -> None:
    """ModelError unless the file holds the tensors that were written, in their shapes, byte for byte."""
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name, shape in writer.shapes.items():
        tensor = found.pop(name, None)
        if tensor is None or tuple(int(n) for n in reversed(tensor.shape)) != shape:
            raise ModelError(f"{name} is not in the file as it was written", where=path, fix="check the disk, and write again")
        if zlib.crc32(tensor.data.tobytes()) != writer.sums[name]:
            raise ModelError(f"{name} reads back unlike what was written", where=path, fix="check the disk, and write again")
    if found:
        raise ModelError(f"{next(iter(found))} was not meant to be in the file", where=path)


def _types(gguf: Any, path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
