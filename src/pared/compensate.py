"""Compensation: refitting what stays so that each pruned block does what the dense one did.

Two streams of hidden states walk through the blocks side by side: x through the dense model, x' through the pruned
one. In each block, for each consumer (o_proj, then down_proj) in the order in which they run:

    a'  the consumer's input on x', all channels still there, earlier consumers already cut and refitted
    T   the dense residual stream after this consumer: x plus the dense outputs so far
    s'  the pruned residual stream before it
    t = W a' + alpha (T - (s' + W a'))            the target: what the layer did, and a part of the drift so far
    W' = argmin E||t - W' a'_S||^2 + ridge        exact least squares on the kept channels S

alpha = 0 is the plain refit of the layer on the pruned stream. "refit" walks one stream: every block sees dense inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pared.axes import Selection, indices, take
from pared.calibration import Batch
from pared.errors import UsageError
from pared.estimate import Progress, consumers, silent
from pared.leastsquares import Moments2, refit_guarded
from pared.plan import Plan
from pared.reconstruct import reconstruct
from pared.stream import Stream, unpadded
from pared.structure import Layout
from pared.surgery import rebuilt

MODES = ("none", "bias", "refit", "sequential")
ALPHA = 0.75
# One sequence in this many tells how far the fit to the others can be trusted.
HELD_OUT = 8


@dataclass(frozen=True)
class Refitted:
    """What compensation changed in one block of the result: cut tensors by their name inside the block."""

    tensors: dict[str, Tensor]
    damping: dict[str, float | None]


class _Enough(Exception):
    """Raised inside a block's forward pass once the input that was wanted has been seen."""


def compensate(
    stream: Stream,
    plan: Plan,
    batches: Sequence[Batch],
    *,
    mode: str = "sequential",
    alpha: float = ALPHA,
    steps: int = 0,
    seed: int = 0,
    progress: Progress = silent,
) -> Iterator[Refitted]:
    """For each block of the result in turn, the consumers' weights refitted to the plan's kept units.

    Layers that the plan leaves out are passed over: their part of the drift goes into the
    targets of the layers after them. steps: of block reconstruction, after the refit. Hidden channels can not be cut at the same time.
    """
    if steps and mode == "refit":
        raise UsageError("reconstruction needs the pruned stream", where="--compensate refit", fix="--compensate sequential")
    if plan.hidden is not None:
        raise UsageError("hidden channels and a refit can not be combined", where="--compensate", fix="--compensate none")
    batches = unpadded(batches)
    x = stream.embed(batches)
    pruned = list(x)
    place = {layer.source: i for i, layer in enumerate(plan.layers)}
    for i in range(stream.num_layers):
        with stream.block(i) as block, torch.no_grad():
            walk = _Block(stream, plan, i, place.get(i), block, mode, alpha, steps, seed)
            x, pruned = walk.advance(x, pruned)
        progress("refit", i + 1, stream.num_layers)
        if i in place:
            yield Refitted(walk.changed, walk.damping)


class _Block:
    """One block's walk: collect, refit, move both streams on."""

    def __init__(
        self,
        stream: Stream,
        plan: Plan,
        source: int,
        place: int | None,
        block: nn.Module,
        mode: str,
        alpha: float,
        steps: int,
        seed: int,
    ) -> None:
        self.stream, self.i, self.block = stream, source, block
        self.layout: Layout = stream.layout
        self.mode, self.alpha, self.place, self.steps, self.seed = mode, alpha, place, steps, seed
        self.keep = plan.selection(place, self.layout) if place is not None else {}
        self.sizes = self.layout.sizes_at(source)
        self.weights = {n: p.detach() for n, p in block.named_parameters()}
        self.changed: dict[str, Tensor] = {}
        self.damping: dict[str, float | None] = {}

    def advance(self, x: list[Tensor], pruned: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        names = consumers(self.stream, [a for a in self.keep], self.i, self.block)
        after, outputs, order = self._dense(x, names)
        if self.place is None:
            return after, pruned  # a layer that goes: the pruned stream passes it by
        additive = self._additive(x, after, outputs, order)
        if self.mode == "refit":
            pruned = x
        targets = x
        for stage, name in enumerate(order if self.mode != "none" else []):
            if additive:
                targets = [t + y for t, y in zip(targets, outputs[name], strict=True)]
            self._refit(name, order[:stage], pruned, targets if additive else None, outputs[name])
        if self.mode == "refit":
            return after, after
        moved = self._module(self.keep)
        if self.steps:
            moved = copy.deepcopy(moved)  # tensors that nothing cut are still the dense block's own
            reconstruct(
                moved, lambda m, h: self.stream.run(m, self.i, h), pruned, after, steps=self.steps, seed=self.seed + self.i
            )
            self.changed = {n: p.detach() for n, p in moved.named_parameters()}
        return after, [self.stream.run(moved, self.i, h) for h in pruned]

    # ---- the dense stream ------------------------------------------------------------------------------------------

    def _dense(self, x: list[Tensor], names: list[str]) -> tuple[list[Tensor], dict[str, list[Tensor]], list[str]]:
        """Dense outputs of the block and of each consumer, and the order in which the consumers ran."""
        outputs: dict[str, list[Tensor]] = {}
        handles = [_owner(self.block, n).register_forward_hook(_collect(outputs.setdefault(n, []))) for n in names]
        order: list[str] = []
        handles += [_owner(self.block, n).register_forward_pre_hook(lambda m, a, n=n: order.append(n)) for n in names]
        try:
            after = [self.stream.run(self.block, self.i, h) for h in x]
        finally:
            for handle in handles:
                handle.remove()
        # MLPs beside experts see tokens of all sequences in one row.
        rows = {n: [y.reshape(*h.shape[:2], -1) for y, h in zip(ys, x, strict=True)] for n, ys in outputs.items()}
        return after, rows, list(dict.fromkeys(order))

    def _additive(self, x: list[Tensor], after: list[Tensor], outputs: dict[str, list[Tensor]], order: list[str]) -> bool:
        """Whether the block's output is its input plus the consumers' outputs: then the drift has a place in the target."""
        total = x[0] + sum((outputs[n][0] for n in order), torch.zeros_like(x[0]))
        return bool(order) and bool(((total - after[0]).norm() <= 1e-2 * (after[0] - x[0]).norm()).item())

    # ---- the pruned stream -----------------------------------------------------------------------------------------

    def _refit(
        self, name: str, before: list[str], pruned: list[Tensor], targets: list[Tensor] | None, outputs: list[Tensor]
    ) -> None:
        full = f"{self.layout.prefix}.{self.i}.{name}"
        dim = self.layout.consumers[full]
        w = self.weights[name] if dim == 1 else self.weights[name].T
        bias_name = name.rpartition(".")[0] + ".bias"
        bias = self.weights.get(bias_name)
        axes = self.layout.tensors[full].axes
        done = {a for n in before for a in self.layout.tensors[f"{self.layout.prefix}.{self.i}.{n}"].axes}
        module = self._module({a: k for a, k in self.keep.items() if a in done and a not in axes})
        device = pruned[0].device
        fit, held = (Moments2.zeros(w.shape[1], w.shape[0], device) for _ in range(2))
        seen = 0
        for b, hidden in enumerate(pruned):
            a, residual = self._inputs(module, name, before, hidden)
            local = a @ w.T if bias is None else a @ w.T + bias
            if targets is not None and self.mode == "sequential":
                t = local + self.alpha * (targets[b] - (residual + local))
            elif self.mode == "sequential":
                t = local + self.alpha * (outputs[b] - local)
            else:
                t = local
            for row in range(a.shape[0]):
                (held if seen % HELD_OUT == HELD_OUT - 1 else fit).add(a[row], t[row])
                seen += 1
        kept = self._kept_columns(full, dim)
        if self.mode == "bias":
            if bias is None:
                raise UsageError(
                    f"{name} has no bias to put the correction in",
                    where="--compensate bias",
                    fix="--compensate refit or sequential",
                )
            problem = fit.plus(held).problem(centred=True)
            new = w.double()[:, kept]
            self.changed[bias_name] = problem.bias(new, kept).to(bias)
            return
        if held.count == 0:
            held = fit
        new, shift, self.damping[name] = refit_guarded(fit, held, w, kept, centred=bias is not None)
        self.changed[name] = (new if dim == 1 else new.T).to(w.dtype).contiguous()
        if bias is not None:
            self.changed[bias_name] = shift.to(bias)

    def _inputs(self, module: nn.Module, name: str, before: list[str], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The consumer's input [b, s, n] and the residual stream that enters its sum [b, s, hidden]."""
        seen: list[Tensor] = []
        outputs: dict[str, list[Tensor]] = {}

        def stop(m: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _Enough

        handles = [_owner(module, n).register_forward_hook(_collect(outputs.setdefault(n, []))) for n in before]
        handles.append(_owner(module, name).register_forward_pre_hook(stop))
        try:
            self.stream.run(module, self.i, hidden)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        residual = hidden
        for n in before:
            residual = residual + outputs[n][0].reshape(hidden.shape)
        return seen[0].reshape(*hidden.shape[:2], -1), residual

    def _kept_columns(self, full: str, dim: int) -> Tensor:
        kept = indices(self.layout.tensors[full].dims[dim], self.sizes, self.keep, self.layout.shapes[full][dim])
        return torch.arange(self.layout.shapes[full][dim]) if kept is None else kept

    def _module(self, keep: Selection) -> nn.Module:
        """The block with only `keep` applied, refitted tensors where there are some."""
        if not keep and not self.changed:
            return self.block
        tensors = {}
        for name, tensor in self.block.state_dict().items():
            signature = self.layout.tensors[f"{self.layout.prefix}.{self.i}.{name}"]
            value = self.changed.get(name)
            tensors[name] = take(tensor, signature, self.sizes, keep) if value is None else value
        return rebuilt(self.block, self.stream.model, self.layout, self.i, keep, tensors)


def _owner(block: nn.Module, name: str) -> nn.Module:
    return block.get_submodule(name.rpartition(".")[0])


def _collect(into: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        into.append(output)

    return hook
