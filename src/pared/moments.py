"""Second moments of a consumer's inputs, summed over tokens, and the least-squares problems that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pared.distributed import total, total_of
from pared.fewrows import FewRows
from pared.inverses import DenseInverse
from pared.leastsquares import STRIP, Factors, factored, ridge, solve_rows_, strips


class Upper:
    """A symmetric matrix [n, n], float32, in strips of rows that begin at the diagonal: half of the memory."""

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        step = max(1, STRIP if torch.device(device).type == "cpu" else n)
        sizes = [(s, min(step, n - s)) for s in range(0, n, step)]
        self.n = n
        self.flat = torch.zeros(sum(rows * (n - s) for s, rows in sizes), dtype=torch.float32, device=device)
        parts = self.flat.split([rows * (n - s) for s, rows in sizes])
        # (where it begins, the strip's own square at the diagonal and all to the right of it)
        self.strips = [(s, part.view(rows, n - s)) for (s, rows), part in zip(sizes, parts, strict=True)]

    def add_square(self, a: Tensor) -> None:
        """Add a^T a for a [tokens, n]."""
        for s, strip in self.strips:
            strip.addmm_(a[:, s : s + len(strip)].T, a[:, s:])

    def diagonal(self) -> Tensor:
        return torch.cat([strip.diagonal() for _, strip in self.strips])

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The matrix, in memory of its own."""
        out = torch.empty(self.n, self.n, dtype=dtype, device=self.flat.device)
        for s, strip in self.strips:
            e = s + len(strip)
            out[s:e, s:] = strip
            out[e:, s:e] = out[s:e, e:].T
        return out

    def times(self, w: Tensor) -> Tensor:
        """w [rows, n] times the matrix, in float32."""
        out = torch.zeros(len(w), self.n, dtype=torch.float32, device=w.device)
        for s, strip in self.strips:
            e = s + len(strip)
            out[:, s:].addmm_(w[:, s:e], strip)
            if e < self.n:
                out[:, s:e].addmm_(w[:, e:], strip[:, e - s :].T)
        return out

    def at(self, kept: Tensor) -> Upper:
        """The rows and columns of some channels alone, int64 [kept]."""
        out = Upper(len(kept), self.flat.device)
        kept = kept.to(self.flat.device)
        if not bool((kept[1:] > kept[:-1]).all()):
            whole = self.whole(torch.float32)[kept][:, kept]
            for s, strip in out.strips:
                strip.copy_(whole[s : s + len(strip), s:])
            return out
        for s, strip in out.strips:
            e = s + len(strip)
            for start, old in self.strips:
                i, j = torch.searchsorted(kept[s:e], torch.tensor([start, start + len(old)], device=kept.device)).tolist()
                if i == j:
                    continue
                strip[i:j, i:] = old[kept[s + i : s + j] - start][:, kept[s + i :] - start]
                strip[i:j, :i] = strip[:i, i:j].T
        return out


@dataclass
class Moments2:
    """Sums over tokens for one consumer: a [tokens, n], t [tokens, out]. fp32, divided by `count` when read.

    upper: sum of a a^T; ta: of t a^T; tt: of ||t||^2. Where tokens have weights, all are weighted sums and `count` is that of
    the weights.
    """

    count: float
    upper: Upper
    ta: Tensor
    a: Tensor
    t: Tensor
    tt: float

    @classmethod
    def zeros(cls, n: int, out: int, device: torch.device | str = "cpu") -> Moments2:
        """out: 0 where `of_output` will say what the targets are."""

        def z(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        return cls(0.0, Upper(n, device), z(out, n), z(n), z(out), 0.0)

    @property
    def aa(self) -> Tensor:
        """The sum of a a^T, [n, n], in memory of its own."""
        return self.upper.whole(torch.float32)

    def add(self, a: Tensor, t: Tensor, weight: Tensor | None = None) -> None:
        """weight: of each token's squared error, [tokens]; None: one."""
        a, t, root = a.float(), t.float(), torch.ones(len(a), device=a.device)
        if weight is not None:
            root = weight.float().sqrt()
            a, t = root[:, None] * a, root[:, None] * t
        self.add_scaled(a, t, root)

    def add_scaled(self, a: Tensor, t: Tensor, root: Tensor) -> None:
        """Tokens that are multiplied by the root of their weight already, and that root, [tokens]."""
        self.count += float(root.square().sum(dtype=torch.float64))
        self.upper.add_square(a)
        self.a += root @ a
        self.ta.addmm_(t.T, a)
        self.t += root @ t
        self.tt += float(t.square().sum(dtype=torch.float64))

    def add_inputs(self, a: Tensor) -> None:
        """Tokens whose target is not known yet: `of_output` fills it in."""
        a = a.float()
        self.count += a.shape[0]
        self.upper.add_square(a)
        self.a += a.sum(0)

    def total(self) -> None:
        """Sum over the processes that each saw a part of the tokens."""
        total(self.upper.flat, self.ta, self.a, self.t)
        self.count, self.tt = total_of(self.count), total_of(self.tt)

    def plus(self, other: Moments2 | FewRows) -> Moments2:
        """These tokens and those of another, in the place of this one; other sums are emptied."""
        if isinstance(other, FewRows):
            self.add_scaled(other.inputs, other.targets, other.roots)
            return self
        self.upper.flat += other.upper.flat
        for mine, more in ((self.ta, other.ta), (self.a, other.a), (self.t, other.t)):
            mine += more
        self.count, self.tt = self.count + other.count, self.tt + other.tt
        if other is not self:
            other.upper, other.ta = Upper(0), other.ta[:, :0].clone()
        return self

    def of_output(self, w: Tensor, bias: Tensor | None = None) -> Moments2:
        """The same inputs with the layer's own output as the target: w a (+ bias)."""
        ta = torch.empty(w.shape, dtype=torch.float32, device=self.a.device)
        power = 0.0
        for rows in strips(len(w)):
            ta[rows] = self.upper.times(w[rows].float())
            power += float((ta[rows] * w[rows]).sum(dtype=torch.float64))
        t = w.float() @ self.a
        if bias is not None:
            bias = bias.float()
            power += float(2 * (t @ bias) + self.count * (bias @ bias))
            ta, t = ta.addr_(bias, self.a), t + self.count * bias
        return Moments2(self.count, self.upper, ta, self.a, t, power)

    def mixed(self, w: Tensor, bias: Tensor | None, alpha: float) -> Moments2:
        """The target (1 - alpha) (w a + bias) + alpha t in the place of t: what the layer does now, and a part of t."""
        if alpha == 1.0:
            return self
        own_power = both = 0.0
        t = w.float() @ self.a
        for rows in strips(len(w)):
            part, mine = w[rows].float(), self.ta[rows]
            own = self.upper.times(part)
            own_power += float((own * part).sum(dtype=torch.float64))
            both += float((mine * part).sum(dtype=torch.float64))
            if bias is not None:
                own.addr_(bias[rows].float(), self.a)
            mine.copy_(own.lerp_(mine, alpha))
        if bias is not None:
            bias = bias.float()
            own_power += float(2 * (t @ bias) + self.count * (bias @ bias))
            both += float(bias @ self.t)
            t = t + self.count * bias
        self.tt = (1 - alpha) ** 2 * own_power + 2 * alpha * (1 - alpha) * both + alpha**2 * self.tt
        self.t = t.lerp_(self.t, alpha)
        return self

    def at(self, kept: Tensor) -> Moments2:
        """Those of some channels alone, int64 [kept]."""
        return Moments2(self.count, self.upper.at(kept), self.ta[:, kept], self.a[kept], self.t.clone(), self.tt)

    @property
    def divisor(self) -> float:
        """What sums are divided by: one where there are no tokens."""
        return self.count or 1.0

    def mean(self) -> Tensor:
        """E a, float64 [n]."""
        return self.a.double() / self.divisor

    def scale(self, *, centred: bool) -> float:
        """The mean over channels of E a^2, or of a's variance: damping is relative to it."""
        scale = float(self.upper.diagonal().double().mean()) / self.divisor
        return scale - float(self.mean().square().mean()) if centred else scale

    @property
    def nbytes(self) -> int:
        """Of the sums over inputs."""
        return 4 * self.upper.flat.numel()

    def square(self, *, centred: bool, dtype: torch.dtype = torch.float64) -> Tensor:
        """C [n, n], a matrix of its own."""
        n = self.divisor
        c = self.upper.whole(dtype).div_(n)
        a = self.a.to(dtype) / n
        return c.addr_(a, a, alpha=-1) if centred else c

    def cross(self, rows: slice = slice(None), *, centred: bool, dtype: torch.dtype = torch.float64) -> Tensor:
        """X [out, n], or some of its rows, a matrix of its own."""
        n = self.divisor
        x = self.ta[rows].to(dtype, copy=True).div_(n)
        return x.addr_(self.t[rows].to(dtype) / n, self.a.to(dtype) / n, alpha=-1) if centred else x

    def problem(self, *, centred: bool, scale: float | None = None, dtype: torch.dtype = torch.float64) -> NormalEquations:
        """The normal equations. centred: with a bias to fit as well. scale: where damping is relative to another."""
        return NormalEquations(self, centred, self.scale(centred=centred) if scale is None else scale, dtype)

    def inverse(self, added: float, *, centred: bool) -> DenseInverse:
        """(C + added I)^-1, float64."""
        return DenseInverse(lambda: self.square(centred=centred), added)

    def regressed(self, h: DenseInverse, w: Tensor, added: float, *, centred: bool) -> Tensor:
        """(X + added w) (C + added I)^-1, float32 [out, n]. h: that inverse."""
        out = torch.empty(w.shape, dtype=torch.float32, device=w.device)
        for rows in strips(len(w)):
            out[rows] = self.cross(rows, centred=centred).add_(w[rows], alpha=added) @ h.matrix
        return out


class NormalEquations:
    """min over W' of E||t - W' a - b||^2 from C [n, n] and X [out, n], which are made when they are used.

    mean_a, mean_t: zero without a bias. scale: what damping is relative to.
    """

    def __init__(self, sums: Moments2, centred: bool, scale: float, dtype: torch.dtype) -> None:
        self.sums, self.centred, self.scale, self.dtype = sums, centred, scale, dtype
        n = sums.divisor if centred else float("inf")
        self.mean_a, self.mean_t = sums.a.to(dtype) / n, sums.t.to(dtype) / n

    @property
    def c(self) -> Tensor:
        return self.sums.square(centred=self.centred, dtype=self.dtype)

    def x(self, rows: slice = slice(None)) -> Tensor:
        return self.sums.cross(rows, centred=self.centred, dtype=self.dtype)

    def at(self, kept: Tensor) -> NormalEquations:
        """The same with some channels alone."""
        return NormalEquations(self.sums.at(kept), self.centred, self.scale, self.dtype)

    def _factor(self, damping: float) -> tuple[Tensor, float]:
        r = ridge(self.scale, damping)
        return factored(lambda: self.c, r), r

    def solved(self, w: Tensor, damping: float) -> Tensor:
        factor, r = self._factor(damping)
        new = torch.empty(w.shape, dtype=self.dtype, device=factor.device)
        for rows in strips(len(w)):
            new[rows] = solve_rows_(factor, self.x(rows).add_(w[rows], alpha=r))
        return new

    def error(self, w: Tensor) -> float:
        """E||t - W' a - b||^2 of given weights [out, n] with their best bias."""
        power = self.sums.tt / self.sums.divisor - float(self.mean_t.double() @ self.mean_t.double())
        return float(((w @ self.c) * w).sum() - 2 * (w * self.x()).sum()) + power

    def gain(self, before: Tensor, after: Tensor) -> float:
        found = 0.0
        for rows in strips(len(before)):
            old, new = before[rows].to(self.dtype), after[rows].to(self.dtype)
            less = old - new
            found += float((self._onto(less).mul_(old + new) - 2 * less * self.x(rows)).sum(dtype=torch.float64))
        return found

    def _onto(self, w: Tensor) -> Tensor:
        """w [rows, n] times C, in float32."""
        w, n = w.float(), self.sums.divisor
        out = self.sums.upper.times(w).div_(n)
        if self.centred:
            mean = self.sums.a / n
            out.addr_(w @ mean, mean, alpha=-1)
        return out

    def moved(self, damping: float) -> Factors:
        off = self.x()  # (T - I) (C + r I) = X - C
        off[: len(self.mean_a)] -= self.c
        return Factors(solve_rows_(self._factor(damping)[0], off))

    def moved_judge(self, weights: Sequence[Tensor]) -> Callable[[Factors], float]:
        metric = torch.zeros(len(self.mean_t), len(self.mean_t), dtype=torch.float32, device=self.mean_t.device)
        for w in weights:
            metric.addmm_(w.float().T, w.float())

        def gain(change: Factors) -> float:
            less = change.onto(metric).neg_()
            eye = torch.eye(len(metric), dtype=torch.float32, device=metric.device)
            x = self.x().float()
            both = change.onto(eye).add_(eye[:, : len(self.mean_a)], alpha=2.0)
            return float(self._onto(less).mul_(both).sub_(x.mul_(less), alpha=2.0).sum(dtype=torch.float64))

        return gain
