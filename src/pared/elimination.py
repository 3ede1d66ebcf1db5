"""Optimal Brain Surgeon on a layer's inputs: what each unit's removal costs after the best refit of what stays.

A consumer is y = W a, C = E[a a^T]. With H = (C + ridge)^-1 the cost of removing the columns M is
tr(V_M (H_MM)^-1 V_M^T), V = W (weighted by whatever the output's error is weighted by). After a removal V and H are
down-dated, so that later costs count on the refit. Source: Hassibi & Stork 1992; blocks as in ZipLM (arXiv:2302.04089).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pared.axes import Nested, Node, coordinates
from pared.leastsquares import DAMPING, factored, inverse, ridge

# All units of one column would go in this many rounds; between two of them costs are taken as they are.
ROUNDS = 128
# Rows that move together when what is gone is squeezed out.
STRIP = 256


class Elimination:
    """The state of removing columns of one consumer: V [out, n], fp32, and H [n, n], float64, down-dated as columns go.

    square: makes C [n, n], float64, which H takes the place of. cross: X [out, n], float64, given up, where the target is not W a: V is then
    the refit to it, (X + ridge W) H. Columns that are gone are dropped from the matrices now and then.
    """

    def __init__(
        self,
        square: Callable[[], Tensor],
        w: Tensor,
        *,
        scale: float,
        cross: Tensor | None = None,
        damping: float = DAMPING,
    ) -> None:
        added = ridge(scale, damping)
        self.h = inverse(square, added)
        self.v = w.float().clone() if cross is None else (cross.add_(w, alpha=added) @ self.h).float()
        self._place = torch.arange(len(self.h), device=self.h.device)  # of each original column, -1 for those gone

    @classmethod
    def of(cls, c: Tensor, w: Tensor, *, damping: float = DAMPING) -> Elimination:
        """From C [n, n] itself, which is left as it is."""
        c = c.double()
        return cls(c.clone, w, scale=float(c.diagonal().mean()), damping=damping)

    def copy(self) -> Elimination:
        """Another at the same point."""
        other = copy.copy(self)
        other.h, other.v, other._place = self.h.clone(), self.v.clone(), self._place.clone()
        return other

    @property
    def weights(self) -> Tensor:
        """V of the columns that stay, in their order: [out, left]."""
        return self.v[:, self._place[self._place >= 0]]

    def stay(self, columns: Tensor) -> Tensor:
        """Which columns (by their original number) have not gone: bool."""
        return (self._place[columns] >= 0).to(columns.device)

    def weigh(self, fisher: Tensor) -> None:
        """Count errors of the output by G = E[g g^T] [out, out], or its diagonal [out]: E||g^T dy||^2. Any factor of G does."""
        if fisher.ndim == 1:
            self.v *= fisher.to(self.v).clamp(min=0).sqrt()[:, None]
            return
        values, vectors = torch.linalg.eigh(fisher.double())
        self.v = (values.clamp(min=0).sqrt()[:, None] * vectors.T).float() @ self.v

    def costs(self, blocks: Tensor) -> Tensor:
        """Of removing each block of columns alone: blocks int64 [units, columns] -> float64 [units]."""
        at = self._place[blocks]
        if at.shape[1] == 1:
            at = at[:, 0]
            power = torch.linalg.vector_norm(self.v, dim=0).double().square()
            return power[at] / self.h.diagonal()[at].clamp(min=1e-300)
        part = torch.stack([self.h[b][:, b] for b in at])
        v = self.v[:, at].permute(1, 2, 0).double()  # [units, columns, out]
        return (v * torch.linalg.solve(part, v)).sum((1, 2))

    def remove(self, columns: Tensor) -> None:
        """Take columns (by their original number) out and let those that stay make up for them."""
        gone = self._place[columns]
        rows = self.h[gone]
        gain = torch.cholesky_solve(rows, factored(rows[:, gone].clone, 0.0))
        self.h.addmm_(rows.T, gain, alpha=-1)
        self.v.addmm_(self.v[:, gone], gain.float(), alpha=-1)
        self._place[columns] = -1
        left = self._place[self._place >= 0]
        # What is gone stays in the matrices until much of them is: moving them each time would cost more than the update.
        if len(left) < 0.75 * len(self.h):
            n = len(left)
            for s in range(0, n, STRIP):  # rows move up only, so what is still to be read is never overwritten
                self.h[s : min(s + STRIP, n), :n] = self.h[left[s : s + STRIP]][:, left]
            self.h, self.v = self.h[:n, :n], self.v[:, left]
            self._place[self._place >= 0] = torch.arange(n, device=left.device)


def elimination_costs(state: Elimination, blocks: Tensor, *, rounds: int = ROUNDS) -> Tensor:
    """The order in which blocks of columns go, all of them: each unit's cost when its turn comes.

    blocks: int64 [units, columns]. Returns float64 [units], ascending in the order of going; the last to stay are the
    largest.
    """
    cost = torch.full((len(blocks),), float("inf"), dtype=torch.float64)
    alive = torch.arange(len(blocks))
    per_round = _per_round(len(blocks), blocks.shape[1], rounds)
    floor = 0.0
    while len(alive):
        now = state.costs(blocks[alive])
        order = now.argsort(stable=True)[:per_round].cpu()
        for k in order.tolist():
            floor = max(floor, float(now[k]))
            cost[alive[k]] = floor
        state.remove(blocks[alive[order]].reshape(-1))
        left = torch.ones(len(alive), dtype=torch.bool)
        left[order] = False
        alive = alive[left]
    return cost


def choose_units(
    state: Elimination,
    node: Node,
    sizes: Mapping[str, int],
    parents: Mapping[str, str],
    wanted: Mapping[str, int],
    *,
    rounds: int = ROUNDS,
) -> dict[str, Tensor | Nested]:
    """Remove units along a consumer's input until `wanted` of each axis stay. node: what that dimension holds.

    An axis with a parent keeps the same number of units in each unit of the parent. Parents go first; costs of all that
    follows count on the refit after them.
    """
    at = coordinates(node, sizes)
    chosen: dict[str, Tensor | Nested] = {}
    for axis in sorted(wanted, key=lambda a: a in parents):
        parent = parents.get(axis)
        alive = torch.arange(sizes[axis]) if parent is None else torch.arange(sizes[parent] * sizes[axis])
        unit = at[axis] if parent is None else at[parent] * sizes[axis] + at[axis]
        blocks = unit.argsort(stable=True).reshape(len(alive), -1)
        alive = alive[state.stay(blocks[:, 0])]
        if parent is None:
            chosen[axis] = _keep(state, blocks, alive, torch.zeros_like(alive), wanted[axis], rounds)
            continue
        rows = chosen.get(parent)
        inside = torch.arange(sizes[parent]) if not isinstance(rows, Tensor) else rows
        alive = alive[torch.isin(alive // sizes[axis], inside)]
        kept = _keep(state, blocks, alive, alive // sizes[axis], wanted[axis], rounds)
        chosen[axis] = Nested(parent, (kept % sizes[axis]).reshape(len(inside), wanted[axis]))
    return chosen


def _keep(state: Elimination, blocks: Tensor, alive: Tensor, row: Tensor, wanted: int, rounds: int) -> Tensor:
    """Remove the cheapest of `alive` until `wanted` of each row are left: their numbers, ascending."""
    surplus = torch.bincount(row, minlength=int(row.max()) + 1) - wanted
    per_round = _per_round(len(blocks), blocks.shape[1], rounds)
    while bool((surplus > 0).any()):
        going: list[int] = []
        for k in state.costs(blocks[alive]).argsort(stable=True).tolist():
            if len(going) < per_round and surplus[row[k]] > 0:
                surplus[row[k]] -= 1
                going.append(k)
        state.remove(blocks[alive[going]].reshape(-1))
        left = torch.ones(len(alive), dtype=torch.bool)
        left[going] = False
        alive, row = alive[left], row[left]
    return alive


def _per_round(units: int, width: int, rounds: int) -> int:
    """Blocks of several columns go one by one."""
    return max(1, -(-units // rounds)) if width == 1 else 1
