"""Least squares on a layer's inputs: the exact refit of what stays.

A consumer layer is y = W a (+ b), W [out, n]. Over calibration tokens C = E[a a^T], X = E[t a^T] for a target t
(t = W a for a plain refit). Everything is solved in float64 with Cholesky factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pared.errors import ModelError

DAMPING = 1e-2


@dataclass
class Moments2:
    """Sums over tokens for one consumer: a [tokens, n], t [tokens, out]. fp32, divided by `count` when read."""

    count: float
    aa: Tensor
    ta: Tensor
    a: Tensor
    t: Tensor
    tt: float

    @classmethod
    def zeros(cls, n: int, out: int, device: torch.device | str = "cpu") -> Moments2:
        def z(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        return cls(0.0, z(n, n), z(out, n), z(n), z(out), 0.0)

    def add(self, a: Tensor, t: Tensor) -> None:
        a, t = a.float(), t.float()
        self.count += a.shape[0]
        self.aa.addmm_(a.T, a)
        self.ta.addmm_(t.T, a)
        self.a += a.sum(0)
        self.t += t.sum(0)
        self.tt += float(t.square().sum(dtype=torch.float64))

    def plus(self, other: Moments2) -> Moments2:
        return Moments2(
            self.count + other.count,
            self.aa + other.aa,
            self.ta + other.ta,
            self.a + other.a,
            self.t + other.t,
            self.tt + other.tt,
        )

    def add_inputs(self, a: Tensor) -> None:
        """Tokens whose target is not known yet: `of_output` fills it in."""
        a = a.float()
        self.count += a.shape[0]
        self.aa.addmm_(a.T, a)
        self.a += a.sum(0)

    def of_output(self, w: Tensor, bias: Tensor | None = None) -> Moments2:
        """The same inputs with the layer's own output as the target: w a (+ bias)."""
        w = w.float()
        t = w @ self.a
        power = float(((w @ self.aa) * w).sum(dtype=torch.float64))
        if bias is not None:
            bias = bias.float()
            power += float(2 * (t @ bias) + self.count * (bias @ bias))
            t = t + self.count * bias
        ta = w @ self.aa if bias is None else w @ self.aa + torch.outer(bias, self.a)
        return Moments2(self.count, self.aa, ta, self.a, t, power)

    def through(self, w: Tensor, bias: Tensor | None = None) -> Moments2:
        """The same inputs with the targets w t (+ bias), w [more, out]; E||t||^2, which no refit changes, counts as 0."""
        w = w.float()
        ta, t = w @ self.ta, w @ self.t
        if bias is not None:
            ta, t = ta + torch.outer(bias.float(), self.a), t + self.count * bias.float()
        return Moments2(self.count, self.aa, ta, self.a, t, 0.0)

    def problem(self, *, centred: bool) -> Problem:
        """The normal equations, in float64. centred: with a bias to fit as well."""
        n = max(self.count, 1.0)
        c, x = self.aa.double() / n, self.ta.double() / n
        a, t = self.a.double() / n, self.t.double() / n
        power = self.tt / n
        if centred:
            c -= torch.outer(a, a)
            x -= torch.outer(t, a)
            power -= float(t @ t)
        else:
            a, t = torch.zeros_like(a), torch.zeros_like(t)
        return Problem(c, x, a, t, power)


@dataclass(frozen=True)
class Problem:
    """min over W' of E||t - W' a_S - b||^2: C [n, n], X [out, n], means of a and t (zero without a bias), E||t||^2."""

    c: Tensor
    x: Tensor
    mean_a: Tensor
    mean_t: Tensor
    power: float

    def error(self, w: Tensor, kept: Tensor) -> float:
        """E||t - W' a_S - b||^2 of given weights [out, kept] with their best bias."""
        c = self.c[kept][:, kept]
        return float(((w @ c) * w).sum() - 2 * (w * self.x[:, kept]).sum()) + self.power

    def bias(self, w: Tensor, kept: Tensor) -> Tensor:
        return self.mean_t - w @ self.mean_a[kept]

    def mixed(self, w: Tensor, bias: Tensor | None, alpha: float) -> Problem:
        """The problem with the target (1 - alpha) (w a + bias) + alpha t: what the layer does now, and a part of t."""
        if alpha == 1.0:
            return self
        w = w.double()
        own = w @ self.c
        power = (1 - alpha) ** 2 * float((own * w).sum()) + 2 * alpha * (1 - alpha) * float((w * self.x).sum())
        mean = w @ self.mean_a if bias is None else w @ self.mean_a + bias.double()
        return Problem(
            self.c,
            (1 - alpha) * own + alpha * self.x,
            self.mean_a,
            (1 - alpha) * mean + alpha * self.mean_t,
            power + alpha**2 * self.power,
        )


def ridge(c: Tensor, damping: float) -> Tensor:
    """The multiple of the identity that damping stands for, for every channel: damping * mean diagonal."""
    mean = c.diagonal().mean()
    return (damping * mean).clamp(min=torch.finfo(torch.float64).tiny)


def cholesky(matrix: Tensor) -> Tensor:
    """Lower factor of a positive definite matrix; what rounding took below zero is lifted until it is."""
    lift, scale = 0.0, float(matrix.diagonal().mean())
    for _ in range(8):
        factor, info = torch.linalg.cholesky_ex(
            matrix + lift * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        )
        if int(info) == 0:
            return factor
        lift = max(10 * lift, 1e-10 * max(scale, 1e-30))
    raise ModelError(
        "the second moments of a layer's input are not finite, or not positive definite",
        fix="check the weights with pared verify, or try --dtype float32",
    )


def refit(problem: Problem, w: Tensor, kept: Tensor, damping: float = DAMPING) -> Tensor:
    """argmin over W' [out, kept] of E||t - W' a_S||^2 + ridge ||W' - W_S||^2. w: the original weights [out, n]."""
    c = problem.c[kept][:, kept]
    r = ridge(problem.c, damping)
    left = c + r * torch.eye(len(kept), dtype=c.dtype, device=c.device)
    right = problem.x[:, kept] + r * w.double()[:, kept]
    return torch.cholesky_solve(right.T, cholesky(left)).T


@dataclass(frozen=True)
class Guarded:
    """The same problem on two parts of the tokens, one to fit and one to judge by, and on all of them."""

    fit: Problem
    held: Problem
    whole: Problem


def refit_guarded(
    problems: Guarded, w: Tensor, kept: Tensor, *, dampings: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
) -> tuple[Tensor, Tensor, float | None]:
    """The refit whose damping held-out tokens choose; the original weights where no refit does better on them.

    The chosen refit is solved once more on all tokens. Returns (weights [out, kept], bias [out], damping or None where
    the weights were left alone).
    """
    held, whole = problems.held, problems.whole
    original = w.double()[:, kept]
    best, chosen = held.error(original, kept), None
    for damping in dampings:
        error = held.error(refit(problems.fit, w, kept, damping), kept)
        if error < best:
            best, chosen = error, damping
    new = original if chosen is None else refit(whole, w, kept, chosen)
    return new, whole.bias(new, kept), chosen
