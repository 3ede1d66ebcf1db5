"""Criteria for what goes whole: layers, and the attention or the MLP of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from pared.criteria import WHOLE, Group, Stats, criterion


@criterion("block_influence", needs="activations", paper="arXiv:2403.03853", axes=WHOLE)
def block_influence(group: Group, stats: Stats) -> Tensor:
    """ShortGPT's block influence: 1 - E cos(output without, output with), where without a layer is its input."""
    return torch.tensor([1.0 - stats.cosine[group.axis]])


@criterion("angular", needs="runs", paper="arXiv:2403.17887", axes=("layer",))
def angular(group: Group, stats: Stats) -> Tensor:
    """Angle between what enters and what leaves a run of layers, of the best run that the layer is in."""
    return torch.tensor([stats.run_angle or 0.0])


@criterion("perplexity", needs="removal", paper="arXiv:2402.02834", axes=WHOLE, comparable=True)
def perplexity_when_removed(group: Group, stats: Stats) -> Tensor:
    """Calibration loss without it, measured again after each removal."""
    return torch.tensor([stats.loss_without or 0.0])
