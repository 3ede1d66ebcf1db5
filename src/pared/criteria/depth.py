"""Criteria for whole layers."""

from __future__ import annotations

import torch
from torch import Tensor

from pared.criteria import Group, Stats, criterion


@criterion("block_influence", needs="activations", paper="arXiv:2403.03853", axes=("layer",))
def block_influence(group: Group, stats: Stats) -> Tensor:
    """ShortGPT's block influence: 1 - E cos(block input, block output)."""
    return torch.tensor([1.0 - (stats.cosine or 0.0)])


@criterion("perplexity", needs="removal", paper="arXiv:2402.02834", axes=("layer",), comparable=True)
def perplexity_when_removed(group: Group, stats: Stats) -> Tensor:
    """Calibration loss without the layer, measured again after each removal."""
    return torch.tensor([stats.loss_without or 0.0])
