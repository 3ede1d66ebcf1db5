"""Hidden channels in a basis of their own."""

from __future__ import annotations

from torch import Tensor

from pared.criteria import Group, Stats, criterion
from pared.errors import UsageError


@criterion("rotation", needs="rotation", paper="arXiv:2401.15024", axes=("hidden",))
def rotation(group: Group, stats: Stats) -> Tensor:
    """Energy of the residual stream's principal directions; the model is turned into their basis before it is cut."""
    if stats.energy is None:
        raise UsageError("no basis was measured for the hidden channels")
    return stats.energy
