"""One block on its way to be cut: its matrices as they were, those that were refitted, and the module that they make."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pared.axes import Nested, indices
from pared.blockparts import bias_of, consumers_of, cut, input_axes, matrices, oriented, rebuilt, stored
from pared.gaps import Kept, skipped_in
from pared.plan import kept_sizes
from pared.stream import Stream
from pared.structure import Layout
from pared.turned import TurnedStream


class CutBlock:
    """Block i of a stream and what is to stay of it.

    keep: the units of each axis; hidden: the leading channels of the residual stream that stay, None where all do. whole,
    changed: refitted tensors, not yet cut and cut.
    """

    def __init__(self, stream: Stream, i: int, block: nn.Module, keep: Kept) -> None:
        self.stream, self.i, self.block, self.keep = stream, i, block, keep
        self.layout: Layout = stream.layout
        self.sizes = self.layout.sizes_at(i)
        self.skipped = skipped_in(keep)
        self.weights = {n: p.detach() for n, p in block.named_parameters()}
        self.hidden = kept_sizes(keep).get("hidden")
        self.whole: dict[str, Tensor] = self._norms()
        self.changed: dict[str, Tensor] = {}

    def tensors(self) -> dict[str, Tensor]:
        """What is not merely cut, in its final form."""
        return {**{n: self._cut(n, t) for n, t in self.whole.items()}, **self.changed}

    def _full(self, name: str) -> str:
        return f"{self.layout.prefix}.{self.i}.{name}"

    def _axes(self, name: str) -> frozenset[str]:
        return input_axes(self.layout, self.i, name)

    def _consumers(self) -> list[str]:
        return list(consumers_of(self.layout, self.i, self.weights))

    def _producers(self) -> list[str]:
        """Matrices that read the residual stream."""
        return [n for n in matrices(self.layout, self.i, self.weights) if self._axes(n) == {"hidden"}]

    def _bias(self, name: str) -> Tensor | None:
        """A matrix's bias. One that was added before the consumers, where a config has one switch for all, stays zero."""
        beside = self._full(bias_of(name)) in self.layout.added and self._axes(name) == {"hidden"}
        bias = None if beside else self.weights.get(bias_of(name))
        return bias if bias is None or self._axes(name) == {"hidden"} else bias[: self.hidden]

    def _weight(self, name: str) -> Tensor:
        """A matrix as [out, in]; of one that writes to the stream the channels that stay."""
        w = oriented(self.layout, self.i, name, self.weights[name])
        return w if self._axes(name) == {"hidden"} else w[: self.hidden]

    def _those(self, h: Tensor) -> Tensor:
        """Of the dense stream's hidden channels those that stay."""
        return h[..., : self.hidden]

    def _norms(self) -> dict[str, Tensor]:
        """The scales of norms that run over fewer channels than before."""
        if self.hidden is None:
            return {}
        assert isinstance(self.stream, TurnedStream)
        basis, named = self.stream.rotation, {n: self._full(n) for n in self.weights}
        return {n: basis.norm(f, self.weights[n], self.hidden) for n, f in named.items() if f in basis.offsets}

    def _stored(self, name: str, w: Tensor) -> Tensor:
        return stored(self.layout, self._full(name), w, self.weights[name].dtype)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    def _kept_columns(self, name: str) -> Tensor:
        full = self._full(name)
        dim = self.layout.consumers[full]
        kept = indices(self.layout.tensors[full].dims[dim], self.sizes, self.keep, self.layout.shapes[full][dim])
        return torch.arange(self.layout.shapes[full][dim]) if kept is None else kept

    def _done(self, before: list[str]) -> dict[str, Tensor | Nested]:
        """The selection along the consumers that are cut already."""
        done = self.skipped.union({"hidden"}, *(self._axes(n) for n in before))
        return {a: k for a, k in self.keep.items() if a in done}

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        return cut(self.layout, self.i, name, tensor, self.keep)

    def _module(self, keep: dict[str, Tensor | Nested]) -> nn.Module:
        """The block with only `keep` applied, refitted tensors where there are some."""
        if not keep and not self.changed and not self.whole:
            return self.block
        return rebuilt(self.stream, self.block, self.i, keep, self.whole, self.changed)

    def _experts_whole(self, axes: set[str]) -> nn.Module:
        """The block as it will be, but with every channel of its experts still there, and of what has their size by config.

        Experts beside those that tokens are sent to do not change what these are given.
        """
        tied = {(a, leader) for a, (leader, _) in self.layout.follows.items()}
        axes = axes | {a for a, leader in tied if leader in axes} | {leader for a, leader in tied if a in axes}
        keep = {a: k for a, k in self.keep.items() if a not in axes}
        final = {n: t for n, t in self.changed.items() if not axes & self.layout.tensors[self._full(n)].axes}
        return rebuilt(self.stream, self.block, self.i, keep, self.whole, final)
