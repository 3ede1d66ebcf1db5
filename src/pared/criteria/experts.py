"""Criteria for whole experts, from what calibration tokens are sent to them and what comes back."""

from __future__ import annotations

from torch import Tensor

from pared.criteria import Group, Routing, Stats, criterion
from pared.errors import UsageError

AXES = ("expert",)


def _seen(group: Group, stats: Stats) -> Routing:
    if stats.routing is None:
        raise UsageError(
            f"the experts of layer {group.layer} do not say which tokens they are given",
            where="--criterion",
            fix="--criterion taylor",
        )
    return stats.routing


@criterion("reap", needs="routing", paper="arXiv:2510.13999", axes=AXES)
def reap(group: Group, stats: Stats) -> Tensor:
    """REAP: mean over the tokens sent to an expert of gate * ||expert output||."""
    seen = _seen(group, stats)
    return (seen.gated / seen.count.clamp(min=1)).float()


@criterion("expert-usage", needs="routing", paper="arXiv:2206.00277", axes=AXES)
def expert_usage(group: Group, stats: Stats) -> Tensor:
    """Share of the tokens that are sent to an expert."""
    seen = _seen(group, stats)
    return (seen.count / max(1, seen.tokens)).float()


@criterion("expert-output", needs="routing", axes=AXES)
def expert_output(group: Group, stats: Stats) -> Tensor:
    """Mean norm of an expert's output over the tokens sent to it."""
    seen = _seen(group, stats)
    return (seen.output / seen.count.clamp(min=1)).float()
