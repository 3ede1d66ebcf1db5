"""One evaluation as a record: quality, size and speed of a checkpoint, and of the dense model that it is compared with."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pared import modeling, process
from pared.accounting import Account, account
from pared.calibration import check_seq_len, check_size, sample_from_model
from pared.checkpoint import Checkpoint
from pared.errors import ModelError, UsageError
from pared.evaluate.perplexity import (
    Logits,
    Quality,
    Windows,
    bits_per_byte,
    logits_of,
    measure,
    protocol,
    restricted,
    windows,
)
from pared.evaluate.speed import Speed, measure_speed, peak_memory_bytes
from pared.plan import Plan, from_ranges
from pared.proof import proved_layout
from pared.structure import experts_per_token

Progress = Callable[[str, int, int], None]  # stage, done, total
DEFAULT_SEQ_LEN = 512
SELF_WINDOWS = 64
# A seed that nobody calibrates with, so that text to be scored is never the text that was calibrated on.
SELF_SEED = 1_000_003
_PROMPT, _DECODE, _SHORT = 128, 32, 1.5  # tokens, tokens, seconds


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is evaluated: opened and counted, not loaded."""

    checkpoint: Checkpoint
    config: PreTrainedConfig
    counts: Account

    @classmethod
    def open(cls, model: str | Path) -> Subject:
        checkpoint = Checkpoint.open(model)
        config, per_layer = modeling.make_config(checkpoint.config)
        used = experts_per_token(config)
        return cls(checkpoint, config, account(proved_layout(config, per_layer), experts_used=used))

    @property
    def max_positions(self) -> int | None:
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def vocab(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(self.checkpoint.path, config=self.config, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"the tokenizer can not be loaded: {error}", where=self.checkpoint.path) from error

    def facts(self) -> dict[str, Any]:
        """What needs no run to be known."""
        c = self.counts
        return {
            "model": str(self.checkpoint.path),
            "params": c.params,
            "block_params": c.block_params,
            "bytes": self.checkpoint.nbytes,
            "macs_per_token": c.flops,
            "macs_context": c.context,
            "kv_cache_per_token": c.kv_cache,
            "layers": c.layers,
        }


def compute_dtype(dtype: str, device: str) -> torch.dtype | None:
    """What to compute in, by name; auto: fp32 on a CPU, else what the checkpoint has (None). UsageError for other names."""
    if dtype != "auto" and dtype not in modeling.COMPUTE:
        raise UsageError(f"unknown dtype {dtype!r}", where="dtype", fix=f"one of auto, {', '.join(modeling.COMPUTE)}")
    return modeling.COMPUTE.get(dtype, torch.float32 if torch.device(device).type == "cpu" else None)


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path = "self",
    seq_len: int | None = None,
    stride: int | None = None,
    batch: int = 8,
    max_windows: int | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    speed: bool = True,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Perplexity, size and speed of a checkpoint; with `against`, KL and agreement with that dense model, and its own numbers.

    text: a .txt or .jsonl file, or "self" for text that the dense model (without one: the model itself) writes.
    seq_len: by default 512, or what the model can take. max_windows: how much of the text; of "self" 64 windows.
    dtype "auto": fp32 on a CPU, elsewhere the checkpoint's own. Raises UsageError and ModelError.
    """
    ours = Subject.open(model)
    dense = None if against is None else Subject.open(against)
    reference = dense or ours
    kept = None if dense is None else kept_tokens(ours, dense)
    limit = min((n for s in (ours, reference) if (n := s.max_positions) is not None), default=None)
    seq_len = seq_len if seq_len is not None else min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN)
    if batch < 1:
        raise UsageError(f"a batch of {batch} windows holds nothing", where="batch", fix="use a batch of 1 or more")
    if max_windows is not None and max_windows < 1:
        raise UsageError(f"{max_windows} windows hold no text", where="max_windows", fix="use 1 or more, or none for all")
    given = _given(text, reference, seq_len, stride, max_windows, limit)
    compute = compute_dtype(dtype, device)

    def load(subject: Subject) -> PreTrainedModel:
        return modeling.load(subject.checkpoint.path, dtype=compute, device=device)

    # Each model alone, the one asked about first: what the other one needs must not count as its memory.
    costs = {id(s): _cost(load, s, device, progress) if speed else _NO_COST for s in (ours, dense) if s is not None}
    base = load(reference)
    own_text, how = given or _self_text(base, reference, seq_len, max_windows or SELF_WINDOWS, progress)
    text_windows, theirs, own_bits = own_text, logits_of(base), None
    if kept is not None:
        text_windows, again = _given(text, ours, seq_len, stride, max_windows, limit) or _read_again(own_text, reference, ours)
        how = f"{how} {again}" if given is None else again
        how += _kept_protocol(len(kept), reference.vocab)
        own_bits = bits_per_byte(_quality(theirs, None, own_text, batch, device, progress)[0].nll, own_text)
        theirs = restricted(theirs, kept)
    quality, of_dense = _quality(
        theirs, None if dense is None else logits_of(load(ours)), text_windows, batch, device, progress
    )
    report = {
        "perplexity": quality.perplexity,
        "nll": quality.nll,
        "bits_per_byte": bits_per_byte(quality.nll, text_windows),
        "tokens": quality.tokens,
        "seq_len": quality.seq_len,
        "stride": quality.stride,
        "kl": quality.kl,
        "top1_agreement": quality.top1_agreement,
        **ours.facts(),
        **costs[id(ours)],
        "text": str(text),
        "dtype": dtype if dtype != "auto" else str(base.dtype).removeprefix("torch."),
        "device": device,
        "protocol": how + (_speed_protocol(limit) if speed else ""),
    }
    if dense is not None and of_dense is not None:
        own: dict[str, Any] = {"perplexity": of_dense.perplexity, "nll": of_dense.nll}
        own["bits_per_byte"] = own_bits or bits_per_byte(of_dense.nll, text_windows)
        report["against"] = {**own, **dense.facts(), **costs[id(dense)]}
    return report


def kept_tokens(ours: Subject, dense: Subject) -> Tensor | None:
    """For each token of a model its id in the dense model; None where both have the same vocabulary.

    From the plan that the model was pruned by. ModelError where there is none for this dense model.
    """
    if ours.vocab == dense.vocab:
        return None
    file = ours.checkpoint.path / "plan.json"
    plan = Plan.load(file) if file.is_file() else None
    if plan is not None and plan.vocab is not None and plan.before.params == dense.counts.params:
        kept = from_ranges(plan.vocab)
        if len(kept) == ours.vocab and int(kept[-1]) < dense.vocab:
            return kept
    raise ModelError(
        f"which of the dense model's {dense.vocab:,} tokens are this model's {ours.vocab:,} is not known: no plan.json says it",
        where=ours.checkpoint.path,
        fix="compare with the model that this one was pruned from; with others by bits per byte, each on its own: --text FILE",
    )


def _kept_protocol(kept: int, dense: int) -> str:
    return (
        f" The pruned vocabulary's tokenizer makes the tokens; the dense model is given the same ones by its own ids, and its "
        f"distribution over {dense:,} tokens is restricted to the {kept:,} that were kept and renormalised: for its perplexity, "
        "for the divergence and for the first choice. Its bits per byte are its own: of the text in all of its tokens."
    )


def _given(
    text: str | Path, subject: Subject, seq_len: int, stride: int | None, max_windows: int | None, limit: int | None
) -> tuple[Windows, str] | None:
    """The windows of a file and how they were made; None where the model has to write the text first."""
    if str(text) == "self":
        check_size(max_windows or SELF_WINDOWS, seq_len, limit)
        if stride is not None:
            what = "text that the model writes comes in separate windows"
            raise UsageError(what, where="stride", fix="give a file, or no stride")
        return None
    check_seq_len(seq_len, limit)
    whole = windows(Path(text), subject.tokenizer(), seq_len, stride, max_positions=limit)
    how = f"{Path(text).name}: {protocol(whole)}"
    if max_windows is None or max_windows >= len(whole.ids):
        return whole, how
    part = replace(whole, ids=whole.ids[:max_windows], first_scored=whole.first_scored[:max_windows])
    return part, f"{how} Of these the first {max_windows} windows alone: {part.tokens} tokens scored."


def _self_text(model: PreTrainedModel, subject: Subject, seq_len: int, count: int, progress: Progress) -> tuple[Windows, str]:
    progress("sampling text", 0, 1)
    tokenizer = subject.tokenizer()
    ids = sample_from_model(model, tokenizer, count, seq_len, SELF_SEED)
    progress("sampling text", 1, 1)
    size = sum(len(written.encode()) for written in _as_text(ids, tokenizer))
    text = Windows(ids, torch.ones(count, dtype=torch.int64), None, count, ids.numel(), size)
    how = (
        f"{count} windows of {seq_len} tokens that {subject.checkpoint.path.name} itself writes (ancestral sampling at "
        f"temperature 1, seed {SELF_SEED}), of which the first token is not scored: {text.tokens} tokens scored."
    )
    return text, how


def _read_again(text: Windows, writer: Subject, reader: Subject) -> tuple[Windows, str]:
    """What one model wrote in the tokens of another."""
    again = windows(_as_text(text.ids, writer.tokenizer()), reader.tokenizer(), text.seq_len)
    return again, f"Read again as text: {protocol(again)}"


def _as_text(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in ids]


_NO_COST: dict[str, Any] = {"prefill_tokens_per_s": None, "decode_tokens_per_s": None, "peak_memory_bytes": None}


def _speed_sizes(limit: int | None) -> tuple[int, int]:
    """Tokens of the prompt and tokens after it, within what the model can take."""
    total = min(_PROMPT + _DECODE, limit or _PROMPT + _DECODE)
    decode = max(1, total // 5)
    return total - decode, decode


def _speed_protocol(limit: int | None) -> str:
    prompt, decode = _speed_sizes(limit)
    return (
        f" Speed: one sequence, a prompt of {prompt} tokens and {decode} greedy steps after it with the key-value cache, the "
        "best of 3 runs or more. Peak memory: of the process while this model alone is loaded and does that."
    )


def _cost(load: Callable[[Subject], PreTrainedModel], subject: Subject, device: str, progress: Progress) -> dict[str, Any]:
    """Speed and peak memory of a model that is alone in memory, and gone afterwards."""
    progress("speed", 0, 1)
    _forget_peak(device)
    model = load(subject)
    prompt, decode = _speed_sizes(subject.max_positions)
    begin = time.perf_counter()
    speed = measure_speed(model, prompt=prompt, decode=decode)
    if time.perf_counter() - begin < _SHORT:
        # Runs of a small model are so short that whatever else the machine does decides: more of them find a quiet moment.
        more = measure_speed(model, prompt=prompt, decode=decode, repeats=20)
        speed = Speed(*(max(a, b) for a, b in zip(astuple(speed), astuple(more), strict=True)))
    progress("speed", 1, 1)
    return {
        "prefill_tokens_per_s": speed.prefill_tokens_per_s,
        "decode_tokens_per_s": speed.decode_tokens_per_s,
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def _forget_peak(device: str) -> None:
    """Let the peak of memory begin at what is held now, where the system allows that."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        process.return_freed_memory()  # what an earlier run left with the allocator is not held
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _quality(
    base: Logits, ours: Logits | None, text: Windows, batch: int, device: str, progress: Progress
) -> tuple[Quality, Quality | None]:
    """Quality of `ours` against `base`, and of `base` itself; of `base` alone where there is no other.

    A batch of windows at a time, so that the dense logits serve both.
    """
    parts: list[tuple[Quality, Quality | None]] = []
    for first in range(0, len(text.ids), batch):
        part = replace(text, ids=text.ids[first : first + batch], first_scored=text.first_scored[first : first + batch])
        logits = _last(base)
        try:
            if ours is None:
                parts.append((measure(logits, part, batch=batch, device=device), None))
            else:
                quality = measure(ours, part, against=logits, batch=batch, device=device)
                parts.append((quality, measure(logits, part, batch=batch, device=device)))
        except ModelError as error:
            raise ModelError(error.what, where=f"windows {first} to {first + len(part.ids) - 1}", fix=error.fix) from error
        progress("windows", min(first + batch, len(text.ids)), len(text.ids))
    return _mean([q for q, _ in parts]), None if ours is None else _mean([q for _, q in parts if q is not None])


def _last(logits: Logits) -> Logits:
    """The same function, computed once for what it is asked twice in a row."""
    held: list[tuple[Tensor, Tensor]] = []

    def remembered(ids: Tensor) -> Tensor:
        if not held or not torch.equal(held[0][0], ids):
            held[:] = [(ids, logits(ids))]
        return held[0][1]

    return remembered


def _mean(parts: list[Quality]) -> Quality:
    """The quality over all parts, each weighted by its tokens."""
    tokens = sum(q.tokens for q in parts)

    def over(value: Callable[[Quality], float | None]) -> float | None:
        found = [(v, q.tokens) for q in parts if (v := value(q)) is not None]
        return math.fsum(v * n for v, n in found) / tokens if found else None

    nll = over(lambda q: q.nll) or 0.0
    return replace(
        parts[0],
        perplexity=math.exp(nll) if nll < 709 else math.inf,  # exp overflows a float64 above that
        nll=nll,
        tokens=tokens,
        kl=over(lambda q: q.kl),
        top1_agreement=over(lambda q: q.top1_agreement),
    )
