"""What a recovery minimises: cross-entropy of the text's own tokens, and forward KL to the teacher's distribution.

Sums over the positions that count, in fp32, a part of them at a time: what is held of a large vocabulary is one part's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pared.evaluate.perplexity import divergence

_CHUNK = 2**24  # logits in fp32 at a time: 64 MB


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens at each position: log-probabilities fp32 [n, k] at the temperature, ids int32 [n, k]."""

    log_p: Tensor
    ids: Tensor


def _by_chunks(loss: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    size = max(1, _CHUNK // logits.shape[-1])
    parts = zip(logits.split(size), *(o.split(size) for o in others), strict=True)
    # Each part's softmax is computed again on the way back rather than kept.
    return torch.stack([checkpoint(loss, *part, use_reentrant=False) for part in parts]).sum()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over positions: logits [n, vocab], labels int64 [n]."""
    return _by_chunks(lambda z, y: F.cross_entropy(z.float(), y, reduction="sum"), logits, labels)


def forward_kl(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) summed over positions, both [n, vocab], softened, times temperature^2 (Hinton et al., 2015)."""

    def part(ours: Tensor, theirs: Tensor) -> Tensor:
        log_q = torch.log_softmax(ours.float() / temperature, dim=-1)
        log_p = torch.log_softmax(theirs.float() / temperature, dim=-1)
        return divergence(log_p, log_q).sum()

    return _by_chunks(part, logits, teacher) * temperature**2


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """What is kept of a teacher's logits [n, vocab]."""
    log_p, ids = torch.log_softmax(logits.float() / temperature, dim=-1).topk(min(k, logits.shape[-1]), dim=-1)
    return TopK(log_p, ids.to(torch.int32))


def top_k_kl(logits: Tensor, teacher: TopK, temperature: float = 1.0) -> Tensor:
    """Forward KL over k + 1 outcomes, summed over positions: the teacher's k likeliest tokens, and any other.

    At most the full divergence, and zero where both agree on these outcomes.
    """
    vocab = logits.shape[-1]

    def part(ours: Tensor, log_p: Tensor, ids: Tensor) -> Tensor:
        log_q = torch.log_softmax(ours.float() / temperature, dim=-1).gather(-1, ids.long())
        if ids.shape[-1] < vocab:
            log_p, log_q = (torch.cat([x, _rest(x)], dim=-1) for x in (log_p, log_q))
        return divergence(log_p, log_q).sum()

    return _by_chunks(part, logits, teacher.log_p, teacher.ids) * temperature**2


def _rest(log_p: Tensor) -> Tensor:
    """log of what is left of one, [n, 1]; never below the rounding of fp32, where the logarithm would be all noise."""
    return torch.log((1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=1e-7))
