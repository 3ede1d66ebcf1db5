"""The dense model that a pruned one learns from: resident, or its likeliest tokens kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from pared.calibration import Batch
from pared.durable import write_whole
from pared.errors import ModelError
from pared.estimate import Progress, silent
from pared.evaluate.report import Subject, kept_tokens
from pared.recover.data import Example
from pared.recover.losses import TopK, top_k
from pared.recover.packing import Row
from pared.source import Source
from pared.stream import Stream

# Tokens whose hidden states are held while the teacher's blocks pass by.
_AT_ONCE = 2**18
_SUFFIX = ".safetensors"


def vocabulary_map(student: Path, teacher: Path) -> Tensor | None:
    """For each token of the student its id in the teacher; None where both have the same vocabulary."""
    return kept_tokens(Subject.open(student), Subject.open(teacher))


def check_fits(student: Source, teacher: Source, kept: Tensor | None) -> None:
    """ModelError where the distributions of the two can not be compared."""
    ours, theirs = (s.config.get_text_config().vocab_size for s in (student, teacher))
    if kept is None and ours != theirs:
        raise ModelError(
            f"the teacher knows {theirs:,} tokens, this model {ours:,}",
            where=f"--teacher {teacher.name}",
            fix="distil from the model that this one was pruned from, or --objective ce",
        )


def resident(model: PreTrainedModel, kept: Tensor | None) -> Callable[..., Tensor]:
    """Logits [b, s, vocab] of the teacher over the student's tokens, without gradients."""
    model.eval().requires_grad_(False)
    model.config.use_cache = False

    @torch.no_grad()
    def logits(input_ids: Tensor, **others: Tensor) -> Tensor:
        chosen = None if kept is None else kept.to(input_ids.device)
        out = model(input_ids=input_ids if chosen is None else chosen[input_ids], use_cache=False, **others).logits
        return out if chosen is None else out[..., chosen]

    return logits


class Cache:
    """The teacher's top k for every document of a run, on disk: k * 8 bytes a token.

    Documents are told by their ids. The teacher is read block by block, so that it never is in memory as a whole.
    """

    def __init__(self, folder: Path, k: int, temperature: float, kept: Tensor | None) -> None:
        self.folder, self.k, self.temperature, self.kept = folder, k, temperature, kept
        self._places: dict[str, tuple[Path, int, int]] = {}  # document -> file, first position, positions

    def fill(
        self, teacher: Source, rows: Iterable[Row], *, dtype: torch.dtype | None, device: str, progress: Progress = silent
    ) -> None:
        """Compute what is not there yet; what a killed run has finished is kept."""
        wanted = {_key(p): p for row in rows for p in row.parts}
        self._find()
        missing = [p for key, p in wanted.items() if key not in self._places]
        if not missing:
            return
        stream = Stream(teacher.runnable, teacher.layout, dtype=dtype, device=device)
        done = 0
        for chunk in _chunks(missing):
            self._write(stream, chunk)
            done += len(chunk)
            progress("teacher", done, len(missing))
        self._find()

    def _write(self, stream: Stream, parts: Sequence[Example]) -> None:
        by_length: dict[int, list[Example]] = {}
        for part in parts:
            by_length.setdefault(len(part.ids), []).append(part)
        groups = [g[i : i + 8] for _, g in sorted(by_length.items()) for i in range(0, len(g), 8)]
        ids = [torch.tensor([p.ids for p in g]) for g in groups]
        hidden = stream.forward([Batch(i if self.kept is None else self.kept[i]) for i in ids])
        log_p, chosen, index, at = [], [], {}, 0
        with stream.outside(front=False), torch.no_grad():
            for group, h in zip(groups, hidden, strict=True):
                logits = stream.logits(h)
                logits = logits if self.kept is None else logits[..., self.kept.to(logits.device)]
                found = top_k(logits.flatten(0, 1), self.k, self.temperature)
                log_p.append(found.log_p.cpu())
                chosen.append(found.ids.cpu())
                for part in group:
                    index[_key(part)] = [at, len(part.ids)]
                    at += len(part.ids)
        name = hashlib.sha256("".join(sorted(index)).encode()).hexdigest()[:16]
        save_file({"log_p": torch.cat(log_p), "ids": torch.cat(chosen)}, self.folder / (name + _SUFFIX))
        write_whole(self.folder / f"{name}.json", json.dumps(index))  # last: what has an index is whole

    def _find(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.folder.glob("*.json")):
            for key, (at, count) in json.loads(file.read_text()).items():
                self._places[key] = (file.with_suffix(_SUFFIX), at, count)

    def of(self, row: Row, longest: int) -> TopK:
        """For one row: log-probabilities [longest, k] and ids [longest, k]; zeros where there is padding."""
        log_p: list[Tensor] = []
        ids: list[Tensor] = []
        for part in row.parts:
            file, at, count = self._places[_key(part)]
            for name, out in (("log_p", log_p), ("ids", ids)):
                out.append(_rows(file, name, at, count))
        empty = longest - row.tokens
        return TopK(*(torch.cat([*found, found[0].new_zeros(empty, found[0].shape[1])]) for found in (log_p, ids)))


def _rows(file: Path, name: str, at: int, count: int) -> Tensor:
    with safe_open(file, framework="pt") as handle:
        return handle.get_slice(name)[at : at + count]


def _key(part: Example) -> str:
    return hashlib.sha256(repr(part.ids).encode()).hexdigest()


def _chunks(parts: Sequence[Example]) -> Iterable[list[Example]]:
    chunk: list[Example] = []
    tokens = 0
    for part in sorted(parts, key=lambda p: len(p.ids)):
        if chunk and tokens + len(part.ids) > _AT_ONCE:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(part)
        tokens += len(part.ids)
    if chunk:
        yield chunk
