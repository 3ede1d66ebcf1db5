"""The main job: a checkpoint or a model in, a smaller one out."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared import modeling
from pared.budget import Amount, Budget
from pared.budget.select import Effort, check_amount, make_plan, recount
from pared.budget.uniform import allocate_uniform
from pared.calibration import Calibration
from pared.checkpoint import place_of
from pared.compensate import Method, Refitted, compensate
from pared.compose import compose
from pared.criteria import get_criterion
from pared.effort import GENERATIONS, judges, measures, no_scores, reselected
from pared.errors import UsageError
from pared.estimate import Progress, Scores, estimate, silent
from pared.models import NATIVE
from pared.plan import Plan
from pared.recipe import Recipe, make_recipe
from pared.remote_code import FILE, auto_map, modelling_file
from pared.report.card import model_card
from pared.resolve import calibrate, compute_dtype, resolve, scored_axes
from pared.retokenize import (
    Retokenized,
    check_vocabulary,
    keep_tokens,
    retokenize_as_planned,
    vocabulary_alone,
    with_vocabulary,
)
from pared.source import Source
from pared.stream import Stream
from pared.surgery import (
    cut_block,
    cut_model,
    cut_outside,
    cut_refitted,
    embedding_scale,
    keep_scale,
    target_config,
    written_as,
)
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
) -> tuple[Plan, Scores]:
    """Score and decide, cutting nothing. calibration: None makes it as the recipe says, where the criterion wants any.

    vocabulary: what `keep_tokens` gave for this recipe.
    """
    recipe = resolve(recipe, source)
    axes = scored_axes(source.layout, recipe)
    whole = _budget(source, recipe, axes, recipe.share)
    whole.vocab = None if vocabulary is None else len(vocabulary.kept)
    if not axes and vocabulary is not None:
        return vocabulary_alone(whole, vocabulary, recipe, _provenance(source, recipe, None)), Scores()
    criterion = get_criterion(recipe.criterion or "")
    if calibration is None and criterion.needs != "weights":
        calibration = calibrate(source, recipe)
    batches = calibration.batches(recipe.batch) if calibration else []
    provenance = _provenance(source, recipe, calibration)

    def decide(now: Source, share: float) -> tuple[Plan, Scores]:
        stream = Stream(now.runnable, now.layout, dtype=compute_dtype(recipe), device=recipe.device)
        budget = _budget(now, recipe, axes, share)
        budget.vocab = whole.vocab
        measured = measures(recipe, now.layout, axes)
        if measured and not criterion.comparable and set(axes) <= reselected(recipe, now.layout):
            scores = no_scores(now.layout, axes)  # sizes are measured, and units chosen in the walk that refits
        else:
            going = now.layout.num_layers - allocate_uniform(budget).layers if "layer" in axes else 0
            scores = estimate(
                stream,
                criterion,
                axes,
                batches,
                reduction=recipe.reduction,
                seed=recipe.seed,
                layers_to_remove=going + 1,
                progress=progress,
            )
        return make_plan(
            budget,
            scores,
            shape=recipe.shape,
            allocate=recipe.allocate or "uniform",
            judges=judges(stream, axes, batches, recipe.batch) if measured else None,
            effort=Effort(recipe.search_steps or GENERATIONS[recipe.effort], recipe.search_minutes, recipe.seed),
            provenance=provenance,
            progress=progress,
        ), scores

    if recipe.iterative_steps == 1:
        once, scores = decide(source, recipe.share)
        return with_vocabulary(once, vocabulary, whole), scores

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
    return recount(plan.model_copy(update={"requested": recipe.remove, "provenance": provenance}), whole), scores


def _compensates(recipe: Recipe) -> bool:
    return recipe.compensate != "none" or bool(recipe.reconstruct)


def refit_blocks(
    source: Source, plan: Plan, recipe: Recipe, calibration: Calibration | None = None, progress: Progress = silent
) -> Iterator[Refitted] | None:
    """Compensation as the recipe says, block by block as it is asked for; None where there is none."""
    if not _compensates(recipe) or plan.hidden is not None or not any(layer.keep for layer in plan.layers):
        return None
    stream = Stream(source.runnable, source.layout, dtype=compute_dtype(recipe), device=recipe.device)
    batches = (calibration or calibrate(source, recipe)).batches(recipe.batch)
    method = Method(
        mode=recipe.compensate or "sequential",
        reselect=reselected(recipe, source.layout),
        steps=recipe.reconstruct or 0,
        seed=recipe.seed,
    )
    return compensate(stream, plan, batches, method, progress=progress)


def chosen_again(plan: Plan, refitted: Iterator[Refitted] | None) -> Plan:
    """The plan with the units that the walk chose; what it refitted is let go."""
    for i, done in enumerate(refitted or ()):
        plan = plan.with_layer(i, done.layer)
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
    versions = {p: importlib.metadata.version(p) for p in ("pared", "torch", "transformers", "safetensors")}
    out: dict[str, Any] = {"recipe": recipe.model_dump(mode="json"), "versions": versions}
    if source.checkpoint is not None:
        out["source"] = {"name": source.checkpoint.path.name, "digest": source.checkpoint.digest()}
    if calibration is not None:
        out["calibration"] = {"source": calibration.source, "tokens": calibration.tokens, "digest": calibration.digest()}
    return out


def write_pruned(
    source: Source,
    plan: Plan,
    writer: CheckpointWriter,
    recipe: Recipe | None = None,
    refitted: Iterator[Refitted] | None = None,
    vocabulary: Retokenized | None = None,
) -> tuple[Path, Plan]:
    """Cut the source as a plan says, one block at a time, into a checkpoint. Returns where it lies and the final plan.

    refitted: for each block of the result in turn, the units that it keeps, and tensors that take the place of those
    that are merely cut. vocabulary: the tokenizer's files, where the plan has a vocabulary.
    """
    layout = source.layout
    plan.check(layout)
    target, per_layer = target_config(layout, source.config, plan)
    result = modeling.skeleton(target, per_layer)
    weights = None
    model = source.model
    if model is None:
        checkpoint = source.checkpoint
        if checkpoint is None:
            raise UsageError("nothing to cut")
        model = modeling.skeleton(source.config, source.per_layer, dtype=modeling.checkpoint_dtype(checkpoint))
        weights = modeling.Weights(checkpoint, model)

    def write(names: list[str], cut: Callable[[Callable[[str], torch.Tensor]], dict[str, torch.Tensor]]) -> None:
        if weights is not None:
            weights.load(names)
        state = model.state_dict()
        for name, tensor in modeling.to_disk(result, cut(state.__getitem__)).items():
            writer.add(name, tensor)
        if weights is not None:
            weights.unload(names)

    scale = embedding_scale(model)
    outside = [n for n in layout.tensors if layout.layer_of(n) is None]
    write(outside, lambda read: keep_scale(result, layout, scale, cut_outside(layout, plan, read)))
    for i, layer in enumerate(plan.layers):
        done = next(refitted) if refitted is not None else None
        if done is not None:
            plan = plan.with_layer(i, done.layer)
        changed = done.tensors if done is not None else {}
        write(layout.block_tensors(layer.source), lambda read, i=i, p=plan, c=changed: cut_block(layout, p, i, read, c))  # type: ignore[misc]
    writer.add_file("config.json", modeling.config_json(target, per_layer, auto_map(type(target), type(result))))
    if per_layer:
        writer.add_file(FILE, modelling_file(type(target), type(result)))
    if target.model_type in NATIVE:
        writer.add_file(NATIVE[target.model_type].file, NATIVE[target.model_type].code())
    files = vocabulary.files if vocabulary else {}
    for path in source.checkpoint.side_files() if source.checkpoint else []:
        if place_of(path) not in files:
            writer.copy_file(path)
    for name, content in files.items():
        if content is not None:
            writer.add_file(name, content)
    writer.add_file("plan.json", plan.to_json())
    if recipe is not None:
        writer.add_file("recipe.yaml", recipe.to_yaml())
    own_head_size = modeling.undeclared_head_size(target) is not None
    writer.add_file("README.md", model_card(plan, source.name, per_layer=bool(per_layer), own_head_size=own_head_size))
    return writer.commit(), plan


def apply_plan(model: str | Path, plan: Plan, out: str | Path, *, overwrite: bool = False) -> Path:
    """Cut a checkpoint as a plan says: the model that it was made for, or a fine-tune of the same base.

    Raises UsageError or ModelError where they do not fit each other; nothing is left at `out` then.
    """
    source = Source.open(model)
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


def _writer(source: Source, out: str | Path, overwrite: bool) -> CheckpointWriter:
    return CheckpointWriter(out, overwrite=overwrite, source=source.checkpoint.path if source.checkpoint else None)


def prune(
    model: str | Path | PreTrainedModel,
    *,
    out: str | Path | None = None,
    calibration: str | Path | torch.Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> Pruned:
    """Prune a model.

    model: a directory, a hub id, or a live causal language model (left as it is). out: where to write the result;
    None builds it in memory alone. calibration: as in a recipe, or token ids int64 [samples, length].
    settings: fields of `Recipe` (remove=0.2, criterion="taylor", ...); base: settings that those override.
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
    axes = scored_axes(source.layout, recipe)
    if axes and recipe.keep_tokens_from is None:
        check_amount(_budget(source, recipe, axes, recipe.share), recipe.allocate or "uniform")  # before weights are read
    started = time.perf_counter()
    # The output is claimed before anything is computed: what is in its way should not be found after hours.
    claim = _writer(source, out, overwrite) if out is not None and not dry_run else contextlib.nullcontext()
    with claim as writer:
        vocabulary = None
        if recipe.keep_tokens_from is not None:
            budget = _budget(source, recipe, ("vocab",), recipe.share)
            vocabulary = keep_tokens(source.words(), recipe, budget, alone=not axes, progress=progress)
            if axes:
                budget = _budget(source, recipe, axes, recipe.share)
                budget.vocab = len(vocabulary.kept)
                check_amount(budget, recipe.allocate or "uniform")
        wanted = axes and (get_criterion(recipe.criterion or "").needs != "weights" or (not dry_run and _compensates(recipe)))
        text = calibrate(source, recipe, ids) if wanted else None
        plan, scores = plan_pruning(source, recipe, calibration=text, vocabulary=vocabulary, progress=progress)
        report: dict[str, Any] = {
            "model_type": source.layout.model_type,
            "requested": recipe.remove,
            "removed": plan.removed,
            "of": plan.of,
            "before": plan.before.model_dump(),
            "after": plan.after.model_dump(),
            "recipe": recipe.model_dump(mode="json"),
        }
        if vocabulary is not None:
            report["vocabulary"] = vocabulary.facts
        if scores.visits:
            report["experts_never_routed"] = scores.never_visited()
        result: PreTrainedModel | None = None
        chooses = bool(reselected(recipe, source.layout))
        refitted = refit_blocks(source, plan, recipe, text, progress) if chooses or not dry_run else None
        if writer is not None:
            where, plan = write_pruned(source, plan, writer, recipe, refitted, vocabulary)
            report["out"] = str(where)
        elif not dry_run:
            result, plan = cut_refitted(source.resident(), source.layout, plan, refitted)
        elif chooses:
            plan = chosen_again(plan, refitted)
    report["seconds"] = round(time.perf_counter() - started, 2)
    return Pruned(result, plan, report, scores, vocabulary.tokenizer if vocabulary else source.tokenizer)
