"""Compensation: refitting what stays so that each pruned block does what the dense one did.

Two streams of hidden states walk through the blocks side by side: x through the dense model, x' through the pruned
one. In each block, for each consumer (o_proj, then down_proj) in the order in which they run:

    h, h'  what the matrices before the consumer (q, k, v; gate, up) are multiplied with on x and on x'
    W_in <- argmin E||W_in h - W_in' h'||^2 + ridge      their refit, where x' differs from x
    a'  the consumer's input on x', all channels still there, earlier consumers already cut and refitted
    T   the dense residual stream after this consumer: x plus the dense outputs so far
    s'  the pruned residual stream before it
    t = W a' + alpha (T - (s' + W a'))            the target: what the layer did, and a part of the drift so far
    S   the units that stay: given, or chosen now, by elimination on E[a' a'^T] and E[t a'^T]
    W' = argmin E||t - W' a'_S||^2 + ridge        exact least squares on the kept channels

alpha = 0 is the plain refit of the layer on the pruned stream. "refit" walks one stream: every block sees dense inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pared.axes import Nested, indices
from pared.blockparts import (
    Observed,
    bias_of,
    consumers_of,
    cut,
    input_axes,
    inputs_at,
    is_sum,
    matrices,
    observe,
    oriented,
    rebuilt,
    stored,
)
from pared.calibration import Batch
from pared.elimination import Elimination, choose_units
from pared.errors import UsageError
from pared.estimate import Progress, silent
from pared.leastsquares import DAMPING, Guarded, Moments2, Problem, refit, refit_guarded
from pared.plan import LayerPlan, Plan, kept_sizes, layer_plan
from pared.reconstruct import reconstruct
from pared.spill import States
from pared.stream import Stream, unpadded
from pared.structure import Layout

MODES = ("none", "bias", "refit", "sequential")
# One sequence in this many tells how far the fit to the others can be trusted.
HELD_OUT = 8


@dataclass(frozen=True)
class Method:
    """How what stays is refitted.

    mode: one of MODES. alpha: how much of the drift a consumer is to make up for. inputs: refit what runs before the
    consumers as well. reselect: axes, each of one consumer, whose units are chosen in the
    walk; the plan then says how many.
    fisher: (layer, consumer's local name) -> E[g g^T] of its output's gradient, which weighs the output's error where
    units are chosen. steps: of block reconstruction, after the refit. fit: how many of the batches, from the first on, are
    fitted to; None: all. guarded: held-out sequences choose the damping and can veto a refit.
    """

    mode: str = "sequential"
    alpha: float = 0.75
    inputs: bool = True
    reselect: frozenset[str] = frozenset()
    fisher: Mapping[tuple[int, str], Tensor] = field(default_factory=dict)
    steps: int = 0
    seed: int = 0
    fit: int | None = None
    guarded: bool = True


@dataclass(frozen=True)
class Refitted:
    """One block of the result: the units that it keeps, and the tensors that are not merely cut, by their local name."""

    layer: LayerPlan
    tensors: dict[str, Tensor]
    damping: dict[str, float | None]


def compensate(
    stream: Stream, plan: Plan, batches: Sequence[Batch], method: Method | None = None, *, progress: Progress = silent
) -> Iterator[Refitted]:
    """For each block of the result in turn, its weights refitted to the units that it keeps.

    Layers that the plan leaves out are passed over: their part of the drift goes into the targets of the layers after
    them. Layers in which the plan cuts nothing stay as they are. Hidden channels can not be cut at the same time.
    """
    method = method or Method()
    if method.steps and method.mode == "refit":
        raise UsageError("reconstruction needs the pruned stream", where="--compensate refit", fix="--compensate sequential")
    if plan.hidden is not None:
        raise UsageError("hidden channels and a refit can not be combined", where="--compensate", fix="--compensate none")
    batches = unpadded(batches)
    x = stream.embed(batches)
    pruned = x  # one and the same until something is cut
    place = {layer.source: i for i, layer in enumerate(plan.layers)}
    for i in range(stream.num_layers):
        with stream.block(i) as block, torch.no_grad():
            keep = plan.selection(place[i], stream.layout) if i in place else None
            walk = Walk(stream, i, block, keep, method)
            dense = walk.look(x)
            pruned = walk.follow(x, dense, pruned)
            x = dense.after
        progress("refit", i + 1, stream.num_layers)
        if i in place:
            yield Refitted(layer_plan(i, walk.keep, stream.layout.sizes_at(i)), walk.tensors(), walk.damping)


class Walk:
    """One block's walk: look at the dense stream, choose and refit, and follow with the pruned one. keep None: it goes."""

    def __init__(
        self, stream: Stream, i: int, block: nn.Module, keep: dict[str, Tensor | Nested] | None, method: Method
    ) -> None:
        self.stream, self.i, self.block, self.method = stream, i, block, method
        self.layout: Layout = stream.layout
        self.gone, self.keep = keep is None, keep or {}
        self.sizes = self.layout.sizes_at(i)
        self.weights = {n: p.detach() for n, p in block.named_parameters()}
        self.whole: dict[str, Tensor] = {}  # refitted, not yet cut
        self.changed: dict[str, Tensor] = {}  # refitted and cut
        self.damping: dict[str, float | None] = {}

    def tensors(self) -> dict[str, Tensor]:
        """What is not merely cut, in its final form."""
        return {**{n: self._cut(n, t) for n, t in self.whole.items()}, **self.changed}

    def look(self, x: States) -> Observed:
        """The dense stream through the block, and what will be asked of it."""
        if self.gone or not self.keep:
            return Observed(self.stream.through(self.block, self.i, x, keep=True))
        producers = self._producers() if self.method.mode == "sequential" and self.method.inputs else []
        return observe(self.stream, self.block, self.i, x, self._consumers(), producers)

    def follow(self, x: States, dense: Observed, pruned: States) -> States:
        """Choose, refit, and the pruned stream through what comes of it."""
        run, mode, after = self.stream.run, self.method.mode, dense.after
        if self.gone:
            return pruned  # the pruned stream passes it by
        if not self.keep:
            return after if pruned is x else self.stream.through(self.block, self.i, pruned, keep=True)
        additive = is_sum(dense, x[0])
        if mode == "refit":
            pruned = x
        targets, differs = x, pruned is not x
        for stage, name in enumerate(dense.order if mode != "none" else []):
            if additive:
                targets = self.stream.pool.store(t + y for t, y in zip(targets, dense.outputs[name], strict=True))
            if differs:
                for group in dense.before(name):
                    self._refit_inputs(group, dense, dense.order[:stage], pruned)
            shrinks = bool(self._axes(name) & self.keep.keys())
            if shrinks or (differs and mode == "sequential"):
                self._refit(name, dense.order[:stage], pruned, targets if additive else None, dense.outputs[name])
            differs = differs or shrinks
        if mode == "refit":
            return after
        moved = self._module(self.keep)
        if self.method.steps:
            moved = copy.deepcopy(moved)  # tensors that nothing cut are still the dense block's own
            reconstruct(
                moved,
                lambda m, h: run(m, self.i, h),
                pruned,
                after,
                steps=self.method.steps,
                seed=self.method.seed + self.i,
            )
            self.changed = {n: p.detach() for n, p in moved.named_parameters()}
        return self.stream.through(moved, self.i, pruned, keep=True)

    # ---- what there is in the block --------------------------------------------------------------------------------

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
        return self.weights.get(bias_of(name))

    def _weight(self, name: str) -> Tensor:
        return oriented(self.layout, self.i, name, self.weights[name])

    def _stored(self, name: str, w: Tensor) -> Tensor:
        return stored(self.layout, self._full(name), w, self.weights[name].dtype)

    # ---- the refits ------------------------------------------------------------------------------------------------

    def _moments(self, n: int, out: int) -> tuple[Moments2, Moments2]:
        device = next(iter(self.weights.values())).device
        return Moments2.zeros(n, out, device), Moments2.zeros(n, out, device)

    def _refit_inputs(self, group: list[str], dense: Observed, before: list[str], pruned: States) -> None:
        """Matrices that read the same input, so that on x' they give what they gave on x."""
        module = self._module(self._done(before))
        width = self._weight(group[0]).shape[1]
        fit, held = self._moments(width, width)
        seen = 0
        fitted = slice(self.method.fit)
        for h, hidden in zip(dense.inputs[group[0]][fitted], pruned[fitted], strict=True):
            now, _ = inputs_at(self.stream, module, self.i, group[0], [], hidden)
            seen = _split(fit, held, now, h, seen)
        dense.inputs[group[0]].clear()  # as large as the stream itself, and not needed again
        held = held if held.count else fit
        for name in group:
            w, bias = self._weight(name), self._bias(name)
            parts = (m.through(w, bias).problem(centred=bias is not None) for m in (fit, held, fit.plus(held)))
            new, shift, self.damping[name] = refit_guarded(Guarded(*parts), w, torch.arange(width))
            self.whole[name] = self._stored(name, new)
            if bias is not None:
                self.whole[bias_of(name)] = shift.to(bias)

    def _refit(self, name: str, before: list[str], pruned: States, targets: States | None, outputs: States) -> None:
        w, bias = self._weight(name), self._bias(name)
        module = self._module(self._done(before))
        fit, held = self._moments(w.shape[1], w.shape[0])
        seen = 0
        for b, hidden in enumerate(pruned[: self.method.fit]):
            a, residual = inputs_at(self.stream, module, self.i, name, before, hidden)
            seen = _split(fit, held, a, outputs[b] if targets is None else targets[b] - residual, seen)
        alpha = self.method.alpha if self.method.mode == "sequential" else 0.0

        def problem(moments: Moments2) -> Problem:
            return moments.problem(centred=bias is not None).mixed(w, bias, alpha)

        whole = problem(fit.plus(held))
        self._choose(name, whole, w)
        kept = self._kept_columns(name)
        if self.method.mode == "bias":
            if bias is None:
                raise UsageError(
                    f"{name} has no bias to put the correction in",
                    where="--compensate bias",
                    fix="--compensate refit or sequential",
                )
            self.changed[bias_of(name)] = whole.bias(w.double()[:, kept], kept).to(bias)
            return
        if self.method.guarded:
            parts = Guarded(problem(fit), problem(held if held.count else fit), whole)
            new, shift, self.damping[name] = refit_guarded(parts, w, kept)
        else:
            new, self.damping[name] = refit(whole, w, kept, DAMPING), DAMPING
            shift = whole.bias(new, kept)
        self.changed[name] = self._stored(name, new)
        if bias is not None:
            self.changed[bias_of(name)] = shift.to(bias)

    def _choose(self, name: str, problem: Problem, w: Tensor) -> None:
        """Choose anew which units of this consumer stay, as many as before."""
        axes = self._axes(name) & self.keep.keys() & self.method.reselect
        if not axes:
            return
        best = refit(problem, w, torch.arange(w.shape[1]), DAMPING)
        fisher = self.method.fisher.get((self.i, name))
        if fisher is not None:
            # E||g^T dy||^2 is the error of the output weighted by G = E[g g^T]; any factor of G will do.
            values, vectors = torch.linalg.eigh(fisher.double())
            best = (values.clamp(min=0).sqrt()[:, None] * vectors.T) @ best
        full = self._full(name)
        node = self.layout.tensors[full].dims[self.layout.consumers[full]]
        wanted = {a: n for a, n in kept_sizes(self.keep).items() if a in axes}
        self.keep.update(choose_units(Elimination(problem.c, best), node, self.sizes, self.layout.parents, wanted))

    def _kept_columns(self, name: str) -> Tensor:
        full = self._full(name)
        dim = self.layout.consumers[full]
        kept = indices(self.layout.tensors[full].dims[dim], self.sizes, self.keep, self.layout.shapes[full][dim])
        return torch.arange(self.layout.shapes[full][dim]) if kept is None else kept

    # ---- modules ---------------------------------------------------------------------------------------------------

    def _done(self, before: list[str]) -> dict[str, Tensor | Nested]:
        """The selection along the consumers that are cut already."""
        done = frozenset().union(*(self._axes(n) for n in before))
        return {a: k for a, k in self.keep.items() if a in done}

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        return cut(self.layout, self.i, name, tensor, self.keep)

    def _module(self, keep: dict[str, Tensor | Nested]) -> nn.Module:
        """The block with only `keep` applied, refitted tensors where there are some."""
        if not keep and not self.changed and not self.whole:
            return self.block
        return rebuilt(self.stream, self.block, self.i, keep, self.whole, self.changed)


def _split(fit: Moments2, held: Moments2, a: Tensor, t: Tensor, seen: int) -> int:
    """Add rows [b, s, n] and [b, s, out], every HELD_OUT-th to `held`. Returns how many have been seen."""
    for row in range(a.shape[0]):
        (held if seen % HELD_OUT == HELD_OUT - 1 else fit).add(a[row], t[row])
        seen += 1
    return seen
