"""Recovery: a pruned checkpoint in, one with its quality brought back by a short training out."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared import modeling
from pared.calibration import sample_from_model
from pared.durable import write_whole
from pared.errors import MissingError, UsageError
from pared.estimate import Progress, silent
from pared.plan import Plan
from pared.recover.data import Example, hold_out, read_examples, whole_pieces
from pared.recover.output import write_recovered
from pared.recover.packing import Row, Rows, isolates, rows_of_epoch, training_rows
from pared.recover.teacher import Cache, check_fits, resident, vocabulary_map
from pared.recovery import LARGEST_BATCH, Recovery, default_batch, default_rate, make_recovery
from pared.source import Source
from pared.writer import CheckpointWriter

DEFAULT_SEQ_LEN = 512
SELF_ROWS = 512  # that the teacher writes where no amount is given
_BLOCK_ROWS = 128  # windows that blocks are distilled on


@dataclass(frozen=True)
class Recovered:
    """Where the result lies, and the report: tokens seen, the held-out curve, what was done."""

    out: Path
    report: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Run:
    """What the parts of one recovery share."""

    recovery: Recovery
    student: Source
    teacher: Source | None
    work: Path
    kept: Tensor | None
    plan: Plan | None
    main: bool
    progress: Progress

    @property
    def dtype(self) -> torch.dtype:
        if self.recovery.dtype != "auto":
            return modeling.COMPUTE[self.recovery.dtype]
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def device(self) -> str:
        from accelerate import PartialState

        return "cpu" if self.recovery.device == "cpu" else str(PartialState().device)

    @property
    def seq_len(self) -> int:
        limits = [
            getattr(s.config.get_text_config(), "max_position_embeddings", None) for s in (self.student, self.teacher) if s
        ]
        limit = min((n for n in limits if n), default=None)
        wanted = self.recovery.seq_len
        if wanted and limit and wanted > limit:
            what = f"rows of {wanted} tokens are longer than the model's {limit} positions"
            raise UsageError(what, where="--seq-len", fix=f"use {limit} or fewer")
        return wanted or min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN)


def recover(
    model: str | Path,
    *,
    out: str | Path,
    teacher: str | Path | None = None,
    base: dict[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> Recovered:
    """Train a pruned checkpoint for a short while and write the result.

    teacher: the dense model, where it is learnt from. settings: fields of `Recovery`; base: settings that those override.
    A killed run goes on from its last whole checkpoint in OUT.training when it is started again. Under torchrun or
    accelerate launch each process calls this; the first one writes. Raises the errors of `pared.errors`.
    """
    recovery = make_recovery(base, **settings)
    _check_installed(recovery)
    from accelerate import PartialState

    processes = PartialState(cpu=recovery.device == "cpu")
    needs = recovery.distils or recovery.data == "self" or recovery.block_steps > 0
    if needs and teacher is None:
        raise UsageError(
            "there is no dense model to learn from", where="--teacher", fix="--teacher MODEL, or --objective ce with --data"
        )
    started = time.perf_counter()
    student = Source.open(model)
    assert student.checkpoint is not None
    path = student.checkpoint.path
    plan = Plan.load(path / "plan.json") if (path / "plan.json").is_file() else None
    dense = Source.open(teacher) if teacher is not None and needs else None
    kept = None
    if dense is not None and dense.checkpoint is not None:
        if student.config.get_text_config().vocab_size != dense.config.get_text_config().vocab_size:
            kept = vocabulary_map(path, dense.checkpoint.path)
        check_fits(student, dense, kept)
    target = Path(os.path.abspath(Path(out).expanduser()))
    run = _Run(
        recovery, student, dense, target.with_name(target.name + ".training"), kept, plan, processes.is_main_process, progress
    )
    run.seq_len  # noqa: B018 (refused before anything is computed)
    adapter = recovery.method == "lora" and not recovery.merge
    claim = CheckpointWriter(out, overwrite=overwrite, source=path, adapter=adapter) if run.main else contextlib.nullcontext()
    with claim as writer:
        trained, report = _train(run)
        report |= {"seconds": round(time.perf_counter() - started, 2), "out": str(target)}
        if writer is not None:
            write_recovered(writer, student, plan, recovery, trained, report)
            shutil.rmtree(run.work, ignore_errors=True)
        processes.wait_for_everyone()
    return Recovered(target, report)


def _check_installed(recovery: Recovery) -> None:
    if recovery.deepspeed and not Path(recovery.deepspeed).is_file():
        raise UsageError(
            "there is no DeepSpeed config", where=f"--deepspeed {recovery.deepspeed}", fix="give the path of its JSON file"
        )
    for package, where in (("accelerate", "pared recover"), ("deepspeed", "--deepspeed")):
        if (package != "deepspeed" or recovery.deepspeed) and importlib.util.find_spec(package) is None:
            fix = "pip install 'pared[recover]'" if package == "accelerate" else "pip install deepspeed, or use FSDP2"
            raise MissingError(f"training needs the package {package!r}", where=where, fix=fix)
    if recovery.dtype == "float16" and (recovery.device == "cpu" or not torch.cuda.is_available()):
        raise UsageError("training in fp16 needs a GPU", where="--dtype float16", fix="--dtype float32, or bfloat16")


def _train(run: _Run) -> tuple[nn.Module, dict[str, Any]]:
    """The trained model, and what is reported of its training."""
    recovery = run.recovery
    tokenizer = run.student.get_tokenizer()
    run.work.mkdir(parents=True, exist_ok=True)
    examples = _examples(run, tokenizer)
    learn, aside = hold_out(examples, recovery.held_out, recovery.seed)
    plain = _load(run)
    isolated = recovery.packing == "documents" and isolates(plain, run.seq_len)
    packing = "none" if recovery.packing == "documents" and not isolated else recovery.packing
    held = rows_of_epoch(aside, run.seq_len, packing, recovery.seed) if aside else []
    model = _trainable(run, plain)
    width = run.student.config.get_text_config().hidden_size
    rate = recovery.learning_rate or default_rate(recovery, width)
    rows = _rows(run, model, learn, packing, isolated)
    report: dict[str, Any] = {
        "method": recovery.method,
        "objective": recovery.objective,
        "learning_rate": rate,
        "seq_len": run.seq_len,
        "packing": packing,
        "documents": len(learn),
        "held_out_documents": len(aside),
        "tokens": sum(r.tokens for r in rows),
        "steps": 0,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    if recovery.block_steps and rows:
        report["blocks"] = _distil_blocks(run, model, rows)
    if rows:
        model, more = _steps(run, model, rows, held, rate, isolated, tokenizer)
        report |= more
    return model, report


def _load(run: _Run) -> PreTrainedModel:
    """The pruned model: in fp32 where all weights are trained, under adapters in what products are computed in."""
    assert run.student.checkpoint is not None
    model = modeling.load(run.student.checkpoint, dtype=torch.float32 if run.recovery.method == "full" else run.dtype)
    model.config.use_cache = False
    return model


def _trainable(run: _Run, model: PreTrainedModel) -> nn.Module:
    if run.recovery.method == "full":
        return model
    from pared.recover.adapters import with_adapters

    assert run.student.checkpoint is not None
    return with_adapters(model, run.recovery, str(run.student.checkpoint.path.resolve()))


def _examples(run: _Run, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    recovery = run.recovery
    if recovery.data != "self":
        return whole_pieces(read_examples(recovery.data, tokenizer, answers_only=recovery.loss_on == "answers"), run.seq_len)
    count = SELF_ROWS if recovery.tokens is None else math.ceil(recovery.tokens / run.seq_len / (1 - recovery.held_out)) + 1
    file = run.work / "self.safetensors"
    with _main_first(run):
        if not file.exists():
            ids = _written_by_teacher(run, count)
            save_file({"ids": ids}, file.with_suffix(".partial"))
            file.with_suffix(".partial").replace(file)
    ids = load_file(file)["ids"]
    if run.kept is not None:
        assert run.teacher is not None
        texts = [str(run.teacher.get_tokenizer().decode(row, skip_special_tokens=True)) for row in ids]
        return [Example(tuple(i), (True,) * len(i)) for i in (tokenizer(t)["input_ids"] for t in texts) if len(i) > 1]
    return [Example(tuple(row), (True,) * len(row)) for row in ids.tolist()]


def _written_by_teacher(run: _Run, count: int) -> Tensor:
    assert run.teacher is not None
    run.progress("sampling text", 0, 1)
    model = run.teacher.resident(run.dtype, run.device)
    ids = sample_from_model(model, run.teacher.get_tokenizer(), count, run.seq_len, run.recovery.seed)
    run.progress("sampling text", 1, 1)
    return ids.contiguous()


@contextlib.contextmanager
def _main_first(run: _Run) -> Iterator[None]:
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield


def _rows(run: _Run, model: nn.Module, learn: Sequence[Example], packing: str, isolated: bool) -> list[Row]:
    """The rows of the whole run in their order; what a killed run settled on is kept."""
    recovery = run.recovery
    note = run.work / "run.json"
    of = _identity(run, learn)
    with _main_first(run):
        if not note.exists():
            tokens = recovery.tokens
            if recovery.minutes is not None:
                tokens = _tokens_in(run, model, learn, packing, isolated)
            write_whole(note, json.dumps({"of": of, "tokens": tokens}))
    found = json.loads(note.read_text())
    if found["of"] != of:
        raise UsageError(
            "another training stopped half way here: its settings, model or data were not these",
            where=run.work,
            fix="start that one again, or remove the directory",
        )
    return training_rows(learn, seq_len=run.seq_len, packing=packing, seed=recovery.seed, tokens=found["tokens"])


def _identity(run: _Run, learn: Sequence[Example]) -> str:
    """What a run has to be the same in to go on from another's checkpoint."""
    state = hashlib.sha256(run.recovery.model_dump_json().encode())
    for source in (run.student, run.teacher):
        if source is not None and source.checkpoint is not None:
            state.update(source.checkpoint.digest().encode())
    for example in learn:
        state.update(repr((example.ids, example.target)).encode())
    return state.hexdigest()


def _tokens_in(run: _Run, model: nn.Module, learn: Sequence[Example], packing: str, isolated: bool) -> int:
    """Tokens that fit into the minutes asked for, as two steps of this machine say (their gradients are thrown away)."""
    from accelerate import PartialState

    from pared.recover.training import Objective, collator_of

    assert run.recovery.minutes is not None
    rows = rows_of_epoch(learn, run.seq_len, packing, run.recovery.seed)[: 2 * (run.recovery.batch or LARGEST_BATCH)]
    objective = Objective(run.recovery.model_copy(update={"objective": "ce"}), None)
    batch = collator_of(0, isolated)(list(rows))
    model.to(run.device).train()
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        objective(model, {k: v.to(run.device) for k, v in batch.items()})[0].backward()
        times.append(time.perf_counter() - begin)
        model.zero_grad(set_to_none=True)
    # The teacher's forward pass is half of a backward one, a third of the whole.
    each = min(times) * (4 / 3 if run.recovery.distils and not run.recovery.teacher_topk else 1) / sum(r.tokens for r in rows)
    return int(60 * run.recovery.minutes / each) * PartialState().num_processes


def _distil_blocks(run: _Run, model: nn.Module, rows: Sequence[Row]) -> list[tuple[float, float]] | None:
    """The first phase; on the first process, whose result the others take."""
    from pared.recover.adapters import base_of
    from pared.recover.blockwise import distil_blocks, windows_of
    from pared.recover.training import restore

    assert run.teacher is not None
    folder = run.work / "blocks"
    file, note = folder / "trained.safetensors", folder / "errors.json"
    whole = base_of(model)
    with _main_first(run):
        if not note.exists():
            folder.mkdir(exist_ok=True)
            count = _BLOCK_ROWS * run.seq_len
            ids = windows_of([p.ids for r in rows[: 2 * _BLOCK_ROWS] for p in r.parts], run.seq_len)[: count // run.seq_len]
            whole.to(torch.device(run.device))  # type: ignore[arg-type]
            errors = distil_blocks(
                whole,
                run.student,
                run.teacher,
                ids,
                plan=run.plan,
                kept=run.kept,
                steps=run.recovery.block_steps,
                batch=run.recovery.batch or LARGEST_BATCH,
                seed=run.recovery.seed,
                dtype=run.dtype,
                progress=run.progress,
            )
            save_file({n: p.detach().cpu().contiguous() for n, p in whole.named_parameters()}, file)
            write_whole(note, json.dumps(errors))
    restore(whole, folder)
    return [(a, b) for a, b in json.loads(note.read_text())]


def _steps(
    run: _Run,
    model: nn.Module,
    rows: list[Row],
    held: list[Row],
    rate: float,
    isolated: bool,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[nn.Module, dict[str, Any]]:
    """The training itself: the model as it was when its held-out loss was least."""
    from pared.recover.training import Judge, Objective, Recoverer, arguments, collator_of, last_checkpoint, trained

    recovery = run.recovery
    speak, objective = _teacher(run, [*rows, *held])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    batches = recovery.accumulate * world
    # What fits into minutes was timed with the largest.
    batch = recovery.batch or (LARGEST_BATCH if recovery.minutes else default_batch(len(rows), batches))
    count = math.ceil(len(rows) / (batch * batches))
    start = run.work / "start.safetensors"
    with _main_first(run):
        if not start.exists() and run.main:
            save_file(trained(model), start.with_suffix(".partial"))
            start.with_suffix(".partial").replace(start)
        last = last_checkpoint(run.work, clean=run.main)
    judge = Judge(recovery.patience, recovery.minutes, run.progress)
    if last is not None:
        judge.restore(last[1])
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    trainer = Recoverer(
        model,
        arguments(recovery, run.work, count, batch, rate, dtype=run.dtype, judged=bool(held)),
        Rows(rows, speak),
        Rows(held, speak),
        Objective(recovery, objective),
        judge,
        collator_of(int(padding), isolated),
    )
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    trainer.train(resume_from_checkpoint=None if last is None else str(last[0]))
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.gathers else trained(model)
    if held and judge.best_step == 0:
        state = load_file(start)
    if trainer.gathers and run.main:
        model = _trainable(run, _load(run))  # the one that was trained lies in pieces on all processes
    if run.main:
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name in names:
                own[name].copy_(state[name])
    return model, {
        "batch": batch,
        "steps": trainer.state.global_step,
        "held_out": {"start": judge.start, "best": judge.best, "best_step": judge.best_step, "curve": judge.curve},
        "stopped": judge.stopped,
    }


def _teacher(run: _Run, rows: Sequence[Row]) -> tuple[Callable[[Row], Any], Callable[..., Tensor] | None]:
    """What the rows carry of the teacher, and the teacher itself where it is resident."""
    if not run.recovery.distils or run.teacher is None:
        return (lambda row: row), None
    if not run.recovery.teacher_topk:
        return (lambda row: row), resident(run.teacher.resident(run.dtype, run.device), run.kept)
    cache = Cache(run.work / "teacher", run.recovery.teacher_topk, run.recovery.temperature, run.kept)
    with _main_first(run):
        cache.fill(run.teacher, rows, dtype=run.dtype, device=run.device, progress=run.progress)
    return (lambda row: (row, cache.of)), None
