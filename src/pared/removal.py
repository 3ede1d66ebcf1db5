"""Scores of layers by what the model loses without them, measured anew after each removal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pared.calibration import Batch
from pared.criteria import Criterion, Group, Stats
from pared.distributed import total_of
from pared.gradients import next_token_loss
from pared.spill import States
from pared.stream import Stream


def search_removals(
    stream: Stream, criterion: Criterion, batches: Sequence[Batch], wanted: int, progress: Callable[[str, int, int], None]
) -> Tensor:
    """Remove the layer whose absence costs least, measure all again, and so on: the order becomes the score, fp32 [layers].

    One pass over the blocks for each removal: every candidate's hidden states travel side by side.
    """
    wanted = min(max(1, wanted), stream.num_layers - 1)
    entered = stream.embed(batches)
    gone: list[int] = []
    for done in range(wanted):
        losses = _losses_without(stream, batches, entered, gone)
        gone.append(min(losses, key=lambda k: losses[k]))
        progress("removals", done + 1, wanted)
    value = torch.zeros(stream.num_layers)
    for layer in range(stream.num_layers):
        # Losses of later rounds are those of smaller models, so layers that went keep their order, below all others.
        without = gone.index(layer) - wanted if layer in gone else losses[layer]
        group = Group("layer", ("layer",), 1, layer, {}, {}, {}, {})
        value[layer] = criterion.function(group, Stats(loss_without=without))[0]
    return value


def _losses_without(stream: Stream, batches: Sequence[Batch], entered: States, gone: list[int]) -> dict[int, float]:
    """Mean loss with each further layer left out."""
    paths: dict[int | None, States] = {None: entered}
    for i in range(stream.num_layers):
        if i in gone:
            continue
        before = paths[None]
        with stream.block(i) as block, torch.no_grad():
            paths = {k: stream.through(block, i, hidden, keep=True) for k, hidden in paths.items()}
        paths[i] = before
    tokens = total_of(sum(b.input_ids.shape[0] * (b.input_ids.shape[1] - 1) for b in batches))
    losses = {}
    with stream.outside(front=False), torch.no_grad():
        for candidate, hidden in paths.items():
            if candidate is not None:
                loss = sum(
                    float(next_token_loss(stream.logits(h), b.input_ids.to(h.device)))
                    for h, b in zip(hidden, batches, strict=True)
                )
                losses[candidate] = total_of(loss) / tokens
    return losses
