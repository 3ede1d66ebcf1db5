"""Sizes for a time: the least loss among all sizes that were timed and meet a target, found exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pared.budget import Budget, Sizes
from pared.budget.ranked import ascending
from pared.errors import UsageError
from pared.scores import Scores

# Times are counted in so many parts of the whole, rounded against the target.
TICKS = 1 << 16


@dataclass(frozen=True)
class Times:
    """Seconds that blocks take. like: for each layer, the first one that takes as long at equal sizes; whole: by that
    layer, of a block as it is; parts: by that layer, for each of its parts (attention, the FFNs), sizes and the seconds
    that the block takes when that part alone has them, its full sizes first.
    """

    like: tuple[int, ...]
    whole: Mapping[int, float]
    parts: Mapping[int, Sequence[Sequence[tuple[Sizes, float]]]]

    @property
    def total(self) -> float:
        return sum(self.whole[k] for k in self.like)

    def of(self, sizes: Mapping[int, Sizes]) -> float:
        """Seconds that all blocks take at sizes that are among those timed."""
        return self.total - sum(self.saved(i, own) for i, own in sizes.items())

    def saved(self, layer: int, sizes: Sizes) -> float:
        kind, out = self.like[layer], 0.0
        for options in self.parts[kind]:
            full = options[0][0]
            wanted = {a: sizes.get(a, n) for a, n in full.items()}
            out += self.whole[kind] - next(t for own, t in options if own == wanted)
        return out


def allocate_timed(budget: Budget, scores: Scores, times: Times, *, uniform: bool) -> dict[int, Sizes]:
    """Sizes for each layer that take at most 1 - share of the time, with the least sum of scores given up.

    uniform: the same for all layers, in a form that a config can say. UsageError where no sizes are fast enough.
    """
    free = [i for i in range(len(times.like)) if i not in budget.protected]
    tick = times.total / TICKS
    target = math.ceil(budget.amount.remove * TICKS)
    # (sizes, loss, ticks saved) for each part of each layer
    parts = {
        i: [
            [
                (sizes, lost(budget, scores, i, sizes), math.floor((times.whole[times.like[i]] - seconds) / tick + 1e-9))
                for sizes, seconds in options
            ]
            for options in times.parts[times.like[i]]
        ]
        for i in free
    }
    if uniform:
        return _alike(budget, parts, target)
    for own in parts.values():  # sizes that take as long as the full ones are no use
        own[:] = [[o for k, o in enumerate(options) if k == 0 or o[2] > 0] for options in own]
    places = [(i, k) for i in free for k in range(len(parts[i]))]
    chosen = knapsack([[(loss, saved) for _, loss, saved in parts[i][k]] for i, k in places], target)
    if chosen is None:
        raise _unreachable(budget, sum(max(s for _, _, s in parts[i][k]) for i, k in places))
    out: dict[int, Sizes] = {i: {} for i in range(len(times.like))}
    for (i, k), pick in zip(places, chosen, strict=True):
        out[i].update(parts[i][k][pick][0])
    return out


def knapsack(groups: Sequence[Sequence[tuple[float, int]]], target: int) -> list[int] | None:
    """One option of each group so that they save `target` together and cost the least: options are (cost, saved), saved >= 0.

    Exact: dynamic programming over what is saved so far, capped at the target. None where the target is out of reach.
    """
    best = torch.full((target + 1,), math.inf, dtype=torch.float64)
    best[0] = 0.0
    at = torch.arange(target + 1)
    picks: list[Tensor] = []
    for options in groups:
        costs = torch.stack([best[(at - saved).clamp(0, target)] + cost for cost, saved in options])
        best, pick = costs.min(0)
        picks.append(pick)
    if math.isinf(float(best[target])):
        return None
    left, chosen = target, []
    for options, pick in zip(reversed(groups), reversed(picks), strict=True):
        chosen.append(int(pick[left]))
        left = max(0, left - options[chosen[-1]][1])
    return chosen[::-1]


def lost(budget: Budget, scores: Scores, layer: int, sizes: Sizes) -> float:
    """The scores of the units that go when the best of one layer stay, as many of each axis as `sizes` says."""
    layout, full = budget.layout, budget.layout.sizes_at(layer)
    out, kept = 0.0, None
    for axis in sorted(sizes, key=lambda a: a in layout.parents):
        value = scores.of.get((layer, axis))
        if value is None or sizes[axis] == full[axis]:
            continue
        parent = layout.parents.get(axis)
        if parent in sizes and sizes[parent] < full[parent] and (layer, parent) in scores.of:
            kept = scores.of[layer, parent].argsort(descending=True, stable=True)[: sizes[parent]]
            rows = value.reshape(full[parent], full[axis])[kept].sort(dim=1).values
            out += float(rows[:, : full[axis] - sizes[axis]].sum())
        else:
            out += float(ascending(budget, scores, layer, axis)[: full[axis] - sizes[axis]].sum())
    return out


def _alike(budget: Budget, parts: Mapping[int, list[list[tuple[Sizes, float, int]]]], target: int) -> dict[int, Sizes]:
    found: list[tuple[float, Sizes]] = []
    most = 0
    first = next(iter(parts.values()))
    if any([[s for s, _, _ in o] for o in own] != [[s for s, _, _ in o] for o in first] for own in parts.values()):
        raise UsageError(
            "layers of other sizes can not all have the same ones", where="--shape uniform", fix="--shape per-layer"
        )
    for picks in itertools.product(*(range(len(options)) for options in first)):
        chosen = [[own[k][p] for k, p in enumerate(picks)] for own in parts.values()]
        saved = sum(s for own in chosen for _, _, s in own)
        most = max(most, saved)
        if saved >= target:
            sizes = {a: n for own, _, _ in chosen[0] for a, n in own.items()}
            found.append((sum(loss for own in chosen for _, loss, _ in own), sizes))
    if not found:
        raise _unreachable(budget, most)
    for _, sizes in sorted(found, key=lambda f: f[0]):
        if budget.written_as is None or budget.written_as(sizes, None) is not None:
            return {i: dict(sizes) if i in parts else {} for i in range(budget.layout.num_layers)}
    raise UsageError("no config can say the sizes that would be fast enough", where="--remove", fix="--shape per-layer")


def _unreachable(budget: Budget, ticks: int) -> UsageError:
    return UsageError(
        f"removing {budget.amount.remove:.1%} of the time is out of reach: {', '.join(budget.axes)} can give "
        f"{max(0, math.floor(1000 * ticks / TICKS)) / 1000:.1%} on this device",
        where="--remove",
        fix="ask for less, or time a larger batch or context",
    )
