"""Speed of a resident model, prefill and decode, and the peak memory of this process."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pared.calibration import inference, max_positions, next_logits
from pared.errors import MissingError, UsageError
from pared.process import device_bytes, now, resident_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Speed:
    """Tokens per second over the whole batch; prefill counts the prompt's tokens, decode those generated after it."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def measure_speed(model: PreTrainedModel, *, prompt: int = 128, decode: int = 32, batch: int = 1, repeats: int = 3) -> Speed:
    """The best of `repeats` after one warm-up: one forward over `prompt` random tokens, then `decode` greedy steps.

    With the key-value cache, on the device and in the dtype of the model. The prompt is the same for every model of
    equal vocabulary. UsageError where the prompt and its continuation are longer than the model's positions.
    """
    if min(prompt, decode, batch, repeats) < 1:
        raise UsageError(
            "a speed needs at least one of each",
            where=f"prompt {prompt}, decode {decode}, batch {batch}, repeats {repeats}",
            fix="use 1 or more",
        )
    limit = max_positions(model)
    if limit is not None and prompt + decode > limit:
        what = f"{prompt} + {decode} tokens are longer than the model's {limit} positions"
        raise UsageError(what, where="prompt and decode", fix=f"use {limit} together or fewer")
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(vocab, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    with inference(model):
        runs = [_timed(model, ids, decode) for _ in range(repeats + 1)][1:]
    return Speed(
        prefill_tokens_per_s=batch * prompt / min(prefill for prefill, _ in runs),
        decode_tokens_per_s=batch * decode / min(after for _, after in runs),
    )


def _timed(model: PreTrainedModel, ids: torch.Tensor, decode: int) -> tuple[float, float]:
    """Seconds for the prompt and for the steps after it."""
    begin = now(ids.device)
    logits, cache = next_logits(model, ids, None)
    prefilled = now(ids.device)
    for _ in range(decode):
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        logits, cache = next_logits(model, ids, cache)
    return prefilled - begin, now(ids.device) - prefilled


def peak_memory_bytes(device: str | torch.device = "cpu") -> int:
    """The most memory held so far: of this process, libraries included, or on CUDA of torch's allocator on that device."""
    if torch.device(device).type == "cuda":
        return device_bytes(device, most=True)
    # Linux hands ru_maxrss down from the process that started this one; the kernel's own high-water mark is ours alone.
    if own := resident_bytes("VmHWM"):
        return own
    try:
        import resource
    except ImportError as error:
        raise MissingError("peak memory is not measured on this system", where=sys.platform) from error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
