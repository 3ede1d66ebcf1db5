"""What one block of a model takes: entries, operations, and bytes while tokens run through it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch

from pared.accounting import block_count
from pared.axes import names
from pared.blockparts import consumers_of
from pared.recipe import Recipe
from pared.structure import Layout


@dataclass(frozen=True)
class Work:
    """What the counts follow from. itemsize: of what is computed in; stored: of the weights on disk."""

    layout: Layout
    recipe: Recipe
    axes: tuple[str, ...]
    experts_used: int | None
    itemsize: int
    stored: int
    samples: int
    seq_len: int
    refits: bool
    writes: bool
    processes: int = 1

    @property
    def tokens(self) -> int:
        return self.samples * self.seq_len


@dataclass(frozen=True)
class Part:
    """A part of a block: the width of what is made of the stream for a token, and of what goes on into the consumer."""

    made: int
    on: int
    attends: bool

    @property
    def inside(self) -> int:
        """Values of a token that are alive together. Queries and keys are turned; activations in many steps are not gated."""
        return 2 * self.made + self.on if self.attends else self.made + self.on * (1 if self.made >= 2 * self.on else 3)

    @property
    def touched(self) -> int:
        """Values of a token that are read or written."""
        return 6 * self.made + 2 * self.on if self.attends else self.made + 3 * self.on


@dataclass
class Block:
    """Counts of one layer.

    entries: of all tensors; largest: of one of them. flops: operations of one forward pass, for a token. consumers: (input
    width, output width, units that go whole or 0 for single columns) of matrices back into the residual stream; made: for
    each, the entries of the matrices that make its input. producer_entries: of all matrices that read the stream. parts: of the block; rest: width of what belongs to
    none of them.
    """

    entries: int
    hidden: int
    largest: int
    flops: float
    consumers: list[tuple[int, int, int]] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    producer_entries: int = 0
    parts: list[Part] = field(default_factory=list)
    rest: int = 0

    def forward(self, itemsize: int) -> int:
        """Bytes alive at the worst moment while one token runs through."""
        inside = max((p.inside for p in self.parts), default=0)
        return itemsize * (inside + 2 * self.rest + 3 * self.hidden) + self._norms(itemsize)

    def backward(self, itemsize: int) -> int:
        """The same on the way back: what was kept of every part, and the gradients within one."""
        kept = sum(p.made + 2 * p.on for p in self.parts)
        inside = max((max(p.made, 2 * p.on) for p in self.parts), default=0)
        return itemsize * (kept + inside + 4 * self.rest + 4 * self.hidden) + 2 * self._norms(itemsize)

    def _norms(self, itemsize: int) -> int:
        """Norms are computed in fp32: another copy where the rest is not."""
        return 8 * self.hidden if itemsize < 4 else 0

    @property
    def touched(self) -> int:
        """Values that elementwise work of one forward pass reads or writes, for a token."""
        return sum(p.touched for p in self.parts) + 4 * self.rest + 24 * self.hidden


def block_costs(work: Work, i: int) -> Block:
    """Of layer i."""
    layout, sizes = work.layout, work.layout.sizes_at(i)
    held = layout.block_tensors(i)
    meta = {layout.local(n): torch.empty(layout.shapes[n], device="meta") for n in held}
    into = [f"{layout.prefix}.{i}.{c}" for c in consumers_of(layout, i, meta)]
    shapes = layout.shapes
    reads = {n: names(layout.tensors[n].dims[layout.consumers[n]]) for n in held if n in layout.consumers}
    producers = [n for n, axes in reads.items() if axes == {"hidden"}]

    def routed(n: str) -> int:
        return min(work.experts_used or shapes[n][0], shapes[n][0]) if len(shapes[n]) == 3 else 1

    def gives(n: str) -> int:
        """Width of a producer's output, for a token."""
        left_out = {layout.consumers[n], *([0] if len(shapes[n]) == 3 else [])}
        return routed(n) * prod(s for d, s in enumerate(shapes[n]) if d not in left_out)

    def makes(n: str, axes: frozenset[str]) -> bool:
        return bool(axes & layout.tensors[n].axes)

    def units(n: str) -> int:
        """Heads that a consumer reads."""
        heads = [sizes[a] for a in ("kv", "query") if a in reads[n]]
        return prod(heads) if heads else 0

    parts, placed = [], set[str]()
    for n, axes in reads.items():
        if n not in producers:
            own = [p for p in producers if p not in placed and makes(p, axes)]
            width = routed(n) * shapes[n][layout.consumers[n]]
            parts.append(Part(sum(map(gives, own)), width, bool({"kv", "query"} & axes)))
            placed |= set(own)
    _, ops = block_count(layout, i, sizes, context=work.seq_len // 2, experts_used=work.experts_used)
    flat = [p for p in producers if len(shapes[p]) == 2]
    return Block(
        sum(layout.parameters(n) for n in held),
        sizes["hidden"],
        max(prod(shapes[n]) for n in held),
        2.0 * ops,
        [(shapes[n][layout.consumers[n]], shapes[n][1 - layout.consumers[n]], units(n)) for n in into],
        [sum(prod(shapes[p]) for p in flat if makes(p, reads[n])) for n in into],
        sum(prod(shapes[p]) for p in flat),
        parts,
        sum(gives(p) for p in producers if p not in placed),
    )
