"""Levels: which units of a block stay at any size, and the refit that goes with it, from one look at the dense block.

Second moments of the consumers' inputs are kept, refitted weights are not: they are solved for when a size is tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pared.axes import Nested, indices
from pared.blockparts import bias_of, consumers_of, oriented, rebuilt, stored
from pared.budget import Sizes
from pared.elimination import Elimination, choose_units, elimination_costs
from pared.leastsquares import DAMPING, Moments2, refit
from pared.spill import States
from pared.stream import Stream, observed
from pared.structure import Layout

Selection = dict[str, Tensor | Nested]


@dataclass
class Consumer:
    """One matrix back into the residual stream: W as [out, n], its bias, and moments of its input."""

    name: str
    axes: tuple[str, ...]
    weight: Tensor
    bias: Tensor | None
    moments: Moments2
    fisher: Tensor | None = None
    order: dict[str, Tensor] = field(default_factory=dict)
    chosen: dict[tuple[tuple[str, int], ...], Selection] = field(default_factory=dict)

    def weighted(self) -> Tensor:
        """W, its rows weighted by a factor of G where there is one: ||G^1/2 dW a||^2 is the error that counts."""
        if self.fisher is None:
            return self.weight.double()
        values, vectors = torch.linalg.eigh(self.fisher.double())
        return (values.clamp(min=0).sqrt()[:, None] * vectors.T) @ self.weight.double()


@dataclass
class Levels:
    """One block's consumers, with what every size of theirs would keep."""

    layout: Layout
    layer: int
    consumers: list[Consumer]

    @property
    def axes(self) -> set[str]:
        return {a for c in self.consumers for a in c.axes}

    @property
    def nbytes(self) -> int:
        """Of what is kept: second moments, and targets of the size of the weights."""
        return sum(4 * (c.moments.aa.numel() + c.moments.ta.numel()) for c in self.consumers)

    def shrunk(self, sizes: Sizes) -> Sizes:
        """Only those sizes that are smaller than the dense block's."""
        full = self.layout.sizes_at(self.layer)
        return {a: n for a, n in sizes.items() if a in self.axes and n < full[a]}

    def select(self, sizes: Sizes) -> Selection:
        """The units that stay of each axis, as many as `sizes` says; axes that keep everything are left out."""
        full = self.layout.sizes_at(self.layer)
        out: Selection = {}
        for consumer in self.consumers:
            wanted = {a: sizes[a] for a in consumer.axes if a in sizes and sizes[a] < full[a]}
            if wanted:
                out.update(self._choose(consumer, wanted))
        return out

    def _choose(self, consumer: Consumer, wanted: dict[str, int]) -> Selection:
        key = tuple(sorted(wanted.items()))
        if key in consumer.chosen:
            return consumer.chosen[key]
        layout, full = self.layout, self.layout.sizes_at(self.layer)
        name = f"{layout.prefix}.{self.layer}.{consumer.name}"
        node = layout.tensors[name].dims[layout.consumers[name]]
        (axis, n), *others = wanted.items()
        if others or axis in layout.parents or consumer.axes != (axis,):
            state = Elimination(consumer.moments.problem(centred=False).c, consumer.weighted())
            found = choose_units(state, node, full, layout.parents, wanted)
            consumer.chosen[key] = found  # few: a block has some heads
            return found
        # One elimination to the end gives every level of an axis with many units.
        if axis not in consumer.order:
            columns = len(consumer.moments.aa) // full[axis]
            blocks = torch.arange(len(consumer.moments.aa)).reshape(full[axis], columns)
            costs = elimination_costs(consumer.moments.problem(centred=False).c, consumer.weighted(), blocks)
            consumer.order[axis] = costs.argsort(descending=True, stable=True)
        return {axis: consumer.order[axis][:n].sort().values}

    def tensors(self, block: nn.Module, keep: Selection) -> dict[str, Tensor]:
        """The consumers' refitted weights and biases for given kept units, by local name."""
        out: dict[str, Tensor] = {}
        for consumer in self.consumers:
            if not set(consumer.axes) & keep.keys():
                continue
            name = f"{self.layout.prefix}.{self.layer}.{consumer.name}"
            dim = self.layout.consumers[name]
            kept = indices(
                self.layout.tensors[name].dims[dim],
                self.layout.sizes_at(self.layer),
                keep,
                self.layout.shapes[name][dim],
            )
            if kept is None:
                continue
            problem = consumer.moments.problem(centred=consumer.bias is not None)
            new = refit(problem, consumer.weight, kept, DAMPING)
            out[consumer.name] = stored(self.layout, name, new, consumer.weight.dtype)
            if consumer.bias is not None:
                out[bias_of(consumer.name)] = problem.bias(new, kept).to(consumer.bias)
        return out

    def module(self, stream: Stream, block: nn.Module, sizes: Sizes) -> nn.Module:
        """The block cut to sizes and refitted."""
        keep = self.select(sizes)
        return block if not keep else rebuilt(stream, block, self.layer, keep, {}, self.tensors(block, keep))


def measure_levels(
    stream: Stream,
    block: nn.Module,
    layer: int,
    hidden: States,
    axes: Sequence[str],
    fisher: Mapping[str, Tensor] | None = None,
) -> tuple[States, Levels]:
    """Run a dense block on all batches: its outputs, and its levels. axes: those that may shrink."""
    weights = {n: p.detach() for n, p in block.named_parameters()}
    layout, found = stream.layout, []
    for name, own in consumers_of(layout, layer, weights).items():
        if set(own) & set(axes):
            w = oriented(layout, layer, name, weights[name])
            bias = weights.get(bias_of(name))
            moments = Moments2.zeros(w.shape[1], w.shape[0], w.device)
            found.append(Consumer(name, tuple(own), w, bias, moments, (fisher or {}).get(name)))
    by_name = {c.name: c for c in found}

    def add(name: str, a: Tensor, expert: int | None) -> None:
        by_name[name].moments.add_inputs(a)

    with observed(block, list(by_name), add):
        out = stream.through(block, layer, hidden, keep=True)
    for consumer in found:
        consumer.moments = consumer.moments.of_output(consumer.weight, consumer.bias)
    return out, Levels(layout, layer, found)
