"""Scoring: every structure's importance under one criterion, computed block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pared.axes import names as names_in
from pared.calibration import Batch
from pared.criteria import WHOLE, Criterion, Group, Moments, Routing, Stats
from pared.depth import Depth, search_removals, search_runs, without
from pared.distributed import total, total_of
from pared.errors import ModelError, UsageError
from pared.expertfit import removal_costs
from pared.gradients import WeightGradients, forward_with_loss, walk_back
from pared.journal import Journal
from pared.rotation import find_rotation
from pared.routing import Visits, expert_modules, watched
from pared.scores import Scores
from pared.scoring_steps import ScoringSteps
from pared.secondmoments import SecondMoments
from pared.spill import States
from pared.stream import Stream, Visit, nothing_around, observed, unpadded
from pared.structure import Layout, sublayer_of

Progress = Callable[[str, int, int], None]  # stage, done, total


def silent(stage: str, done: int, total: int) -> None:
    """The progress that shows nothing."""


def estimate(
    stream: Stream,
    criterion: Criterion,
    axes: Sequence[str],
    batches: Sequence[Batch],
    *,
    reduction: str = "sum",
    seed: int = 0,
    depth: Depth | None = None,
    progress: Progress = silent,
    journal: Journal | None = None,
) -> Scores:
    """Score every unit of the given axes in every layer.

    journal: where blocks that are done are noted, and from where they are gone on with.

    axes: names of axes, and "layer". Hidden channels are scored by what all blocks together hold of them.
    depth: how far a criterion that searches over removals has to go. batches may be empty for a criterion
    that needs the weights alone.
    """
    if criterion.axes is not None and (odd := [a for a in axes if a not in criterion.axes]):
        raise UsageError(
            f"the criterion {criterion.name!r} does not score {', '.join(odd)}",
            fix=f"it scores {', '.join(criterion.axes)}; pared ls criteria lists the others",
        )
    batches = unpadded(batches)
    if not batches and criterion.needs != "weights":
        raise UsageError(f"the criterion {criterion.name!r} needs calibration text of two tokens or more", where="calibration")
    scores = Scores(comparable=criterion.comparable)
    steps = ScoringSteps(journal, scores, stream)
    if steps.finished:
        return scores
    if criterion.needs == "rotation":
        scores.rotation = find_rotation(stream, batches, progress)
        energy = scores.rotation.energy.float()
        group = Group("hidden", ("hidden",), len(energy), None, {}, {}, {}, {})
        scores.of[None, "hidden"] = criterion.function(group, Stats(energy=energy))
        return scores
    if criterion.needs in ("removal", "runs"):
        far = depth or Depth()
        if criterion.needs == "removal":
            scores.of = search_removals(stream, criterion, axes, batches, far, progress, journal)
        else:
            scores.of = search_runs(stream, criterion, batches, far, progress)
        steps.finish()
        return scores

    def score(i: int, block: nn.Module, stats: Stats) -> None:
        stats.seed = seed
        for axis in axes:
            group = make_group(stream.layout, axis, i, dict(block.named_parameters()), reduction)
            if group is not None:
                value = criterion.function(group, stats).detach().float().cpu()
                if value.shape != (group.units,) or not torch.isfinite(value).all():
                    raise ModelError(f"the criterion {criterion.name!r} gave no finite score for {axis} in layer {i}")
                _put(scores, axis, i, value, stream.num_layers)

    stream.around = _visit_counter(stream.layout, scores)
    try:
        _run(stream, criterion, axes, batches, score, progress, steps, scores.power)
    finally:
        stream.around = nothing_around
    total(*(scores.visits[i] for i in sorted(scores.visits)))
    steps.finish()
    return scores


def _run(
    stream: Stream,
    criterion: Criterion,
    axes: Sequence[str],
    batches: Sequence[Batch],
    score: Callable[[int, nn.Module, Stats], None],
    progress: Progress,
    steps: ScoringSteps,
    power: dict[tuple[int, str], Tensor],
) -> None:
    """Gather what the criterion needs, block by block, and have each block scored."""
    if criterion.needs == "weights":
        for i in range(steps.first, stream.num_layers):
            with stream.block(i) as block, torch.no_grad():
                score(i, block, Stats())
            progress("scores", i + 1, stream.num_layers)
            steps.done(i, None)
    elif criterion.needs == "activations":
        stream.forward(batches, _activation_visitor(stream, axes, score, progress), start=steps.start, after=steps.done)
    elif criterion.needs == "routing":
        stream.forward(batches, _routing_visitor(stream, score, progress), start=steps.start, after=steps.done)
    elif criterion.needs == "second-moments":
        stream.forward(batches, _second_moment_visitor(stream, axes, score, progress), start=steps.start, after=steps.done)
    elif criterion.needs == "second-moments-fisher":
        _second_moments_with_fisher(stream, axes, batches, score, progress, steps, power)
    else:
        squared = criterion.needs == "squared-gradients"
        state = forward_with_loss(stream, batches, steps.back, steps.went)

        def visit(i: int, block: nn.Module, found: WeightGradients) -> None:
            score(i, block, Stats(gradients=found.first, squared=found.squared))
            progress("gradients", stream.num_layers - i, stream.num_layers)

        walk_back(stream, batches, state, visit, squared=squared, went=steps.went)


def _put(scores: Scores, axis: str, layer: int, value: Tensor, num_layers: int) -> None:
    if axis == "layer":
        scores.of.setdefault((None, "layer"), torch.zeros(num_layers))[layer] = value[0]
    elif axis == "hidden":
        scores.of[(None, "hidden")] = scores.of.get((None, "hidden"), torch.zeros_like(value)) + value
    else:
        scores.of[(layer, axis)] = value


def make_group(layout: Layout, axis: str, layer: int, weights: Mapping[str, Tensor], reduction: str = "sum") -> Group | None:
    """The structures of one axis in one block; None where the block has none. weights: by name inside the block."""
    sizes = layout.sizes_at(layer)
    axes = (layout.parents[axis], axis) if axis in layout.parents else (axis,)
    held, signatures, inputs = {}, {}, {}
    names = layout.block_tensors(layer)
    if axis in layout.sublayers:
        names = [n for n in names if n not in layout.remaining(names, {axis: 0})]
    for name in names:
        signature, local = layout.tensors[name], layout.local(name)
        if local not in weights or not (axis in WHOLE or set(axes) <= signature.axes):
            continue
        held[local], signatures[local] = weights[local], signature
        dim = layout.consumers.get(name)
        if dim is not None and any(axis in (a, sublayer_of(a)) for a in names_in(signature.dims[dim])):
            inputs[local] = dim
    if not held:
        return None
    units = 1
    for a in axes if axis not in WHOLE else ():
        units *= sizes[a]
    return Group(axis, axes, units, layer, held, signatures, sizes, inputs, reduction)


def _activation_visitor(
    stream: Stream, axes: Sequence[str], score: Callable[[int, nn.Module, Stats], None], progress: Progress
) -> Visit:
    def visit(i: int, block: nn.Module, hidden: States) -> States:
        weights = dict(block.named_parameters())
        watched: dict[str, Moments] = {}
        for axis in axes:
            group = make_group(stream.layout, axis, i, weights)
            for name, dim in (group.inputs if group else {}).items():
                w = weights[name]
                watched.setdefault(name, Moments.zeros(w.shape[dim], w.shape[0] if w.ndim == 3 else None, w.device))

        def observe(name: str, x: Tensor, expert: int | None) -> None:
            watched[name].add(x, expert)

        tokens, out = 0, stream.pool.store()
        cosine = {a: 0.0 for a in axes if a == "layer" or (a in WHOLE and stream.layout.sizes_at(i).get(a))}
        others = {a: without(stream, block, i, [a]) for a in cosine if a != "layer"}
        for h in hidden.drain():
            with observed(block, list(watched), observe):
                after = stream.run(block, i, h)
            for axis in cosine:
                other = stream.run(others[axis], i, h) if axis in others else h
                cosine[axis] += float(F.cosine_similarity(other.float(), after.float(), dim=-1).sum())
            tokens += h.shape[0] * h.shape[1]
            out.append(after)
        for moments in watched.values():
            total(moments.count, moments.total, moments.absolute, moments.square)
        every = total_of(tokens)
        score(i, block, Stats(moments=watched, cosine={a: total_of(c) / every for a, c in cosine.items()}))
        progress("activations", i + 1, stream.num_layers)
        return out

    return visit


def _routing_visitor(stream: Stream, score: Callable[[int, nn.Module, Stats], None], progress: Progress) -> Visit:
    def visit(i: int, block: nn.Module, hidden: States) -> States:
        found: list[Routing] = []

        def see(visits: Visits) -> None:
            if not found:
                found.append(Routing.zeros(stream.layout.sizes_at(i)["expert"]))
            norms = [visits.output(j).float().norm(dim=-1) for j in range(visits.index.shape[1])]
            found[0].add(visits.index, visits.gate, torch.stack(norms, 1))

        with watched(expert_modules(stream.layout, i, block), see):
            out = stream.through(block, i, hidden)
        if found:
            total(found[0].count, found[0].gated, found[0].output)
            found[0].tokens = int(total_of(found[0].tokens))
        score(i, block, Stats(routing=found[0] if found else None))
        progress("routing", i + 1, stream.num_layers)
        return out

    return visit


def _visit_counter(layout: Layout, scores: Scores) -> Callable[[int, nn.Module], contextlib.AbstractContextManager[None]]:
    """Counts the calibration tokens that each expert is sent, in the forward pass that every criterion makes."""

    def around(i: int, block: nn.Module) -> contextlib.AbstractContextManager[None]:
        def see(visits: Visits) -> None:
            n = layout.sizes_at(i)["expert"]
            counts = torch.bincount(visits.index.flatten().cpu(), minlength=n)
            scores.visits[i] = scores.visits.get(i, torch.zeros_like(counts)) + counts

        return watched(expert_modules(layout, i, block), see)

    return around


def consumers(stream: Stream, axes: Sequence[str], layer: int, block: nn.Module, *, ndim: int = 2) -> list[str]:
    """The matrices of a block (local names) whose input runs along one of the axes; experts' stacks are not among them."""
    weights = dict(block.named_parameters())
    found: dict[str, None] = {}
    for axis in axes:
        group = make_group(stream.layout, axis, layer, weights)
        found.update(dict.fromkeys(n for n in (group.inputs if group else {}) if weights[n].ndim == ndim))
    return list(found)


def expert_stacks(stream: Stream, axes: Sequence[str], layer: int, block: nn.Module) -> list[str]:
    """The stacks of matrices in a block (local names) whose input runs along one of the axes inside experts."""
    inside = [a for a in axes if stream.layout.parents.get(a) == "expert"]
    return consumers(stream, inside, layer, block, ndim=3)


def _second_moment_visitor(
    stream: Stream, axes: Sequence[str], score: Callable[[int, nn.Module, Stats], None], progress: Progress
) -> Visit:
    def visit(i: int, block: nn.Module, hidden: States) -> States:
        stacks = expert_stacks(stream, axes, i, block)
        costs = {name: removal_costs(stream, block, i, name, hidden) for name in stacks}
        moments = SecondMoments(block, consumers(stream, axes, i, block))
        with moments.observing:
            out = stream.through(block, i, hidden)
        score(i, block, Stats(second_moments=moments.means(), expert_costs=costs))
        progress("second moments", i + 1, stream.num_layers)
        return out

    return visit


def _second_moments_with_fisher(
    stream: Stream,
    axes: Sequence[str],
    batches: Sequence[Batch],
    score: Callable[[int, nn.Module, Stats], None],
    progress: Progress,
    steps: ScoringSteps,
    power: dict[tuple[int, str], Tensor],
) -> None:
    """Inputs' second moments and outputs' gradients of each consumer, both gathered on the walk back.

    power: what `Scores` has of that name.
    """
    state = forward_with_loss(stream, batches, steps.back, steps.went)
    found: dict[str, Tensor] = {}
    moments: list[SecondMoments] = []

    @contextlib.contextmanager
    def around(i: int, block: nn.Module) -> Iterator[None]:
        names = consumers(stream, axes, i, block)
        moments[:] = [SecondMoments(block, names)]
        found.clear()

        def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
            def seen(gradient: Tensor) -> None:
                g = gradient.reshape(-1, gradient.shape[-1]).float()
                if name not in found:
                    found[name] = g.new_zeros(g.shape[1], g.shape[1])
                found[name].addmm_(g.T, g, alpha=1 / state.tokens)

            return lambda module, inputs, output: output.register_hook(seen) and None

        handles = [block.get_submodule(n.rpartition(".")[0]).register_forward_hook(watch(n)) for n in names]
        try:
            with moments[0].observing:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def visit(i: int, block: nn.Module, _: WeightGradients) -> None:
        total(*(found[n] for n in moments[0].names))
        power.update({(i, n): found[n].diagonal().cpu().clone() for n in moments[0].names})
        score(i, block, Stats(second_moments=moments[0].means(), output_fisher=found))
        progress("second moments", stream.num_layers - i, stream.num_layers)

    walk_back(stream, batches, state, visit, weights=False, around=around, went=steps.went)
