"""Training with transformers' Trainer: the loss, what judges it, and checkpoints that a killed run goes on from."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, TrainerControl, TrainerState

from pared.durable import sync, write_whole
from pared.errors import UsageError
from pared.estimate import Progress
from pared.recover.losses import TopK, cross_entropy, forward_kl, top_k_kl
from pared.recover.packing import IGNORED, Row, Rows, collate
from pared.recovery import LARGEST_BATCH, Recovery
from pared.tensorfile import sha256

_COMPLETE = "complete.json"
_WEIGHTS = "trained.safetensors"
_PREFIX = "checkpoint-"
# A loss so many times that of the start, and so much more, is no noise: the training has gone astray.
_ASTRAY, _MARGIN = 2.0, 1.0


class Objective:
    """The loss of a batch as a sum over its targets."""

    def __init__(self, recovery: Recovery, teacher: Callable[..., Tensor] | None) -> None:
        self.recovery, self.teacher = recovery, teacher

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Sum of the loss and the number of targets."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        kept = TopK(inputs.pop("log_p"), inputs.pop("ids")) if "log_p" in inputs else None
        counts = labels != IGNORED
        ours = model(**inputs, use_cache=False).logits[counts]
        share, soft = self.recovery.share_of_teacher, self.recovery.temperature
        loss = torch.zeros((), device=ours.device)
        if share and kept is not None:
            loss = loss + share * top_k_kl(ours, TopK(kept.log_p[counts], kept.ids[counts]), soft)
        elif share and self.teacher is not None:
            loss = loss + share * forward_kl(ours, self.teacher(**inputs)[counts], soft)
        if share < 1:
            loss = loss + (1 - share) * cross_entropy(ours, labels[counts])
        return loss, int(counts.sum())


class Judge(TrainerCallback, ExportableState):
    """Watches the losses: stops when the held-out one no longer falls, and refuses to go on where training went astray."""

    def __init__(self, patience: int, minutes: float | None, progress: Progress) -> None:
        self.patience, self.minutes, self.progress = patience, minutes, progress
        self.start: float | None = None  # held-out loss before the first step
        self.best: float | None = None
        self.best_step = 0
        self.worse = 0
        self.curve: list[list[float]] = []  # step, tokens, held-out loss
        self.stopped: str | None = None
        self._began = time.monotonic()

    def state(self) -> dict[str, Any]:
        names = ("start", "best", "best_step", "worse", "curve", "stopped")
        return {"args": {}, "attributes": {n: getattr(self, n) for n in names}}

    def restore(self, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)

    def judged(self, step: int, tokens: int, loss: float, *, late: bool) -> None:
        """A held-out evaluation. late: the rate has fallen so far that no gain means that none will come.

        While it is high the loss may stand above that of the start, and comes down with the rate.
        """
        if self.start is None:
            self.start = loss
        if self.curve and self.curve[-1][0] >= step:  # evaluated again after a resume
            return
        self.check(loss, step, self.start, "held-out loss")
        self.curve.append([step, tokens, loss])
        if self.best is None or loss < self.best:
            self.best, self.best_step, self.worse = loss, step, 0
        elif late:
            self.worse += 1

    def check(self, loss: float, step: int, start: float | None, what: str) -> None:
        """UsageError where a loss says that the training went astray."""
        astray = start is not None and loss > _ASTRAY * start + _MARGIN
        if math.isfinite(loss) and not astray:
            return
        said = f"went from {start:.3g} to {loss:.3g}" if astray and math.isfinite(loss) else f"is {loss}"
        raise UsageError(
            f"the training went astray: the {what} {said}",
            where=f"step {step}",
            fix="lower --learning-rate, raise --warmup, or train in --dtype float32 or bfloat16",
        )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.patience and self.worse >= self.patience and state.global_step < state.max_steps:
            self.stopped = f"after {state.global_step} steps: {self.worse} evaluations without a better held-out loss"
            control.should_training_stop = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress("steps", state.global_step, state.max_steps)
        if self.minutes is not None and time.monotonic() - self._began > 60 * self.minutes:
            control.should_evaluate = control.should_save = control.should_training_stop = True


class Recoverer(Trainer):
    """A Trainer whose loss is an Objective, and whose checkpoints hold what is trained, by its name, and say when whole."""

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        rows: Rows,
        held_out: Rows,
        objective: Objective,
        judge: Judge,
        collator: Callable[[list[Any]], dict[str, Tensor]],
    ) -> None:
        super().__init__(
            model=model, args=args, train_dataset=rows, eval_dataset=held_out, data_collator=collator, callbacks=[judge]
        )
        self.remove_callback(PrinterCallback)  # which prints to stdout
        self._objective, self._judge, self._held_out = objective, judge, held_out
        self._collator = collator
        # The loss is divided by the targets of all batches of a step, on all processes; labels are shifted already.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False
        self._start_of_training: float | None = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        total, count = self._objective(model, inputs)
        value = float(total.detach()) / max(1, count)
        if self._start_of_training is None:
            self._start_of_training = value
        self._judge.check(value, self.state.global_step, self._start_of_training, "loss of a batch")
        loss = total / (num_items_in_batch if num_items_in_batch is not None else max(1, count))
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # which DDP and FSDP divide by
        return (loss, None) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Held-out loss per target, on every process alike."""
        loss = self.held_out_loss()
        metrics = {"eval_loss": loss}
        step = self.state.global_step
        tokens = tokens_of(self.train_dataset.rows, step, self.args)  # type: ignore[union-attr]
        self._judge.judged(step, tokens, loss, late=2 * step > self.state.max_steps)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        # The rows are in their order already, so that it is the same however the run is cut and resumed.
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def held_out_loss(self) -> float:
        model = self.model_wrapped
        training = model.training
        model.eval()
        total, targets = 0.0, 0
        size = self.args.per_device_eval_batch_size
        with torch.no_grad(), self.compute_loss_context_manager():
            for first in range(0, len(self._held_out), size):
                batch = self._collator([self._held_out[i] for i in range(first, min(first + size, len(self._held_out)))])
                loss, count = self._objective(model, self._prepare_inputs(batch))
                total, targets = total + float(loss), targets + count
        model.train(training)
        return total / max(1, targets)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def gathers(self) -> bool:
        """Whether the weights lie in pieces on the processes (FSDP, DeepSpeed), so that others save and load them."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.gathers:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(trained(self.accelerator.unwrap_model(self.model)), folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.gathers:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.gathers:
            super()._load_best_model()
        else:
            restore(self.accelerator.unwrap_model(self.model), Path(str(self.state.best_model_checkpoint)))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"{_PREFIX}{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder, self._judge.state()["attributes"])
        self.accelerator.wait_for_everyone()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What a training changes, by its name; a tensor that two modules share once."""
    return {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}


def restore(model: nn.Module, folder: Path) -> None:
    """Put what a checkpoint holds into a model."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(folder / _WEIGHTS).items():
            own[name].copy_(tensor)


def mark_complete(folder: Path, judge: dict[str, Any]) -> None:
    """The last file of a checkpoint: what lies there, byte for byte. One without it, or that it does not fit, is not whole."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files[str(path.relative_to(folder))] = sha256(path)
        with path.open("r+b") as stream:
            sync(stream)
    write_whole(folder / _COMPLETE, json.dumps({"files": files, "judge": judge}))


def whole(folder: Path) -> bool:
    """Whether a checkpoint was written to its end and is as it was then."""
    try:
        files = json.loads((folder / _COMPLETE).read_text())["files"]
        return all(sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def last_checkpoint(work: Path, *, clean: bool) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and what the judge knew then. clean: remove those that are not whole."""
    folders = sorted(work.glob(f"{_PREFIX}*"), key=lambda p: int(p.name.removeprefix(_PREFIX)))
    good = [f for f in folders if whole(f)]
    for folder in folders:
        if clean and folder not in good:
            shutil.rmtree(folder)
    return (good[-1], json.loads((good[-1] / _COMPLETE).read_text())["judge"]) if good else None


def tokens_of(rows: Sequence[Row], steps: int, args: TrainingArguments) -> int:
    """Tokens that the first steps of a run see."""
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return sum(r.tokens for r in rows[: steps * step])


def collator_of(padding: int, isolated: bool) -> Callable[[list[Any]], dict[str, Tensor]]:
    """Rows, or pairs of a row and a function to what the teacher said of it, as a batch."""

    def collator(found: list[Any]) -> dict[str, Tensor]:
        rows = [f[0] if isinstance(f, tuple) else f for f in found]
        batch = collate(rows, padding=padding, isolated=isolated)
        if isinstance(found[0], tuple):
            said = [of(row, batch["input_ids"].shape[1]) for row, of in found]
            batch |= {"log_p": torch.stack([s.log_p for s in said]), "ids": torch.stack([s.ids for s in said])}
        return batch

    return collator


def arguments(
    recovery: Recovery, work: Path, steps: int, batch: int, rate: float, *, dtype: torch.dtype, judged: bool
) -> TrainingArguments:
    """What the Trainer is told: AdamW, warmup, then a cosine to zero."""
    every = max(1, math.ceil(steps / recovery.evaluations))
    told = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=recovery.batch or LARGEST_BATCH,
        gradient_accumulation_steps=recovery.accumulate,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(recovery.warmup * steps),
        weight_decay=recovery.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=recovery.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=recovery.device == "cpu",
        **{_CHECKPOINTING: recovery.gradient_checkpointing},  # type: ignore[arg-type]
        eval_strategy="steps" if judged else "no",
        eval_steps=every,
        eval_on_start=judged,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=judged,
        metric_for_best_model="loss" if judged else None,
        greater_is_better=False,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=recovery.device != "cpu",
        seed=recovery.seed,
        data_seed=recovery.seed,
        deepspeed=recovery.deepspeed,
        ddp_find_unused_parameters=False,
        logging_nan_inf_filter=False,
        log_level="error",
    )
    if told.n_gpu > 1:  # one process works on one device: the Trainer would take all of them, with a batch for each
        told._n_gpu = 1
    return told


_FIELDS = TrainingArguments.__dataclass_fields__
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"
