"""Importing old checkpoints: those whose published code no current transformers runs become ones that it builds itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from pared.checkpoint import Checkpoint
from pared.errors import ModelError
from pared.importing import baichuan, chatglm_6b, glm
from pared.importing.card import import_card
from pared.importing.published import Conversion, Move, check_tensors, refuse_pickles, tokenizer_note
from pared.modeling import checkpoint_dtype, config_json, expected_tensors, make_config
from pared.models import NATIVE
from pared.process import return_freed_memory
from pared.writer import CheckpointWriter

__all__ = ["Imported", "import_checkpoint"]

FAMILIES: tuple[ModuleType, ...] = (baichuan, glm, chatglm_6b)


@dataclass(frozen=True)
class Imported:
    """What an import gave: where it lies, what was recognised, the model type that was written, and remarks."""

    path: Path
    family: str
    model_type: str
    tensors: int
    notes: tuple[str, ...]


def import_checkpoint(
    old: str | Path, out: str | Path, *, overwrite: bool = False, max_shard_bytes: int = 4 * 2**30
) -> Imported:
    """Write an old checkpoint anew in a form that transformers builds without its code, exactly the same function.

    old: a directory or a hub id. One tensor is in memory at a time. Raises ModelError for a checkpoint of another kind, or
    with tensors or settings that the published one does not have; nothing is written then.
    """
    refuse_pickles(old)
    # Opened so that the published code comes along: it is read as text where a config leaves the formula open, never run.
    with Checkpoint.open(old, trust_remote_code=True) as checkpoint:
        conversion = _family(checkpoint).convert(checkpoint)
        check_tensors(checkpoint, conversion)
        expected = _expected(conversion)
        notes = (*conversion.notes, *filter(None, [tokenizer_note(checkpoint)]))
        with CheckpointWriter(out, overwrite=overwrite, source=checkpoint.path, max_shard_bytes=max_shard_bytes) as writer:
            for move in sorted(conversion.moves, key=lambda m: _place(checkpoint, m)):
                for name, tensor in zip(move.targets, move.split(_read(checkpoint, move.source)), strict=True):
                    _check_shape(name, tensor, expected)
                    writer.add(name, tensor)
                return_freed_memory()
            for name, tensor in conversion.made.items():
                writer.add(name, tensor)
            _add_files(writer, checkpoint, conversion, notes)
            path = writer.commit()
    return Imported(path, conversion.family, conversion.config["model_type"], len(expected), notes)


def _family(checkpoint: Checkpoint) -> ModuleType:
    config = checkpoint.config
    for family in FAMILIES:
        if family.recognises(config):
            return family
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = config.get("model_type")
    if model_type in CONFIG_MAPPING_NAMES or model_type in NATIVE:
        raise ModelError(
            f"a {model_type!r} needs no import",
            where=checkpoint.path / "config.json",
            fix="use it as it is: pared inspect, pared prune",
        )
    raise ModelError(
        f"this is no checkpoint that can be imported: model type {model_type!r}",
        where=checkpoint.path / "config.json",
        fix=f"what can: {'; '.join(f.NAMES for f in FAMILIES)}, as they were published",
    )


def _expected(conversion: Conversion) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the result as the class that reads it has them."""
    expected = expected_tensors(conversion.config)
    given = {t for m in conversion.moves for t in m.targets} | conversion.made.keys()
    # A tied head that the old checkpoint holds all the same is not written twice.
    if odd := sorted(expected.keys() ^ given - ({"lm_head.weight"} if conversion.config["tie_word_embeddings"] else set())):
        raise ModelError(f"the import of {conversion.family} and its class disagree on {odd[0]}")
    return expected


def _place(checkpoint: Checkpoint, move: Move) -> tuple[str, int]:
    info = checkpoint.tensors[move.source]
    return info.file, info.offset


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    tensor = checkpoint.read(name)
    if not tensor.is_floating_point() or not all(bool(torch.isfinite(end)) for end in tensor.aminmax()):
        raise ModelError(
            f"{name} holds values that are not finite numbers",
            where=checkpoint.path / checkpoint.tensors[name].file,
            fix="use a checkpoint whose weights are finite and not quantised",
        )
    return tensor


def _check_shape(name: str, tensor: Tensor, expected: dict[str, tuple[int, ...]]) -> None:
    if tuple(tensor.shape) != expected[name]:
        raise ModelError(f"{name} came out as {list(tensor.shape)} where its class has {list(expected[name])}")


def _add_files(writer: CheckpointWriter, checkpoint: Checkpoint, conversion: Conversion, notes: Sequence[str]) -> None:
    dtype = str(checkpoint_dtype(checkpoint)).removeprefix("torch.")
    config, _ = make_config({**conversion.config, "dtype": dtype})
    writer.add_file("config.json", config_json(config))
    native = NATIVE.get(config.model_type)
    if native is not None:
        writer.add_file(native.file, native.code())
    for path in checkpoint.side_files():
        if path.suffix != ".py" or path.name.startswith("tokenization_"):
            writer.copy_file(path)
    writer.add_file("README.md", import_card(checkpoint.path.name, conversion.family, config.model_type, notes, native))
