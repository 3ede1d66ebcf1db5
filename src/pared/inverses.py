"""H = (C + ridge)^-1 while columns go: the matrix itself, or what it follows from where tokens are few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pared.leastsquares import factored, inverse

# Rows that move together when what is gone is squeezed out, and that are made together.
STRIP, MADE = 64, 256
# Columns that go before the whole matrix follows: one product for all of them instead of one for each round.
WAITING = 64


class Inverse(Protocol):
    """H [n, n], float64. Columns that went keep their places until `squeeze`; nothing is asked of them any more."""

    def __len__(self) -> int: ...

    def diagonal(self) -> Tensor:
        """[n]."""

    def rows(self, at: Tensor) -> Tensor:
        """Some rows, float64 [at, n], in memory of their own."""

    def squares(self, blocks: Tensor) -> Tensor:
        """The squares at the diagonal of some blocks int64 [units, columns]: [units, columns, columns]."""

    def down_date(self, gone: Tensor, rows: Tensor, gain: Tensor) -> None:
        """Columns go. rows: H[gone]; gain: (H[gone, gone])^-1 H[gone]."""

    def squeeze(self, left: Tensor) -> None:
        """Drop all but some columns, ascending."""

    def copy(self) -> Inverse: ...


class DenseInverse:
    """The matrix. square: makes C, which H takes the place of.

    It follows what goes a little later: until then H = matrix - rows^T gains, of the columns that went last. The diagonal
    follows at once.
    """

    def __init__(self, square: Callable[[], Tensor], added: float) -> None:
        self._set(inverse(square, added))

    def _set(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._diagonal = matrix.diagonal().clone()
        self._rows = self._gains = matrix[:0]

    @classmethod
    def of_few(cls, a: Tensor, added: float) -> DenseInverse:
        """Of C = A^T A for few rows A [tokens, n], float64, which are given up: (I - A^T (A A^T + added I)^-1 A) / added."""
        n = a.shape[1]
        torch.linalg.solve_triangular(factored(lambda: a @ a.T, added), a, upper=False, out=a)
        h = torch.empty(n, n, dtype=a.dtype, device=a.device)
        for s in range(0, n, MADE):
            e = min(s + MADE, n)
            torch.mm(a[:, s:e].T, a[:, s:], out=h[s:e, s:])
            h[s:e, s:].div_(-added)
            h[e:, s:e] = h[s:e, e:].T
        h.diagonal().add_(1 / added)
        return cls._from(h)

    @classmethod
    def _from(cls, matrix: Tensor) -> DenseInverse:
        made = object.__new__(cls)
        made._set(matrix)
        return made

    def __len__(self) -> int:
        return len(self.matrix)

    def diagonal(self) -> Tensor:
        return self._diagonal

    def rows(self, at: Tensor) -> Tensor:
        return self.matrix[at].addmm_(self._rows[:, at].T, self._gains, alpha=-1)

    def squares(self, blocks: Tensor) -> Tensor:
        return torch.stack([self.matrix[b][:, b] - self._rows[:, b].T @ self._gains[:, b] for b in blocks])

    def down_date(self, gone: Tensor, rows: Tensor, gain: Tensor) -> None:
        self._diagonal -= (rows * gain).sum(0)
        self._rows, self._gains = torch.cat([self._rows, rows]), torch.cat([self._gains, gain])
        if len(self._rows) >= WAITING:
            self._follow()

    def _follow(self) -> None:
        self.matrix.addmm_(self._rows.T, self._gains, alpha=-1)
        self._rows = self._gains = self.matrix[:0]

    def squeeze(self, left: Tensor) -> None:
        self._follow()
        n, h = len(left), self.matrix
        for s in range(0, n, STRIP):  # rows move up only, so what is still to be read is never overwritten
            h[s : min(s + STRIP, n), :n] = h[left[s : s + STRIP]][:, left]
        self._set(h[:n, :n])

    def copy(self) -> DenseInverse:
        self._follow()
        return self._from(self.matrix.clone())


class FewInverse:
    """C = A^T A for few rows A [tokens, n], float64: H = (I - A^T (A A^T + ridge)^-1 A) / ridge.

    What goes leaves A, so that A A^T alone has to follow.
    """

    def __init__(self, a: Tensor, added: float) -> None:
        self._a, self._added = a, added
        self._square = a @ a.T
        self._solve()

    def _solve(self) -> None:
        factor = factored(self._square.clone, self._added)
        self._b = torch.linalg.solve_triangular(factor, self._a, upper=False)

    def __len__(self) -> int:
        return self._a.shape[1]

    def diagonal(self) -> Tensor:
        return (1 - torch.linalg.vector_norm(self._b, dim=0).square_()).div_(self._added)

    def rows(self, at: Tensor) -> Tensor:
        out = self._b[:, at].T @ self._b
        out.neg_()[torch.arange(len(at)), at] += 1
        return out.div_(self._added)

    def squares(self, blocks: Tensor) -> Tensor:
        b = self._b[:, blocks].transpose(0, 1)  # [units, tokens, columns]
        eye = torch.eye(blocks.shape[1], dtype=b.dtype, device=b.device)
        return (eye - b.mT @ b).div_(self._added)

    def down_date(self, gone: Tensor, rows: Tensor, gain: Tensor) -> None:
        part = self._a[:, gone]
        self._square.addmm_(part, part.T, alpha=-1)
        self._a[:, gone] = 0
        self._solve()

    def squeeze(self, left: Tensor) -> None:
        self._a, self._b = self._a[:, left], self._b[:, left]

    def copy(self) -> FewInverse:
        other = object.__new__(FewInverse)
        other._a, other._added, other._square, other._b = self._a.clone(), self._added, self._square.clone(), self._b.clone()
        return other
