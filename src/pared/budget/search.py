"""Search for the sizes of each layer: small moves at a constant budget, judged by the KL of the whole model.

A generation is a handful of children of the best shape so far, scored on a few sequences. On more of them the best child
is scored again, and so are two shapes that take all children into account: the moves of all that gained together, and
every move in proportion to what it gained, backwards where it lost. One takes the parent's place if it beats it there:
the result is never worse than the start on the sequences that it was judged by. Evolution at a fixed budget as in
EvoPress (arXiv:2410.14649); the third is a step along a gradient that was measured by the children.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pared.budget import Budget, Sizes
from pared.distributed import once
from pared.errors import UsageError
from pared.estimate import Progress, silent
from pared.journal import Journal

Shape = dict[int, Sizes]
_Key = tuple[tuple[int, tuple[tuple[str, int], ...]], ...]
# (shapes, share of the judging sequences to use) -> KL of each.
Judge = Callable[[Sequence[Shape], float], list[float]]

CHILDREN = 8
# Shares of the judging sequences: for all children, and for those of them and of their moves together that may take over.
SHARES, MOST_WORTH = (0.25, 1.0), 3
# A move of channels is up to this share of a layer's.
REACH = 0.12
# What a search is called in a journal, and its durable step.
STAGE, STEP = "search", "searched"
# Between the seeds of two generations, so that one can begin without those before it.
_EACH = 1_000_003


@dataclass(frozen=True)
class Found:
    """The best shape, its KL, and that of the start it began from."""

    shape: Shape
    kl: float
    start: float
    generations: int


@dataclass
class _State:
    """How far a search has come. tried: shapes that were judged; seconds: that it has taken."""

    shape: Shape
    kl: float
    start: float
    tried: dict[_Key, None]
    reach: float = REACH
    done: int = 0
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        return {**vars(self), "shape": _key(self.shape), "tried": list(self.tried)}

    @classmethod
    def of(cls, record: dict[str, Any]) -> _State:
        tried = dict.fromkeys(tuple((i, tuple((a, n) for a, n in s)) for i, s in key) for key in record["tried"])
        return cls(**{**record, "shape": {i: dict(s) for i, s in record["shape"]}, "tried": tried})


def search(
    budget: Budget,
    starts: Sequence[Shape],
    judge: Judge,
    *,
    generations: int,
    minutes: float | None = None,
    seed: int = 0,
    progress: Progress = silent,
    journal: Journal | None = None,
) -> Found:
    """Improve on the best of `starts` for so many generations, or until the minutes are over.

    starts: sizes of every axis that may shrink, for each layer, that meet the budget. Without `minutes` the result
    depends on the seed alone. journal: where each generation is noted, and the last one noted is gone on from.
    """
    if not starts:
        raise UsageError("a search needs a shape to start from", where="--allocate search")
    noted = journal.last(STAGE) if journal is not None else None
    if noted is not None:
        now = _State.of(noted[1])
    else:
        first = judge(starts, 1.0)
        best = min(range(len(starts)), key=first.__getitem__)
        now = _State(starts[best], first[best], first[best], dict.fromkeys(map(_key, starts)))
    started, before = time.monotonic(), now.seconds
    while now.done < generations and (minutes is None or now.seconds < 60 * minutes):
        if not _generation(budget, now, judge, torch.Generator().manual_seed(seed + _EACH * now.done)):
            break
        now.seconds = once(lambda: before + time.monotonic() - started)  # by one clock, where several processes search
        progress("search", now.done, generations)
        if journal is not None:
            journal.checkpoint(STAGE, STEP, now.done, now.record, {})
    return Found(now.shape, now.kl, now.start, now.done)


def _generation(budget: Budget, now: _State, judge: Judge, rng: torch.Generator) -> bool:
    """One more generation. False where no move is left to try."""
    now.done += 1
    children: list[Shape] = []
    for _ in range(4 * CHILDREN):
        child = mutate(budget, now.shape, rng, now.reach)
        if child is not None and _fresh(now, child):
            children.append(child)
        if len(children) == CHILDREN:
            break
    if not children:
        return False
    own, *theirs = judge([now.shape, *children], SHARES[0])
    gains = [own - kl if math.isfinite(kl) else 0.0 for kl in theirs]
    most, largest = max(gains), max(map(abs, gains)) or 1.0
    worth = [children[gains.index(most)]] if most > 0 else []
    gaining = [float(g > 0) for g in gains]
    for shares in (gaining if sum(gaining) > 1 else [], [g / largest for g in gains]):
        together = combined(budget, now.shape, children, shares)
        if together is not None and _fresh(now, together):
            worth.append(together)
    scores = judge(worth, SHARES[1]) if worth else []
    if scores and min(scores) < now.kl:
        now.kl = min(scores)
        now.shape = worth[scores.index(now.kl)]
        now.reach = min(2 * REACH, 1.2 * now.reach)
    else:
        now.reach = max(REACH / 8, 0.9 * now.reach)
    return True


def _fresh(now: _State, shape: Shape) -> bool:
    """Whether a shape has not been judged yet; it counts as judged from here on."""
    if _key(shape) in now.tried:
        return False
    now.tried[_key(shape)] = None
    return True


def combined(budget: Budget, shape: Shape, children: Sequence[Shape], shares: Sequence[float]) -> Shape | None:
    """The moves of several children at once, each in part or backwards, at the budget. None: they come to nothing."""
    out = {i: dict(sizes) for i, sizes in shape.items()}
    moved = []
    for i, sizes in shape.items():
        full = budget.layout.sizes_at(i)
        for axis, n in sizes.items():
            by = sum(share * (child[i][axis] - n) for child, share in zip(children, shares, strict=False))
            least = budget.step(axis)
            out[i][axis] = max(least, min(full[axis], _rounded(budget, axis, full[axis], n + round(by)))) if round(by) else n
        if out[i] != sizes:
            moved.append(i)
    return out if moved and meet(budget, out, [i for i in shape if i not in moved] or moved) else None


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


def _key(shape: Shape) -> _Key:
    return tuple((i, tuple(sorted(s.items()))) for i, s in sorted(shape.items()))
