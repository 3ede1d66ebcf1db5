"""From sizes and scores to a plan: the best units of each layer and axis stay."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pared.axes import Nested
from pared.budget import Budget, Sizes
from pared.budget.mixture import allocate_mixed
from pared.budget.narrow import allocate_narrowed
from pared.budget.ranked import allocate_ranked, check_reach
from pared.budget.search import search
from pared.budget.timed import Times, allocate_timed
from pared.budget.trials import Judges
from pared.budget.uniform import Shape, allocate_uniform, uniform_shapes
from pared.errors import UsageError
from pared.estimate import Progress, silent
from pared.journal import Journal
from pared.plan import Plan, kept_sizes, layer_plan, to_ranges
from pared.scores import Scores
from pared.structure import SUBLAYERS, Layout

ALLOCATIONS = ("uniform", "global", "search", "latency")


@dataclass(frozen=True)
class Effort:
    """How long a search may take: generations, and minutes (None: as long as those take). seed: of its moves."""

    generations: int = 8
    minutes: float | None = None
    seed: int = 0


def check_amount(budget: Budget, allocate: str) -> None:
    """UsageError where the amount is out of reach, whatever the scores will be."""
    if allocate == "uniform":
        _check_whole_layers(budget)
        allocate_uniform(budget)
    elif allocate in ("global", "search"):
        check_reach(budget)


def _check_whole_layers(budget: Budget) -> None:
    if odd := [a for a in budget.axes if a in SUBLAYERS]:
        raise UsageError(
            f"a uniform allocation gives all layers the same, so none can lose its {odd[0]}",
            where="--allocate uniform",
            fix="--allocate global --shape per-layer, or --structures layer",
        )


def make_plan(
    budget: Budget,
    scores: Scores,
    *,
    shape: Literal["uniform", "per-layer"],
    allocate: str,
    judges: Judges | None = None,
    effort: Effort | None = None,
    times: Times | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    journal: Journal | None = None,
) -> Plan:
    """Decide what goes. Raises UsageError where the amount is out of reach or shape and allocation exclude each other.

    judges: measure trial models; a search needs them, and a uniform shape's split between attention and FFN is then
    measured too. Without them it is balanced. times: what sizes take, for "latency". journal: where a search notes how far
    it has come.
    """
    layout = budget.layout
    width = [a for a in budget.axes if a not in ("layer", "hidden")]
    if shape == "uniform" and budget.protected and width:
        raise UsageError(
            "protected layers keep their size, so a uniform shape can not narrow the others",
            where="--keep-first / --keep-last",
            fix="--shape per-layer, or protect none",
        )
    if allocate == "latency":
        if times is None or not scores.comparable:
            raise UsageError(
                "what a unit is worth for its time wants scores that compare between layers",
                where="--criterion",
                fix="--criterion obs-fisher, or taylor",
            )
        timed = allocate_timed(budget, scores, times, uniform=shape == "uniform")
        said = {"dense": times.total, "predicted": times.of(timed), "requested": budget.amount.remove}
        made = _plan(budget, scores, timed, range(layout.num_layers), None, shape, {**(provenance or {}), "latency": said})
        return made.model_copy(update={"requested": None})  # of what is counted nothing was asked for
    if allocate in ("global", "search"):
        if shape == "uniform":
            raise UsageError(
                f"--allocate {allocate} gives every layer its own size", where="--shape uniform", fix="--shape per-layer"
            )
        if odd := [a for a in budget.axes if a in ("layer", "hidden")]:
            raise UsageError(f"--allocate {allocate} compares units inside layers, not {odd[0]}", fix="--allocate uniform")
        every = list(range(layout.num_layers))
        if allocate == "global":
            ranked = allocate_ranked(budget, scores)
            return _plan(budget, scores, ranked, _not_empty(layout, ranked), None, shape, provenance)
        if judges is not None and judges.turned is not None:
            budget = replace(budget, hidden=_measured(budget, judges).hidden)
        sizes, found = _search(budget, scores, judges, effort or Effort(), progress, journal)
        return _plan(budget, scores, sizes, every, budget.hidden, shape, {**(provenance or {}), "search": found})
    _check_whole_layers(budget)
    if allocate != "uniform":
        raise UsageError(f"unknown allocation {allocate!r}", where="--allocate", fix=f"one of {', '.join(ALLOCATIONS)}")
    worth: list[int] = list(range(layout.num_layers))  # what stays longest comes first
    if "layer" in budget.axes:
        value = scores.of[None, "layer"].clone()
        value[list(budget.protected)] = float("inf")
        worth = value.argsort(descending=True, stable=True).tolist()
    if judges is not None and "layer" in budget.axes:
        mixed = functools.partial(judges.sequential, share=1.0)
        chosen = allocate_mixed(budget, judges.uniform, mixed, worth[::-1], brief=judges.brief)
    elif judges is not None:
        chosen = _measured(budget, judges)
    else:
        chosen = allocate_uniform(budget)
    kept = sorted(worth[: chosen.layers])
    sizes = {i: {} if i in budget.protected else dict(chosen.sizes) for i in kept}
    return _plan(budget, scores, sizes, kept, chosen.hidden, shape, provenance)


def _measured(budget: Budget, judges: Judges) -> Shape:
    """The uniform shape that trial models lose the least in, with fewer hidden channels where those may go and that is better."""
    chosen = allocate_uniform(budget, judges.uniform, brief=judges.brief)
    return chosen if judges.turned is None else allocate_narrowed(budget, chosen, judges.narrowed)


def _not_empty(layout: Layout, sizes: Mapping[int, Sizes]) -> list[int]:
    """The layers of which something is left; those that lose all of their sublayers go whole where layers may."""
    may = layout.prunable("layer")
    gone = [
        i
        for i, own in sizes.items()
        if may
        and i not in layout.fixed_layers
        and layout.sublayers
        and all(own.get(kind, layout.sizes_at(i).get(kind, 1)) == 0 for kind in SUBLAYERS)
    ]
    return [i for i in range(layout.num_layers) if i not in gone]


def _search(
    budget: Budget, scores: Scores, judges: Judges | None, effort: Effort, progress: Progress, journal: Journal | None
) -> tuple[dict[int, Sizes], dict[str, float]]:
    """Sizes from a search that starts from the best uniform shapes and, where scores of layers compare, their ranking."""
    if judges is None:
        raise UsageError(
            "a search tries sizes of heads and FFN channels by second-order selection",
            where="--allocate search",
            fix="--criterion obs with --structures kv,query,ffn, or --allocate global",
        )
    full = {
        i: {a: budget.layout.sizes_at(i)[a] for a in budget.axes if (i, a) in scores.of}
        for i in range(budget.layout.num_layers)
    }
    starts = [
        {i: own if i in budget.protected else {a: s.sizes.get(a, n) for a, n in own.items()} for i, own in full.items()}
        for s in uniform_shapes(budget)[:8]
    ]
    if scores.comparable:
        starts.append({i: {**full[i], **own} for i, own in allocate_ranked(budget, scores).items()})
    found = search(
        budget,
        starts,
        functools.partial(judges.sequential, hidden=budget.hidden),
        generations=effort.generations,
        minutes=effort.minutes,
        seed=effort.seed,
        progress=progress,
        journal=journal,
    )
    return found.shape, {"kl": found.kl, "start": found.start, "generations": found.generations}


def _plan(
    budget: Budget,
    scores: Scores,
    sizes: Mapping[int, Sizes],
    kept: Sequence[int],
    hidden: int | None,
    shape: Literal["uniform", "per-layer"],
    provenance: Mapping[str, Any] | None,
) -> Plan:
    layout = budget.layout
    layers = [layer_plan(i, select(layout, scores, i, sizes[i]), layout.sizes_at(i)) for i in kept]
    text = None
    if hidden is not None and hidden < layout.sizes["hidden"]:
        text = to_ranges(top(scores.of[None, "hidden"], hidden).tolist())
    plan = Plan(
        model_type=layout.model_type,
        shape=shape,
        requested=budget.amount.remove,
        of=budget.amount.of,
        before=budget.before,
        after=budget.before,
        hidden=text,
        layers=layers,
        provenance=dict(provenance or {}),
    )
    return recount(plan, budget)


def recount(plan: Plan, budget: Budget) -> Plan:
    """The plan with its account of what it leaves."""
    layout, of = budget.layout, plan.of
    layers = [(p.source, kept_sizes(plan.selection(i, layout))) for i, p in enumerate(plan.layers)]
    outside = plan.sizes(None, layout)
    after = budget.count(layers, outside["hidden"], outside["vocab"])
    removed = 1 - after.amount(of) / budget.before.amount(of)
    return plan.model_copy(update={"before": budget.before, "after": after, "removed": removed, "biases": bool(layout.added)})


def select(layout: Layout, scores: Scores, layer: int, sizes: Sizes) -> dict[str, Tensor | Nested]:
    """The units of one layer with the highest scores, as many of each axis as `sizes` says. Ties go to the lower index."""
    full = layout.sizes_at(layer)
    keep: dict[str, Tensor | Nested] = {}
    for axis in sorted(sizes, key=lambda a: a in layout.parents):  # parents first
        n = sizes[axis]
        if axis not in full or n == full[axis]:
            continue
        value = scores.of[layer, axis]
        parent = layout.parents.get(axis)
        if parent is None:
            keep[axis] = top(value, n, layout.runs.get(axis, 1))
        else:
            chosen = keep.get(parent)
            rows = value.reshape(full[parent], full[axis])
            picked = rows if chosen is None else rows[chosen]  # type: ignore[index]
            keep[axis] = Nested(parent, torch.stack([top(row, n) for row in picked]))
    return keep


def top(value: Tensor, n: int, runs: int = 1) -> Tensor:
    """Indices of the n largest values, ascending; as many out of each of so many equal runs of them."""
    order = value.reshape(runs, -1).argsort(dim=1, descending=True, stable=True)[:, : n // runs]
    return (order + torch.arange(runs, device=value.device)[:, None] * (len(value) // runs)).flatten().sort().values
