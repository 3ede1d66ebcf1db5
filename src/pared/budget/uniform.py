"""Uniform allocation: every layer that is not protected gets the same sizes, as balanced as the units allow.

Axes with few units (KV groups, query heads, layers) come in coarse steps; axes with many (FFN channels) make up the
rest, so that the budget is met from above with less than one step to spare.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pared.budget import Budget, Sizes
from pared.errors import UsageError

# What it costs, as imbalance, to be written as another model type: a few per cent more of one kind of structure.
OTHER_TYPE = 0.02
# Combinations of coarse sizes: some seconds for a model of 80 layers.
MOST_TRIED = 1024
# Splits whose loss is measured, where it is to take little time those along a single coarse axis, and how much less balanced
# than the best they may be.
MOST_MEASURED = 5
FEW_MEASURED = 3
UNBALANCED = 0.3
# A shape that loses another kind of structure as well, whole layers or hidden channels, has to be better by this factor: trial
# models are refitted to few tokens, which overstates differences.
CLEARLY = 1.05


PerLayer = dict[int, Sizes]


@dataclass(frozen=True)
class Shape:
    """Sizes for every layer that stays (source layer -> sizes that change), and the hidden channels that stay."""

    sizes: Sizes
    layers: int
    hidden: int | None
    removed: int

    def lost(self, full: Sizes, axes: Sequence[str]) -> float:
        """The share that axes lose together of what is inside each other, as query heads in KV groups are."""
        return 1 - math.prod(self.sizes.get(a, full[a]) / full[a] for a in axes if a in full)


def allocate_uniform(
    budget: Budget, judge: Callable[[list[PerLayer]], list[float]] | None = None, *, brief: bool = False
) -> Shape:
    """The best uniform shape that removes at least the amount asked for.

    judge: gives the loss of shapes (sizes for each layer), and some splits between the kinds of structure are then
    compared by it, brief: few of them; without it the most balanced one is taken.
    """
    enough = enough_removed(budget)
    if judge is not None:
        tried = [shape for _, shape in _spread(budget, enough, brief)]
        if len(tried) > 1:
            losses = judge([per_layer(budget, shape) for shape in tried])
            return best_written(budget, sorted(zip(losses, tried, strict=True), key=lambda e: e[0]), relative=True)
    return best_written(budget, enough)


def uniform_shapes(budget: Budget, *, brief: bool = False) -> list[Shape]:
    """Some uniform shapes that meet the budget, from much attention and little FFN to the reverse; brief: few of them."""
    return [shape for _, shape in _spread(budget, enough_removed(budget), brief)]


def per_layer(budget: Budget, shape: Shape) -> PerLayer:
    """A uniform shape as sizes for each layer, of hidden channels where some go."""
    hidden = {} if shape.hidden in (None, budget.layout.sizes["hidden"]) else {"hidden": shape.hidden}
    return {i: hidden | ({} if i in budget.protected else shape.sizes) for i in range(budget.layout.num_layers)}


def _spread(budget: Budget, shapes: list[tuple[float, Shape]], brief: bool) -> list[tuple[float, Shape]]:
    """Up to MOST_MEASURED of the shapes, the most balanced one among them, evenly over the attention that they keep.

    brief: up to FEW_MEASURED where they differ in KV groups or in query heads alone, and so lie on a line. That one of them
    removes more than another, where FFN channels come in coarse steps, counts for nothing here: a shape that loses less is
    the better one for being smaller too.
    """
    far = imbalance(budget, shapes[0][1]) + UNBALANCED
    near = [s for s in shapes if imbalance(budget, s[1]) <= far]
    full = budget.full()

    near.sort(key=lambda s: (-s[1].lost(full, ("kv", "query")), s[0]))
    varied = [a for a in ("kv", "query") if len({s.sizes.get(a) for _, s in near}) > 1]
    most = FEW_MEASURED if brief and len(varied) == 1 else MOST_MEASURED
    if len(near) > most:
        at = sorted({round(k * (len(near) - 1) / (most - 2)) for k in range(most - 1)})
        thin = [near[k] for k in at]
        near = thin if shapes[0] in thin else [*thin, shapes[0]]
    return near


def enough_removed(budget: Budget) -> list[tuple[float, Shape]]:
    """(imbalance, shape) of all that remove the amount asked for, best first."""
    enough: list[tuple[float, Shape]] = []
    most = 0.0
    total = budget.before.amount(budget.amount.of)
    alike = functools.cache(lambda kept: budget.alike([i for i, _ in layers_under(budget, {}, kept)]))
    for coarse in _coarse_levels(budget):
        shape = _fill(budget, coarse, alike(coarse.get("layer", budget.layout.num_layers)))
        most = max(most, shape.removed / total)
        if shape.removed >= budget.target:
            penalty = imbalance(budget, shape) + 10 * (shape.removed - budget.target) / total
            enough.append((round(penalty, 12), shape))
    if not enough:
        raise budget.unreachable(most)
    return sorted(enough, key=lambda e: e[0])


def filled(budget: Budget, hidden: int) -> list[Shape]:
    """Shapes with so many hidden channels, every combination of coarse sizes completed to the amount as far as FFNs can."""
    alike = budget.alike(range(budget.layout.num_layers))
    return [_fill(budget, {**coarse, "hidden": hidden}, alike) for coarse in _coarse_levels(budget)]


def best_written(budget: Budget, shapes: list[tuple[float, Shape]], *, relative: bool = False) -> Shape:
    """The best of these, best first, that a config can say, those of the model's own type at an advantage.

    relative: the advantage is a share of the penalty rather than an imbalance.
    """
    best: tuple[float, Shape] | None = None
    for penalty, shape in shapes:
        if best is not None and best[0] <= penalty:
            break
        kind = budget.written_as(shape.sizes, shape.hidden) if budget.written_as else budget.layout.model_type
        if kind is not None:
            other = 0.0 if kind == budget.layout.model_type else OTHER_TYPE * (penalty if relative else 1.0)
            if best is None or penalty + other < best[0]:
                best = penalty + other, shape
    if best is None:
        raise UsageError(
            f"no config of a {budget.layout.model_type} can say the uniform sizes that would remove {budget.amount.remove:.1%}",
            where="--remove",
            fix="another amount, other structures, or --shape per-layer",
        )
    return best[1]


def layers_under(budget: Budget, sizes: Sizes, kept: int) -> list[tuple[int, Sizes]]:
    """A stand-in list of kept layers, for counting: which layers go is the scores' business, and all that may go are alike."""
    layout = budget.layout
    free = [i for i in range(layout.num_layers) if i not in budget.protected]
    gone = set(free[: layout.num_layers - kept])
    return [
        (i, {} if i in budget.protected else {a: n for a, n in sizes.items() if a in layout.sizes_at(i)})
        for i in range(layout.num_layers)
        if i not in gone
    ]


def _coarse_levels(budget: Budget) -> list[dict[str, int]]:
    layout = budget.layout
    sizes = budget.full()
    choices: dict[str, list[int]] = {}
    for axis in budget.axes:
        if axis in ("kv", "query", "expert"):
            choices[axis] = budget.levels(axis, sizes[axis])
        elif axis == "layer":
            free = layout.num_layers - len(budget.protected)
            choices[axis] = list(range(layout.num_layers, max(len(budget.protected), layout.num_layers - free), -1))
        elif axis == "hidden":
            fine = budget.align is None and not budget.width_axes  # nothing else makes up for a coarse step
            step = budget.grain(axis) if fine else budget.step(axis)
            levels = [n for n in range(sizes["hidden"], 0, -1) if n == sizes["hidden"] or n % step == 0]
            choices[axis] = levels[:: max(1, len(levels) // 512)]
    # FFN channels fill in whatever the coarse axes leave, so these need not be tried at every level.
    while budget.width_axes and math.prod(map(len, choices.values())) > MOST_TRIED:
        longest = max(choices, key=lambda a: len(choices[a]))
        choices[longest] = choices[longest][::2]
    return [dict(zip(choices, c, strict=True)) for c in itertools.product(*choices.values())]


def _fill(budget: Budget, coarse: dict[str, int], alike: list[tuple[int, int]]) -> Shape:
    """Complete coarse sizes by the widest FFN that still meets the budget. alike: the layers that stay, in groups."""
    layout = budget.layout
    hidden = coarse.get("hidden")
    kept = coarse.get("layer", layout.num_layers)
    base = {a: n for a, n in coarse.items() if a not in ("hidden", "layer")}
    full = budget.full()
    ladders = {a: ladder(full[a], budget.step(a)) for a in budget.width_axes if a in full}

    def at(share: float) -> Sizes:
        """All FFN axes narrowed by the same share."""
        own = {a: rungs[min(len(rungs) - 1, round(share * (len(rungs) - 1)))] for a, rungs in ladders.items()}
        return layout.with_followers(own)

    def removed(share: float) -> int:
        sizes, left = {**base, **at(share)}, budget.outside_amount(hidden)
        for i, n in alike:
            own = {} if i in budget.protected else {a: size for a, size in sizes.items() if a in layout.sizes_at(i)}
            left += n * budget.block_amount(i, own, hidden)
        return budget.before.amount(budget.amount.of) - left

    steps = max((len(r) - 1 for r in ladders.values()), default=0)
    low, high = 0, steps
    while low < high:
        middle = (low + high) // 2
        if removed(middle / steps) >= budget.target:
            high = middle
        else:
            low = middle + 1
    share = low / steps if steps else 0.0
    return Shape({**base, **at(share)}, kept, hidden, removed(share))


def ladder(n: int, step: int) -> list[int]:
    """Sizes that an axis may shrink to, widest first."""
    return [n, *range((n - 1) // step * step, 0, -step)]


def imbalance(budget: Budget, shape: Shape) -> float:
    """How unlike the shares are that the kinds of structure lose: attention, FFN, hidden, depth."""
    full = budget.full()
    lost: list[float] = []
    if {"kv", "query"} & set(budget.axes):
        kv, query = shape.sizes.get("kv", full["kv"]) / full["kv"], shape.sizes.get("query", full["query"]) / full["query"]
        lost.append(1 - kv * query)
    lost.extend(1 - shape.sizes[a] / full[a] for a in budget.width_axes if a in shape.sizes)
    lost.extend(1 - shape.sizes["expert"] / full["expert"] for a in budget.axes if a == "expert")
    if "hidden" in budget.axes and shape.hidden is not None:
        lost.append(1 - shape.hidden / full["hidden"])
    if "layer" in budget.axes:
        lost.append(1 - shape.layers / budget.layout.num_layers)
    mean = sum(lost) / len(lost)
    spread = sum(abs(x - mean) for x in lost) / len(lost)
    # Among equals, thin out query heads before giving up whole KV groups: it was measured to cost less.
    groups = 1 - shape.sizes.get("kv", full.get("kv", 1)) / full.get("kv", 1) if "query" in budget.axes else 0.0
    return spread + 1e-3 * groups
