"""Second moments of what the matrices of a block are multiplied with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pared.distributed import total, total_of
from pared.stream import observed


class SecondMoments:
    """E[a a^T] of the inputs of some matrices of a block (local names), over all that runs through while `observing`."""

    def __init__(self, block: nn.Module, names: Sequence[str]) -> None:
        self.names, self.sums, self.count = names, dict[str, Tensor](), dict.fromkeys(names, 0)
        self.observing = observed(block, names, self._add)

    def _add(self, name: str, x: Tensor, expert: int | None) -> None:
        x = x.float()
        if name not in self.sums:
            self.sums[name] = x.new_zeros(x.shape[1], x.shape[1])
        self.sums[name].addmm_(x.T, x)
        self.count[name] += x.shape[0]

    def means(self) -> dict[str, Tensor]:
        """By name, fp32 [n, n], over the tokens of all processes."""
        total(*(self.sums[n] for n in self.names))
        self.count = {n: int(total_of(c)) for n, c in self.count.items()}
        return {n: self.sums[n] / self.count[n] for n in self.names}
