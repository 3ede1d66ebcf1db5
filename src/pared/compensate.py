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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pared.calibration import Batch
from pared.errors import UsageError
from pared.estimate import Progress, silent
from pared.gaps import gap_behind, past_gap, skipped_in
from pared.plan import LayerPlan, Plan, layer_plan
from pared.spill import States
from pared.stream import Stream, unpadded
from pared.turned import TurnedStream
from pared.walk import Method, Walk


@dataclass(frozen=True)
class Reached:
    """How far a walk has come: the next layer of the source, and the two streams that enter it; pruned None: it is the dense one."""

    layer: int
    dense: States
    pruned: States | None


@dataclass(frozen=True)
class Refitted:
    """One block of the result: the units that it keeps, and the tensors that are not merely cut, by their local name.

    reached: where a walk that is to go on after this block begins.
    """

    layer: LayerPlan
    tensors: dict[str, Tensor]
    damping: dict[str, float | None]
    reached: Reached | None = None


def compensate(
    stream: Stream,
    plan: Plan,
    batches: Sequence[Batch],
    method: Method | None = None,
    *,
    progress: Progress = silent,
    reached: Reached | None = None,
) -> Iterator[Refitted]:
    """For each block of the result in turn, its weights refitted to the units that it keeps.

    reached: where to go on; the blocks before it are passed over.

    Layers and sublayers that the plan leaves out are passed over: what they did goes into the target of the consumer before
    them, what is left of it into those after. Layers in which and behind which nothing goes stay as they are. Where hidden
    channels go, `stream` is in the basis that their number counts from, and T the part of the dense stream that stays.
    """
    method = method or Method()
    if method.steps and method.mode == "refit":
        raise UsageError("reconstruction needs the pruned stream", where="--compensate refit", fix="--compensate sequential")
    if plan.hidden is not None and (method.mode not in ("none", "sequential") or not isinstance(stream, TurnedStream)):
        raise UsageError(
            "fewer hidden channels are made up for in a basis of their own, in the walk of both streams",
            where="--compensate",
            fix="--compensate none, or sequential with --criterion rotation or --narrow",
        )
    batches = unpadded(batches)
    x = stream.embed(batches)
    pruned: States | None = None  # the dense stream itself until something is cut
    if plan.hidden is not None:
        pruned = stream.pool.store(h[..., : plan.sizes(None, stream.layout)["hidden"]].clone() for h in x)
    if reached is not None:
        x, pruned = reached.dense, reached.pruned
    place = {layer.source: i for i, layer in enumerate(plan.layers)}
    kept = [plan.selection(place[i], stream.layout) if i in place else None for i in range(stream.num_layers)]
    for i in range(reached.layer if reached else 0, stream.num_layers):
        keep = kept[i]
        beyond: States | None = None
        if method.mode in ("refit", "sequential") and keep is not None and ({"mlp"} <= skipped_in(keep) or gap_behind(kept, i)):
            with stream.block(i) as block, torch.no_grad():
                after = stream.through(block, i, x, keep=True)
            beyond = past_gap(stream, kept, i, after)  # one block is resident at a time: this one comes back
        with stream.block(i) as block, torch.no_grad():
            walk = Walk(stream, i, block, keep, method, beyond)
            x, pruned = walk.through(x, pruned, last=i == stream.num_layers - 1)
        progress("refit", i + 1, stream.num_layers)
        if i in place:
            inside = {a: k for a, k in walk.keep.items() if a != "hidden"}
            layer = layer_plan(i, inside, stream.layout.sizes_at(i))
            tensors, damping = walk.tensors(), walk.damping
            del walk  # and with it the block's own weights, while the result is written
            yield Refitted(layer, tensors, damping, Reached(i + 1, x, pruned))
            del tensors
