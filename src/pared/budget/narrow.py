"""A narrower residual stream beside smaller blocks: whether hidden channels go as well, decided by the loss of trial models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from pared.budget import Budget
from pared.budget.uniform import CLEARLY, PerLayer, Shape, best_written, filled, per_layer

# What part of the amount hidden channels are to give: the first that is tried, and the others where that is better than none.
FIRST, OTHERS = 1 / 4, (1 / 2, 3 / 4)
# Most configs want hidden channels that their heads divide, quantised formats rows of whole blocks of up to so many: met where
# it takes steps of no more than this share of them.
ROW, FINE = 256, 1 / 16


def allocate_narrowed(budget: Budget, wide: Shape, judge: Callable[[list[PerLayer]], list[float]]) -> Shape:
    """A uniform shape that keeps every hidden channel, or the best of some that do not where it does clearly better.

    judge: gives the loss of shapes, sizes for each layer.
    """
    tried = [wide, *_narrower(budget, wide, [FIRST])]
    if len(tried) == 1:
        return wide
    losses = judge([per_layer(budget, shape) for shape in tried])
    if losses[1] < losses[0] and (more := _narrower(budget, wide, OTHERS)):
        tried, losses = tried + more, losses + judge([per_layer(budget, shape) for shape in more])
    losses = [loss * (1 if shape is wide else CLEARLY) for loss, shape in zip(losses, tried, strict=True)]
    return best_written(budget, sorted(zip(losses, tried, strict=True), key=lambda e: e[0]), relative=True)


def _narrower(budget: Budget, wide: Shape, parts: Sequence[float]) -> list[Shape]:
    """For each part the shape whose attention loses the most nearly what it loses in `wide`, less that part of it."""
    full, total, step = budget.full(), budget.before.amount(budget.amount.of), _step(budget)
    found: dict[int, Shape] = {}
    for part in parts:
        hidden = round(full["hidden"] * (1 - part * budget.amount.remove)) // step * step
        shapes = [s for s in filled(budget, hidden) if s.removed >= budget.target] if 0 < hidden < full["hidden"] else []
        wanted = (1 - part) * wide.lost(full, ("kv", "query"))
        if shapes:
            found[hidden] = min(
                shapes,
                key=lambda s: abs(s.lost(full, ("kv", "query")) - wanted) + 10 * (s.removed - budget.target) / total,
            )
    return list(found.values())


def _step(budget: Budget) -> int:
    """The multiple that kept hidden channels are rounded to; by --align, or by what formats want."""
    full, least = budget.full(), budget.step("hidden")
    most = FINE * full["hidden"]
    row = 1 if budget.align is not None else min(ROW, 2 ** int(math.log2(max(1.0, most))))
    step = math.lcm(least, row, full.get("kv", 1) * full.get("query", 1))
    return step if step <= most else least
