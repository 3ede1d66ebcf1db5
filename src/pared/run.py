"""The main job: a checkpoint or a model in, a smaller one out."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pared import modeling
from pared.budget import Amount, Budget
from pared.budget.select import Effort, check_amount, make_plan, recount
from pared.budget.uniform import allocate_uniform
from pared.calibration import Calibration, load_calibration, sample_from_model
from pared.checkpoint import Checkpoint, place_of
from pared.compensate import Method, Refitted, compensate
from pared.compose import compose
from pared.criteria import get_criterion
from pared.effort import GENERATIONS, STEPS, judges, measures, no_scores, reselected, tried
from pared.errors import ModelError, UsageError
from pared.estimate import Progress, Scores, estimate, silent
from pared.models import NATIVE
from pared.per_layer import PerLayer
from pared.plan import Plan
from pared.proof import proved_layout
from pared.recipe import Recipe, make_recipe
from pared.remote_code import FILE, auto_map, modelling_file
from pared.report.card import model_card
from pared.retokenize import (
    Retokenized,
    Words,
    check_vocabulary,
    keep_tokens,
    retokenize_as_planned,
    vocabulary_alone,
    with_vocabulary,
)
from pared.stream import Stream
from pared.structure import Layout, experts_per_token
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

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_STRUCTURES = ("kv", "query", "ffn")
DEFAULT_SEQ_LEN = 512


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


@dataclass
class Source:
    """What is to be pruned: a checkpoint on disk or a live model, with its proved layout."""

    checkpoint: Checkpoint | None
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    config: PreTrainedConfig
    per_layer: PerLayer
    layout: Layout

    @classmethod
    def open(cls, what: str | Path | Checkpoint | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Source:
        if isinstance(what, PreTrainedModel):
            config, per_layer = modeling.make_config(what.config.to_dict())
            return cls(None, what, tokenizer, config, per_layer, proved_layout(config, per_layer))
        checkpoint = what if isinstance(what, Checkpoint) else Checkpoint.open(what)
        config, per_layer = modeling.make_config(checkpoint.config)
        return cls(checkpoint, None, tokenizer, config, per_layer, proved_layout(config, per_layer))

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            if self.checkpoint is None:
                raise UsageError(
                    "calibration from text needs a tokenizer", fix="pass tokenizer=, or calibration ids as a tensor"
                )
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(
                    self.checkpoint.path, config=self.config, trust_remote_code=False
                )
            except (OSError, ValueError) as error:
                raise ModelError(f"the tokenizer can not be loaded: {error}", where=self.checkpoint.path) from error
        return self.tokenizer

    def resident(self, dtype: torch.dtype | None = None, device: str = "cpu") -> PreTrainedModel:
        """The whole model in memory."""
        if self.model is not None:
            return self.model
        if self.checkpoint is None:
            raise UsageError("nothing to load")
        return modeling.load(self.checkpoint, dtype=dtype, device=device)

    @property
    def runnable(self) -> Checkpoint | PreTrainedModel:
        """What a Stream is made from."""
        if self.model is not None:
            return self.model
        if self.checkpoint is None:
            raise UsageError("nothing to run")
        return self.checkpoint

    def words(self) -> Words:
        """The tokenizer in the form in which its vocabulary can be pruned."""
        generation = getattr(self.model, "generation_config", None)
        return Words.open(self.checkpoint, self.tokenizer, self.config, generation and generation.to_dict())

    @property
    def name(self) -> str:
        return self.checkpoint.path.name if self.checkpoint else self.config._name_or_path or self.config.model_type

    @property
    def experts_used(self) -> int | None:
        return experts_per_token(self.config)


def resolve_axes(layout: Layout, structures: tuple[str, ...] | None, *, shape: str = "per-layer") -> tuple[str, ...]:
    """The axes that the named structures are in this model. ModelError where one is not proved, with the reason.

    shape: "uniform" leaves out axes that the family's config has no size for; where nothing else is left, that is said.
    """
    chosen: list[str] = []
    apart: list[str] = []
    for structure in structures or DEFAULT_STRUCTURES:
        named = [a for a in layout.proofs if a == structure or (structure == "ffn" and a.endswith("ffn"))]
        proved = [a for a in named if layout.prunable(a)]
        if shape == "uniform" and (odd := [a for a in proved if not layout.prunable(a, stock=True)]):
            if structures is not None:
                raise _only_per_layer(layout, odd)
            apart += odd
            proved = [a for a in proved if a not in odd]
        if not proved and structures is not None:
            reason = (
                "; ".join(layout.proofs[a].reason for a in named)
                or f"no layout with more than one unit of it was found in {layout.model_type}"
            )
            raise ModelError(
                f"{structure!r} can not be removed from this model: {reason}",
                where="--structures",
                fix=f"it can lose {', '.join(a for a in layout.proofs if layout.prunable(a)) or 'nothing'}",
            )
        chosen += proved
    if not chosen and apart:
        raise _only_per_layer(layout, apart)
    if not chosen:
        raise ModelError(f"no structure of {layout.model_type} is proved to be removable", fix="pared inspect says why")
    return tuple(dict.fromkeys(chosen))


def removable(layout: Layout) -> tuple[tuple[str, ...], str]:
    """What is removed by default and the shape that can say it: uniform, or per-layer where the config has no words for it."""
    for shape in ("uniform", "per-layer"):
        with contextlib.suppress(ModelError):
            return resolve_axes(layout, None, shape=shape), shape
    return (), "uniform"  # nothing is proved; the proofs say why


def _only_per_layer(layout: Layout, axes: list[str]) -> ModelError:
    return ModelError(
        f"a {layout.model_type} config has no sizes of its own for {', '.join(axes)}: no stock checkpoint can say the result",
        where="--shape uniform",
        fix="--shape per-layer, which carries them in a form of its own",
    )


def scored_axes(layout: Layout, recipe: Recipe) -> tuple[str, ...]:
    """The axes whose units are scored: all but the vocabulary, about which a text decides."""
    return tuple(a for a in resolve_axes(layout, recipe.structures, shape=recipe.shape) if a != "vocab")


def resolve(recipe: Recipe, source: Source) -> Recipe:
    """The recipe with everything that it left open decided.

    Second-order selection where every structure is a dense layer's own; weighted by gradients where layers compete by
    score. Elsewhere (experts' channels, hidden channels, layers) first-order Taylor scores all kinds alike.
    """
    axes = scored_axes(source.layout, recipe)
    if not axes:
        return recipe
    inside = not {"layer", "hidden"} & set(axes)
    dense = all(a in get_criterion("obs").axes_or(axes) and source.layout.parents.get(a) != "expert" for a in axes)
    quick = recipe.effort == "quick"
    compensate = recipe.compensate or ("refit" if quick and not recipe.reconstruct else "sequential")
    searches = (
        tried(source.layout, axes)
        and not quick
        and compensate == "sequential"
        and recipe.criterion in (None, "obs", "obs-fisher")
    )
    allocate = recipe.allocate or ("uniform" if recipe.shape == "uniform" or not inside else "search" if searches else "global")
    criterion = recipe.criterion
    if criterion is None:
        criterion = "taylor" if not dense else "obs-fisher" if allocate in ("global", "search") else "obs"
    reconstruct = recipe.reconstruct
    if reconstruct is None:
        reconstruct = STEPS if recipe.effort == "max" and compensate == "sequential" else 0
    generations = recipe.search_steps or GENERATIONS[recipe.effort]
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    seq_len = recipe.seq_len or min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN)
    return make_recipe(
        recipe.model_dump(),
        allocate=allocate,
        criterion=criterion,
        compensate=compensate,
        reconstruct=reconstruct,
        search_steps=generations if allocate == "search" else recipe.search_steps,
        seq_len=seq_len,
    )


def compute_dtype(recipe: Recipe) -> torch.dtype | None:
    """What blocks are computed in: on a CPU fp32 unless told otherwise, on a GPU what the checkpoint has."""
    if recipe.dtype != "auto":
        return _DTYPES[recipe.dtype]
    return torch.float32 if recipe.device == "cpu" else None


def calibrate(source: Source, recipe: Recipe, ids: torch.Tensor | None = None) -> Calibration:
    """Calibration windows as the recipe says."""
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)

    def sampler(samples: int, length: int, seed: int) -> torch.Tensor:
        model = source.resident(compute_dtype(recipe), recipe.device)
        return sample_from_model(model, source.get_tokenizer(), samples, length, seed)

    what: Any = ids if ids is not None else recipe.calibration
    tokenizer = cast(PreTrainedTokenizerBase, source.tokenizer) if ids is not None else source.get_tokenizer()
    return load_calibration(
        what,
        tokenizer,
        samples=recipe.samples,
        seq_len=recipe.seq_len or DEFAULT_SEQ_LEN,
        seed=recipe.seed,
        sampler=sampler,
        max_positions=limit,
    )


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
    writer.add_file("README.md", model_card(plan, source.name, per_layer=bool(per_layer)))
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
