"""What a run takes, before it starts: memory, disk, bytes read and written, floating point operations.

Counted from the layout and the recipe alone. Memory is what is alive at the worst moment of each stage: the weights of
one block, what is gathered about it, what runs through it, and the hidden states that may wait elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from pared import solves
from pared.accounting import block_count
from pared.axes import names
from pared.blockparts import consumers_of
from pared.budget import Amount, Budget
from pared.budget.trials import KEPT
from pared.budget.uniform import uniform_shapes
from pared.criteria import get_criterion
from pared.distributed import size
from pared.effort import GENERATIONS, measures, reselected
from pared.errors import UsageError
from pared.recipe import Recipe
from pared.structure import Layout

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
# What the allocator, the libraries' workspaces and the interpreter take beyond what is counted.
SLACK, OVER = 96 << 20, 1.03


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
class Stage:
    """One pass over the model. Bytes, but for flops (multiplications and additions, of fp32 or less) and solves (fp64).

    fixed: alive at its worst moment whatever the batch. row: more for each sequence of a batch. states: hidden states of
    all sequences that are alive together. block: what reading the next block ahead would take. read: of the source.
    """

    name: str
    fixed: int
    row: int = 0
    states: int = 0
    block: int = 0
    read: int = 0
    written: int = 0
    flops: float = 0.0
    solves: float = 0.0


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


@dataclass
class _Block:
    """Counts of one layer. consumers: (input width, output width) of matrices back into the residual stream."""

    entries: int
    inner: int
    hidden: int
    largest: int
    flops: float
    consumers: list[tuple[int, int]] = field(default_factory=list)
    producers: int = 0
    producer_entries: int = 0
    made: list[int] = field(default_factory=list)
    """For each consumer, the entries of the matrices that make its input."""


def _block(work: Work, i: int) -> _Block:
    layout, sizes = work.layout, work.layout.sizes_at(i)
    held = layout.block_tensors(i)
    meta = {layout.local(n): torch.empty(layout.shapes[n], device="meta") for n in held}
    into = [f"{layout.prefix}.{i}.{c}" for c in consumers_of(layout, i, meta)]
    consumers = [(layout.shapes[n][layout.consumers[n]], layout.shapes[n][1 - layout.consumers[n]]) for n in into]
    axes = [names(layout.tensors[n].dims[layout.consumers[n]]) for n in into]
    made = [0] * len(into)
    inner = 0
    makers = 0
    for n in held:
        if n not in layout.consumers:
            continue
        shape, dim = layout.shapes[n], layout.consumers[n]
        routed = min(work.experts_used or shape[0], shape[0]) if len(shape) == 3 else 1
        if names(layout.tensors[n].dims[dim]) == {"hidden"}:
            inner += routed * prod(s for d, s in enumerate(shape) if d not in ({0, dim} if len(shape) == 3 else {dim}))
            makers += prod(shape) if len(shape) == 2 else 0
            for k, own in enumerate(axes):
                made[k] += prod(shape) if len(shape) == 2 and own & layout.tensors[n].axes else 0
        else:
            inner += routed * shape[dim]
    _, ops = block_count(layout, i, sizes, context=work.seq_len // 2, experts_used=work.experts_used)
    return _Block(
        sum(layout.parameters(n) for n in held),
        inner,
        sizes["hidden"],
        max(prod(layout.shapes[n]) for n in held),
        2.0 * ops,
        consumers,
        len({names(layout.tensors[n].dims[layout.consumers[n]]) for n in held if n in layout.consumers}) - 1,
        makers,
        made,
    )


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
    blocks = [_block(work, i) for i in range(layout.num_layers)]
    outside = [n for n in layout.tensors if layout.layer_of(n) is None and n not in layout.tied]
    table = max((prod(layout.shapes[n]) for n in outside), default=0)
    rest = sum(prod(layout.shapes[n]) for n in outside)
    # Where they are two, the table of one end stays on disk while the other works.
    end = table + (rest - 2 * table if not layout.tied and rest >= 2 * table else rest - table)
    stages = [*_scoring(work, blocks, end), *_measuring(work, blocks, end)]
    if refits and (writes or reselected(recipe, layout)):
        stages += _walk(work, blocks, end)
    if writes:
        stages.append(_writing(work, blocks, rest))
    source = work.stored * (rest + sum(b.entries for b in blocks))
    return Footprint(tuple(stages), base, source)


def _forward(work: Work, b: _Block) -> int:
    """Bytes alive while one sequence runs through a block without gradients."""
    return work.seq_len * (2 * b.inner * work.itemsize + b.hidden * (4 * work.itemsize + 8))


def _states(work: Work, b: _Block) -> int:
    """Bytes of one hidden state of every sequence."""
    return work.samples * work.seq_len * b.hidden * work.itemsize


def _passes(work: Work, blocks: list[_Block]) -> float:
    """Operations of one forward pass over the blocks."""
    return work.samples * work.seq_len * sum(b.flops for b in blocks)


def _consumer(work: Work, n: int, out: int, tokens: int) -> solves.Consumer:
    return solves.Consumer(n, tokens, work.processes, out=out, keep=1 - work.recipe.share)


def _logits(work: Work, copies: int) -> int:
    return copies * 4 * work.seq_len * work.layout.sizes["vocab"]


def _scoring(work: Work, blocks: list[_Block], end: int) -> list[Stage]:
    recipe, c = work.recipe, work.itemsize
    criterion = get_criterion(recipe.criterion or "")
    big = max(blocks, key=lambda b: b.entries)
    whole = work.stored * sum(b.entries for b in blocks)
    if measures(recipe, work.layout, work.axes) and not criterion.comparable:
        return []  # units are chosen in the walk
    score = 3 * 4 * big.largest
    if criterion.needs == "weights":
        return [Stage("scores", c * big.entries + score // 2, block=c * big.entries, read=whole)]
    tables = 2 * work.stored * end
    head = Stage("loss", c * end + _logits(work, 5), states=_states(work, big))
    embed = Stage("embed", c * end, states=_states(work, big))
    fixed, passes, solved = c * big.entries, 1.0, 0.0
    row, states, read = _forward(work, big), 2 * _states(work, big), whole + tables // 2
    if criterion.needs in ("gradients", "squared-gradients"):
        copies = 2 if criterion.needs == "squared-gradients" else 1
        fixed += copies * 4 * big.entries + max(score, 2 * 4 * big.largest)
        passes, read = 4.0, 2 * whole + tables
    if criterion.needs in ("second-moments", "second-moments-fisher"):
        fisher = criterion.needs == "second-moments-fisher"
        fixed += sum(4 * (n * n + (o * o if fisher else 0)) for n, o in big.consumers)
        n, o = max(big.consumers, default=(0, 0))
        fixed += int(8 * (4 * n * n + 3 * n * o))
        solved = sum(3.0 * n**3 + 2.0 * n * n * o for b in blocks for n, o in b.consumers)
        passes = 3.0 if fisher else 1.0
        read = 2 * whole + tables if fisher else read
    if criterion.needs in ("gradients", "squared-gradients", "second-moments-fisher"):
        row = work.seq_len * c * (4 * big.inner + 14 * big.hidden)
        states = (work.layout.num_layers + 2) * _states(work, big)
    if criterion.needs in ("removal", "runs"):
        most = work.layout.num_layers * (1 if criterion.needs == "runs" else len(work.axes))
        states = (most + 2) * _states(work, big)
    if criterion.needs == "rotation":  # a block in another basis beside it, in float64 while it is turned; the basis itself
        fixed += c * big.entries + 3 * 8 * big.largest + 8 * 6 * big.hidden**2
        solved = 25.0 * big.hidden**3
    if criterion.needs == "removal":  # a pass for each removal, in which half of the candidates travel on the average
        rounds = max(1, round(recipe.share * most))
        passes, read = rounds * (most + 2) / 2, rounds * (whole + tables)
    flops = passes * _passes(work, blocks)
    stage = Stage(criterion.name, fixed, row, states, c * big.entries, read, flops=flops, solves=solved)
    return [embed, stage, *([head] if passes > 1 else [])]


def _measuring(work: Work, blocks: list[_Block], end: int) -> list[Stage]:
    """Trial models of other sizes, side by side."""
    recipe = work.recipe
    if not measures(recipe, work.layout, work.axes):
        return []
    big = max(blocks, key=lambda b: b.entries)
    whole = work.stored * sum(b.entries for b in blocks) + 2 * work.stored * end
    if recipe.allocate == "search":
        models, rounds, share = 9, 2 * (recipe.search_steps or GENERATIONS[recipe.effort]) + 1, 0.4
    else:
        budget = Budget(work.layout, Amount(recipe.share, recipe.of), work.axes, experts_used=work.experts_used)
        models, rounds, share = len(uniform_shapes(budget)), 1, 0.35
    share_tokens = int(share * work.samples * work.seq_len)
    parts = [_consumer(work, n, o, share_tokens) for n, o in big.consumers]
    sums = sum(c.sums(0 if recipe.allocate != "search" else c.out) for c in parts)
    eliminated, cut = max((c.eliminated for c in parts), default=0), work.itemsize * big.entries
    fixed = work.itemsize * big.entries + sums + max(eliminated, cut)
    refitted = models * sum(c.weights for c in parts)
    if recipe.allocate == "search":
        fixed += min(KEPT, work.layout.num_layers * sums) + max((c.selected for c in parts), default=0)
    every = [_consumer(work, n, o, share_tokens) for b in blocks for n, o in b.consumers]
    solved = rounds * (models if recipe.allocate == "search" else 1) * sum(c.elimination_flops for c in every)
    return [
        Stage(
            "trials",
            fixed,
            _forward(work, big),
            int(share * (models + 2) * _states(work, big)) + refitted,
            work.itemsize * big.entries,
            rounds * whole,
            flops=rounds * share * (models + 1) * _passes(work, blocks),
            solves=solved,
        ),
        Stage("trials' logits", work.itemsize * end + _logits(work, 7), states=int(share * (models + 1) * _states(work, big))),
    ]


def _walk(work: Work, blocks: list[_Block], end: int) -> list[Stage]:
    """The dense and the pruned stream side by side, and the solves between them."""
    big = max(blocks, key=lambda b: b.entries)
    sequential = work.recipe.compensate == "sequential"
    tokens, keep = work.samples * work.seq_len, 1 - work.recipe.share
    parts = [_consumer(work, n, o, tokens) for n, o in big.consumers]
    moved = solves.Moved(big.hidden, tokens // 2, work.processes, entries=big.producer_entries)
    # The block, the refitted matrices that read the stream beside their dense ones, and refitted consumers.
    block, done = work.itemsize * big.entries, sum(c.weights for c in parts)
    held = block + (work.itemsize * big.producer_entries if sequential else 0) + done
    # What made the inputs of the consumers before runs cut.
    gathered = [c.gathered + int(keep * work.itemsize * sum(big.made[:k])) for k, c in enumerate(parts)]
    # Nothing dense is needed beside what was refitted once the last consumer has been passed.
    solving = [(block + done if k == len(parts) - 1 else held) - c.weights + c.peak for k, c in enumerate(parts)]
    if sequential:
        gathered.append(moved.gathered + int(keep * work.itemsize * sum(big.made[:-1])))
        solving.append(held + moved.peak)
    states = (5 + 2 * len(big.consumers) if sequential else 3 + len(big.consumers)) * _states(work, big)
    flops = solved = 0.0
    for b in blocks:
        for n, o in b.consumers:
            one = _consumer(work, n, o, tokens)
            flops, solved = flops + one.flops, solved + one.solves
        if sequential:
            every = solves.Moved(b.hidden, tokens // 2, work.processes, entries=b.producer_entries)
            flops, solved = flops + every.flops, solved + every.solves
    steps = 4.0 * (work.recipe.reconstruct or 0) * work.recipe.batch / max(1, work.samples)
    rows = _forward(work, big) * (2 if work.recipe.reconstruct else 1)
    return [
        Stage(
            "refit",
            held + max(gathered, default=0),
            rows,
            states,
            block,
            work.stored * (sum(b.entries for b in blocks) + end),
            flops=(3.5 + steps if sequential else 2.5) * _passes(work, blocks) + flops,
            solves=solved,
        ),
        Stage("refit: the solves", max(solving, default=0), states=states, block=block),
    ]


def _writing(work: Work, blocks: list[_Block], rest: int) -> Stage:
    big = max(blocks, key=lambda b: b.entries)
    keep = 1 - work.recipe.share
    whole = work.stored * (sum(b.entries for b in blocks) + rest)
    # Everything outside of the blocks is cut together; a block beside its cut copies, refitted ones come in fp32.
    fixed = max(
        work.stored * 2 * rest, int(work.stored * (1 + 2 * keep) * big.entries + (4 * keep * big.entries if work.refits else 0))
    )
    written = int(work.stored * (keep * sum(b.entries for b in blocks) + rest))
    # Written twice: a shard's header has to be known before its first tensor can stand in it.
    return Stage("write", fixed, read=whole, written=2 * written)
