"""Least squares on a layer's inputs: the exact refit of what stays, and the order in which units can go.

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


def refit_guarded(
    fit: Moments2,
    held: Moments2,
    w: Tensor,
    kept: Tensor,
    *,
    centred: bool,
    dampings: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0),
) -> tuple[Tensor, Tensor, float | None]:
    """The refit whose damping held-out tokens choose; the original weights where no refit does better on them.

    Returns (weights [out, kept], bias [out], damping or None where the weights were left alone). The chosen refit is
    solved once more on all tokens.
    """
    original = w.double()[:, kept]
    problem, check = fit.problem(centred=centred), held.problem(centred=centred)
    best, chosen = check.error(original, kept), None
    for damping in dampings:
        error = check.error(refit(problem, w, kept, damping), kept)
        if error < best:
            best, chosen = error, damping
    whole = fit.plus(held).problem(centred=centred)
    new = original if chosen is None else refit(whole, w, kept, chosen)
    return new, whole.bias(new, kept), chosen


def elimination_costs(c: Tensor, w: Tensor, blocks: Tensor, *, damping: float = DAMPING, rounds: int = 24) -> Tensor:
    """The order in which blocks of columns go, as in Optimal Brain Surgeon: each unit's cost when its turn comes.

    c: C [n, n]; w: W [out, n], weighted by whatever the output error is weighted by. blocks: int64 [units, columns].
    Cost of a block M: tr(V_M (H_MM)^-1 V_M^T), H = (C + ridge)^-1; after each round V and H are down-dated so that
    later costs count on the refit of everything that stays. Units of one column go many in a round, blocks one by one.
    Source: Hassibi & Stork 1992; blocks as in ZipLM (arXiv:2302.04089). Returns float64 [units], ascending in the
    order of going; the last to stay are the largest.
    """
    units, width = blocks.shape
    n = len(c)
    h = torch.cholesky_inverse(
        cholesky(c.double() + ridge(c.double(), damping) * torch.eye(n, dtype=torch.float64, device=c.device))
    )
    v = w.double().clone()
    cost = torch.full((units,), float("inf"), dtype=torch.float64)
    alive = torch.arange(units)
    blocks = blocks.clone()
    floor = 0.0
    per_round = max(1, -(-units // rounds)) if width == 1 else 1
    while len(alive):
        now = _block_costs(h, v, blocks)
        order = now.argsort(stable=True)[: min(per_round, len(alive))]
        for k in order.tolist():
            floor = max(floor, float(now[k]))
            cost[alive[k]] = floor
        gone = blocks[order].reshape(-1)
        stay = torch.ones(len(h), dtype=torch.bool)
        stay[gone] = False
        if not stay.any():
            break
        gain = torch.cholesky_solve(h[gone][:, stay], cholesky(h[gone][:, gone]))
        v = v[:, stay] - v[:, gone] @ gain
        h = h[stay][:, stay] - h[stay][:, gone] @ gain
        new_index = torch.cumsum(stay, 0) - 1
        left = torch.ones(len(alive), dtype=torch.bool)
        left[order] = False
        alive, blocks = alive[left], new_index[blocks[left]]
    return cost


def _block_costs(h: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
    """tr(V_M (H_MM)^-1 V_M^T) for every block: [units]."""
    if blocks.shape[1] == 1:
        at = blocks[:, 0]
        return v[:, at].square().sum(0) / h.diagonal()[at].clamp(min=1e-300)
    part = torch.stack([h[b][:, b] for b in blocks])
    vm = v[:, blocks].permute(1, 2, 0)  # [units, columns, out]
    return (vm * torch.linalg.solve(part, vm)).sum((1, 2))
