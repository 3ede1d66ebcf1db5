"""Rows of tokens to train on: documents that share a row without seeing each other.

Positions begin anew with each document. Transformers' masks read that as a boundary that attention may not cross; models
that do not (ALiBi, for one) get a document a row, with padding. Which it is, is seen by trying: `isolates`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pared.calibration import inference
from pared.recover.data import Example

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """Documents side by side."""

    parts: tuple[Example, ...]

    @property
    def tokens(self) -> int:
        return sum(len(p.ids) for p in self.parts)


def rows_of_epoch(examples: Sequence[Example], seq_len: int, packing: str, seed: int) -> list[Row]:
    """One pass over the examples as rows of at most seq_len tokens, in an order that the seed decides.

    documents: longer ones are cut, and pieces are put together as they fit (best fit, largest first); contiguous: windows
    over all text, of which the rest is dropped; none: each piece is a row.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = [examples[i] for i in torch.randperm(len(examples), generator=generator).tolist()]
    if packing == "contiguous":
        ids = list(chain.from_iterable(e.ids for e in shuffled))
        target = list(chain.from_iterable(e.target for e in shuffled))
        starts = range(0, len(ids) - seq_len + 1, seq_len)
        parts = [Example(tuple(ids[a : a + seq_len]), tuple(target[a : a + seq_len])) for a in starts]
    else:
        cut = ((e, a) for e in shuffled for a in range(0, len(e.ids), seq_len))
        parts = [Example(e.ids[a : a + seq_len], e.target[a : a + seq_len]) for e, a in cut]
    parts = [p for p in parts if p.targets]
    rows = best_fit(parts, seq_len) if packing == "documents" else [Row((p,)) for p in parts]
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


def best_fit(parts: Sequence[Example], seq_len: int) -> list[Row]:
    """Parts of at most seq_len tokens in as few rows as best fit, largest first, needs."""
    rows: list[list[Example]] = []
    room: dict[int, list[int]] = {}  # tokens that are free -> rows
    for part in sorted(parts, key=lambda p: -len(p.ids)):
        size = len(part.ids)
        free = min((f for f, found in room.items() if f >= size and found), default=None)
        if free is None:
            rows.append([part])
            at, left = len(rows) - 1, seq_len - size
        else:
            at, left = room[free].pop(), free - size
            rows[at].append(part)
        if left:
            room.setdefault(left, []).append(at)
    return [Row(tuple(r)) for r in rows]


def training_rows(examples: Sequence[Example], *, seq_len: int, packing: str, seed: int, tokens: int | None) -> list[Row]:
    """Rows, epoch after epoch, until they hold `tokens` tokens (None: one epoch)."""
    out: list[Row] = []
    held = 0
    for row in _epochs(examples, seq_len, packing, seed, endless=tokens is not None):
        if tokens is not None and held >= tokens:
            break
        out.append(row)
        held += row.tokens
    return out


def _epochs(examples: Sequence[Example], seq_len: int, packing: str, seed: int, endless: bool) -> Iterator[Row]:
    epoch = 0
    while epoch == 0 or endless:
        rows = rows_of_epoch(examples, seq_len, packing, seed + epoch)
        if not rows:
            return
        yield from rows
        epoch += 1


def collate(rows: Sequence[Row], *, padding: int, isolated: bool) -> dict[str, Tensor]:
    """Rows as tensors int64 [rows, longest]: input_ids, labels, and position_ids (isolated) or attention_mask (else).

    labels: at each position the token that comes next in the same document where it is a target, else -100. Padding
    follows the documents; where it is not masked it is a document of its own, so that nothing reads it.
    """
    longest = max(r.tokens for r in rows)
    ids = torch.full((len(rows), longest), padding, dtype=torch.int64)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.int64)
    positions = torch.zeros((len(rows), longest), dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for i, row in enumerate(rows):
        at = 0
        for part in row.parts:
            end = at + len(part.ids)
            ids[i, at:end] = torch.tensor(part.ids)
            following = torch.tensor([*part.ids[1:], IGNORED])
            learnt = torch.tensor([*part.target[1:], False])
            labels[i, at:end] = torch.where(learnt, following, IGNORED)
            positions[i, at:end] = torch.arange(len(part.ids))
            at = end
        positions[i, at:] = torch.arange(longest - at)
        mask[i, :at] = 1
    out = {"input_ids": ids, "labels": labels}
    if isolated:
        return {**out, "position_ids": positions}
    return out if bool(mask.all()) else {**out, "attention_mask": mask}


def isolates(model: PreTrainedModel, seq_len: int) -> bool:
    """Whether documents that share a row are to this model as if each were alone: two are tried, behind unlike others."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    half = min(16, seq_len // 2)
    vocab = model.config.get_text_config().vocab_size
    one, other, last = torch.randint(0, vocab, (3, half), generator=torch.Generator().manual_seed(0))
    packed = torch.stack([torch.cat([one, last]), torch.cat([other, last])])
    positions = torch.arange(half).repeat(2).expand(2, -1)
    with inference(model):
        together = model(input_ids=packed.to(model.device), position_ids=positions.to(model.device), use_cache=False).logits
        alone = model(input_ids=last[None].to(model.device), use_cache=False).logits
    found, want = together[:, half:].float(), alone.float()
    tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
    return bool((found - want).abs().max() <= tolerance * want.abs().max())


class Rows(torch.utils.data.Dataset[Any]):
    """The rows of a run in their order, as what a data loader draws from; `of` may add to each what the teacher said."""

    def __init__(self, rows: Sequence[Row], of: Callable[[Row], Any] = lambda row: row) -> None:
        self.rows, self._of = rows, of

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self._of(self.rows[index])
