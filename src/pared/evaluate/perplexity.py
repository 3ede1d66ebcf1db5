"""Perplexity under a stated protocol and, against a dense model, KL divergence and top-1 agreement, all in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pared.calibration import check_seq_len, inference, read_documents, tokenize_documents
from pared.errors import ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Logits = Callable[[Tensor], Tensor]
"""input_ids [b, s] -> logits [b, s, vocab]; a resident model or a streamed one."""

# Logits that are in fp32 at a time: 64 MB, of which a handful of copies are alive, whatever the vocabulary.
_CHUNK = 2**24


@dataclass(frozen=True, eq=False)
class Windows:
    """Text cut for evaluation: ids [n, seq_len] and, for each window, the first position that is scored [n].

    text_bytes: of the whole text in UTF-8, which its stream_tokens tokens stand for; None where that is not known.
    """

    ids: Tensor
    first_scored: Tensor
    stride: int | None
    documents: int
    stream_tokens: int
    text_bytes: int | None = None

    @property
    def seq_len(self) -> int:
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return int((self.seq_len - self.first_scored).sum())

    @property
    def dropped(self) -> int:
        """Number of tokens at the end of the text that no window reaches."""
        return self.stream_tokens - self.seq_len - (len(self.ids) - 1) * (self.stride or self.seq_len)


@dataclass(frozen=True)
class Quality:
    """nll and kl, KL(dense || model), in nats per scored token; kl and top1_agreement are None without a dense model."""

    perplexity: float
    nll: float
    tokens: int
    seq_len: int
    stride: int | None
    kl: float | None
    top1_agreement: float | None


def windows(
    text: str | Path | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    stride: int | None = None,
    *,
    max_positions: int | None = None,
) -> Windows:
    """Windows over a .txt or .jsonl file or a list of documents; `protocol` says in words how they are made and scored.

    Without a stride they are contiguous. With one, a window begins every `stride` tokens and only what the one before
    it did not reach is scored, so that each token but the first few has a context of at least seq_len - stride tokens.
    """
    check_seq_len(seq_len, max_positions)
    if stride is not None and not 1 <= stride <= seq_len:
        what = f"a stride of {stride} does not fit windows of {seq_len} tokens"
        raise UsageError(what, where="stride", fix=f"use 1 to {seq_len}, or none for contiguous windows")
    documents = read_documents(text) if isinstance(text, str | Path) else list(text)
    stream = torch.tensor(list(chain.from_iterable(tokenize_documents(documents, tokenizer))), dtype=torch.int64)
    if len(stream) < seq_len:
        where = text if isinstance(text, str | Path) else "the documents given"
        what = f"the text has {len(stream)} tokens, less than one window of {seq_len}"
        raise UsageError(what, where=where, fix="give more text or use a smaller seq_len")
    ids = stream.unfold(0, seq_len, stride or seq_len)  # a view: overlapping windows take no memory
    first_scored = torch.full((len(ids),), max(1, seq_len - (stride or seq_len)), dtype=torch.int64)
    first_scored[0] = 1
    return Windows(ids, first_scored, stride, len(documents), len(stream), sum(len(d.encode()) for d in documents))


def bits_per_byte(nll: float, windows: Windows) -> float | None:
    """A mean loss per token as bits per byte of the text: comparable between models with unlike tokenizers."""
    return nll / math.log(2) * windows.stream_tokens / windows.text_bytes if windows.text_bytes else None


def restricted(logits: Logits, kept: Tensor) -> Logits:
    """A model whose tokens are numbered by their place in `kept` (int64, the model's own ids), and that knows no others.

    A softmax over what it gives is the model's distribution over the kept tokens alone.
    """

    def inner(ids: Tensor) -> Tensor:
        chosen = kept.to(ids.device)
        out = logits(chosen[ids])
        return out[..., chosen.to(out.device)]

    return inner


def protocol(windows: Windows) -> str:
    """One sentence that says exactly what was scored, to be printed beside the numbers."""
    n, length = len(windows.ids), windows.seq_len
    if windows.stride is None:
        cut = f"cut into {n} contiguous windows of {length} tokens, of which the first token is not scored"
    else:
        cut = (
            f"cut into {n} windows of {length} tokens that begin every {windows.stride} tokens, of which the last "
            f"{length - max(1, length - windows.stride)} tokens are scored (in the first window all but its first token)"
        )
    return (
        f"{_counted(windows.documents, 'document')} tokenised one by one with the tokenizer's own special tokens, "
        f"concatenated, {cut}: {_counted(windows.tokens, 'token')} scored, the last {windows.dropped} of "
        f"{windows.stream_tokens}, too few for a window, dropped."
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def logits_of(model: PreTrainedModel) -> Logits:
    """A resident model as a plain function from ids to logits, without dropout or gradients."""

    def logits(ids: Tensor) -> Tensor:
        with inference(model):
            return model(input_ids=ids, use_cache=False).logits

    return logits


def measure(
    logits: Logits,
    windows: Windows,
    *,
    against: Logits | None = None,
    batch: int = 8,
    device: str | torch.device = "cpu",
) -> Quality:
    """Quality of a model over the windows; `against` is the dense model that KL and agreement refer to.

    Softmax in fp32, sums in float64. ModelError where a loss or a divergence is not finite, or the vocabularies differ.
    """
    if batch < 1:
        raise UsageError(f"a batch of {batch} windows holds nothing", where="batch", fix="use a batch of 1 or more")
    nll = kl = 0.0
    agreed = 0
    with torch.no_grad():
        for first in range(0, len(windows.ids), batch):
            ids = windows.ids[first : first + batch].to(device)
            begins = windows.first_scored[first : first + batch].to(device)
            where = f"windows {first} to {first + len(ids) - 1}"
            reference = None if against is None else against(ids)
            ours = logits(ids)
            if reference is not None and reference.shape != ours.shape:
                raise ModelError(
                    f"logits {list(ours.shape)} can not be compared with the dense model's {list(reference.shape)}",
                    where=where,
                    fix="compare with the model that this one was pruned from",
                )
            added = _sums(ours, reference, ids, begins)
            for name, value in zip(("loss", "KL divergence to the dense model"), added, strict=False):
                if not math.isfinite(value):
                    raise ModelError(f"the {name} is {value}", where=where, fix="run `pared verify` on both models")
            nll, kl, agreed = nll + added[0], kl + added[1], agreed + added[2]
    tokens = windows.tokens
    mean = nll / tokens
    return Quality(
        perplexity=math.exp(mean) if mean < 709 else math.inf,  # exp overflows a float64 above that
        nll=mean,
        tokens=tokens,
        seq_len=windows.seq_len,
        stride=windows.stride,
        kl=None if against is None else max(0.0, kl / tokens),  # rounding can leave -1e-12
        top1_agreement=None if against is None else agreed / tokens,
    )


def _sums(ours: Tensor, reference: Tensor | None, ids: Tensor, begins: Tensor) -> tuple[float, float, int]:
    """Summed over the scored tokens: nll, KL(reference || ours), equal first choices. ours, reference: [b, s, vocab]."""
    length, vocab = ours.shape[1:]
    scored = torch.arange(length, device=ids.device) >= begins[:, None]
    nll = torch.zeros((), dtype=torch.float64)
    kl = torch.zeros((), dtype=torch.float64)
    agreed = 0
    targets = ids.flatten()
    for chunk in scored.flatten().nonzero()[:, 0].split(max(1, _CHUNK // vocab)):
        # The token at a position is predicted by the logits of the position before it, in the same window.
        before = (chunk - 1).to(ours.device)
        log_q = torch.log_softmax(ours.flatten(0, 1)[before].float(), dim=-1)
        nll -= log_q.gather(1, targets[chunk].to(log_q.device)[:, None]).cpu().double().sum()
        if reference is None:
            continue
        log_p = torch.log_softmax(reference.flatten(0, 1)[before.to(reference.device)].float(), dim=-1).to(log_q.device)
        agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        kl += divergence(log_p, log_q).cpu().double().sum()
    return float(nll), float(kl), agreed


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row [k, vocab] -> [k].

    Written as sum p log(p/q) - p + q: no term is negative and the rounding of either normalisation cancels to first
    order, so that small divergences are right in fp32. Entries with p = 0 (a masked vocabulary) contribute q.
    """
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    return terms.sub_(p).add_(log_q.exp()).sum(dim=-1)
