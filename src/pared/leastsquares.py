"""Least squares on a layer's inputs: the exact refit of what stays.

A consumer layer is y = W a (+ b), W [out, n]. Over calibration tokens C = E[a a^T], X = E[t a^T] for a target t
(t = W a for a plain refit). Sums over tokens are fp32; everything is solved in float64 with Cholesky factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pared.distributed import total, total_of
from pared.errors import ModelError

DAMPING = 1e-2
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
# Rows of a symmetric sum that are added up together: what lies below them is mirrored when it is read.
STRIP = 512


def add_square(into: Tensor, a: Tensor) -> None:
    """into += a^T a for a [tokens, n], its upper triangle alone, but for the parts of strips below the diagonal."""
    n = a.shape[1]
    strip = STRIP if a.device.type == "cpu" else n
    for s in range(0, n, strip):
        into[s : s + strip, s:].addmm_(a[:, s : s + strip].T, a[:, s:])


def mirrored(square: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle `add_square` made; in place."""
    n = len(square)
    strip = STRIP if square.device.type == "cpu" else n
    for s in range(0, n, strip):
        square[s + strip :, s : s + strip] = square[s : s + strip, s + strip :].T
    return square


@dataclass
class Moments2:
    """Sums over tokens for one consumer: a [tokens, n], t [tokens, out]. fp32, divided by `count` when read.

    upper: sum of a a^T, of which `aa` reads the upper triangle.
    """

    count: float
    upper: Tensor
    ta: Tensor
    a: Tensor
    t: Tensor
    tt: float

    @classmethod
    def zeros(cls, n: int, out: int, device: torch.device | str = "cpu") -> Moments2:
        def z(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        return cls(0.0, z(n, n), z(out, n), z(n), z(out), 0.0)

    @property
    def aa(self) -> Tensor:
        """The sum of a a^T, [n, n]."""
        return mirrored(self.upper)

    def add(self, a: Tensor, t: Tensor) -> None:
        a, t = a.float(), t.float()
        self.add_inputs(a)
        self.ta.addmm_(t.T, a)
        self.t += t.sum(0)
        self.tt += float(t.square().sum(dtype=torch.float64))

    def add_inputs(self, a: Tensor) -> None:
        """Tokens whose target is not known yet: `of_output` fills it in."""
        a = a.float()
        self.count += a.shape[0]
        add_square(self.upper, a)
        self.a += a.sum(0)

    def total(self) -> None:
        """Sum over the processes that each saw a part of the tokens."""
        total(self.upper, self.ta, self.a, self.t)
        self.count, self.tt = total_of(self.count), total_of(self.tt)

    def plus(self, other: Moments2) -> Moments2:
        return Moments2(
            self.count + other.count,
            self.upper + other.upper,
            self.ta + other.ta,
            self.a + other.a,
            self.t + other.t,
            self.tt + other.tt,
        )

    def of_output(self, w: Tensor, bias: Tensor | None = None) -> Moments2:
        """The same inputs with the layer's own output as the target: w a (+ bias)."""
        w = w.float()
        ta, t = w @ self.aa, w @ self.a
        power = float((ta * w).sum(dtype=torch.float64))
        if bias is not None:
            bias = bias.float()
            power += float(2 * (t @ bias) + self.count * (bias @ bias))
            ta, t = ta + torch.outer(bias, self.a), t + self.count * bias
        return Moments2(self.count, self.upper, ta, self.a, t, power)

    def mixed(self, w: Tensor, bias: Tensor | None, alpha: float) -> Moments2:
        """The target (1 - alpha) (w a + bias) + alpha t: what the layer does now, and a part of t."""
        if alpha == 1.0:
            return self
        own = self.of_output(w, bias)
        both = float((w.float() * self.ta).sum(dtype=torch.float64)) + (0.0 if bias is None else float(bias.float() @ self.t))
        power = (1 - alpha) ** 2 * own.tt + 2 * alpha * (1 - alpha) * both + alpha**2 * self.tt
        ta, t = own.ta.lerp_(self.ta, alpha), own.t.lerp_(self.t, alpha)
        return Moments2(self.count, self.upper, ta, self.a, t, power)

    def at(self, kept: Tensor) -> Moments2:
        """Those of some channels alone, int64 [kept]."""
        return Moments2(self.count, self.aa[kept][:, kept], self.ta[:, kept], self.a[kept], self.t, self.tt)

    def scale(self, *, centred: bool) -> float:
        """The mean over channels of E a^2, or of a's variance: damping is relative to it."""
        n = max(self.count, 1.0)
        scale = float(self.upper.diagonal().double().mean()) / n
        return scale - float((self.a.double() / n).square().mean()) if centred else scale

    def square(self, *, centred: bool, dtype: torch.dtype = torch.float64) -> Tensor:
        """C [n, n], a matrix of its own."""
        n = max(self.count, 1.0)
        c = self.aa.to(dtype, copy=True).div_(n)
        a = self.a.to(dtype) / n
        return c.addr_(a, a, alpha=-1) if centred else c

    def cross(self, *, centred: bool, dtype: torch.dtype = torch.float64) -> Tensor:
        """X [out, n], a matrix of its own."""
        n = max(self.count, 1.0)
        x = self.ta.to(dtype, copy=True).div_(n)
        return x.addr_(self.t.to(dtype) / n, self.a.to(dtype) / n, alpha=-1) if centred else x

    def problem(self, *, centred: bool, scale: float | None = None, dtype: torch.dtype = torch.float64) -> Problem:
        """The normal equations. centred: with a bias to fit as well. scale: where damping is relative to another."""
        n = max(self.count, 1.0)
        a, t, power = self.a.to(dtype) / n, self.t.to(dtype) / n, self.tt / n
        if centred:
            power -= float(t.double() @ t.double())
        else:
            a, t = torch.zeros_like(a), torch.zeros_like(t)
        return Problem(
            self.square(centred=centred, dtype=dtype),
            self.cross(centred=centred, dtype=dtype),
            a,
            t,
            power,
            self.scale(centred=centred) if scale is None else scale,
        )


@dataclass(frozen=True)
class Problem:
    """min over W' of E||t - W' a_S - b||^2: C [n, n], X [out, n], means of a and t (zero without a bias), E||t||^2.

    scale: what damping is relative to.
    """

    c: Tensor
    x: Tensor
    mean_a: Tensor
    mean_t: Tensor
    power: float
    scale: float

    def error(self, w: Tensor, kept: Tensor) -> float:
        """E||t - W' a_S - b||^2 of given weights [out, kept] with their best bias."""
        c = self.c[kept][:, kept]
        return float(((w @ c) * w).sum() - 2 * (w * self.x[:, kept]).sum()) + self.power

    def gain(self, before: Tensor, after: Tensor) -> float:
        """How much less the error is with the weights `after` than with `before`, [out, n] of all channels."""
        before, after = before.to(self.c), after.to(self.c)
        less = before - after
        return float(((less @ self.c) * (before + after) - 2 * less * self.x).sum(dtype=torch.float64))

    def bias(self, w: Tensor, kept: Tensor | None = None) -> Tensor:
        return self.mean_t - w @ (self.mean_a if kept is None else self.mean_a[kept])


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
    raise ModelError(
        "the second moments of a layer's input are not finite, or not positive definite",
        fix="check the weights with pared verify, or try --dtype float32",
    )


def inverse(square: Callable[[], Tensor], added: float) -> Tensor:
    """The inverse of such a matrix, float64, in its place."""
    factor = factored(square, added)
    torch.cholesky_inverse(factor, out=factor)
    return factor.mT


def refit(problem: Problem, w: Tensor, kept: Tensor | None = None, damping: float = DAMPING) -> Tensor:
    """argmin over W' [out, kept] of E||t - W' a_S||^2 + ridge ||W' - W_S||^2. w: the original weights [out, n].

    In the problem's own precision.
    """
    c, x, w = problem.c, problem.x, w.to(problem.c)
    if kept is not None:
        c, x, w = c[kept][:, kept], x[:, kept], w[:, kept]
    r = ridge(problem.scale, damping)
    return torch.cholesky_solve((x + r * w).T, factored(c.clone, r)).T


def refit_guarded(
    fit: Moments2, held: Moments2, w: Tensor, *, centred: bool, scale: float | None = None
) -> tuple[Tensor, Tensor, float | None]:
    """The refit whose damping held-out tokens choose; the original weights where no refit does better on them.

    fit, held: moments of the tokens to fit and of those to judge by; w: the original weights [out, n]. Dampings are tried
    in fp32; the chosen refit is solved on all tokens in float64. Returns (weights [out, n], bias [out], damping or None where the weights were left
    alone).
    """

    def judged() -> float | None:
        on = fit.problem(centred=centred, scale=scale, dtype=torch.float32)
        by = held.problem(centred=centred, dtype=torch.float32)
        return choose_damping(lambda damping: by.gain(w, refit(on, w, None, damping)))

    w, chosen = w.double(), judged()
    whole = fit.plus(held).problem(centred=centred, scale=scale)
    new = w if chosen is None else refit(whole, w, None, chosen)
    return new, whole.bias(new), chosen


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


def transfer(fit: Moments2, held: Moments2, w: Tensor, *, centred: bool) -> tuple[Tensor, Tensor, float | None]:
    """T [n, n] and s [n] so that W (T h' + s) comes near W h: moments of h' with the target h. w: W [out, n].

    (X + ridge I) (C + ridge I)^-1: for every W at once what `refit_guarded` gives with the target W h, the damping chosen
    by the error at W's output. The identity and zero where no refit does better there on the held-out tokens.
    """
    eye = torch.eye(w.shape[1], dtype=torch.float64, device=w.device)

    def judged() -> float | None:
        on, by = (m.problem(centred=centred, dtype=torch.float32) for m in (fit, held))
        metric, one = w.float().T @ w.float(), eye.float()

        def gain(damping: float) -> float:
            t = refit(on, one, None, damping)
            less = metric @ (one - t)
            return float(((less @ by.c) * (one + t) - 2 * less * by.x).sum(dtype=torch.float64))

        return choose_damping(gain)

    chosen = judged()
    whole = fit.plus(held).problem(centred=centred)
    new = eye if chosen is None else refit(whole, eye, None, chosen)
    return new, whole.bias(new), chosen
