"""The stages of a run: what each takes, from the counts of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from pared import solves
from pared.blockcosts import Block, Work
from pared.budget import Amount, Budget
from pared.budget.levels import ROUGHLY
from pared.budget.narrow import OTHERS
from pared.budget.search import CHILDREN, MOST_WORTH, SHARES
from pared.budget.trials import FEW, KEPT, MOST_NEAR, split_rows
from pared.budget.uniform import Shape, uniform_shapes
from pared.criteria import get_criterion
from pared.effort import GENERATIONS, measures, narrows, refits_inputs
from pared.elimination import HELD_OUT
from pared.reconstruct import between_looks
from pared.unlikely import SCRAMBLED


@dataclass(frozen=True)
class Stage:
    """One pass over the model. Bytes, but for flops (multiplications and additions, of fp32 or less) and solves (fp64).

    fixed: alive at its worst moment whatever the batch. row: more for each sequence of a batch. states: hidden states of
    all sequences that are alive together. block: what reading the next block ahead would take. read: of the source.
    inverted: operations of factors and inverses, fp64 as well. touched: what elementwise work reads and writes.
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
    inverted: float = 0.0
    touched: float = 0.0


def _row(work: Work, b: Block) -> int:
    """Bytes alive while one sequence runs through a block without gradients."""
    return work.seq_len * b.forward(work.itemsize)


def _states(work: Work, b: Block) -> int:
    """Bytes of one hidden state of every sequence."""
    return work.tokens * b.hidden * work.itemsize


def _pass(work: Work, blocks: Sequence[Block]) -> float:
    """Operations of one forward pass over some blocks."""
    return work.tokens * sum(b.flops for b in blocks)


def _touched(work: Work, blocks: Sequence[Block]) -> float:
    """Bytes that its elementwise work reads and writes."""
    return float(work.itemsize * work.tokens * sum(b.touched for b in blocks))


def _whole(work: Work, blocks: Sequence[Block]) -> int:
    """Bytes of the blocks on disk."""
    return work.stored * sum(b.entries for b in blocks)


def _consumer(work: Work, n: int, out: int, units: int, tokens: int) -> solves.Consumer:
    return solves.Consumer(n, tokens, work.processes, out=out, keep=1 - work.recipe.share, units=units)


def _logits(work: Work, copies: int) -> int:
    return copies * 4 * work.seq_len * work.layout.sizes["vocab"]


def _head(work: Work, tokens: float) -> float:
    """Operations of the logits of some tokens."""
    return 2.0 * tokens * work.layout.sizes["hidden"] * work.layout.sizes["vocab"]


def _costing(b: Block) -> int:
    """Bytes while second-order costs of the units of a block's largest consumer are computed."""
    n, out, _ = max(b.consumers, default=(0, 0, 0))
    return 8 * (4 * n * n + 3 * n * out)


def _costs(blocks: Sequence[Block]) -> float:
    """Operations of the second-order costs of all consumers, float64."""
    return sum(3.0 * n**3 + 2.0 * n * n * out for b in blocks for n, out, _ in b.consumers)


def scoring(work: Work, blocks: list[Block], end: int) -> list[Stage]:
    recipe, c = work.recipe, work.itemsize
    criterion = get_criterion(recipe.criterion or "")
    big = max(blocks, key=lambda b: b.entries)
    whole, block, table = _whole(work, blocks), c * big.entries, work.stored * end
    if measures(recipe, work.layout, work.axes) and not criterion.comparable:
        return []  # units are chosen in the walk
    # A product with the weights and what is made of it; where these are no fp32 a copy of them as well.
    score = (2 if c == 4 else 3) * 4 * big.largest
    entries = float(sum(b.entries for b in blocks))
    if criterion.needs == "weights":
        return [Stage("scores", block + score, block=block, read=whole, touched=16 * entries)]
    layers, states = work.layout.num_layers, _states(work, big)
    embed = Stage("embed", c * end, states=states, read=table)
    row, flops, touched = _row(work, big), _pass(work, blocks), _touched(work, blocks)
    if criterion.needs in ("gradients", "squared-gradients", "second-moments-fisher"):
        return [embed, *_backward(work, blocks, end, score)]
    fixed, read, solved, held = block, whole, 0.0, 2 * states
    if criterion.needs == "second-moments":
        fixed += sum(4 * n * n for n, _, _ in big.consumers) + _costing(big)
        solved = _costs(blocks)
    if criterion.needs in ("removal", "runs"):
        most = layers * (1 if criterion.needs == "runs" else len(work.axes))
        held = (most + 2) * states
    if criterion.needs == "rotation":
        return [embed, _rotation(work, blocks)]
    if criterion.needs == "removal":  # a pass for each removal, in which half of the candidates travel on the average
        rounds = max(1, round(recipe.share * most))
        passes = rounds * (most + 2) / 2
        flops, touched, read = passes * flops, passes * touched, rounds * (whole + 2 * table)
        return [
            embed,
            Stage(criterion.name, fixed, row, held, block, read, flops=flops, touched=touched),
            Stage("loss", c * end + _logits(work, 5), states=states),
        ]
    return [embed, Stage(criterion.name, fixed, row, held, block, read, flops=flops, solves=solved, touched=touched)]


def _rotation(work: Work, blocks: list[Block], name: str = "rotation", part: float = 1.0) -> Stage:
    """The basis of the residual stream, from a part of the tokens."""
    big = max(blocks, key=lambda b: b.entries)
    block = work.itemsize * big.entries
    return Stage(
        name,
        2 * block + 3 * 8 * big.largest + 8 * 6 * big.hidden**2,
        _row(work, big),
        int(2 * part * _states(work, big)),
        block,
        _whole(work, blocks),
        flops=part * (_pass(work, blocks) + work.tokens * sum(4.0 * b.hidden**2 for b in blocks)),
        solves=25.0 * big.hidden**3,
        touched=part * _touched(work, blocks),
    )


def _turning(work: Work, big: Block) -> Stage:
    """A block beside itself in another basis, one matrix after the other in float64."""
    return Stage("turning", 2 * work.itemsize * big.entries + 3 * 8 * big.largest, states=5 * _states(work, big))


def _backward(work: Work, blocks: list[Block], end: int, score: int) -> list[Stage]:
    """The pass forth, the loss, and the walk back."""
    recipe, c = work.recipe, work.itemsize
    needs = get_criterion(recipe.criterion or "").needs
    big = max(blocks, key=lambda b: b.entries)
    whole, block, entries = _whole(work, blocks), c * big.entries, sum(b.entries for b in blocks)
    held = (work.layout.num_layers + 1) * _states(work, big)
    flops, touched = _pass(work, blocks), _touched(work, blocks)
    batches = work.samples / min(recipe.batch, work.samples)
    # Computed once more, but for the last matrix of each block; gradients of what runs through, and of the weights.
    spared = work.tokens * sum(2.0 * b.consumers[-1][0] * b.consumers[-1][1] for b in blocks if b.consumers)
    if needs == "second-moments-fisher":
        found = sum(4 * (n * n + o * o) for n, o, _ in big.consumers)
        score = _costing(big)
        back, moved = 2 * flops - spared, 0.0
        back += work.tokens * sum(2.0 * (n * n + o * o) for b in blocks for n, o, _ in b.consumers)
        solved = _costs(blocks)
    else:
        copies = 2 if needs == "squared-gradients" else 1
        found = copies * 4 * big.entries
        each = work.samples if copies == 2 else batches
        # The gradient of one matrix before it is added to those of the batches before, and where it is no fp32 a copy.
        found += (c + (0 if c == 4 and copies == 1 else 4)) * big.largest
        back, solved, moved = 3 * flops - spared, 0.0, 4.0 * entries * (copies * 5 * each + 4)
        score = max(0, score - c * big.largest)
    return [
        Stage("pass forth", block, _row(work, big), held, block, whole, flops=flops, touched=touched),
        Stage(
            "loss",
            c * end + _logits(work, 5),
            states=held,
            read=work.stored * end,
            flops=2 * _head(work, work.tokens),
            touched=10.0 * 4 * work.tokens * work.layout.sizes["vocab"],
        ),
        Stage(
            "walk back",
            block + found,
            work.seq_len * big.backward(c),
            held,
            block,
            whole,
            flops=back,
            solves=solved,
            touched=3 * touched + moved,
        ),
        Stage("scores", block + found + score, states=held, block=block),
    ]


def measuring(work: Work, blocks: list[Block], end: int) -> list[Stage]:
    """Trial models of other sizes, side by side."""
    recipe = work.recipe
    if work.samples < 1 or not measures(recipe, work.layout, work.axes):
        return []  # that there are no samples is refused where they are drawn
    big = max(blocks, key=lambda b: b.entries)
    split = split_rows(work.samples)
    compared = split.compared + split.compared // SCRAMBLED
    narrow, found, name = narrows(recipe, work.layout, work.axes), [], "trials"
    if recipe.allocate == "search":
        rounds = 2 * (recipe.search_steps or GENERATIONS[recipe.effort]) + 1
        models, judged = CHILDREN + 1, split.many + split.many // SCRAMBLED
        # The children and their parent on a few sequences; then the best and two more on all, which take as much or less.
        run = max(split.few + SHARES[0] * judged, (split.few + judged) * (MOST_WORTH + 1) / (models + 1))
        gone = {n: models * (1 - recipe.share) for n, _, _ in big.consumers}
        found = _trials(work, blocks, end, "trials", models, split.few, run, gone, rounds=rounds, walked=True)
        if not narrow:
            return found
        name = "uniform trials"
    budget = Budget(work.layout, Amount(recipe.share, recipe.of), work.axes, experts_used=work.experts_used)
    shapes, widths = uniform_shapes(budget, brief=split.brief), [n for n, _, _ in big.consumers]
    found += _trials(work, blocks, end, name, len(shapes), split.measured, compared, _gone(budget, shapes, widths))
    near = min(len(shapes), MOST_NEAR)
    if split.again and near > 1:  # at most: where shapes come near each other
        gone = {n: near * (1 - recipe.share) for n in widths}
        found += _trials(work, blocks, end, "near trials", near, split.again, split.again + compared, gone, walked=True)
    if narrow:
        found += [_rotation(work, blocks, "trial rotation", split.again / work.samples), _turning(work, big)]
        for name, models in (("narrow trials", 2), ("narrower trials", len(OTHERS))):  # the second where the first gained
            gone = {n: models * (1 - recipe.share) for n in widths}
            run = split.again + compared
            found += _trials(work, blocks, end, name, models, split.again, run, gone, walked=True)
        found.append(_rotation(work, blocks))
    return found


def _trials(
    work: Work,
    blocks: list[Block],
    end: int,
    name: str,
    models: int,
    seen: int,
    run: float,
    gone: dict[int, float],
    *,
    rounds: int = 1,
    walked: bool = False,
) -> list[Stage]:
    """So many models beside the dense one, measured on some sequences and run on others. walked: as the walk refits."""
    recipe = work.recipe
    big = max(blocks, key=lambda b: b.entries)
    whole = _whole(work, blocks) + 2 * work.stored * end
    block, one = work.itemsize * big.entries, _states(work, big) / work.samples
    tokens = seen * work.seq_len
    parts = [_consumer(work, *c, tokens) for c in big.consumers]
    sums = sum(c.sums(c.out if walked else 0) for c in parts)
    eliminated = max((c.eliminated * (1 if k == len(parts) - 1 else 2) for k, c in enumerate(parts)), default=0)
    cut = int((1 - recipe.share) * work.itemsize * big.producer_entries)
    fixed = block + sums + max(eliminated, cut)
    refitted = models * sum(c.weights for c in parts)
    if walked:
        fixed += min(KEPT, work.layout.num_layers * sums) if rounds > 1 else 0
        fixed += max((c.selected for c in parts), default=0)
    every = [_consumer(work, *c, tokens) for b in blocks for c in b.consumers]
    passes = rounds * (seen + (models * (1 - recipe.share) + 1) * run) / work.samples
    return [
        Stage(
            name,
            fixed,
            _row(work, big),
            int(2 * (seen + (models + 1) * run) * one) + refitted,
            block,
            rounds * whole,
            flops=passes * _pass(work, blocks) + rounds * sum(c.moving(gone.get(c.n, 0.2)) for c in every),
            solves=rounds * sum(c.elimination(gone.get(c.n, 0.2), ROUGHLY) for c in every),
            inverted=rounds * sum(c.inverted for c in every),
            touched=passes * _touched(work, blocks) + rounds * sum(c.touched(gone.get(c.n, 0.2), ROUGHLY) for c in every),
        ),
        Stage(
            f"{name}' logits",
            work.itemsize * end + 7 * 4 * min(FEW, work.seq_len) * work.layout.sizes["vocab"],
            states=int((models + 1) * run * one),
            flops=rounds * (models + 1) * _head(work, run * work.seq_len),
            touched=rounds * (models + 1) * 8.0 * 4 * run * work.seq_len * work.layout.sizes["vocab"],
        ),
    ]


def _gone(budget: Budget, shapes: Sequence[Shape], widths: Sequence[int]) -> dict[int, float]:
    """By the width of a consumer's input: which share of it goes in all trial models together.

    FFN channels go once for all of them, as far as any needs; heads anew for each.
    """
    full = budget.full()
    ffn = max((1 - s.sizes.get(a, full[a]) / full[a] for s in shapes for a in budget.width_axes if a in full), default=0.0)
    heads = sum(1 - prod(s.sizes.get(a, full[a]) / full[a] for a in ("kv", "query") if a in full) for s in shapes)
    return {n: ffn if n == max(widths) else heads for n in widths}


def _moved_on(b: Block, keep: float, *, first: bool, last: bool) -> float:
    """Operations for a token of the pruned stream's way through a block: up to its consumers, where it is not the dense
    one still, and cut from the last of the parts on, where something follows."""
    products = [2.0 * n * o for n, o, _ in b.consumers]
    up_to = 0.0 if first else b.flops - sum(products)
    behind = 0.0 if last or not products else 2.0 * b.made[-1] + products[-1]
    return up_to + keep * (sum(products[:-1]) + behind)


def walk(work: Work, blocks: list[Block], end: int) -> list[Stage]:
    """The dense and the pruned stream side by side, and the solves between them."""
    big = max(blocks, key=lambda b: b.entries)
    sequential = work.recipe.compensate == "sequential"
    moves = sequential and refits_inputs(work.recipe)
    keep, c = 1 - work.recipe.share, work.itemsize
    together = work.recipe.step_of if work.recipe.reconstruct else 0
    parts = [_consumer(work, *p, work.tokens) for p in big.consumers]
    moved = solves.Moved(big.hidden, work.tokens // 2, work.processes, entries=big.producer_entries)
    # The block, the refitted matrices that read the stream beside their dense ones, and refitted consumers.
    block, done = c * big.entries, sum(p.weights for p in parts)
    held = block + (c * big.producer_entries if moves else 0) + done
    # What made the inputs of the consumers before runs cut.
    gathered = [p.gathered + int(keep * c * sum(big.made[:k])) for k, p in enumerate(parts)]
    # Nothing dense is needed beside what was refitted once the last consumer has been passed.
    solving = [(block + done if k == len(parts) - 1 else held) - p.weights + p.peak for k, p in enumerate(parts)]
    if moves:
        gathered.append(moved.gathered + int(keep * c * sum(big.made[:-1])))
        solving.append(held + moved.peak)
    states = (5 + 2 * len(big.consumers) if sequential else 3 + len(big.consumers)) * _states(work, big)
    flops = solved = inverted = touched = 0.0
    for i, b in enumerate(blocks):
        own = [_consumer(work, *p, work.tokens) for p in b.consumers]
        flops += sum(p.flops for p in own) + work.tokens * _moved_on(b, keep, first=i == 0, last=i == len(blocks) - 1)
        solved, inverted = solved + sum(p.solves for p in own), inverted + sum(p.inverted for p in own)
        touched += sum(p.touched(1 - keep, solves.ROUNDS) for p in own)
        if moves:
            share = 1.0 if i else b.made[-1] / max(1, b.producer_entries) if b.made else 0.0
            every = solves.Moved(b.hidden, work.tokens // 2, work.processes, entries=b.producer_entries)
            flops, solved = flops + share * every.flops, solved + share * every.solves
            touched += 4.0 * 4 * b.producer_entries
        touched += 4.0 * c * b.entries  # cut, for what runs next and to be written
    passes = 2.5 if sequential else 1.0
    found = [
        Stage(
            "refit",
            held + max(gathered, default=0) + together * _row(work, big),
            0 if together else _row(work, big),
            states,
            block,
            _whole(work, blocks) + work.stored * end,
            flops=_pass(work, blocks) + flops,
            solves=solved,
            inverted=inverted,
            touched=passes * _touched(work, blocks) + touched,
        ),
        Stage("refit: the solves", max(solving, default=0), states=states, block=block),
    ]
    if work.recipe.criterion == "rotation":
        found.append(_turning(work, big))
    return [*found, _reconstruction(work, blocks, states)] if work.recipe.reconstruct else found


def _reconstruction(work: Work, blocks: list[Block], states: int) -> Stage:
    """Gradient descent on cut blocks, a copy of which is kept, beside the dense one."""
    recipe, c = work.recipe, work.itemsize
    big = max(blocks, key=lambda b: b.entries)
    steps, rows, keep = recipe.reconstruct or 0, recipe.step_of, 1 - recipe.share
    looks = 1 + -(-steps // between_looks(steps, work.samples // (HELD_OUT * rows)))
    passes = keep * (3 * steps * rows + looks * work.samples / HELD_OUT) / max(1, work.samples)
    return Stage(
        "reconstruction",
        c * big.entries + int(5 * keep * c * big.entries) + rows * work.seq_len * big.backward(c),
        states=states,
        block=c * big.entries,
        flops=passes * _pass(work, blocks),
        touched=passes * _touched(work, blocks) + 8.0 * c * steps * keep * sum(b.entries for b in blocks),
    )


def writing(work: Work, blocks: list[Block], rest: int) -> Stage:
    big = max(blocks, key=lambda b: b.entries)
    keep = 1 - work.recipe.share
    whole = _whole(work, blocks) + work.stored * rest
    # Everything outside of the blocks is cut together; a block beside its cut copies, refitted ones come in fp32.
    fixed = max(
        work.stored * 2 * rest, int(work.stored * (1 + 2 * keep) * big.entries + (4 * keep * big.entries if work.refits else 0))
    )
    written = int(keep * _whole(work, blocks) + work.stored * rest)
    # Written twice: a shard's header has to be known before its first tensor can stand in it.
    return Stage("write", fixed, read=whole, written=2 * written, touched=3.0 * whole)
