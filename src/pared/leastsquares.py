"""Least squares on a layer's inputs: the exact refit of what stays.

A consumer layer is y = W a (+ b), W [out, n]. Over calibration tokens C = E[a a^T], X = E[t a^T] for a target t
(t = W a for a plain refit). What is known of the tokens is either C and X (`pared.moments`) or, where tokens are few
against channels, the tokens themselves (`pared.fewrows`): the same problems, solved with the smaller of the two matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from pared.errors import ModelError

DAMPING = 1e-2
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
# Rows of a symmetric sum that are added up together, and rows of weights that are solved for together.
STRIP = 256


class Problem(Protocol):
    """min over W' of E||t - W' a - b||^2, in one precision. mean_a, mean_t: of the tokens; zero without a bias to fit."""

    mean_a: Tensor
    mean_t: Tensor

    def solved(self, w: Tensor, damping: float) -> Tensor:
        """argmin over W' [out, n] of the error + ridge ||W' - w||^2."""

    def gain(self, before: Tensor, after: Tensor) -> float:
        """How much less the error is with the weights `after` than with `before`, [out, n]."""

    def moved(self, damping: float) -> Factors:
        """Of a problem with the target h: (T - I) with T = argmin E||h - T a||^2 + ridge ||T - I||^2."""

    def moved_judge(self, weights: Sequence[Tensor]) -> Callable[[Factors], float]:
        """How much less E||W (h - T a)||^2 is, over all W, for T = I + change than for T = I."""


class Sums(Protocol):
    """What is known of the tokens of one consumer."""

    def plus(self, other: Self) -> Self:
        """These tokens and those of another together, in the place of this one."""

    def problem(self, *, centred: bool, scale: float | None = None, dtype: torch.dtype = torch.float64) -> Problem:
        """What is to be solved. centred: with a bias to fit as well. scale: what damping is relative to, if not its own."""


class Factors:
    """A square matrix as a product: one factor [n, n], or two, [n, r] and [r, n]."""

    def __init__(self, *factors: Tensor) -> None:
        self._factors = factors

    def onto(self, w: Tensor) -> Tensor:
        """w [out, n] times the matrix, in float32."""
        for factor in self._factors:
            w = w.float() @ factor.float()
        return w

    def times(self, v: Tensor) -> Tensor:
        """The matrix times v, [n] or [n, m], in v's precision."""
        for factor in reversed(self._factors):
            v = factor.to(v) @ v
        return v


def best_bias(problem: Problem, w: Tensor) -> Tensor:
    """The best bias of given weights [out, n]: [out]."""
    return problem.mean_t - w.to(problem.mean_a) @ problem.mean_a


def strips(n: int) -> Iterator[slice]:
    """Some rows at a time."""
    return (slice(s, min(s + STRIP, n)) for s in range(0, n, STRIP))


def ridge(scale: float, damping: float) -> float:
    """The multiple of the identity that damping stands for."""
    return max(damping * scale, torch.finfo(torch.float32).tiny)


def factored(square: Callable[[], Tensor], added: float) -> Tensor:
    """The lower Cholesky factor of a positive definite matrix plus a multiple of the identity.

    square: makes the matrix, which the factor takes the place of. What rounding took below zero is lifted until it is
    positive.
    """
    lift = 0.0
    for _ in range(8):
        # A symmetric matrix read by columns is itself: LAPACK then factors it where it lies.
        factor = square().mT
        diagonal = factor.diagonal()
        size = float(diagonal.mean())
        diagonal.add_(added + lift)
        info = torch.empty((), dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        if int(info) == 0:
            return factor
        lift = max(10 * lift, 1e-2 * torch.finfo(factor.dtype).eps ** 0.5 * max(size, 1e-30))
        del factor, diagonal  # before the matrix is made once more
    raise ModelError(
        "the second moments of a layer's input are not finite, or not positive definite",
        fix="check the weights with pared verify, or try --dtype float32",
    )


def solve_rows_(factor: Tensor, rows: Tensor) -> Tensor:
    """rows [r, n] times the inverse of a matrix [n, n] of which the lower Cholesky factor is given, in the place of the rows.

    `torch.cholesky_solve` would copy the factor.
    """
    torch.linalg.solve_triangular(factor.mT, rows, upper=True, left=False, out=rows)
    return torch.linalg.solve_triangular(factor, rows, upper=False, left=False, out=rows)


def inverse(square: Callable[[], Tensor], added: float) -> Tensor:
    """The inverse of such a matrix, in its place."""
    factor = factored(square, added)
    torch.cholesky_inverse(factor, out=factor)
    return factor.mT


def refit_guarded(
    fit: Sums, held: Sums, w: Tensor, *, centred: bool, scale: float | None = None
) -> tuple[Tensor, Tensor, float | None]:
    """The refit whose damping held-out tokens choose; the original weights where no refit does better on them.

    fit, held: the tokens to fit and those to judge by, which are given up; w: the original weights [out, n]. Dampings are
    tried in fp32; the chosen refit is solved on all tokens in float64. Returns (weights [out, n], bias [out], damping or
    None where the weights were left alone).
    """

    def judged() -> float | None:
        on = fit.problem(centred=centred, scale=scale, dtype=torch.float32)
        by = held.problem(centred=centred, dtype=torch.float32)
        return choose_damping(lambda damping: by.gain(w, on.solved(w, damping)))

    chosen = judged()
    whole = fit.plus(held).problem(centred=centred, scale=scale)
    new = w.double() if chosen is None else whole.solved(w, chosen)
    return new, best_bias(whole, new), chosen


def choose_damping(gain: Callable[[float], float]) -> float | None:
    """The damping of those in DAMPINGS with the largest gain, None where none gains; gains are taken to have one peak."""
    at = DAMPINGS.index(DAMPING)
    found = {at: gain(DAMPINGS[at]), at + 1: gain(DAMPINGS[at + 1])}
    step = 1 if found[at + 1] > found[at] else -1
    k = at + 1 + step if step > 0 else at - 1
    while 0 <= k < len(DAMPINGS):
        found[k] = gain(DAMPINGS[k])
        if found[k] <= found[k - step]:
            break
        k += step
    best = max(found, key=found.__getitem__)
    return DAMPINGS[best] if found[best] > 0 else None


def transfer(fit: Sums, held: Sums, weights: Sequence[Tensor], *, centred: bool) -> tuple[Factors | None, Tensor, float | None]:
    """T - I and s [n] so that W (T h' + s) comes near W h: sums over h' with the target h. weights: each W [out, n].

    T = (X + ridge I) (C + ridge I)^-1: for every W at once what `refit_guarded` gives with the target W h, the damping
    chosen by the error at the output of all of them. None and zero where no refit does better there on the held-out
    tokens. fit and held are given up.
    """

    def judged() -> float | None:
        on, by = (m.problem(centred=centred, dtype=torch.float32) for m in (fit, held))

        gain = by.moved_judge(weights)
        return choose_damping(lambda damping: gain(on.moved(damping)))

    chosen = judged()
    whole = fit.plus(held).problem(centred=centred)
    change = None if chosen is None else whole.moved(chosen)
    shift = whole.mean_t.clone()
    shift[: len(whole.mean_a)] -= whole.mean_a
    return change, shift if change is None else shift - change.times(whole.mean_a), chosen
