"""Magnitude of a structure's weights."""

from __future__ import annotations

from torch import Tensor

from pared.criteria import Group, Stats, criterion


@criterion("l1", needs="weights", paper="arXiv:1608.08710")
def l1(group: Group, stats: Stats) -> Tensor:
    """Sum of absolute weights."""
    return group.over_weights(lambda name, w: w.float().abs())


@criterion("l2", needs="weights", paper="arXiv:1608.08710")
def l2(group: Group, stats: Stats) -> Tensor:
    """Sum of squared weights: the squared Euclidean norm of the group."""
    return group.over_weights(lambda name, w: w.float().square())
