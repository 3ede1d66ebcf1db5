"""Sequences that are like no text: tokens of the calibration in random order, and any tokens at all.

A calibration text leaves directions of the hidden states unused. A refit to it alone is free to do anything there, and
what it does costs on text of another kind.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from transformers import PreTrainedConfig

from pared.calibration import Batch

# For so many sequences of the calibration one of scrambled tokens, where shapes are judged.
SCRAMBLED = 2
# For so many one of random tokens, where weights are fitted: the first behind half as many.
ANY = 16
# Sequences of the calibration below which there is none where blocks are reconstructed: one of the few held-out ones would
# then be random, and veto what helps text.
RECONSTRUCTED = 64


def with_scrambled(rows: Sequence[Batch]) -> list[Batch]:
    """Single rows, and after every second one another of its length: tokens of all rows in random order."""
    tokens = torch.cat([row.input_ids.flatten() for row in rows])
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(len(tokens))).to(tokens.device)]
    out: list[Batch] = []
    for k, (row, part) in enumerate(zip(rows, tokens.split([row.input_ids.numel() for row in rows]), strict=True)):
        out.append(row)
        if k % SCRAMBLED == SCRAMBLED - 1:
            out.append(Batch(part.reshape(row.input_ids.shape), None))
    return out


def random_rows(rows: int, *, reconstructed: bool = False) -> int:
    """How many of random tokens there are beside so many of the calibration."""
    return 0 if reconstructed and rows < RECONSTRUCTED else (rows + ANY // 2) // ANY


def with_random(rows: Sequence[Batch], vocabulary: int, special: Collection[int] = (), *, seed: int = 0) -> list[Batch]:
    """Single rows, and after some of them the same once more with random tokens in place of all but the first.

    Special tokens stay where they stand, and none are drawn; the others of the vocabulary are equally likely. The first such
    row comes after ANY / 2 rows.
    """
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed[[t for t in special if 0 <= t < vocabulary]] = False
    words = allowed.nonzero()[:, 0]
    rng = torch.Generator().manual_seed(seed)
    out: list[Batch] = []
    for k, row in enumerate(rows):
        out.append(row)
        if k % ANY == ANY // 2 - 1 and len(words):
            mask = row.attention_mask
            own = row.input_ids if mask is None else row.input_ids[mask.bool()][None]
            ids = words[torch.randint(len(words), own.shape, generator=rng)].to(own)
            stays = ~allowed.to(own.device)[own]
            stays[:, :1] = True
            out.append(Batch(torch.where(stays, own, ids), None))
    return out


def special_tokens(config: PreTrainedConfig) -> set[int]:
    """Those that a config names: where a text begins and ends, padding, places of images."""
    named = {**config.to_dict(), **config.get_text_config().to_dict()}
    found: set[int] = set()
    for name, value in named.items():
        if name.endswith("_token_id"):
            found.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    return found
