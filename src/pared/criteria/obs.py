"""Second-order selection (Optimal Brain Surgeon on the consumer's inputs): what a structure's removal costs after
everything that stays has been refitted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pared.axes import coordinates
from pared.criteria import WHOLE, Group, Stats, criterion
from pared.elimination import Elimination, elimination_costs
from pared.errors import UsageError
from pared.structure import SUBLAYERS

PAPER = "Hassibi & Stork 1992; arXiv:2302.04089"
AXES = ("kv", "query", "ffn", "shared_ffn", "expert_ffn")


def _columns(group: Group, name: str) -> Tensor:
    """Columns of the consumer's input that belong to each unit: int64 [units, columns]."""
    if group.axis in WHOLE:
        return torch.arange(group.weights[name].shape[group.inputs[name]])[None]
    at = coordinates(group.signatures[name].dims[group.inputs[name]], group.sizes)
    unit = torch.zeros_like(at[group.axes[0]])
    for axis in group.axes:
        unit = unit * group.sizes[axis] + at[axis]
    return unit.argsort(stable=True).reshape(group.units, -1)


def _costs(group: Group, stats: Stats, *, fisher: bool) -> Tensor:
    parts = []
    for name, dim in group.inputs.items():
        if group.weights[name].ndim != 2:
            if fisher or name not in stats.expert_costs:
                raise UsageError(
                    f"{'weighted ' if fisher else ''}second-order selection does not score {group.axis} of experts",
                    where="--criterion",
                    fix="--criterion taylor" + (", or obs for channels inside experts" if fisher else ""),
                )
            parts.append(stats.expert_costs[name].flatten().float())
            continue
        w = group.weights[name].double()
        w = w if dim == 1 else w.T
        if fisher:
            # E||g^T dy||^2 is the error of the output weighted by G = E[g g^T]; any factor of G will do.
            values, vectors = torch.linalg.eigh(stats.output_fisher[name].double())
            w = (values.clamp(min=0).sqrt()[:, None] * vectors.T) @ w
        second = stats.second_moments[name]
        parts.append(elimination_costs(Elimination.of(second, w), _columns(group, name)).float())
    return group.combine(parts)


@criterion("obs", needs="second-moments", paper=PAPER, axes=(*AXES, *SUBLAYERS))
def obs(group: Group, stats: Stats) -> Tensor:
    """Error of the consumer's output after the optimal refit, with down-dating."""
    return _costs(group, stats, fisher=False)


@criterion("obs-fisher", needs="second-moments-fisher", paper=PAPER, axes=(*AXES, *SUBLAYERS), comparable=True)
def obs_fisher(group: Group, stats: Stats) -> Tensor:
    """The same, the output's error weighted by its gradients, so that layers and kinds compare."""
    return _costs(group, stats, fisher=True)
