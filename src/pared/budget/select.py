"""From sizes and scores to a plan: the best units of each layer and axis stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pared.axes import Nested
from pared.budget import Budget, Sizes
from pared.budget.ranked import allocate_ranked, check_reach
from pared.budget.uniform import allocate_uniform
from pared.errors import UsageError
from pared.estimate import Scores
from pared.plan import Plan, kept_sizes, layer_plan, to_ranges
from pared.structure import Layout

ALLOCATIONS = ("uniform", "global")


def check_amount(budget: Budget, allocate: str) -> None:
    """UsageError where the amount is out of reach, whatever the scores will be."""
    if allocate == "uniform":
        allocate_uniform(budget)
    elif allocate == "global":
        check_reach(budget)


def make_plan(
    budget: Budget,
    scores: Scores,
    *,
    shape: Literal["uniform", "per-layer"],
    allocate: str,
    provenance: Mapping[str, Any] | None = None,
) -> Plan:
    """Decide what goes. Raises UsageError where the amount is out of reach or shape and allocation exclude each other."""
    layout = budget.layout
    width = [a for a in budget.axes if a not in ("layer", "hidden")]
    if shape == "uniform" and budget.protected and width:
        raise UsageError(
            "protected layers keep their size, so a uniform shape can not narrow the others",
            where="--keep-first / --keep-last",
            fix="--shape per-layer, or protect none",
        )
    if allocate == "global":
        if shape == "uniform":
            raise UsageError(
                "global allocation gives every layer its own size", where="--shape uniform", fix="--shape per-layer"
            )
        if odd := [a for a in budget.axes if a in ("layer", "hidden")]:
            raise UsageError(f"global allocation ranks units inside layers, not {odd[0]}", fix="--allocate uniform")
        return _plan(budget, scores, allocate_ranked(budget, scores), list(range(layout.num_layers)), None, shape, provenance)
    if allocate != "uniform":
        raise UsageError(f"unknown allocation {allocate!r}", where="--allocate", fix=f"one of {', '.join(ALLOCATIONS)}")
    chosen = allocate_uniform(budget)
    kept = list(range(layout.num_layers))
    if "layer" in budget.axes:
        value = scores.of[None, "layer"].clone()
        value[list(budget.protected)] = float("inf")
        kept = sorted(value.argsort(descending=True, stable=True)[: chosen.layers].tolist())
    sizes = {i: {} if i in budget.protected else dict(chosen.sizes) for i in kept}
    return _plan(budget, scores, sizes, kept, chosen.hidden, shape, provenance)


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
    return plan.model_copy(update={"before": budget.before, "after": after, "removed": removed})


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
