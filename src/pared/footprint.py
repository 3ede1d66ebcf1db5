"""What a run takes, before it starts: memory, disk, bytes read and written, floating point operations.

Counted from the layout and the recipe alone. Memory is what is alive at the worst moment of each stage: the weights of
one block, what is gathered about it, what runs through it, and the hidden states that may wait elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from pared.blockcosts import Work, block_costs
from pared.distributed import size
from pared.effort import random_beside, reselected
from pared.errors import UsageError
from pared.recipe import Recipe
from pared.stagecosts import Stage, measuring, scoring, walk, writing
from pared.structure import Layout

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
# What the allocator, the libraries' workspaces and the interpreter take beyond what is counted.
SLACK, OVER = 64 << 20, 1.03


def parse_size(text: str | int) -> int:
    """Bytes: "4GiB", "800MB", "1.5g", 4294967296. UsageError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not found or found[2].lower() not in _UNITS or float(found[1]) <= 0:
        raise UsageError(f"{text!r} is not an amount of memory", fix="write it as 4GiB or 800MB")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def show_size(nbytes: float) -> str:
    """As GiB or MiB, for people."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"


@dataclass(frozen=True)
class Footprint:
    """The stages of a run in their order, and what is resident before any of them begins."""

    stages: tuple[Stage, ...]
    base: int
    source: int

    def peak(self, batch: int, room: int | None, *, ahead: bool = False) -> int:
        """Bytes at the worst moment with so many sequences in a batch. room: bytes of hidden states in memory; None: all."""

        def at(s: Stage) -> int:
            states = s.states if room is None else min(room, s.states)
            return int(OVER * (s.fixed + batch * s.row + states + (s.block if ahead else 0)))

        return self.base + SLACK + max(map(at, self.stages))

    def room(self, limit: int, batch: int, *, ahead: bool = False) -> int:
        """Bytes of hidden states that can stay in memory under a limit; negative where the rest does not fit."""
        most = max(s.fixed + batch * s.row + (s.block if ahead else 0) for s in self.stages)
        return int((limit - self.base - SLACK) / OVER) - most

    def spill(self, room: int | None) -> int:
        """Bytes of disk that hidden states take beyond that room."""
        return 0 if room is None else max(0, max(s.states for s in self.stages) - room)

    @property
    def worst(self) -> Stage:
        return max(self.stages, key=lambda s: s.fixed + s.row)

    @property
    def read(self) -> int:
        return sum(s.read for s in self.stages)

    @property
    def written(self) -> int:
        return sum(s.written for s in self.stages)

    @property
    def flops(self) -> float:
        return sum(s.flops for s in self.stages)

    @property
    def solves(self) -> float:
        return sum(s.solves for s in self.stages)

    @property
    def inverted(self) -> float:
        return sum(s.inverted for s in self.stages)

    @property
    def touched(self) -> float:
        return sum(s.touched for s in self.stages)


def footprint(
    layout: Layout,
    recipe: Recipe,
    axes: Sequence[str],
    *,
    experts_used: int | None,
    compute: torch.dtype,
    stored: torch.dtype,
    samples: int,
    seq_len: int,
    writes: bool,
    base: int,
) -> Footprint:
    """What a run of a resolved recipe takes. compute, stored: dtypes that blocks run in and that the checkpoint has.

    base: bytes that the process holds already. writes: whether a checkpoint is written.
    """
    refits = recipe.compensate != "none" or bool(recipe.reconstruct)
    work = Work(
        layout, recipe, tuple(axes), experts_used, compute.itemsize, stored.itemsize, samples, seq_len, refits, writes, size()
    )
    blocks = [block_costs(work, i) for i in range(layout.num_layers)]
    outside = [n for n in layout.tensors if layout.layer_of(n) is None and n not in layout.tied]
    table = max((prod(layout.shapes[n]) for n in outside), default=0)
    rest = sum(prod(layout.shapes[n]) for n in outside)
    # Where they are two, the table of one end stays on disk while the other works.
    end = table + (rest - 2 * table if not layout.tied and rest >= 2 * table else rest - table)
    stages = [*scoring(work, blocks, end), *measuring(work, blocks, end)]
    if refits and (writes or reselected(recipe, layout)):
        stages += walk(replace(work, samples=samples + random_beside(recipe, samples)), blocks, end)
    if writes:
        stages.append(writing(work, blocks, rest))
    source = work.stored * (rest + sum(b.entries for b in blocks))
    return Footprint(tuple(stages), base, source)
