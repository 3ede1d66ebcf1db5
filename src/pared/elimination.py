"""Optimal Brain Surgeon on a layer's inputs: what each unit's removal costs after the best refit of what stays.

A consumer is y = W a, C = E[a a^T]. With H = (C + ridge)^-1 the cost of removing the columns M is
tr(V_M (H_MM)^-1 V_M^T), V = W (weighted by whatever the output's error is weighted by). After a removal V and H are
down-dated, so that later costs count on the refit. Source: Hassibi & Stork 1992; blocks as in ZipLM (arXiv:2302.04089).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pared.axes import Nested, Node, coordinates
from pared.leastsquares import DAMPING, cholesky, ridge

# Units of one column go in about this many rounds; between two of them their costs are taken as they are.
ROUNDS = 128


class Elimination:
    """The state of removing columns of one consumer: V [out, n] and H [n, n], float64, down-dated as columns go.

    Those that are gone are dropped from the matrices now and then.
    """

    def __init__(self, c: Tensor, w: Tensor, *, damping: float = DAMPING) -> None:
        c = c.double()
        eye = torch.eye(len(c), dtype=torch.float64, device=c.device)
        self.h = torch.cholesky_inverse(cholesky(c + ridge(c, damping) * eye))
        self.v = w.double().clone()
        self._place = torch.arange(len(c), device=c.device)  # of each original column in the matrices, -1 for those gone

    @property
    def weights(self) -> Tensor:
        """V of the columns that stay, in their order: [out, left]."""
        return self.v[:, self._place[self._place >= 0]]

    def costs(self, blocks: Tensor) -> Tensor:
        """Of removing each block of columns alone: blocks int64 [units, columns] -> float64 [units]."""
        at = self._place[blocks]
        if at.shape[1] == 1:
            at = at[:, 0]
            return self.v[:, at].square().sum(0) / self.h.diagonal()[at].clamp(min=1e-300)
        part = torch.stack([self.h[b][:, b] for b in at])
        v = self.v[:, at].permute(1, 2, 0)  # [units, columns, out]
        return (v * torch.linalg.solve(part, v)).sum((1, 2))

    def remove(self, columns: Tensor) -> None:
        """Take columns (by their original number) out and let those that stay make up for them."""
        gone = self._place[columns]
        rows = self.h[gone]
        gain = torch.cholesky_solve(rows, cholesky(rows[:, gone]))
        self.h.addmm_(rows.T, gain, alpha=-1)
        self.v.addmm_(self.v[:, gone], gain, alpha=-1)
        self._place[columns] = -1
        left = self._place[self._place >= 0]
        # What is gone stays in the matrices until much of them is: copying them each time would cost more than the update.
        if len(left) < 0.75 * len(self.h):
            self.h, self.v = self.h[left][:, left], self.v[:, left]
            self._place[self._place >= 0] = torch.arange(len(left), device=left.device)


def elimination_costs(c: Tensor, w: Tensor, blocks: Tensor, *, damping: float = DAMPING, rounds: int = ROUNDS) -> Tensor:
    """The order in which blocks of columns go: each unit's cost when its turn comes.

    c: C [n, n]; w: W [out, n]; blocks: int64 [units, columns]. Returns float64 [units], ascending in the order of
    going; the last to stay are the largest.
    """
    state = Elimination(c, w, damping=damping)
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
    state: Elimination, node: Node, sizes: Mapping[str, int], parents: Mapping[str, str], wanted: Mapping[str, int]
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
        if parent is None:
            chosen[axis] = _keep(state, blocks, alive, torch.zeros_like(alive), wanted[axis])
            continue
        rows = chosen.get(parent)
        inside = torch.arange(sizes[parent]) if not isinstance(rows, Tensor) else rows
        alive = alive[torch.isin(alive // sizes[axis], inside)]
        kept = _keep(state, blocks, alive, alive // sizes[axis], wanted[axis])
        chosen[axis] = Nested(parent, (kept % sizes[axis]).reshape(len(inside), wanted[axis]))
    return chosen


def _keep(state: Elimination, blocks: Tensor, alive: Tensor, row: Tensor, wanted: int) -> Tensor:
    """Remove the cheapest of `alive` until `wanted` of each row are left: their numbers, ascending."""
    surplus = torch.bincount(row, minlength=int(row.max()) + 1) - wanted
    per_round = _per_round(int(surplus.clamp(min=0).sum()), blocks.shape[1])
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


def _per_round(units: int, width: int, rounds: int = ROUNDS) -> int:
    """Blocks of several columns go one by one."""
    return max(1, -(-units // rounds)) if width == 1 else 1
