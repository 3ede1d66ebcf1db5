"""Global allocation: units of all layers and axes compete, the cheapest loss for its size goes first."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from pared.budget import Budget, Sizes
from pared.scores import Scores
from pared.structure import sublayer_of


def allocate_ranked(budget: Budget, scores: Scores) -> dict[int, Sizes]:
    """Sizes for every layer (the axes that change). Removes at least the amount asked for, by less than one last step.

    Sublayers compete as wholes with their own units. Query heads go one from every KV group at a time, channels in experts one from every expert, FFN channels in
    aligned steps. Every sublayer that stays keeps at least one unit of each axis, and the experts that its router needs.
    """
    layout = budget.layout
    sizes = {i: {a: layout.sizes_at(i)[a] for a in budget.axes if (i, a) in scores.of} for i in range(layout.num_layers)}
    ladders = {
        (i, a): _steps(budget, scores, i, a)
        for i, own in sizes.items()
        if i not in budget.protected
        for a in own
        if layout.follows.get(a, ("",))[0] not in own
    }
    at = dict.fromkeys(ladders, 0)
    heap: list[tuple[float, int, str, int]] = []
    price: dict[tuple[int, str], float] = {}
    lost: dict[tuple[int, str], float] = {}  # what units of a sublayer were worth that have gone one by one

    def push(i: int, a: str) -> None:
        price.pop((i, a), None)
        if at[i, a] < len(ladders[i, a]):
            score, after = ladders[i, a][at[i, a]]
            # Experts and channels inside of them: what one is worth falls with the other as what it saves does.
            at_first = {b: n for b, n in budget.layout.layer_sizes[i].items() if _nested(budget, a, b)}
            saved = _saves(budget, i, a, after, {**sizes[i], **at_first})
            if saved > 0:
                if scores.comparable and a in layout.sublayers:
                    score = max(min(score, 0.0), score - lost.get((i, a), 0.0))
                price[i, a] = score / saved if scores.comparable else score
                heapq.heappush(heap, (price[i, a], i, a, at[i, a]))

    for i, a in ladders:
        push(i, a)
    removed = budget.given
    while heap and removed < budget.target:
        now, i, a, step = heapq.heappop(heap)
        if step != at[i, a] or now != price.get((i, a)):
            continue
        score, after = ladders[i, a][step]
        inside = sublayer_of(a) or a
        lost[i, inside] = lost.get((i, inside), 0.0) + score
        removed += _saves(budget, i, a, after, sizes[i])
        sizes[i] = _with(budget, sizes[i], a, after)
        at[i, a] += 1
        # What a step saves depends on the other axes of its sublayer, and on whether that stays: prices are renewed.
        for other in sizes[i]:
            if (sublayer_of(other) or other) == inside and (i, other) in ladders:
                push(i, other)
    if removed < budget.target:
        raise budget.unreachable(removed / budget.before.amount(budget.amount.of))
    _give_back(budget, sizes, ladders, at, removed)
    return sizes


def check_reach(budget: Budget) -> None:
    """UsageError where not even the smallest sizes of every layer would remove the amount; needs no scores."""
    layout, left = budget.layout, budget.outside_amount()
    for i, own in enumerate(layout.layer_sizes):
        fewest: Sizes = {}
        for axis in budget.axes if i not in budget.protected else ():
            if axis in own and layout.follows.get(axis, ("",))[0] not in own:
                allowed = [m for m in budget.levels(axis, own[axis]) if m % budget.step(axis) == 0]
                fewest = _with(budget, {**own, **fewest}, axis, allowed[-1] if allowed else own[axis])
        left += budget.block_amount(i, fewest)
    total = budget.before.amount(budget.amount.of)
    if total - left < budget.target:
        raise budget.unreachable((total - left) / total)


def _saves(budget: Budget, i: int, axis: str, after: int, now: Sizes) -> int:
    return budget.block_amount(i, now) - budget.block_amount(i, _with(budget, now, axis, after))


def _with(budget: Budget, now: Sizes, axis: str, n: int) -> Sizes:
    """Sizes with another number of units of one axis, and of those that follow it."""
    follow = {f: factor * n for f, (leader, factor) in budget.layout.follows.items() if leader == axis and f in now}
    return {**now, axis: n, **follow}


def _nested(budget: Budget, one: str, other: str) -> bool:
    parents = budget.layout.parents
    return "expert" in (one, other) and (parents.get(one) == other or parents.get(other) == one)


def _steps(budget: Budget, scores: Scores, i: int, axis: str) -> list[tuple[float, int]]:
    """For one (layer, axis), the steps down: (score that the step gives up, units left after it)."""
    n = budget.layout.sizes_at(i)[axis]
    order = ascending(budget, scores, i, axis)
    for follower, (leader, _) in budget.layout.follows.items():
        if leader == axis and (i, follower) in scores.of:
            more = ascending(budget, scores, i, follower).reshape(n, -1)
            order = order + (more.sum(1) if scores.comparable else more.mean(1))
    step = budget.step(axis)
    levels = [m for m in budget.levels(axis, n)[1:] if m % step == 0]
    out, left = [], n
    for m in levels:
        part = order[n - left : n - m]
        out.append((float(part.sum() if scores.comparable else part.mean()), m))
        left = m
    return out


def ascending(budget: Budget, scores: Scores, i: int, axis: str) -> Tensor:
    """What each unit of one (layer, axis) is worth, cheapest first; nested axes give the same number in every parent."""
    n, runs = budget.layout.sizes_at(i)[axis], budget.layout.runs.get(axis, 1)
    value = scores.of[i, axis]
    if not scores.comparable:
        value = standardise(value) if axis not in budget.layout.sublayers else _among_layers(scores, i, axis)
    rows = value.reshape(-1, n).sort(dim=1).values
    if runs > 1:  # the cheapest of every run, then the next of every run
        return value.reshape(runs, -1).sort(dim=1).values.T.flatten()
    return rows.sum(0) if scores.comparable else rows.mean(0)


def _among_layers(scores: Scores, i: int, axis: str) -> Tensor:
    """The score of the one unit that a layer has of an axis, standardised over the layers."""
    places = [layer for layer, a in scores.of if a == axis]
    return standardise(torch.cat([scores.of[layer, axis] for layer in places]))[[places.index(i)]]


def standardise(value: Tensor) -> Tensor:
    """Zero mean and unit variance over one (layer, axis): FLAP's way to let layers compete (arXiv:2312.11983, eq. 6)."""
    return (value - value.mean()) / value.std().clamp(min=1e-12) if value.numel() > 1 else torch.zeros_like(value)


def _give_back(
    budget: Budget,
    sizes: dict[int, Sizes],
    ladders: dict[tuple[int, str], list[tuple[float, int]]],
    at: dict[tuple[int, str], int],
    removed: int,
) -> None:
    """Undo the dearest steps that the budget did not need (the last coarse step may have overshot by many small ones)."""
    undone = True
    while undone:
        undone = False
        for (i, a), step in sorted(at.items(), key=lambda item: -ladders[item[0]][item[1] - 1][0] if item[1] else 0.0):
            if step == 0:
                continue
            before = ladders[i, a][step - 2][1] if step > 1 else budget.layout.sizes_at(i)[a]
            wider = _with(budget, sizes[i], a, before)
            saved = budget.block_amount(i, wider) - budget.block_amount(i, sizes[i])
            if removed - saved >= budget.target:
                removed -= saved
                sizes[i] = wider
                at[i, a] = step - 1
                undone = True
                break
