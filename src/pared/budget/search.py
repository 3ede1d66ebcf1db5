"""Search for the sizes of each layer: small moves at a constant budget, judged by the KL of the whole model.

A generation is a handful of children of the best shape so far. All are scored on a few sequences, the better ones again
on more (successive halving), and one takes the parent's place if it beats it on all of them: the result is never worse
than the start on the sequences that it was judged by. Evolution at a fixed budget as in EvoPress (arXiv:2410.14649).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pared.budget import Budget, Sizes
from pared.errors import UsageError
from pared.estimate import Progress, silent

Shape = dict[int, Sizes]
# (shapes, share of the judging sequences to use) -> KL of each.
Judge = Callable[[Sequence[Shape], float], list[float]]

CHILDREN = 8
SHARES = (0.25, 1.0)
# A move of channels is up to this share of a layer's.
REACH = 0.12


@dataclass(frozen=True)
class Found:
    """The best shape, its KL, and that of the start it began from."""

    shape: Shape
    kl: float
    start: float
    generations: int


def search(
    budget: Budget,
    starts: Sequence[Shape],
    judge: Judge,
    *,
    generations: int,
    minutes: float | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Found:
    """Improve on the best of `starts` for so many generations, or until the minutes are over.

    starts: sizes of every axis that may shrink, for each layer, that meet the budget. Without `minutes` the result
    depends on the seed alone.
    """
    if not starts:
        raise UsageError("a search needs a shape to start from", where="--allocate search")
    started = time.monotonic()
    rng = torch.Generator().manual_seed(seed)
    first = judge(starts, 1.0)
    best = min(range(len(starts)), key=first.__getitem__)
    shape, kl = starts[best], first[best]
    reach, done = REACH, 0
    tried = {_key(s) for s in starts}
    while done < generations and (minutes is None or time.monotonic() - started < 60 * minutes):
        children = []
        for _ in range(4 * CHILDREN):
            child = mutate(budget, shape, rng, reach)
            if child is not None and _key(child) not in tried:
                tried.add(_key(child))
                children.append(child)
            if len(children) == CHILDREN:
                break
        done += 1
        if not children:
            break
        quick = judge([shape, *children], SHARES[0])
        order = sorted(range(len(children)), key=lambda k: quick[k + 1])[: max(1, len(children) // 4)]
        worth = [children[k] for k in order if quick[k + 1] < quick[0]]
        scores = judge(worth, SHARES[1]) if worth else []
        if scores and min(scores) < kl:
            kl = min(scores)
            shape = worth[scores.index(kl)]
            reach = min(2 * REACH, 1.2 * reach)
        else:
            reach = max(REACH / 8, 0.9 * reach)
        progress("search", done, generations)
    return Found(shape, kl, first[best], done)


def mutate(budget: Budget, shape: Shape, rng: torch.Generator, reach: float = REACH) -> Shape | None:
    """Another shape at the budget: one or two layers change, and FFN channels make up the difference. None: no such move."""
    out = {i: dict(sizes) for i, sizes in shape.items()}
    free = [i for i in out if i not in budget.protected and out[i]]
    kinds = sorted({a for i in free for a in out[i]})
    if not kinds:
        return None
    width = [a for a in kinds if a in budget.width_axes]
    axis = kinds[_draw(len(kinds), rng)]
    i = free[_draw(len(free), rng)]
    if axis not in out[i]:
        return None
    full = budget.layout.sizes_at(i)
    if axis in width:
        most = max(1, int(reach * full[axis]) // budget.step(axis))
        by = budget.step(axis) * (1 + _draw(most, rng))
    else:
        by = 1
    up = bool(_draw(2, rng))
    if up:
        out[i][axis] = min(full[axis], _rounded(budget, axis, full[axis], out[i][axis] + by))
    else:
        out[i][axis] = max(budget.step(axis), _rounded(budget, axis, full[axis], out[i][axis] - by))
    if out[i][axis] == shape[i][axis]:
        return None
    # The difference goes to one other layer, or is spread over all of them.
    others = [j for j in free if j != i] or free
    takers = others if _draw(3, rng) == 0 else [others[_draw(len(others), rng)]]
    return out if meet(budget, out, takers) else None


def meet(budget: Budget, shape: Shape, first: Sequence[int]) -> bool:
    """Change FFN channels (heads where there are none), of layers in `first` to begin with, until the budget is just met."""
    axes = budget.width_axes or [a for a in budget.axes if a in ("kv", "query")]
    total = budget.before.amount(budget.amount.of)
    removed = total - budget.outside_amount() - sum(budget.block_amount(i, s) for i, s in shape.items())
    places = [(i, a) for i in [*first, *(j for j in shape if j not in first)] for a in axes if a in shape[i]]
    ahead = {(i, a) for i, a in places if i in first}
    for group in ([p for p in places if p in ahead], [p for p in places if p not in ahead]):
        moved = True
        while removed < budget.target and moved:
            moved = False
            for i, a in group:
                if removed < budget.target and (saved := _shrink(budget, shape, i, a)) > 0:
                    removed, moved = removed + saved, True
    if removed < budget.target:
        return False
    for group in ([p for p in places if p in ahead], [p for p in places if p not in ahead]):
        moved = True
        while moved:
            moved = False
            for i, a in group:
                cost = _grow(budget, shape, i, a, removed - budget.target)
                if cost > 0:
                    removed, moved = removed - cost, True
    return True


def _shrink(budget: Budget, shape: Shape, i: int, axis: str) -> int:
    """One step down: what it saves, 0 where the axis is at its least."""
    step, full = budget.step(axis), budget.layout.sizes_at(i)[axis]
    now = shape[i][axis]
    lower = _rounded(budget, axis, full, now - step)
    if lower < step or lower >= now or i in budget.protected:
        return 0
    before = budget.block_amount(i, shape[i])
    shape[i][axis] = lower
    return before - budget.block_amount(i, shape[i])


def _grow(budget: Budget, shape: Shape, i: int, axis: str, slack: float) -> int:
    """One step up where the slack pays for it: what it costs, else 0."""
    full = budget.layout.sizes_at(i)[axis]
    now = shape[i][axis]
    if now >= full or i in budget.protected:
        return 0
    higher = min(full, now + budget.step(axis))
    cost = budget.block_amount(i, {**shape[i], axis: higher}) - budget.block_amount(i, shape[i])
    if not 0 < cost <= slack:
        return 0
    shape[i][axis] = higher
    return cost


def _rounded(budget: Budget, axis: str, full: int, n: int) -> int:
    return n if n >= full else n // budget.step(axis) * budget.step(axis)


def _draw(n: int, rng: torch.Generator) -> int:
    return int(torch.randint(n, (1,), generator=rng))


def _key(shape: Shape) -> tuple[tuple[int, tuple[tuple[str, int], ...]], ...]:
    return tuple((i, tuple(sorted(s.items()))) for i, s in sorted(shape.items()))
