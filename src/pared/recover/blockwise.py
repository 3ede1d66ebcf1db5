"""Block-wise distillation, the cheap first phase: each block of the pruned model towards what its dense twin gives.

No logits and no gradients through more than one block: the pruned stream enters, the dense stream's next hidden state is
the target (`pared.reconstruct`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pared.calibration import Batch
from pared.errors import UsageError
from pared.estimate import Progress, silent
from pared.plan import Plan
from pared.reconstruct import reconstruct
from pared.source import Source
from pared.stream import Stream


def twins(student: Source, teacher: Source, plan: Plan | None) -> list[int]:
    """For each block of the student, the teacher's block that it was made from."""
    if student.config.get_text_config().hidden_size != teacher.config.get_text_config().hidden_size:
        raise UsageError(
            "blocks of another hidden size have no common output to learn from", where="--block-steps", fix="--block-steps 0"
        )
    known = plan is not None and plan.before.layers == teacher.layout.num_layers
    if plan is not None and known and len(plan.layers) == student.layout.num_layers:
        # The last block answers for whatever was removed after it.
        return [*(layer.source for layer in plan.layers[:-1]), teacher.layout.num_layers - 1]
    if student.layout.num_layers == teacher.layout.num_layers:
        return list(range(student.layout.num_layers))
    raise UsageError(
        "which of the teacher's blocks these were made from is not known: no plan.json says it",
        where="--block-steps",
        fix="--block-steps 0, or recover a checkpoint that pared wrote",
    )


def distil_blocks(
    model: PreTrainedModel,
    student: Source,
    teacher: Source,
    ids: Tensor,
    *,
    plan: Plan | None,
    kept: Tensor | None,
    steps: int,
    batch: int,
    seed: int,
    dtype: torch.dtype | None,
    progress: Progress = silent,
) -> list[tuple[float, float]]:
    """Train the blocks of `model` in place, one after the other, on windows int64 [n, s].

    Returns for each its held-out error before and after (pared.reconstruct). Layers that were removed whole are passed:
    the block after them learns to give what the dense model has there.
    """
    sources = twins(student, teacher, plan)
    ours = Stream(model, student.layout)
    theirs = Stream(teacher.runnable, teacher.layout, dtype=dtype, device=str(ours.device))
    windows = list(ids.split(batch))
    x = ours.embed([Batch(w) for w in windows])
    dense = theirs.embed([Batch(w if kept is None else kept[w]) for w in windows])
    trainable = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    errors: list[tuple[float, float]] = []
    at = 0
    for i, source in enumerate(sources):
        while at <= source:
            with theirs.block(at) as block, torch.no_grad():
                dense = theirs.through(block, at, dense)
            at += 1
        with ours.block(i) as block:
            errors.append(
                reconstruct(block, lambda b, h, i=i: ours.run(b, i, h), x, dense, steps=steps, seed=seed + i)  # type: ignore[misc]
            )
            with torch.no_grad():
                x = ours.through(block, i, x)
        progress("blocks", i + 1, len(sources))
    for p, wanted in zip(model.parameters(), trainable, strict=True):
        p.requires_grad_(wanted)
    return errors


def windows_of(rows: Sequence[Sequence[int]], seq_len: int) -> Tensor:
    """Windows of one length, as blocks run on them: int64 [n, seq_len], what is left over dropped."""
    stream = torch.tensor([t for row in rows for t in row], dtype=torch.int64)
    seq_len = min(seq_len, len(stream))
    return stream[: len(stream) // seq_len * seq_len].view(-1, seq_len)
