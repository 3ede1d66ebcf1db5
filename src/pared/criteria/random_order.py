"""Random importance: the floor that every method has to beat."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from pared.criteria import Group, Stats, criterion


@criterion("random", needs="weights")
def random_order(group: Group, stats: Stats) -> Tensor:
    """Uniform random numbers, fixed by the seed, the layer and the axis."""
    place = zlib.crc32(f"{stats.seed}/{group.axis}/{group.layer}".encode())
    return torch.rand(group.units, generator=torch.Generator().manual_seed(place))
