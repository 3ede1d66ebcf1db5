"""Criteria from the activations that enter a structure's consumer (o_proj for heads, down_proj for FFN channels)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pared.criteria import Group, Moments, Stats, criterion

INNER = ("kv", "query", "ffn", "expert_ffn", "shared_ffn")


def _over_consumers(group: Group, stats: Stats, channels: Callable[[str, Moments], Tensor]) -> Tensor:
    """Combine `channels(name, moments)`, a quantity of each input channel, over the consumers."""
    return group.combine([group.channels_to_units(n, channels(n, stats.moments[n])) for n in group.inputs])


@criterion("wanda_sp", needs="activations", paper="arXiv:2306.11695", axes=INNER)
def wanda_sp(group: Group, stats: Stats) -> Tensor:
    """Wanda for structures: sum over the consumer's weights of |W_ij| ||x_j||."""
    return _over_consumers(group, stats, lambda n, m: group.per_channel(n, group.weights[n].float().abs()) * m.norm)


@criterion("flap", needs="activations", paper="arXiv:2312.11983", axes=INNER)
def flap(group: Group, stats: Stats) -> Tensor:
    """FLAP's fluctuation: Var(x_j) ||W_:j||^2."""
    return _over_consumers(group, stats, lambda n, m: group.per_channel(n, group.weights[n].float().square()) * m.variance)


@criterion("minitron", needs="activations", paper="arXiv:2407.14679", axes=INNER)
def minitron(group: Group, stats: Stats) -> Tensor:
    """Minitron's activation: mean |x_j|, over the channels of the structure."""
    return _over_consumers(group, stats, lambda n, m: m.mean_absolute)
