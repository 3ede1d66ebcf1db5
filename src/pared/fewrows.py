"""The tokens of a consumer themselves, where they are few against its channels: the same least squares, solved between
tokens instead of between channels.

With A [tokens, n] and R = T - A w^T the refit is w + R^T (A A^T + ridge I)^-1 A: it takes no matrix of n x n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pared.inverses import DenseInverse, FewInverse
from pared.leastsquares import Factors, factored, ridge, solve_rows_, strips

# Tokens are few where there are this many channels for each of them: they take less memory than their second moments, and
# less work.
CHANNELS = 2
# Where there are this many, elimination costs less without the inverse of n x n as well.
CHANNELS_ELIMINATED = 8


def are_few(tokens: int, n: int) -> bool:
    """Whether so many tokens are kept as they are, for n channels."""
    return tokens * CHANNELS <= n


def are_eliminated(tokens: int, n: int) -> bool:
    """Whether columns are eliminated with so few tokens in the place of the inverse."""
    return tokens * CHANNELS_ELIMINATED <= n


class FewRows:
    """Tokens a [tokens, n] and their targets t [tokens, out], float32, both times the root of the token's weight.

    roots: those roots, [tokens]; one unless tokens are weighted.
    """

    def __init__(self, a: Sequence[Tensor] = (), t: Sequence[Tensor] = (), roots: Sequence[Tensor] = ()) -> None:
        self._a, self._t, self._roots = list(a), list(t), list(roots)

    @property
    def count(self) -> float:
        """The sum of the weights."""
        return sum(float(root.square().sum(dtype=torch.float64)) for root in self._roots)

    @property
    def divisor(self) -> float:
        """What sums are divided by: one where there are no tokens."""
        return self.count or 1.0

    @property
    def roots(self) -> Tensor:
        """[tokens]."""
        self._roots[:] = [torch.cat(self._roots)]
        return self._roots[0]

    @property
    def inputs(self) -> Tensor:
        """[tokens, n]."""
        self._a[:] = [torch.cat(self._a)]
        return self._a[0]

    @property
    def targets(self) -> Tensor:
        """[tokens, out]."""
        self._t[:] = [torch.cat(self._t)]
        return self._t[0]

    def add(self, a: Tensor, t: Tensor, weight: Tensor | None = None) -> None:
        """weight: of each token's squared error, [tokens]; None: one."""
        root = torch.ones(len(a), device=a.device) if weight is None else weight.float().sqrt()
        self._a.append(root[:, None] * a.float())
        self._t.append(root[:, None] * t.float())
        self._roots.append(root)

    def add_inputs(self, a: Tensor) -> None:
        """Tokens whose target is not known yet: `of_output` fills it in."""
        self._a.append(a.to(torch.float32, copy=True))
        self._roots.append(torch.ones(len(a), device=a.device))

    def total(self) -> None:
        """Several processes keep sums instead."""

    def plus(self, other: FewRows) -> FewRows:
        """These tokens and those of another, in the place of this one."""
        if other is not self:
            self._a, self._t, self._roots = self._a + other._a, self._t + other._t, self._roots + other._roots
        return self

    def of_output(self, w: Tensor, bias: Tensor | None = None) -> FewRows:
        """The same inputs with the layer's own output as the target: w a (+ bias)."""
        t = self.inputs @ w.float().T
        return FewRows(self._a, [t if bias is None else t.addr_(self.roots, bias.float())], self._roots)

    def mixed(self, w: Tensor, bias: Tensor | None, alpha: float) -> FewRows:
        """The target (1 - alpha) (w a + bias) + alpha t in the place of t: what the layer does now, and a part of t."""
        if alpha != 1.0:
            self._t = [self.of_output(w, bias).targets.lerp_(self.targets, alpha)]
        return self

    def at(self, kept: Tensor) -> FewRows:
        """Those of some channels alone, int64 [kept]."""
        return FewRows([self.inputs[:, kept]], self._t, self._roots)

    def mean(self) -> Tensor:
        """E a, float64 [n]."""
        return self._mean(self.inputs)

    def _mean(self, rows: Tensor) -> Tensor:
        """Of what is scaled, float64."""
        return (self.roots.double() @ rows.double()) / self.divisor

    def mean_target(self) -> Tensor:
        """E t, float64 [out]."""
        return self._mean(self.targets)

    def centred(self, rows: Tensor, mean: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Inputs or targets, less a mean if one is given, of which the sum of squares is the weighted mean over tokens: a matrix of its own."""
        out = rows.to(dtype, copy=True)
        if mean is not None:
            out.addr_(self.roots.to(dtype), mean.to(dtype), alpha=-1)
        return out.div_(self.divisor**0.5)

    def scale(self, *, centred: bool) -> float:
        """The mean over channels of E a^2, or of a's variance: damping is relative to it."""
        scale = float(self.inputs.square().sum(dtype=torch.float64)) / self.divisor / self.inputs.shape[1]
        return scale - float(self.mean().square().mean()) if centred else scale

    @property
    def nbytes(self) -> int:
        """Of the inputs."""
        return 4 * sum(a.numel() for a in self._a)

    def problem(self, *, centred: bool, scale: float | None = None, dtype: torch.dtype = torch.float64) -> BetweenTokens:
        """What is to be solved. centred: with a bias to fit as well. scale: where damping is relative to another."""
        return BetweenTokens(self, centred, self.scale(centred=centred) if scale is None else scale, dtype)

    def inverse(self, added: float, *, centred: bool) -> FewInverse | DenseInverse:
        """(C + added I)^-1: the matrix, or what it follows from where that costs less."""
        a = self.centred(self.inputs, self.mean() if centred else None, torch.float64)
        return FewInverse(a, added) if are_eliminated(*a.shape) else DenseInverse.of_few(a, added)

    def regressed(self, h: FewInverse | DenseInverse, w: Tensor, added: float, *, centred: bool) -> Tensor:
        """(X + added w) (C + added I)^-1, float32 [out, n]."""
        problem = self.problem(centred=centred)
        left, a = problem.dual(w, added)
        out = torch.empty(w.shape, dtype=torch.float32, device=w.device)
        for rows in strips(len(w)):
            out[rows] = torch.addmm(w[rows].double(), left[rows], a)
        return out


class BetweenTokens:
    """min over W' of E||t - W' a - b||^2 from the tokens. mean_a, mean_t: zero without a bias. scale: what damping is
    relative to."""

    def __init__(self, rows: FewRows, centred: bool, scale: float, dtype: torch.dtype) -> None:
        self.rows, self.centred, self.scale, self.dtype = rows, centred, scale, dtype
        a, t = rows.mean(), rows.mean_target()
        self.mean_a, self.mean_t = (a, t) if centred else (torch.zeros_like(a), torch.zeros_like(t))

    def at(self, kept: Tensor) -> BetweenTokens:
        """The same with some channels alone."""
        return BetweenTokens(self.rows.at(kept), self.centred, self.scale, self.dtype)

    def _inputs(self) -> Tensor:
        return self.rows.centred(self.rows.inputs, self.mean_a if self.centred else None, self.dtype)

    def _targets(self) -> Tensor:
        return self.rows.centred(self.rows.targets, self.mean_t if self.centred else None, self.dtype)

    def solved(self, w: Tensor, damping: float) -> Tensor:
        left, a = self.dual(w, ridge(self.scale, damping))
        return w.to(self.dtype, copy=True).addmm_(left, a)

    def dual(self, w: Tensor, added: float) -> tuple[Tensor, Tensor]:
        """L [out, tokens] and A [tokens, n]: the refit with a ridge given as a number is w + L A."""
        a = self._inputs()
        off = self._targets().T.contiguous()
        for rows in strips(len(w)):
            off[rows] -= w[rows].to(self.dtype) @ a.T
        return solve_rows_(factored(lambda: a @ a.T, added), off), a

    def error(self, w: Tensor) -> float:
        """E||t - W' a - b||^2 of given weights [out, n] with their best bias."""
        return float((self._targets() - self._inputs() @ w.to(self.dtype).T).square().sum(dtype=torch.float64))

    def gain(self, before: Tensor, after: Tensor) -> float:
        return self.error(before) - self.error(after)

    def _off(self, a: Tensor) -> Tensor:
        """Targets less inputs, which stand for the first of them."""
        off = self._targets()
        off[:, : a.shape[1]] -= a
        return off

    def moved(self, damping: float) -> Factors:
        a = self._inputs()
        off = self._off(a).T.contiguous()
        return Factors(solve_rows_(factored(lambda: a @ a.T, ridge(self.scale, damping)), off), a)

    def moved_judge(self, weights: Sequence[Tensor]) -> Callable[[Factors], float]:
        a, off = self._inputs().float(), self._off(self._inputs()).float()
        before = [off @ w.float().T for w in weights]

        def gain(change: Factors) -> float:
            found = 0.0
            for w, old in zip(weights, before, strict=True):
                new = old - (w.float() @ change.times(a.T)).T
                found += float((old.square() - new.square()).sum(dtype=torch.float64))
            return found

        return gain
