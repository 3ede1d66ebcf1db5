"""An examination of several checkpoints at once: perplexity under a named protocol, tasks, and what they write."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pared import modeling
from pared.calibration import documents_of
from pared.errors import UsageError
from pared.evaluate.generation import write
from pared.evaluate.perplexity import windows
from pared.evaluate.report import Progress, Subject, compute_dtype, evaluate
from pared.evaluate.tasks import run_tasks

# name -> tokens in a window, and the texts that the protocol is about (NAME:CONFIG:SPLIT:FIELD, and what joins their rows)
PROTOCOLS: dict[str, tuple[int, dict[str, str]]] = {
    # LLM-Pruner's LLMPruner/datasets/ppl_dataset.py: rows joined by two newlines, windows of 128, the rest dropped.
    "llm-pruner": (
        128,
        {
            "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1:test:text",
            "ptb": "ptb-text-only/ptb_text_only:penn_treebank:validation:sentence",
        },
    ),
    "standard": (2048, {"wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1:test:text"}),
}


def examine(
    models: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    protocol: str | None = None,
    texts: Sequence[str] = ("self",),
    tasks: Sequence[str] = (),
    task_dir: Path | None = None,
    limit: int | None = None,
    generate: int = 0,
    progress: Progress = lambda stage, done, total: None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """One record for each model, the dense one last where there is one.

    protocol: a name in PROTOCOLS, which sets the length of windows and, where no text is given, the texts. generate: so
    many prompts are continued. settings: of `pared.evaluate.report.evaluate`. With `against`, a model's `kept` is its
    average accuracy as a share of the dense model's.
    """
    if protocol is not None:
        if protocol not in PROTOCOLS:
            raise UsageError(f"unknown protocol {protocol!r}", where="--protocol", fix=f"one of {', '.join(PROTOCOLS)}")
        if settings.get("seq_len") or settings.get("stride"):
            raise UsageError(
                "a protocol says how text is cut", where="--seq-len, --stride", fix="leave them, or --protocol, out"
            )
        settings["seq_len"] = PROTOCOLS[protocol][0]
    with tempfile.TemporaryDirectory() as folder:
        named = {str(t): str(t) for t in texts}
        if protocol is not None and list(texts) == ["self"]:
            named = {name: str(_fetched(name, source, Path(folder))) for name, source in PROTOCOLS[protocol][1].items()}
        everyone = [*models, *([against] if against is not None else [])]
        found = [
            _one(m, against if m is not against else None, named, tasks, task_dir, limit, generate, progress, dict(settings))
            for m in everyone
        ]
    dense = found[-1].get("average") if against is not None else None
    for record in found:
        record["kept"] = record["average"] / dense if dense and record.get("average") is not None else None
        record["protocol_name"] = protocol
    return found


def _fetched(name: str, source: str, folder: Path) -> Path:
    """The rows of a data set as the one document that the protocol is about."""
    path = folder / f"{name}.txt"
    path.write_text("\n\n".join(documents_of(source)))
    return path


def _one(
    model: str | Path,
    against: str | Path | None,
    texts: dict[str, str],
    tasks: Sequence[str],
    task_dir: Path | None,
    limit: int | None,
    generate: int,
    progress: Progress,
    settings: dict[str, Any],
) -> dict[str, Any]:
    record: dict[str, Any] = {"model": str(model), "texts": {}}
    for name, text in texts.items():
        measured = evaluate(model, against=against, text=text, progress=progress, **settings)
        settings["speed"] = False  # once is enough
        record = {**measured, **{k: v for k, v in record.items() if k in ("texts", *_COSTS)}}
        record["texts"][name] = {k: measured[k] for k in ("perplexity", "kl", "bits_per_byte", "top1_agreement", "protocol")}
    if not tasks and not generate:
        return record
    subject = Subject.open(model)
    device = str(settings.get("device", "cpu"))
    dtype = compute_dtype(str(settings.get("dtype", "auto")), device)
    loaded, tokenizer = modeling.load(subject.checkpoint, dtype=dtype, device=device), subject.tokenizer()
    if tasks:
        record |= run_tasks(loaded, tokenizer, tasks, task_dir=task_dir, limit=limit, batch=int(settings.get("batch", 8)))
        progress("tasks", 1, 1)
    if generate:
        text = next(iter(texts.values()))
        if text == "self":
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            prompts = torch.full((generate, 1), int(start or 0))
        else:
            prompts = windows(Path(text), tokenizer, 16).ids[:generate]
        room = (subject.max_positions or 10**9) - prompts.shape[1]
        length = min(128, room)
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            done = write(loaded, tokenizer, prompts, length=length, temperature=temperature)
            record.setdefault("written", {})[name] = {
                "repeated": {str(n): share for n, share in done.repeated.items()},
                "looping": done.looping,
                "samples": done.samples,
            }
        progress("writing", 1, 1)
    return record


_COSTS = ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes")
