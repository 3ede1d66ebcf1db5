"""Planning: score and decide what goes, cutting nothing."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pared.budget import Amount, Budget
from pared.budget.select import Effort, make_plan, recount
from pared.budget.uniform import allocate_uniform
from pared.calibration import Calibration, together
from pared.compose import compose
from pared.criteria import get_criterion
from pared.depth import Depth
from pared.distributed import once, own_rows, size
from pared.effort import GENERATIONS, judges, layers_by_loss, measures, narrows, no_scores, reselected, some_rows
from pared.errors import ModelError, UsageError
from pared.estimate import Progress, estimate, silent
from pared.journal import Journal, reached
from pared.latency import Workload, times_for
from pared.means import Means, backing_off, versions
from pared.plan import Plan
from pared.recipe import Recipe
from pared.resolve import calibrate, compute_dtype, resolve, scored_axes
from pared.resources import Resources
from pared.retokenize import Retokenized, vocabulary_alone, with_vocabulary
from pared.rotation import Rotation, find_rotation
from pared.scores import Scores, named_power, power_of
from pared.source import Source
from pared.stream import unpadded
from pared.surgery import cut_model, written_as


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
    whole = budget_of(source, recipe, axes, recipe.share)
    whole.vocab = None if vocabulary is None else len(vocabulary.kept)
    if not axes and vocabulary is not None:
        return vocabulary_alone(whole, vocabulary, recipe, provenance_of(source, recipe, None)), Scores()
    criterion = get_criterion(recipe.criterion or "")
    if calibration is None and criterion.needs != "weights":
        calibration = calibrate(source, recipe)
    rows = own_rows(calibration.batches(1)) if calibration else []
    mine = together(rows, means.resources.batch)
    every = calibration.batches(means.resources.batch) if calibration else []

    noted = means.journal if size() == 1 else None

    def decide(now: Source, share: float, journal: Journal | None) -> tuple[Plan, Scores]:
        stream = means.stream(now, recipe)
        budget = budget_of(now, recipe, axes, share)
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
        judging = judges(stream, axes, every, means.resources.batch, scores, progress) if measured else None
        refused = {}
        if judging is not None and narrows(recipe, now.layout, axes):
            try:
                scores.of[None, "hidden"] = judging.turn().energy.float()
            except ModelError as error:
                if recipe.narrow:
                    raise
                refused = {"narrow": {"refused": error.what}}
        times = None
        if recipe.allocate == "latency":
            file = Path(recipe.latency_table).expanduser() if recipe.latency_table is not None else None
            times = times_for(stream, budget, Workload(recipe.latency_batch, recipe.context), file, progress)
        made = make_plan(
            budget,
            scores,
            shape=recipe.shape,
            allocate=recipe.allocate or "uniform",
            judges=judging,
            effort=Effort(recipe.search_steps or GENERATIONS[recipe.effort], recipe.search_minutes, recipe.seed),
            times=times,
            progress=progress,
            journal=journal,
        )
        if made.hidden is not None and judging is not None:
            scores.rotation = find_rotation(stream, unpadded(mine), progress)
            scores.power = scores.rotation.power(scores.power)
            made = recount(made, budget_of(now.untied(), recipe, axes, share))
        # After the weights were read: what identifies them was gathered on the way.
        said = {**provenance_of(source, recipe, calibration), **made.provenance, **refused}
        return made.model_copy(update={"provenance": said, "rotated": scores.rotation is not None}), scores

    if recipe.iterative_steps == 1:
        single, scores = decide(source, recipe.share, noted)
        return with_vocabulary(single, vocabulary, whole), scores

    # In steps: each removes an equal part of the whole amount from what the one before left.
    found = noted.read("iterated") if noted is not None else None
    plan = Plan.model_validate(found["plan"]) if found is not None else None
    scores = Scores()
    dense = source.resident(compute_dtype(recipe), recipe.device)
    total = whole.before.amount(recipe.of)
    for step in range(found["step"] + 1 if found is not None else 1, recipe.iterative_steps + 1):
        left = (plan.after if plan else whole.before).amount(recipe.of)
        share = (recipe.share * step / recipe.iterative_steps * total - (total - left)) / left
        if share <= 0:
            continue
        now = Source.open(dense if plan is None else cut_model(dense, source.layout, plan), source.tokenizer)
        journal = noted.within(f"step {step}") if noted is not None else None
        part, scores = decide(now, share, journal)
        plan = part if plan is None else compose(plan, part, source.layout, now.layout)
        if noted is not None and journal is not None and step < recipe.iterative_steps:
            noted.write("iterated", {"step": step, "plan": plan.model_dump(mode="json")})
            journal.forget()
            reached("iterated")
    if plan is None:
        raise UsageError("the first step removed everything asked for", fix="use fewer --iterative-steps")
    return recount(
        plan.model_copy(update={"requested": recipe.remove, "provenance": provenance_of(source, recipe, calibration)}), whole
    ), scores


def budget_of(source: Source, recipe: Recipe, axes: tuple[str, ...], share: float) -> Budget:
    """What a recipe asks of a source: `share` of its amount, along these axes."""
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


def provenance_of(source: Source, recipe: Recipe, calibration: Calibration | None) -> dict[str, Any]:
    out: dict[str, Any] = {"recipe": recipe.model_dump(mode="json"), "versions": versions()}
    if source.checkpoint is not None:
        out["source"] = {"name": source.checkpoint.path.name, "digest": source.checkpoint.digest()}
    if calibration is not None:
        out["calibration"] = {"source": calibration.source, "tokens": calibration.tokens, "digest": calibration.digest()}
    return out


def noted_plan(
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
