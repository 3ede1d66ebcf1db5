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
from pared.distributed import size
from pared.fewrows import FewRows, are_few
from pared.inverses import DenseInverse, Inverse
from pared.leastsquares import DAMPING, factored, ridge
from pared.moments import Moments2

# What is known of a consumer's tokens.
Sums = Moments2 | FewRows
# All units of one column would go in this many rounds; between two of them costs are taken as they are.
ROUNDS = 128
# One sequence (of an expert, one token) in this many tells how far the fit to the others can be trusted.
HELD_OUT = 8
# Rows of V whose squares are there at once, in memory that is taken once: to take it anew costs more than to square them.
STRIP = 64


def sums_for(n: int, out: int, tokens: int, device: torch.device | str = "cpu") -> Sums:
    """What to gather of so many tokens in a consumer with n inputs; out: 0 where `of_output` will say what the targets are."""
    return FewRows() if size() == 1 and are_few(tokens, n) else Moments2.zeros(n, out, device)


def halves_for(n: int, out: int, tokens: int, device: torch.device) -> list[Sums]:
    """Of the tokens to fit and of those to judge by. tokens: of both."""
    return [sums_for(n, out, tokens, device), sums_for(n, out, -(-tokens // HELD_OUT), device)]


def add_sequence(fit: Sums, held: Sums, a: Tensor, t: Tensor, row: int, weight: Tensor | None = None) -> None:
    """Add one sequence, [s, n] and [s, out], its tokens weighted by [s], to one of the two: every HELD_OUT-th is held out.

    row: its number.
    """
    (held if row % HELD_OUT == HELD_OUT - 1 else fit).add(a, t, weight)


class Elimination:
    """The state of removing columns of one consumer: V [out, n], float32, and H, both down-dated as columns go.

    Columns that are gone are dropped from both now and then.
    """

    def __init__(self, h: Inverse, v: Tensor) -> None:
        self.h, self.v = h, v
        self._place = torch.arange(len(h), device=v.device)  # of each original column, -1 for those gone

    @classmethod
    def of(cls, c: Tensor, w: Tensor, *, damping: float = DAMPING) -> Elimination:
        """From C [n, n] itself, which is left as it is; the target is what the layer gives."""
        c = c.double()
        return cls(DenseInverse(c.clone, ridge(float(c.diagonal().mean()), damping)), w.float().clone())

    @classmethod
    def from_sums(cls, sums: Sums, w: Tensor, *, centred: bool, scale: float, own: bool = False) -> Elimination:
        """From what is known of the tokens. own: the target is what the layer gives; else V starts as the refit to theirs."""
        added = ridge(scale, DAMPING)
        h = sums.inverse(added, centred=centred)
        return cls(h, w.float().clone() if own else sums.regressed(h, w, added, centred=centred))  # type: ignore[arg-type]

    def copy(self) -> Elimination:
        """Another at the same point."""
        other = Elimination(self.h.copy(), self.v.clone())
        other._place = self._place.clone()
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
            power = torch.zeros(self.v.shape[1], dtype=torch.float64, device=self.v.device)
            square = torch.empty_like(self.v[:STRIP])
            for rows in self.v.split(STRIP):
                power += torch.mul(rows, rows, out=square[: len(rows)]).sum(0)
            return power[at] / self.h.diagonal()[at].clamp(min=1e-300)
        part = self.h.squares(at)
        v = self.v[:, at].permute(1, 2, 0).double()  # [units, columns, out]
        return (v * torch.linalg.solve(part, v)).sum((1, 2))

    def remove(self, columns: Tensor) -> None:
        """Take columns (by their original number) out and let those that stay make up for them."""
        gone = self._place[columns]
        rows = self.h.rows(gone)
        gain = torch.cholesky_solve(rows, factored(rows[:, gone].clone, 0.0))
        self.h.down_date(gone, rows, gain)
        self.v.addmm_(self.v[:, gone], gain.float(), alpha=-1)
        self._place[columns] = -1
        left = self._place[self._place >= 0]
        # What is gone stays in the matrices until much of them is: moving them each time would cost more than the update.
        if len(left) < 0.75 * len(self.h):
            self.h.squeeze(left)
            for rows in self.v.split(STRIP):  # in place
                rows[:, : len(left)] = rows[:, left]
            self.v = self.v[:, : len(left)]
            self._place[self._place >= 0] = torch.arange(len(left), device=left.device)


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
    surplus = (torch.bincount(row, minlength=int(row.max()) + 1) - wanted).tolist()
    per_round = _per_round(len(blocks), blocks.shape[1], rounds)
    while any(n > 0 for n in surplus):
        going: list[int] = []
        rows = row.tolist()
        for k in state.costs(blocks[alive]).argsort(stable=True).tolist():
            if surplus[rows[k]] > 0:
                surplus[rows[k]] -= 1
                going.append(k)
                if len(going) == per_round:
                    break
        state.remove(blocks[alive[going]].reshape(-1))
        left = torch.ones(len(alive), dtype=torch.bool)
        left[going] = False
        alive, row = alive[left], row[left]
    return alive


def _per_round(units: int, width: int, rounds: int) -> int:
    """Blocks of several columns go one by one."""
    return max(1, -(-units // rounds)) if width == 1 else 1
