"""What a model makes of a long context: loss and KL by position, keys found again by depth and length, memory of the cache.

The measures take plain functions from ids to logits, so that a model in another engine can be measured as well.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared import modeling
from pared.calibration import check_seq_len, inference, next_logits
from pared.errors import ModelError, UsageError
from pared.evaluate.perplexity import Logits, divergence, logits_of, windows
from pared.evaluate.report import Progress, Subject, compute_dtype, kept_tokens

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_LEAST_WORDS = 64
_WINDOWS, _NEEDLES = 8, 16


@dataclass(frozen=True)
class Bucket:
    """The tokens at positions [first, end): how many, their mean loss, and the mean KL(dense || model) in nats."""

    first: int
    end: int
    tokens: int
    nll: float
    kl: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 709 else math.inf


@dataclass(frozen=True)
class Needles:
    """Sequences that ask for a key's value, all of one length and depth: ids [n, length], and the values asked for [n]."""

    length: int
    depth: float
    ids: Tensor
    values: Tensor


@dataclass(frozen=True)
class Wording:
    """How a key's value is said and asked for. The value follows the question at once."""

    told: str = "\nThe key of{key} is{value}.\n"
    asked: str = "\nThe key of{key} is"


def edges(trained: int, longest: int) -> list[int]:
    """Ends of the buckets of positions: eighths of the trained length doubling up to it, then halves of it."""
    inside = [trained // 8, trained // 4, trained // 2, trained]
    outside = range(trained + trained // 2, longest + trained // 2, max(1, trained // 2))
    return [*(e for e in inside if e < longest), *(e for e in outside if e < longest), longest]


def by_position(logits: Logits, ids: Tensor, ends: Sequence[int], *, against: Logits | None = None) -> list[Bucket]:
    """Mean loss, and KL to a dense model, of the tokens in each bucket of positions. ids: [n, length], a row at a time.

    Token 0 is not scored. Softmax in fp32, sums in float64. ModelError where a value is not finite.
    """
    return _both_by_position(logits, ids, ends, against)[0]


def _both_by_position(
    logits: Logits, ids: Tensor, ends: Sequence[int], against: Logits | None
) -> tuple[list[Bucket], list[Bucket]]:
    """The buckets of a model, and those of the one that it is compared with (none without one), each run once."""
    nll, theirs, kl = (torch.zeros(ids.shape[1], dtype=torch.float64) for _ in range(3))
    for row in ids:
        log_q = logits(row[None])[0, :-1].float().log_softmax(-1).cpu()
        nll[1:] -= log_q.gather(1, row[1:, None])[:, 0].double()
        if against is not None:
            log_p = against(row[None])[0, :-1].float().log_softmax(-1).cpu()
            theirs[1:] -= log_p.gather(1, row[1:, None])[:, 0].double()
            kl[1:] += divergence(log_p, log_q).double()
    if not all(bool(torch.isfinite(v).all()) for v in (nll, theirs, kl)):
        raise ModelError("a loss or a divergence is not finite", where="long context", fix="run `pared verify` on both models")
    ours = _buckets(nll, None if against is None else kl, ends, len(ids))
    return ours, [] if against is None else _buckets(theirs, None, ends, len(ids))


def _buckets(nll: Tensor, kl: Tensor | None, ends: Sequence[int], rows: int) -> list[Bucket]:
    """Sums over rows by position as means by bucket."""
    out, first = [], 0
    for end in ends:
        start = max(1, first)
        count = (end - start) * rows
        if count > 0:
            mean = None if kl is None else max(0.0, float(kl[start:end].sum()) / count)
            out.append(Bucket(first, end, count, float(nll[start:end].sum()) / count, mean))
        first = end
    return out


def words_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words with the space before them that are one token each: what keys and values are drawn from."""
    found = []
    for i in range(len(tokenizer)):
        text = str(tokenizer.decode([i]))
        if len(text) > 4 and text[0] == " " and text[1:].isascii() and text[1:].isalpha():
            found.append(text)
        elif len(text) > 3 and text.isascii() and text.isalpha():
            found.append(" " + text)  # a tokenizer that marks the space in another way
    words = [w for w in dict.fromkeys(found) if len(_ids(tokenizer, "x" + w)) == len(_ids(tokenizer, "x")) + 1]
    if len(words) < _LEAST_WORDS:
        what = f"the tokenizer has {len(words)} words of one token, and keys and values need {_LEAST_WORDS}"
        raise UsageError(what, where="needles", fix="measure perplexity by position alone")
    return words


def make_needles(
    tokenizer: PreTrainedTokenizerBase,
    filler: Tensor,
    length: int,
    depth: float,
    *,
    count: int = _NEEDLES,
    others: int = 3,
    wording: Wording | None = None,
    seed: int = 0,
) -> Needles:
    """Text with one key and its value at a depth (0: the beginning, 1: just before the question), and a question at the end.

    filler: ids of the text [n], from which a place is drawn each time. others: so many other keys with values of their own
    lie at random depths, so that the key has to be read and not the form alone. UsageError where the text is too short.
    """
    words, wording, draw = words_of(tokenizer), wording or Wording(), random.Random(f"{seed}/{length}/{depth}")
    bos = tokenizer.bos_token_id
    begin = [bos] if isinstance(bos, int) else []
    rows, values = [], []
    for _ in range(count):
        chosen = draw.sample(words, 2 * (others + 1))
        lines = [_ids(tokenizer, wording.told.format(key=k, value=v)) for k, v in zip(chosen[::2], chosen[1::2], strict=True)]
        question = _ids(tokenizer, wording.asked.format(key=chosen[0]))
        room = length - len(begin) - len(question) - sum(map(len, lines))
        if room < 1 or room >= len(filler):
            what = f"sequences of {length} tokens can not be made from a text of {len(filler)}"
            raise UsageError(what, where="needles", fix="use other lengths, or more text")
        start = draw.randrange(len(filler) - room)
        body = filler[start : start + room].tolist()
        places = sorted(
            [(int(depth * room), 0, lines[0]), *((draw.randrange(room + 1), i, ln) for i, ln in enumerate(lines[1:], 1))]
        )
        ids, done = list(begin), 0
        for at, _, line in places:
            ids += [*body[done:at], *line]
            done = at
        rows.append([*ids, *body[done:], *question])
        values.append(_ids(tokenizer, "x" + chosen[1])[-1])
    return Needles(length, depth, torch.tensor(rows), torch.tensor(values))


def found(logits: Logits, needles: Needles) -> int:
    """How many of the values are the model's first choice after the question."""
    return sum(int(logits(row[None])[0, -1].argmax()) == int(v) for row, v in zip(needles.ids, needles.values, strict=True))


def cache_bytes(model: PreTrainedModel, length: int) -> int:
    """Bytes that the key-value cache holds after `length` tokens, as measured on the cache itself."""
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with inference(model):
        _, cache = next_logits(model, ids.to(model.device), None)
    tensors: dict[int, Tensor] = {}
    for layer in getattr(cache, "layers", []):
        for value in vars(layer).values():
            if isinstance(value, Tensor) and value.ndim > 1:
                tensors[id(value)] = value
    return sum(t.numel() * t.element_size() for t in tensors.values())


def evaluate_long(
    model: str | Path,
    *,
    text: str | Path,
    against: str | Path | None = None,
    longest: int | None = None,
    max_windows: int | None = None,
    needles: int = _NEEDLES,
    dtype: str = "auto",
    device: str = "cpu",
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Loss (and with `against` KL) by position, keys found again, and cache memory of a checkpoint.

    text: a .txt or .jsonl file. longest: tokens of a window, by default twice what the model was trained on, or that
    where its positions end there. Needles are asked for at a quarter, a half and all of the trained length and at `longest`.
    """
    ours = Subject.open(model)
    dense = None if against is None else Subject.open(against)
    if dense is not None and kept_tokens(ours, dense) is not None:
        raise UsageError("a long context is compared between models of one vocabulary", where="--against", fix="leave it out")
    compute = compute_dtype(dtype, device)
    trained = (dense or ours).max_positions
    if trained is None:
        raise ModelError("the config does not say how long a context the model was trained on", where=ours.checkpoint.path)
    built = modeling.load(ours.checkpoint.path, dtype=compute, device=device)
    limit = None if _turns(built) else trained
    longest = longest if longest is not None else limit or 2 * trained
    check_seq_len(longest, limit)
    tokenizer = (dense or ours).tokenizer()
    cut = windows(Path(text), tokenizer, longest)
    ids = cut.ids[: max_windows or _WINDOWS]
    own = logits_of(built)
    base = None if dense is None else logits_of(modeling.load(dense.checkpoint.path, dtype=compute, device=device))
    progress("positions", 0, 1)
    buckets, theirs = _both_by_position(_on(own, device), ids, edges(trained, longest), base and _on(base, device))
    progress("positions", 1, 1)
    report: dict[str, Any] = {
        **ours.facts(),
        "trained": trained,
        "longest": longest,
        "positions": [{**vars(b), "perplexity": b.perplexity} for b in buckets],
        "retrieval": _retrieval(_on(own, device), tokenizer, cut.ids.flatten(), trained, longest, needles, progress),
        "cache": {
            "bytes_per_token": ours.counts.kv_cache * built.dtype.itemsize,
            "measured_bytes_per_token": cache_bytes(built, min(trained, longest)) / min(trained, longest),
            "bytes_at_longest": ours.counts.kv_cache * built.dtype.itemsize * longest,
        },
        "dtype": str(built.dtype).removeprefix("torch."),
        "device": device,
        "protocol": _protocol(Path(text).name, ids, longest, needles),
    }
    if base is not None:
        report["against"] = {
            **(dense.facts() if dense else {}),
            "positions": [{**vars(b), "perplexity": b.perplexity} for b in theirs],
            "retrieval": _retrieval(_on(base, device), tokenizer, cut.ids.flatten(), trained, longest, needles, progress),
        }
    return report


def _retrieval(
    logits: Logits,
    tokenizer: PreTrainedTokenizerBase,
    filler: Tensor,
    trained: int,
    longest: int,
    count: int,
    progress: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    lengths = sorted({n for n in (trained // 4, trained // 2, trained, longest) if n <= longest})
    out: list[dict[str, Any]] = []
    for length in lengths:
        for depth in DEPTHS:
            asked = make_needles(tokenizer, filler, length, depth, count=count)
            out.append({"length": length, "depth": depth, "asked": count, "found": found(logits, asked)})
            progress("needles", len(out), len(lengths) * len(DEPTHS))
    return out


def _turns(model: PreTrainedModel) -> bool:
    """Whether positions are rotations, which have no end, rather than a table, which has one."""
    return any("inv_freq" in module._buffers for module in model.modules())


def _on(logits: Logits, device: str) -> Logits:
    return lambda ids: logits(ids.to(device))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _protocol(name: str, ids: Tensor, longest: int, needles: int) -> str:
    return (
        f"{name}: {len(ids)} contiguous windows of {longest} tokens, each token scored by its position in the window but the first. "
        f"Needles: {needles} sequences for each length and depth, of the same text, with one line that names the value of the "
        "key that is asked for at the end and three of other keys at random depths; keys and values are words of one token, "
        "and found means that the value is the first choice of all tokens."
    )
