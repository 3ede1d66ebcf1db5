"""A model directory, read only: opened with everything checked that can be checked without reading weights.

Safetensors only. What transformers takes without a word is refused here: shards that an index names outside the directory,
truncated files, tensors that the index and the shards disagree about.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from pared.errors import MissingError, ModelError, ResourceError
from pared.models import IMPORTABLE, NATIVE
from pared.tensorfile import DTYPES, TensorInfo, chunks, non_finite, read_header, read_tensor

__all__ = ["INDEX", "SINGLE", "Checkpoint", "TensorInfo", "read_config"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEMPLATES = "additional_chat_templates"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NOT_CARRIED = {"config.json", "README.md", INDEX, "adapter_config.json", "plan.json", "recipe.yaml", "manifest.json"}
_CARRIED = (
    *("tokenizer*.json", "tokenizer*.model", "*.tiktoken", "sentencepiece*", "spiece.model", "*.spm"),
    *("vocab.*", "vocab-*", "merges.txt", "bpe.codes", "tekken.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "chat_template*", "preprocessor_config.json", "processor_config.json"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "*.model"),
)
_FETCHED = ("*.safetensors", "*.json", "*.jinja", *(p for p in _CARRIED if not p.endswith(".json")))
# Other forms of the same weights that many hub repositories hold beside the one that transformers reads.
_NOT_FETCHED = ("original/*", "onnx/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")


@dataclass
class Checkpoint:
    """A model directory. `tensors` comes from the headers of the shards; weights are read by `read` and `slice`."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    trust_remote_code: bool = False
    bytes_read: int = field(default=0, repr=False)
    """Of weights, by this object."""
    _handles: dict[str, Any] = field(default_factory=dict, repr=False)
    _digests: dict[str, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, model: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
        """Open a directory or a hub id.

        Raises ModelError for a checkpoint that is broken, unsafe or of a kind that can not be pruned, and MissingError
        for a hub id that can not be fetched.
        """
        path = _locate(model, trust_remote_code)
        config = _config(path)
        _refuse_unsupported(path, config, trust_remote_code)
        return cls(path, config, _tensors(path, str(model)), trust_remote_code)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(_numel(t) for t in self.tensors.values())

    @property
    def files(self) -> list[str]:
        """The shards, sorted."""
        return sorted({t.file for t in self.tensors.values() if t.file})

    def read(self, name: str, dtype: torch.dtype | None = None, see: Callable[[Tensor], None] | None = None) -> Tensor:
        """A private copy of a tensor, on the CPU, in its own dtype or, if it holds floating point numbers, in another.

        see: is shown the tensor as the file has it, in flat slices.
        """
        info = self._info(name)
        if not info.file:
            return torch.zeros(info.shape, dtype=dtype or DTYPES[info.dtype])
        digest = None if name in self._digests else hashlib.sha256()

        def look(raw: memoryview, part: Tensor) -> None:
            if digest is not None:
                digest.update(raw)
            if see is not None:
                see(part)

        out = read_tensor(self.path / info.file, info, dtype, look)
        self.bytes_read += info.nbytes
        if digest is not None:
            self._digests[name] = digest.digest()
        return out

    def with_zeros(self, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: str) -> Checkpoint:
        """The same with another config.json, and tensors of zeros which no file holds."""
        made = {n: TensorInfo(n, "", dtype, shape, 0, 0) for n, shape in shapes.items()}
        return replace(self, config=config, tensors={**self.tensors, **made})

    def slice(self, name: str) -> Any:
        """A lazy safetensors slice: index it to read a part. Valid until close()."""
        info = self._info(name)
        if info.file not in self._handles:
            self._handles[info.file] = safe_open(self.path / info.file, framework="pt")
        return self._handles[info.file].get_slice(name)

    def close(self) -> None:
        for handle in self._handles.values():
            handle.__exit__(None, None, None)
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def digest(self) -> str:
        """sha256 over config.json and every tensor by name: what a plan was made for, however it is split into shards.

        Tensors that were read already are not read again.
        """
        config = (self.path / "config.json").read_bytes()
        total = hashlib.sha256(f"{len(config)}\0".encode() + config)
        for name in sorted(n for n, t in self.tensors.items() if t.file):
            info = self.tensors[name]
            if name not in self._digests:
                one = hashlib.sha256()
                for chunk in chunks(self.path / info.file, info.offset, info.nbytes):
                    one.update(chunk)
                self._digests[name] = one.digest()
                self.bytes_read += info.nbytes
            total.update(f"{name}\0{info.dtype}\0{list(info.shape)}\0".encode() + self._digests[name])
        return total.hexdigest()

    def stamp(self) -> dict[str, Any]:
        """What tells this checkpoint from a changed one without reading weights: config, and each shard's size and time."""
        config = hashlib.sha256((self.path / "config.json").read_bytes()).hexdigest()
        found = {f: (self.path / f).stat() for f in self.files}
        return {
            "path": str(self.path.resolve()),
            "config.json": config,
            **{f: f"{s.st_size} bytes of {s.st_mtime_ns}" for f, s in found.items()},
        }

    def side_files(self) -> list[Path]:
        """What a pruned copy carries over: tokenizer, generation config, chat templates, licence. Sorted by name.

        Code of the model's authors is among them only in a checkpoint that was opened with trust_remote_code.
        """
        patterns = (*_CARRIED, "*.py") if self.trust_remote_code else _CARRIED
        found = [
            p
            for p in sorted(self.path.iterdir())
            if p.is_file() and p.name not in _NOT_CARRIED and any(fnmatch.fnmatchcase(p.name, w) for w in patterns)
        ]
        found += sorted((self.path / TEMPLATES).glob("*.jinja"))
        for p in found:
            _check_inside(self.path, p)
        return found

    def non_finite(self) -> Iterator[tuple[TensorInfo, str]]:
        """Every tensor that holds "NaN" or "Inf". Streams all weights."""
        for info in self.tensors.values():
            if kind := non_finite(self.path / info.file, info):
                yield info, kind

    def check_finite(self) -> None:
        """ModelError for the first tensor with NaN or Inf."""
        for info, kind in self.non_finite():
            raise ModelError(
                f"{info.name} holds {kind}", where=self.path / info.file, fix="use a checkpoint whose weights are finite"
            )

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise ModelError(f"there is no tensor {name}", where=self.path)
        return self.tensors[name]


def place_of(path: Path) -> str:
    """A side file's name in its checkpoint: all lie at the top but for the additional chat templates."""
    return f"{TEMPLATES}/{path.name}" if path.parent.name == TEMPLATES else path.name


def _numel(info: TensorInfo) -> int:
    count = 1
    for n in info.shape:
        count *= n
    return count


def _locate(model: str | Path, trust_remote_code: bool) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError("a model is a directory, this is a file", where=path, fix=f"pass its directory: {path.parent}")
    text = str(model)
    if isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise ModelError("there is no such model directory", where=path, fix="check the path")
    # Slow to import and not needed for a directory.
    from huggingface_hub import snapshot_download

    patterns = [*_FETCHED, "*.py"] if trust_remote_code else list(_FETCHED)
    try:
        return Path(snapshot_download(text, allow_patterns=patterns, ignore_patterns=list(_NOT_FETCHED)))
    except Exception as error:
        # The hub's client lets through the errors of whichever HTTP library it is built on.
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise ResourceError(
                "the disk is full", where=text, fix="free some space, or set HF_HOME to another disk"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingError(
            f"{text} is no directory here and can not be fetched from the hub: {reason}",
            where=text,
            fix="check the spelling; offline, pass the path of a model directory; for a gated model, run: hf auth login",
        ) from error


def _check_inside(root: Path, path: Path) -> None:
    """Refuse a file that a link leads out of the directory, unless the hub's cache put it there."""
    real, home = path.resolve(), root.resolve()
    allowed = [home]
    # cache/models--owner--name/snapshots/REVISION/file is a link into cache/models--owner--name/blobs, or cache/blobs.
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed += [home.parent.parent / "blobs", home.parent.parent.parent / "blobs"]
    if not any(real.is_relative_to(a) for a in allowed):
        raise ModelError(
            f"{path.name} is a link that leads outside the directory", where=path, fix="copy the file to its place"
        )


def _json(root: Path, name: str) -> dict[str, Any]:
    path = root / name
    _check_inside(root, path)
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name} is not valid JSON: {error}", where=path, fix="fetch the file again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{name} must hold an object", where=path, fix="fetch the file again")
    return data


def _config(path: Path) -> dict[str, Any]:
    if (path / "config.json").is_file():
        return _json(path, "config.json")
    if (path / "adapter_config.json").exists():
        raise _adapter(path)
    raise ModelError(
        "no config.json: this is not a model directory", where=path, fix="pass the directory that holds config.json"
    )


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a directory that need not hold weights; refused as `Checkpoint.open` would for it or for the index."""
    config = _config(path)
    _refuse_unsupported(path, config, trust_remote_code=False)
    if (path / INDEX).exists():
        _weight_map(path)
    return config


def _adapter(path: Path) -> ModelError:
    load = f"AutoPeftModelForCausalLM.from_pretrained({str(path)!r})"
    code = f"from peft import AutoPeftModelForCausalLM; {load}.merge_and_unload().save_pretrained('merged')"
    return ModelError(
        "this is a LoRA adapter, not a model",
        where=path / "adapter_config.json",
        fix=f"merge it first: python -c {shlex.quote(code)}",
    )


def _refuse_unsupported(path: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    for part in (config, config.get("text_config") or {}):
        quantised = part.get("quantization_config") or part.get("compression_config")
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            raise ModelError(
                f"this checkpoint is quantised ({method or 'see quantization_config'}): its weights can not be scored or cut",
                where=path / "config.json",
                fix="prune the unquantised checkpoint that it was made from, then quantise the result",
            )
    if config.get("auto_map") and not trust_remote_code:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        # Our own classes are registered: the code that such a checkpoint carries is for others, and is not run here.
        if config.get("model_type") not in CONFIG_MAPPING_NAMES and config.get("model_type") not in NATIVE:
            raise ModelError(
                f"the model type {config.get('model_type')!r} needs code from the checkpoint, which is not run unasked",
                where=path / "config.json",
                fix=f"pared import {shlex.quote(str(path))} -o NEW, and use NEW"
                if config.get("model_type") in IMPORTABLE
                else "read its .py files, then pass --trust-remote-code",
            )


def _tensors(path: Path, model: str) -> dict[str, TensorInfo]:
    """All tensors by name, in the order of the files."""
    single, index = (path / SINGLE).exists(), (path / INDEX).exists()
    weight_map = _weight_map(path) if index else {}
    if single and index and set(weight_map.values()) != {SINGLE}:
        raise ModelError(
            f"there are both {SINGLE} and {INDEX}, and they may hold different models",
            where=path,
            fix="remove the one that is wrong",
        )
    if not single and not index:
        raise _no_weights(path, model)
    files = sorted(set(weight_map.values())) or [SINGLE]
    found: dict[str, TensorInfo] = {}
    for file in files:
        if not (path / file).is_file():
            raise ModelError("a shard is missing that the index names", where=path / file, fix="download the checkpoint again")
        _check_inside(path, path / file)
        for name, info in read_header(path / file, file).items():
            if name in found:
                raise ModelError(
                    f"{name} is in two shards", where=f"{path / found[name].file} and {file}", fix="remove one of them"
                )
            if index and weight_map.get(name) != file:
                said = f"says {weight_map[name]}" if name in weight_map else "does not name it"
                raise ModelError(f"{name} is in this shard, but the index {said}", where=path / file, fix=f"repair {INDEX}")
            found[name] = info
    for name, file in weight_map.items():
        if name not in found:
            raise ModelError(
                f"{name} is not in the shard that the index names", where=path / file, fix="download the checkpoint again"
            )
    if not found:
        raise ModelError("there are no tensors in this checkpoint", where=path / files[0], fix="download the checkpoint again")
    return found


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = _json(path, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("the index has no weight_map", where=path / INDEX, fix="download the checkpoint again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise ModelError(
                f"the index names {file!r} for {name}: not a safetensors file", where=path / INDEX, fix=_convert(str(path))
            )
        pure = PurePosixPath(file)
        if pure.is_absolute() or ".." in pure.parts or "\\" in file or "\0" in file or os.path.isabs(file):
            raise ModelError(
                f"the index points outside the directory: {file!r} for {name}",
                where=path / INDEX,
                fix="do not use this checkpoint unless you know why it does that",
            )
    return weight_map


def _no_weights(path: Path, model: str) -> ModelError:
    if (path / "adapter_config.json").exists():
        return _adapter(path)
    pickles = sorted(p.name for w in _PICKLES for p in path.glob(w) if p.name != "training_args.bin")
    if pickles:
        what = f"the weights are only there as {pickles[0]}, and loading such a file can run code"
        return ModelError(what, where=path, fix=_convert(model))
    return ModelError(
        f"no {SINGLE} and no {INDEX}", where=path, fix=f"if its weights are in another form, convert it: {_convert(model)}"
    )


def _convert(model: str) -> str:
    out = Path(model).name + "-safetensors"
    code = (
        f"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; m, out = {model!r}, {out!r}; "
        "M.from_pretrained(m, dtype='auto').save_pretrained(out); T.from_pretrained(m).save_pretrained(out)"
    )
    return f"python -c {shlex.quote(code)}"
