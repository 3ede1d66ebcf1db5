"""The main job: a checkpoint or a model in, a smaller one out."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.budget import Amount, Budget
from pared.budget.select import check_amount, recount
from pared.calibration import Batch, Calibration, together
from pared.compensate import Reached, Refitted, compensate
from pared.criteria import get_criterion
from pared.distributed import Share, first_row, once, own_parts, own_rows, rank, size, total_of
from pared.effort import random_beside, refits_inputs, reselected
from pared.errors import UsageError
from pared.estimate import Progress, silent
from pared.journal import Journal, reached, stopping_at_steps
from pared.means import Means, backing_off, key_of, noted_calibration, resources_of, tell
from pared.output import Written, follow_written, turned_by, write_pruned
from pared.plan import Plan
from pared.planning import budget_of, noted_plan
from pared.process import device_bytes
from pared.recipe import Recipe, make_recipe
from pared.resolve import calibrate, resolve, scored_axes
from pared.resources import Limits, Resources, check_disk, used
from pared.retokenize import Retokenized, check_vocabulary, keep_tokens, retokenize_as_planned
from pared.scores import Scores
from pared.slots import with_slots
from pared.source import Source
from pared.stream import unpadded
from pared.surgery import Turned, cut_refitted
from pared.turned import TurnedStream
from pared.unlikely import special_tokens, with_random
from pared.walk import Method
from pared.writer import CheckpointWriter


@dataclass(frozen=True)
class Pruned:
    """What pruning gives: the model (None after a dry run or where it was only written), the plan, and a report.

    tokenizer: the one that belongs to the result where its vocabulary was pruned, else the source's where one was used.
    """

    model: PreTrainedModel | None
    plan: Plan
    report: dict[str, Any] = field(default_factory=dict)
    scores: Scores | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


def _compensates(recipe: Recipe) -> bool:
    return recipe.compensate != "none" or bool(recipe.reconstruct)


def refit_blocks(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    calibration: Calibration | None = None,
    progress: Progress = silent,
    *,
    means: Means | None = None,
    reached: Reached | None = None,
    scores: Scores | None = None,
) -> Iterator[Refitted] | None:
    """Compensation as the recipe says, block by block as it is asked for; None where there is none.

    scores: of what they say of gradients and of another basis. means: what to work with. reached: where to go on.
    """
    scores = scores or Scores()
    if not _compensates(recipe) or not plan.changes_blocks(source.layout) or (plan.hidden is not None) != plan.rotated:
        return None
    means = means or Means(Resources(recipe.batch))
    stream = means.stream(source, recipe)
    if scores.rotation is not None:
        stream = TurnedStream(stream, scores.rotation)
    rows = (calibration or calibrate(source, recipe)).batches(1)
    if random_beside(recipe, len(rows)):
        rows = with_random(rows, source.layout.sizes["vocab"], special_tokens(source.config), seed=recipe.seed)
    batch = recipe.step_of if recipe.reconstruct else means.resources.batch
    batches, stream.share = _shared(rows, batch, bool(recipe.reconstruct))
    method = Method(
        mode=recipe.compensate or "sequential",
        inputs=refits_inputs(recipe),
        reselect=reselected(recipe, source.layout),
        fisher=scores.power,
        steps=recipe.reconstruct or 0,
        step_of=recipe.step_of,
        seed=recipe.seed,
    )
    return compensate(stream, plan, batches, method, progress=progress, reached=reached)


def _shared(rows: list[Batch], batch: int, at_once: bool) -> tuple[list[Batch], Share | None]:
    """The batches of this process, and what they are of those of all; None where it is the only one. rows: of all.

    at_once: all processes work on the same batch at the same time, as gradient descent takes one batch after the other.
    """
    if size() == 1:
        return together(rows, batch), None
    if not at_once:
        first, mine = first_row(len(rows)), own_rows(rows)
        return together(mine, batch), Share(range(first, first + len(mine)), {}, 0)
    every = unpadded(together(rows, batch))
    parts, share = own_parts([len(b.input_ids) for b in every])
    return [Batch(every[b].input_ids[part], None) for b, part in parts.items()], share


def chosen_again(plan: Plan, refitted: Iterator[Refitted] | None) -> Plan:
    """The plan with the units that the walk chose; what it refitted is let go."""
    place = itertools.count()  # `enumerate` would hold each block until the next one is there
    for done in refitted or ():
        plan = plan.with_layer(next(place), done.layer)
        del done
    return plan


def apply_plan(model: str | Path, plan: Plan, out: str | Path, *, overwrite: bool = False) -> Path:
    """Cut a checkpoint as a plan says: the model that it was made for, or a fine-tune of the same base.

    Raises UsageError or ModelError where they do not fit each other; nothing is left at `out` then.
    """
    source = Source.open(model)
    if plan.rotated:
        raise UsageError(
            "the plan keeps channels of a basis that was measured, and a plan holds no basis",
            where="plan",
            fix="pared prune with --criterion rotation",
        )
    plan.check(source.layout)
    with _writer(source, out, overwrite) as writer:
        recorded = plan.provenance.get("source", {}).get("digest")
        if source.checkpoint is not None and recorded != source.checkpoint.digest():
            plan = plan.model_copy(update={"provenance": {**plan.provenance, "applied_to": source.name}})
        vocabulary = retokenize_as_planned(source.words(), plan) if plan.vocab else None
        return write_pruned(source, recount_for(source, plan), writer, vocabulary=vocabulary)[0]


def recount_for(source: Source, plan: Plan) -> Plan:
    """The plan with the account of the model that it is applied to."""
    amount = Amount(plan.requested or 0.5, plan.of)
    return recount(plan, Budget(source.layout, amount, (), context=plan.before.context, experts_used=source.experts_used))


def _writer(source: Source, out: str | Path, overwrite: bool, resumable: bool = False) -> CheckpointWriter:
    place = source.checkpoint.path if source.checkpoint else None
    return CheckpointWriter(out, overwrite=overwrite, source=place, resumable=resumable)


def prune(
    model: str | Path | PreTrainedModel,
    *,
    out: str | Path | None = None,
    calibration: str | Path | torch.Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    max_memory: str | int | None = None,
    max_gpu_memory: str | int | None = None,
    spill: str | Path | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> Pruned:
    """Prune a model.

    model: a directory, a hub id, or a live causal language model (left as it is). out: where to write the result;
    None builds it in memory alone. calibration: as in a recipe, or token ids int64 [samples, length].
    settings: fields of `Recipe` (remove=0.2, criterion="taylor", ...); base: settings that those override.
    max_memory, max_gpu_memory: bounds, as "4GiB", that the run chooses its batch by and beyond which hidden states go
    to files in `spill`; no bound changes the result. A run that was stopped before `out` was complete is gone on with by
    the same call; restart: begin it anew.
    Raises UsageError, ModelError and the other errors of `pared.errors`; nothing is written then.
    """
    ids = calibration if isinstance(calibration, torch.Tensor) else None
    if ids is not None:
        settings["samples"] = len(ids)
    elif calibration is not None:
        settings["calibration"] = str(calibration)
    if settings.get("keep_tokens_from") is not None:
        settings["keep_tokens_from"] = str(settings["keep_tokens_from"])
    recipe = make_recipe(dict(base or {}), **settings)
    Amount(recipe.share, recipe.of)
    check_vocabulary(recipe)
    source = Source.open(model, tokenizer)
    recipe = resolve(recipe, source)
    if recipe.criterion == "rotation":
        if recipe.iterative_steps > 1:
            raise UsageError("a rotation is found and cut in one step", where="--iterative-steps", fix="--iterative-steps 1")
        source = source.untied()
    if recipe.add_bias:
        source = with_slots(source, recipe)
    axes = scored_axes(source.layout, recipe)
    if axes and recipe.keep_tokens_from is None:
        check_amount(budget_of(source, recipe, axes, recipe.share), recipe.allocate or "uniform")  # before weights are read
    started = time.perf_counter()
    live = source.checkpoint is None
    limits = Limits.parse(max_memory, max_gpu_memory, spill)
    resources, need = resources_of(source, recipe, ids, limits, None if dry_run else out)
    tell(progress, limit=limits.memory)
    writes = out is not None and not dry_run and rank() == 0
    # The output is claimed before anything is computed: what is in its way should not be found after hours.
    claim = _writer(source, out or "", overwrite, not live) if writes else contextlib.nullcontext()
    with stopping_at_steps() if writes else contextlib.nullcontext(), claim as writer:
        means = Means(resources)
        if writer is not None and source.checkpoint is not None:
            means.journal = Journal(writer.partial, key_of(source, recipe, ids), restart=restart)
            means.journal.reserve = need.spill(resources.room) if need is not None else 0
            # What is free may be more or less by now; another batch would round otherwise.
            if (batch := means.journal.read("batch")) is None:
                means.journal.write("batch", resources.batch)
            else:
                means.resources = replace(resources, batch=batch)
            reached("claimed")
            least = source.checkpoint.nbytes * (1 - recipe.share if recipe.of in ("params", "block-params") else 0.0)
            check_disk(writer.partial, int(least), "the result", "free some space, or choose an -o on another disk")
        if size() > 1:  # batches of one size, for their rows to be where they were when the run goes on
            means.resources = replace(means.resources, batch=once(lambda: means.resources.batch))
        walked, follows = means.journal, False
        if size() > 1 and out is not None and not dry_run and source.checkpoint is not None:
            folder, follows = once(lambda: writer.partial if writer else Path()), writer is None
            # Each process notes its own hidden states: where one does not see the output, the walk is noted in none.
            if total_of(float(folder.is_dir())) < size():
                walked = None
            elif writer is None:
                walked = Journal.of_first(folder)
        vocabulary = None
        if recipe.keep_tokens_from is not None:
            budget = budget_of(source, recipe, ("vocab",), recipe.share)
            vocabulary = keep_tokens(source.words(), recipe, budget, alone=not axes, progress=progress)
            if axes:
                budget = budget_of(source, recipe, axes, recipe.share)
                budget.vocab = len(vocabulary.kept)
                check_amount(budget, recipe.allocate or "uniform")
        wanted = axes and (get_criterion(recipe.criterion or "").needs != "weights" or (not dry_run and _compensates(recipe)))
        text = noted_calibration(source, recipe, ids, means.journal) if wanted else None
        tell(progress, tokens=text.tokens if text else None)
        plan, scores = noted_plan(source, recipe, text, vocabulary, progress, means)
        source = source.untied() if plan.rotated else source
        report: dict[str, Any] = {
            "model_type": source.layout.model_type,
            "requested": recipe.remove if recipe.allocate != "latency" else None,
            "removed": plan.removed,
            "of": plan.of,
            "before": plan.before.model_dump(),
            "after": plan.after.model_dump(),
            "recipe": recipe.model_dump(mode="json"),
        }
        if (latency := plan.provenance.get("latency")) is not None:
            report["latency"] = latency
        if vocabulary is not None:
            report["vocabulary"] = vocabulary.facts
        if scores.visits:
            report["experts_never_routed"] = scores.never_visited()
        result: PreTrainedModel | None = None
        chooses = bool(reselected(recipe, source.layout))
        turned = turned_by(source, plan, scores)

        def refitted(at: Reached | None = None) -> Iterator[Refitted] | None:
            if not (chooses or not dry_run):
                return None
            return refit_blocks(source, plan, recipe, text, progress, means=means, reached=at, scores=scores)

        if writer is not None:
            space = sum(t.nbytes for t in source.checkpoint.tensors.values()) if source.checkpoint else 0
            check_disk(writer.partial, int(space * plan.after.params / plan.before.params), "the result", "free some space")
            where, plan = backing_off(
                means, lambda: _write(source, plan, writer, recipe, refitted, vocabulary, means, turned, walked)
            )
            report["out"] = str(where)
        elif follows:
            steps = Written(walked, None, means.resources.pool(), recipe.device)
            plan = follow_written(plan, refitted(steps.reached), steps)
        elif rank() > 0:
            plan = chosen_again(plan, refitted())
        elif not dry_run:
            result, plan = cut_refitted(source.resident(), source.layout, plan, refitted(), turned)
        elif chooses:
            plan = chosen_again(plan, refitted())
    report["seconds"] = round(time.perf_counter() - started, 2)
    if need is not None:
        read = source.checkpoint.bytes_read if source.checkpoint else 0
        report["resources"] = used(need, means.resources, means.pools, read)
        if most := device_bytes(recipe.device, most=True):
            report["resources"]["device_peak"] = most
    return Pruned(result, plan, report, scores, vocabulary.tokenizer if vocabulary else source.tokenizer)


def _write(
    source: Source,
    plan: Plan,
    writer: CheckpointWriter,
    recipe: Recipe,
    refitted: Callable[[Reached | None], Iterator[Refitted] | None],
    vocabulary: Retokenized | None,
    means: Means,
    turned: Turned,
    journal: Journal | None,
) -> tuple[Path, Plan]:
    steps = Written(journal, writer, means.resources.pool(), recipe.device)
    return write_pruned(source, plan, writer, recipe, refitted(steps.reached), vocabulary, steps, turned)
