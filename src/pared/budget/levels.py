"""Levels: which units of a block stay at any size, and the refit that goes with it, from one look at the dense block.

Second moments of the consumers' inputs are kept, refitted weights are not: they are solved for when a size is tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pared.axes import Nested, Node, indices
from pared.blockparts import bias_of, consumers_of, oriented, rebuilt, stored
from pared.budget import Sizes
from pared.elimination import Elimination, Sums, choose_units, elimination_costs, sums_for
from pared.leastsquares import DAMPING
from pared.plan import kept_sizes
from pared.spill import Pool, States
from pared.stream import Stream, observed
from pared.structure import Layout

Selection = dict[str, Tensor | Nested]
Key = tuple[tuple[str, int], ...]
# Rounds of an elimination where sizes are only compared.
ROUGHLY = 24


@dataclass
class Consumer:
    """One matrix back into the residual stream: W as [out, n], its bias, and what is known of its input.

    refitted: weights that were solved for, where the pool has put them. targets: whether `sums` hold what the layer gives
    as well; only a refit that is solved for from them needs that.
    """

    name: str
    axes: tuple[str, ...]
    weight: Tensor
    bias: Tensor | None
    sums: Sums
    fisher: Tensor | None = None
    order: dict[str, Tensor] = field(default_factory=dict)
    chosen: dict[Key, Selection] = field(default_factory=dict)
    refitted: dict[Key, States] = field(default_factory=dict)
    targets: bool = False

    @property
    def centred(self) -> bool:
        return self.bias is not None

    def elimination(self) -> Elimination:
        """Of all its columns, before any has gone."""
        scale = self.sums.scale(centred=self.centred)
        state = Elimination.from_sums(self.sums, self.weight, centred=self.centred, scale=scale, own=True)
        if self.fisher is not None:
            state.weigh(self.fisher)
        return state

    def solved(self, key: Key, kept: Tensor) -> Tensor:
        """The refit of some columns: the one that elimination left for these sizes, or solved for."""
        if key in self.refitted:
            return self.refitted[key][0]
        scale = self.sums.scale(centred=self.centred)
        if not self.targets:
            self.sums, self.targets = self.sums.of_output(self.weight, self.bias), True
        return self.sums.at(kept).problem(centred=self.centred, scale=scale).solved(self.weight[:, kept], DAMPING)


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
        """Of what is kept: what is known of the inputs, and targets of the size of the weights."""
        return sum(c.sums.nbytes + 4 * c.weight.numel() for c in self.consumers)

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
        if (axis := self._single(consumer, key)) is None:
            found = choose_units(consumer.elimination(), *self._at(consumer), wanted)
            consumer.chosen[key] = found  # few: a block has some heads
            return found
        # One elimination to the end gives every level of an axis with many units.
        if axis not in consumer.order:
            blocks = self._blocks(consumer, axis)
            consumer.order[axis] = elimination_costs(consumer.elimination(), blocks).argsort(descending=True, stable=True)
        return {axis: consumer.order[axis][: wanted[axis]].sort().values}

    def prepare(self, shapes: Sequence[Sizes], pool: Pool) -> None:
        """Choose and refit for all of these sizes at once: what elimination leaves is the refit to what the layer did."""
        full = self.layout.sizes_at(self.layer)
        for consumer in self.consumers:
            keys = {tuple(sorted((a, s[a]) for a in consumer.axes if a in s and s[a] < full[a])) for s in shapes} - {()}
            state = consumer.elimination() if keys else None
            axes = {a for key in keys for a, _ in key}
            for key in sorted(keys, key=lambda k: [-n for _, n in k]):
                assert state is not None
                # Smaller levels of one axis go on from where the larger ones ended.
                at = state if len(axes) == 1 and not axes & self.layout.parents.keys() else state.copy()
                consumer.chosen[key] = choose_units(at, *self._at(consumer), dict(key), rounds=ROUGHLY)
                if consumer.fisher is None:
                    consumer.refitted[key] = pool.store([at.weights])

    def _single(self, consumer: Consumer, key: Key) -> str | None:
        """The axis, where a consumer has only this one and it is in no other."""
        ((axis, _), *others) = key
        return None if others or axis in self.layout.parents or consumer.axes != (axis,) else axis

    def _at(self, consumer: Consumer) -> tuple[Node, dict[str, int], dict[str, str]]:
        name = f"{self.layout.prefix}.{self.layer}.{consumer.name}"
        return (
            self.layout.tensors[name].dims[self.layout.consumers[name]],
            self.layout.sizes_at(self.layer),
            self.layout.parents,
        )

    def _blocks(self, consumer: Consumer, axis: str) -> Tensor:
        n = self.layout.sizes_at(self.layer)[axis]
        return torch.arange(consumer.weight.shape[1]).reshape(n, -1)

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
            full = self.layout.sizes_at(self.layer)
            sizes = {a: n for a, n in kept_sizes(keep).items() if a in consumer.axes and n < full[a]}
            new = consumer.solved(tuple(sorted(sizes.items())), kept)
            out[consumer.name] = stored(self.layout, name, new, consumer.weight.dtype)
            if consumer.bias is not None:
                mean, w = consumer.sums.mean(), consumer.weight.double()
                bias = consumer.bias.double() + w @ mean - new.double() @ mean[kept]
                out[bias_of(consumer.name)] = bias.to(consumer.bias)
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
    tokens = sum(h.shape[0] * h.shape[1] for h in hidden.like())
    for name, own in consumers_of(layout, layer, weights).items():
        if set(own) & set(axes):
            w = oriented(layout, layer, name, weights[name])
            bias = weights.get(bias_of(name))
            sums = sums_for(w.shape[1], 0, tokens, w.device)
            found.append(Consumer(name, tuple(own), w, bias, sums, (fisher or {}).get(name)))
    by_name = {c.name: c for c in found}

    def add(name: str, a: Tensor, expert: int | None) -> None:
        by_name[name].sums.add_inputs(a)

    with observed(block, list(by_name), add):
        out = stream.through(block, layer, hidden, keep=True)
    for consumer in found:
        consumer.sums.total()
    return out, Levels(layout, layer, found)
