"""Criteria: how important each structure is. One file for each method; a method registers itself by decorator.

    @criterion("wanda_sp", needs="activations", paper="arXiv:2306.11695")
    def wanda_sp(group: Group, stats: Stats) -> Tensor:   # [units] fp32, larger = keep

Other packages add criteria through the entry point group `pared.criteria` (name = module to import).
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Literal

import torch
from torch import Tensor

from pared.axes import Signature, reduce_to_units
from pared.errors import UsageError
from pared.structure import SUBLAYERS

Needs = Literal[
    "weights",
    "activations",
    "routing",
    "second-moments",
    "second-moments-fisher",
    "gradients",
    "squared-gradients",
    "removal",
    "runs",
    "rotation",
]
# Structures that are one unit in each layer: all entries of all tensors are parts of it.
WHOLE = ("layer", *SUBLAYERS)
REDUCTIONS = ("sum", "mean", "max", "prod", "first", "last")


@dataclass(frozen=True)
class Group:
    """The structures of one kind in one place: what a criterion scores.

    axis: "ffn", "kv", "query", "hidden", ... or one of WHOLE. axes: the axes that count the units, parent first.
    units: how many. weights: name inside the block -> tensor, all that hold a part of a unit, in the block's order.
    inputs: for weights that are multiplied with activations along the axis, the dimension that the input runs along.
    reduction: how the parts that different tensors contribute become one score.
    """

    axis: str
    axes: tuple[str, ...]
    units: int
    layer: int | None
    weights: Mapping[str, Tensor]
    signatures: Mapping[str, Signature]
    sizes: Mapping[str, int]
    inputs: Mapping[str, int]
    reduction: str = "sum"

    def per_unit(self, name: str, values: Tensor) -> Tensor:
        """Sum an elementwise quantity of one tensor over the entries of each unit: fp32 [units]."""
        if self.units == 1 and self.axis in WHOLE:
            return values.float().sum().reshape(1)
        total = reduce_to_units(values, self.signatures[name], self.sizes, self.axes)
        if total is None:
            raise UsageError(f"{name} holds no part of {self.axis}")
        return total

    def per_channel(self, name: str, values: Tensor) -> Tensor:
        """Sum an elementwise quantity of a consumer's weight to its input channels: [n], or [experts, n]."""
        keep = {self.inputs[name], *([0] if values.ndim == 3 else [])}
        return values.float().sum([d for d in range(values.ndim) if d not in keep])

    def channels_to_units(self, name: str, channels: Tensor) -> Tensor:
        """Sum a quantity of a consumer's input channels, [n] or [experts, n], over each unit: fp32 [units]."""
        dims = self.signatures[name].dims
        along = (*dims[:1], dims[self.inputs[name]]) if channels.ndim == 2 else (dims[self.inputs[name]],)
        total = reduce_to_units(channels, Signature("", along), self.sizes, self.axes)
        if total is None:
            raise UsageError(f"the input of {name} holds no part of {self.axis}")
        return total

    def combine(self, parts: list[Tensor]) -> Tensor:
        """One score for each unit from the tensors' parts [units] each, by the group's reduction."""
        stacked = torch.stack(parts)
        match self.reduction:
            case "sum":
                return stacked.sum(0)
            case "mean":
                return stacked.mean(0)
            case "max":
                return stacked.amax(0)
            case "prod":
                return stacked.prod(0)
            case "first":
                return stacked[0]
            case "last":
                return stacked[-1]
        raise UsageError(f"unknown group reduction {self.reduction!r}", fix=f"one of {', '.join(REDUCTIONS)}")

    def over_weights(self, value: Callable[[str, Tensor], Tensor]) -> Tensor:
        """Combine `value(name, weight)`, elementwise, over all tensors of the group."""
        return self.combine([self.per_unit(n, value(n, w)) for n, w in self.weights.items()])


@dataclass
class Moments:
    """Running sums of one matrix's input over calibration tokens: float64 [n], or [experts, n].

    count: tokens, float64 [1] or [experts, 1].
    """

    count: Tensor
    total: Tensor
    absolute: Tensor
    square: Tensor

    @classmethod
    def zeros(cls, n: int, experts: int | None = None, device: torch.device | str = "cpu") -> Moments:
        shape = (n,) if experts is None else (experts, n)
        sums = [torch.zeros(size, dtype=torch.float64, device=device) for size in ((*shape[:-1], 1), shape, shape, shape)]
        return cls(*sums)

    def add(self, x: Tensor, expert: int | None = None) -> None:
        """Add tokens: x [tokens, n]."""
        x = x.float()
        at = slice(None) if expert is None else expert
        self.count[at] += x.shape[0]
        self.total[at] += x.sum(0).double()
        self.absolute[at] += x.abs().sum(0).double()
        self.square[at] += x.square().sum(0).double()

    @property
    def norm(self) -> Tensor:
        """Euclidean norm of each channel over all tokens."""
        return self.square.sqrt().float()

    @property
    def mean_absolute(self) -> Tensor:
        return (self.absolute / self.count.clamp(min=1)).float()

    @property
    def variance(self) -> Tensor:
        """Unbiased variance of each channel."""
        n = self.count.clamp(min=1)
        return ((self.square - self.total.square() / n).clamp(min=0) / (n - 1).clamp(min=1)).float()


@dataclass
class Routing:
    """Where one block's tokens were sent, and what came back: float64 sums over the tokens sent to each expert [experts].

    tokens: all of them. count: sent to each expert. gated: of gate * ||output||. output: of ||output||, without the gate.
    """

    tokens: int
    count: Tensor
    gated: Tensor
    output: Tensor

    @classmethod
    def zeros(cls, experts: int) -> Routing:
        return cls(0, *(torch.zeros(experts, dtype=torch.float64) for _ in range(3)))

    def add(self, index: Tensor, gate: Tensor, norm: Tensor) -> None:
        """Add tokens, each with the experts it visits: index, gate and norm of the experts' outputs, all [tokens, k]."""
        at, size = index.flatten().cpu(), norm.double().flatten().cpu()
        self.tokens += index.shape[0]
        self.count += torch.bincount(at, minlength=len(self.count))
        self.output.index_add_(0, at, size)
        self.gated.index_add_(0, at, size * gate.double().flatten().cpu())


@dataclass
class Stats:
    """What calibration gave for one block, by tensor name inside the block. Only what the criterion needs is there.

    moments: of the inputs. second_moments: E[a a^T] of the inputs, fp32 [n, n]. output_fisher: E[g g^T] of the loss's
    gradient at the outputs, fp32 [out, out], scaled to one token's own loss. expert_costs: of removing each channel of each
    expert in a stack, after the best refit, float64 [experts, n]. gradients: of the mean loss, fp32. squared: mean over sequences of the squared gradient of
    the sequence's mean loss. cosine: of a layer or a sublayer, mean over tokens of
    cos(block output without it, block output). run_angle: of the best run of layers that this one is in. energy: of the stream's channels in its principal basis [hidden]. loss_without: mean loss of
    the model when the layer is left out, at the moment of the search when it went. routing: None where the block's experts
    do not show it. seed: of the run.
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    squared: dict[str, Tensor] = field(default_factory=dict)
    second_moments: dict[str, Tensor] = field(default_factory=dict)
    output_fisher: dict[str, Tensor] = field(default_factory=dict)
    expert_costs: dict[str, Tensor] = field(default_factory=dict)
    cosine: dict[str, float] = field(default_factory=dict)
    run_angle: float | None = None
    energy: Tensor | None = None
    loss_without: float | None = None
    routing: Routing | None = None
    seed: int = 0


@dataclass(frozen=True)
class Criterion:
    name: str
    function: Callable[[Group, Stats], Tensor]
    needs: Needs
    paper: str
    axes: tuple[str, ...] | None  # None: every axis
    comparable: bool  # scores of different layers and axes are in one unit; otherwise they are standardised to compete
    about: str

    def axes_or(self, axes: Sequence[str]) -> Sequence[str]:
        """The axes that it scores; `axes` where it scores any."""
        return axes if self.axes is None else self.axes


_REGISTRY: dict[str, Criterion] = {}


def criterion(
    name: str, *, needs: Needs, paper: str = "", axes: tuple[str, ...] | None = None, comparable: bool = False
) -> Callable[[Callable[[Group, Stats], Tensor]], Callable[[Group, Stats], Tensor]]:
    """Register a criterion. axes: those that it can score; None for all. paper: where it is from.

    comparable: scores estimate the loss itself, so that layers and axes may compete by score per parameter; the
    scores of other criteria are standardised within each (layer, axis) before they do.
    """

    def register(function: Callable[[Group, Stats], Tensor]) -> Callable[[Group, Stats], Tensor]:
        about = (function.__doc__ or "").strip().splitlines()[0] if function.__doc__ else ""
        _REGISTRY[name] = Criterion(name, function, needs, paper, axes, comparable, about)
        return function

    return register


def all_criteria() -> dict[str, Criterion]:
    """Every registered criterion by name, those of other packages included."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group="pared.criteria"):
        entry.load()
    return dict(sorted(_REGISTRY.items()))


def get_criterion(name: str) -> Criterion:
    """The criterion of that name. UsageError with the nearest name where there is none."""
    known = all_criteria()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"unknown criterion {name!r}", fix=f"{hint}pared ls criteria lists all of them")
    return known[name]
