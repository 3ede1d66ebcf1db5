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
    """The state of removing columns of one consumer: V [out, left] and H [left, left], float64, down-dated as they go."""

    def __init__(self, c: Tensor, w: Tensor, *, damping: float = DAMPING) -> None:
        c = c.double()
        eye = torch.eye(len(c), dtype=torch.float64, device=c.device)
        self.h = torch.cholesky_inverse(cholesky(c + ridge(c, damping) * eye))
        self.v = w.double().clone()
        self._place = torch.arange(len(c), device=c.device)  # of each original column among those left

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
        stay = torch.ones(len(self.h), dtype=torch.bool, device=gone.device)
        stay[gone] = False
        if bool(stay.any()):
            gain = torch.cholesky_solve(self.h[gone][:, stay], cholesky(self.h[gone][:, gone]))
            self.v = self.v[:, stay] - self.v[:, gone] @ gain
            self.h = self.h[stay][:, stay] - self.h[stay][:, gone] @ gain
        else:
            self.v, self.h = self.v[:, stay], self.h[stay][:, stay]
        left = self._place >= 0
        left[columns] = False
        self._place = torch.where(left, torch.cumsum(left, 0) - 1, -1)


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
