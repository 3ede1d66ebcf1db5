"""LLM-Pruner's Taylor family: the change of the loss when a structure is set to zero, to first and second order.

Source: Ma, Fang, Wang: LLM-Pruner, NeurIPS 2023, equations 3 to 5. "Element" takes the absolute value of every
weight's term before summing, "vector" after summing over the structure in each tensor.
"""

from __future__ import annotations

from torch import Tensor

from pared.criteria import Group, Stats, criterion

PAPER = "arXiv:2305.11627"


def _present(group: Group, stats: Stats) -> list[str]:
    return [n for n in group.weights if n in stats.gradients]


@criterion("taylor", needs="gradients", paper=PAPER, comparable=True)
def taylor(group: Group, stats: Stats) -> Tensor:
    """First order, element: sum |w g|."""
    g = stats.gradients
    return group.combine([group.per_unit(n, (group.weights[n].float() * g[n]).abs()) for n in _present(group, stats)])


@criterion("taylor-vector", needs="gradients", paper=PAPER, comparable=True)
def taylor_vector(group: Group, stats: Stats) -> Tensor:
    """First order, vector: |sum w g| in each tensor."""
    g = stats.gradients
    return group.combine([group.per_unit(n, group.weights[n].float() * g[n]).abs() for n in _present(group, stats)])


@criterion("taylor-second", needs="squared-gradients", paper=PAPER, comparable=True)
def taylor_second(group: Group, stats: Stats) -> Tensor:
    """Second order with the diagonal Fisher matrix: sum w^2 g^2 / 2."""
    f = stats.squared
    return group.combine([group.per_unit(n, group.weights[n].float().square() * f[n] / 2) for n in _present(group, stats)])


@criterion("taylor-mixed", needs="squared-gradients", paper=PAPER, comparable=True)
def taylor_mixed(group: Group, stats: Stats) -> Tensor:
    """First and second order, element: sum |w g - w^2 g^2 / 2|."""
    g, f = stats.gradients, stats.squared

    def term(n: str) -> Tensor:
        w = group.weights[n].float()
        return (w * g[n] - w.square() * f[n] / 2).abs()

    return group.combine([group.per_unit(n, term(n)) for n in _present(group, stats)])
