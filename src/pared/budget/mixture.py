"""Mixtures of depth and width: whether whole layers go, and how many, decided by the loss of trial models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pared.budget import Budget
from pared.budget.uniform import (
    CLEARLY,
    MOST_MEASURED,
    PerLayer,
    Shape,
    allocate_uniform,
    best_written,
    enough_removed,
    imbalance,
    per_layer,
)
from pared.errors import UsageError

Judge = Callable[[list[PerLayer]], list[float]]


def allocate_mixed(budget: Budget, width: Judge, mixed: Judge, order: Sequence[int], *, brief: bool = False) -> Shape:
    """The best of the shape that keeps every layer and of one for each smaller number of layers.

    width: compares splits among shapes that keep all layers, as where none may go, brief: few of them; mixed: compares the
    best of them with shapes that lose layers, in which those are marked as going. order: layers in the order in which they
    go. The result is the shape by width alone, or one that does clearly better on what `mixed` measures.
    """
    shapes = fewer_layers(budget)
    try:
        shapes = [allocate_uniform(_without_depth(budget), width, brief=brief), *shapes]
    except UsageError:
        if not shapes:  # neither can give so much
            raise
    if len(shapes) == 1:
        return shapes[0]
    losses = mixed([leaving(budget, shape, order) for shape in shapes])
    whole = budget.layout.num_layers
    losses = [loss * (1 if shape.layers == whole else CLEARLY) for loss, shape in zip(losses, shapes, strict=True)]
    return best_written(budget, sorted(zip(losses, shapes, strict=True), key=lambda e: e[0]), relative=True)


def fewer_layers(budget: Budget) -> list[Shape]:
    """For some numbers of layers below all of them, the shape whose width is the most balanced."""
    best: dict[int, tuple[float, Shape]] = {}
    width = _without_depth(budget)
    for _, shape in enough_removed(budget):
        if shape.layers < budget.layout.num_layers:
            found = (imbalance(width, shape) if width.axes else 0.0, shape)
            if shape.layers not in best or found[0] < best[shape.layers][0]:
                best[shape.layers] = found
    # Fewer layers than are needed with the width whole would remove more than was asked for.
    counts = sorted(best, reverse=True)
    whole = next((k for k in counts if not _narrower(budget, best[k][1])), counts[-1] if counts else 0)
    counts = [k for k in counts if k >= whole]
    most = MOST_MEASURED - 1
    if len(counts) > most:
        counts = [counts[round(k * (len(counts) - 1) / (most - 1))] for k in range(most)]
    return [best[k][1] for k in counts]


def leaving(budget: Budget, shape: Shape, order: Sequence[int]) -> PerLayer:
    """A shape as sizes for each layer; those that go are marked as having no unit of "layer"."""
    gone = set(order[: budget.layout.num_layers - shape.layers])
    return {i: {"layer": 0} if i in gone else own for i, own in per_layer(budget, shape).items()}


def _without_depth(budget: Budget) -> Budget:
    return replace(budget, axes=tuple(a for a in budget.axes if a != "layer"))


def _narrower(budget: Budget, shape: Shape) -> bool:
    full = budget.full()
    return any(n < full[a] for a, n in shape.sizes.items())
