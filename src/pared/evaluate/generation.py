"""What a model writes: samples, and how much of them is repetition, the known weakness of pruned models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.calibration import inference

LONGEST_LOOP = 16


@dataclass(frozen=True)
class Written:
    """Continuations of prompts, and their repetition as shares."""

    samples: list[str]
    repeated: dict[
        int, float
    ]  # n -> share of n-grams that were there before in the same sample (Welleck et al., 2020: seq-rep-n)
    looping: float  # share of samples that end in a loop: the same up to 16 tokens, three times over or more


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Tensor,
    *,
    length: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> Written:
    """Continue prompts int64 [n, s] by `length` tokens each: greedily, or sampled at a temperature."""
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        with inference(model):
            out = model.generate(  # type: ignore[operator]
                prompts.to(model.device),
                attention_mask=torch.ones_like(prompts).to(model.device),
                min_new_tokens=1,
                max_new_tokens=length,
                pad_token_id=padding,
                **sampled,
            )
    finally:
        torch.random.set_rng_state(state)
    rows = [_until_end(row, tokenizer) for row in out[:, prompts.shape[1] :].cpu().tolist()]
    return Written(
        [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows],
        {n: _mean([repetition(row, n) for row in rows]) for n in (1, 2, 3, 4)},
        _mean([float(loops(row)) for row in rows]),
    )


def repetition(tokens: Sequence[int], n: int) -> float:
    """1 - different n-grams / n-grams; 0 where there are none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(tokens: Sequence[int], longest: int = LONGEST_LOOP) -> bool:
    """Whether the text ends in the same at most `longest` tokens, three times over or more."""
    for period in range(1, longest + 1):
        tail = list(tokens[-3 * period :])
        if len(tail) == 3 * period and tail[:period] == tail[period : 2 * period] == tail[2 * period :]:
            return True
    return False


def _until_end(row: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return row[: row.index(end)] if end in row else row


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
