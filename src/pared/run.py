"""The main job: a checkpoint or a model in, a smaller one out."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.budget import Amount, Budget
from pared.budget.select import Effort, check_amount, make_plan, recount
from pared.budget.uniform import allocate_uniform
from pared.calibration import Calibration, together
from pared.compensate import Reached, Refitted, compensate
from pared.compose import compose
from pared.criteria import get_criterion
from pared.depth import Depth
from pared.distributed import first_row, once, own_rows, rank, size
from pared.effort import GENERATIONS, judges, layers_by_loss, measures, no_scores, reselected, some_rows
from pared.errors import UsageError
from pared.estimate import Progress, Scores, estimate, named_power, power_of, silent
from pared.journal import Journal, reached, stopping_at_steps
from pared.latency import Workload, times_for
from pared.means import Means, backing_off, key_of, noted_calibration, resources_of, tell, versions
from pared.output import Written, turned_by, write_pruned
from pared.plan import Plan
from pared.recipe import Recipe, make_recipe
from pared.resolve import calibrate, compute_dtype, resolve, scored_axes
from pared.resources import Limits, Resources, check_disk, used
from pared.retokenize import (
    Retokenized,
    check_vocabulary,
    keep_tokens,
    retokenize_as_planned,
    vocabulary_alone,
    with_vocabulary,
)
from pared.rotation import Rotation
from pared.source import Source
from pared.surgery import Turned, cut_model, cut_refitted, written_as
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


def plan_pruning(
    source: Source,
    recipe: Recipe,
    *,
    calibration: Calibration | None = None,
    vocabulary: Retokenized | None = None,
    progress: Progress = silent,
    means: Means | None = None,
) -> tuple[Plan, Scores]:
    """Score and decide, cutting nothing. calibration: None makes it as the recipe says, where the criterion wants any.

    vocabulary: what `keep_tokens` gave for this recipe. means: what to work with.
    """
    recipe = resolve(recipe, source)
    means = means or Means(Resources(recipe.batch))
    axes = scored_axes(source.layout, recipe)
    whole = _budget(source, recipe, axes, recipe.share)
    whole.vocab = None if vocabulary is None else len(vocabulary.kept)
    if not axes and vocabulary is not None:
        return vocabulary_alone(whole, vocabulary, recipe, _provenance(source, recipe, None)), Scores()
    criterion = get_criterion(recipe.criterion or "")
    if calibration is None and criterion.needs != "weights":
        calibration = calibrate(source, recipe)
    rows = own_rows(calibration.batches(1)) if calibration else []
    mine = together(rows, means.resources.batch)
    every = calibration.batches(means.resources.batch) if calibration else []

    journal = means.journal if recipe.iterative_steps == 1 and size() == 1 else None

    def decide(now: Source, share: float) -> tuple[Plan, Scores]:
        stream = means.stream(now, recipe)
        budget = _budget(now, recipe, axes, share)
        budget.vocab = whole.vocab
        measured = measures(recipe, now.layout, axes)
        going = now.layout.num_layers - allocate_uniform(budget).layers if "layer" in axes else 0
        apart = {"layer"} < set(axes) and "layer" not in criterion.axes_or(axes) and criterion.needs != "rotation"
        scored = tuple(a for a in axes if not (apart and a == "layer"))
        if measured and not criterion.comparable and set(scored) <= reselected(recipe, now.layout):
            scores = no_scores(now.layout, scored)  # sizes are measured, and units chosen in the walk that refits
        else:
            scores = estimate(
                stream,
                criterion,
                scored,
                mine,
                reduction=recipe.reduction,
                seed=recipe.seed,
                depth=Depth(going, budget.target, budget.saves, budget.protected),
                progress=progress,
                journal=journal,
            )
        if apart:
            few = together(own_rows(some_rows(calibration.batches(1) if calibration else [])), means.resources.batch)
            scores.of[None, "layer"] = layers_by_loss(stream, budget, few, going, progress)
        times = None
        if recipe.allocate == "latency":
            file = Path(recipe.latency_table).expanduser() if recipe.latency_table is not None else None
            times = times_for(stream, budget, Workload(recipe.latency_batch, recipe.context), file, progress)
        made = make_plan(
            budget,
            scores,
            shape=recipe.shape,
            allocate=recipe.allocate or "uniform",
            judges=judges(stream, axes, every, means.resources.batch, scores) if measured else None,
            effort=Effort(recipe.search_steps or GENERATIONS[recipe.effort], recipe.search_minutes, recipe.seed),
            times=times,
            progress=progress,
            journal=journal,
        )
        # After the weights were read: what identifies them was gathered on the way.
        said = {**_provenance(source, recipe, calibration), **made.provenance}
        return made.model_copy(update={"provenance": said, "rotated": scores.rotation is not None}), scores

    if recipe.iterative_steps == 1:
        single, scores = decide(source, recipe.share)
        return with_vocabulary(single, vocabulary, whole), scores

    # In steps: each removes an equal part of the whole amount from what the one before left.
    plan: Plan | None = None
    scores = Scores()
    dense = source.resident(compute_dtype(recipe), recipe.device)
    now = Source.open(dense, source.tokenizer)
    total = whole.before.amount(recipe.of)
    for step in range(1, recipe.iterative_steps + 1):
        left = (plan.after if plan else whole.before).amount(recipe.of)
        share = (recipe.share * step / recipe.iterative_steps * total - (total - left)) / left
        if share <= 0:
            continue
        part, scores = decide(now, share)
        plan = part if plan is None else compose(plan, part, source.layout, now.layout)
        now = Source.open(cut_model(dense, source.layout, plan), source.tokenizer)
    if plan is None:
        raise UsageError("the first step removed everything asked for", fix="use fewer --iterative-steps")
    return recount(
        plan.model_copy(update={"requested": recipe.remove, "provenance": _provenance(source, recipe, calibration)}), whole
    ), scores


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
    power: Mapping[tuple[int, str], torch.Tensor] | None = None,
) -> Iterator[Refitted] | None:
    """Compensation as the recipe says, block by block as it is asked for; None where there is none.

    power: as in `Scores`, what weighs errors where units are chosen. means: what to work with. reached: where to go on.
    """
    if not _compensates(recipe) or plan.hidden is not None or not plan.changes_blocks(source.layout):
        return None
    means = means or Means(Resources(recipe.batch))
    stream = means.stream(source, recipe)
    if recipe.reconstruct and size() > 1:
        raise UsageError("gradient descent on blocks runs in one process", where="--reconstruct", fix="--reconstruct 0")
    rows = (calibration or calibrate(source, recipe)).batches(1)
    batches, stream.first_row = together(own_rows(rows), means.resources.batch), first_row(len(rows))
    method = Method(
        mode=recipe.compensate or "sequential",
        reselect=reselected(recipe, source.layout),
        fisher=power or {},
        steps=recipe.reconstruct or 0,
        seed=recipe.seed,
    )
    return compensate(stream, plan, batches, method, progress=progress, reached=reached)


def chosen_again(plan: Plan, refitted: Iterator[Refitted] | None) -> Plan:
    """The plan with the units that the walk chose; what it refitted is let go."""
    for i, done in enumerate(refitted or ()):
        plan = plan.with_layer(i, done.layer)
        del done
    return plan


def _budget(source: Source, recipe: Recipe, axes: tuple[str, ...], share: float) -> Budget:
    layout, amount = source.layout, Amount(share, recipe.of)
    n = layout.num_layers
    if recipe.keep_first + recipe.keep_last >= n:
        raise UsageError(
            f"all of the {n} layers are protected", where="--keep-first / --keep-last", fix=f"their sum must be below {n}"
        )
    protected = frozenset([*range(recipe.keep_first), *range(n - recipe.keep_last, n)])
    if "layer" in axes:
        protected |= layout.fixed_layers
    writable = functools.partial(written_as, layout, source.config) if recipe.shape == "uniform" else None
    return Budget(layout, amount, axes, protected, recipe.align, recipe.context, source.experts_used, writable)


def _provenance(source: Source, recipe: Recipe, calibration: Calibration | None) -> dict[str, Any]:
    out: dict[str, Any] = {"recipe": recipe.model_dump(mode="json"), "versions": versions()}
    if source.checkpoint is not None:
        out["source"] = {"name": source.checkpoint.path.name, "digest": source.checkpoint.digest()}
    if calibration is not None:
        out["calibration"] = {"source": calibration.source, "tokens": calibration.tokens, "digest": calibration.digest()}
    return out


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
    if calibration is not None and ids is None:
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
    axes = scored_axes(source.layout, recipe)
    if axes and recipe.keep_tokens_from is None:
        check_amount(_budget(source, recipe, axes, recipe.share), recipe.allocate or "uniform")  # before weights are read
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
            # What is free may be more or less by now; another batch would round otherwise.
            if (batch := means.journal.read("batch")) is None:
                means.journal.write("batch", resources.batch)
            else:
                means.resources = replace(resources, batch=batch)
            reached("claimed")
            least = source.checkpoint.nbytes * (1 - recipe.share if recipe.of in ("params", "block-params") else 0.0)
            check_disk(writer.partial, int(least), "the result", "free some space, or choose an -o on another disk")
        vocabulary = None
        if recipe.keep_tokens_from is not None:
            budget = _budget(source, recipe, ("vocab",), recipe.share)
            vocabulary = keep_tokens(source.words(), recipe, budget, alone=not axes, progress=progress)
            if axes:
                budget = _budget(source, recipe, axes, recipe.share)
                budget.vocab = len(vocabulary.kept)
                check_amount(budget, recipe.allocate or "uniform")
        wanted = axes and (get_criterion(recipe.criterion or "").needs != "weights" or (not dry_run and _compensates(recipe)))
        text = noted_calibration(source, recipe, ids, means.journal) if wanted else None
        tell(progress, tokens=text.tokens if text else None)
        plan, scores = _planned(source, recipe, text, vocabulary, progress, means)
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
            return refit_blocks(source, plan, recipe, text, progress, means=means, reached=at, power=scores.power)

        if writer is not None:
            space = sum(t.nbytes for t in source.checkpoint.tensors.values()) if source.checkpoint else 0
            check_disk(writer.partial, int(space * plan.after.params / plan.before.params), "the result", "free some space")
            where, plan = backing_off(means, lambda: _write(source, plan, writer, recipe, refitted, vocabulary, means, turned))
            report["out"] = str(where)
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
) -> tuple[Path, Plan]:
    steps = Written(means.journal if size() == 1 else None, writer, means.resources.pool())
    return write_pruned(source, plan, writer, recipe, refitted(steps.reached), vocabulary, steps, turned)


def _planned(
    source: Source,
    recipe: Recipe,
    text: Calibration | None,
    vocabulary: Retokenized | None,
    progress: Progress,
    means: Means,
) -> tuple[Plan, Scores]:
    """The plan and the scores behind it, from the journal where they stand in it."""
    journal = means.journal
    found = once(lambda: journal.read("plan") if journal is not None else None)
    if found is not None:
        plan = Plan.model_validate(found["plan"])
        turned = Rotation.read(journal) if plan.rotated and journal is not None else None
        visits = {int(i): torch.tensor(n) for i, n in found["visits"].items()}
        return plan, Scores(visits=visits, power=once(lambda: _noted_power(journal, found)), rotation=turned)
    plan, scores = backing_off(
        means,
        lambda: plan_pruning(source, recipe, calibration=text, vocabulary=vocabulary, progress=progress, means=means),
    )
    made = plan
    plan = once(lambda: made)
    if journal is not None:
        if scores.rotation is not None:
            scores.rotation.write(journal)
        if scores.power:
            journal.write_tensors("plan", named_power(scores.power))
        counted = {str(i): counts.tolist() for i, counts in scores.visits.items()}
        journal.write("plan", {"plan": plan.model_dump(mode="json"), "visits": counted, "power": bool(scores.power)})
        reached("planned")
    return plan, scores


def _noted_power(journal: Journal | None, plan: Mapping[str, Any]) -> dict[tuple[int, str], torch.Tensor]:
    """`Scores.power` beside a noted plan."""
    return power_of(journal.read_tensors("plan")) if journal is not None and plan["power"] else {}
