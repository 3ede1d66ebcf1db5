"""Gaps: what a plan leaves out behind a block, and the dense stream past it, which the block before is refitted to bridge.

The linear repair of a removed part is T = argmin E||M T + R - X||, with M what the consumer before it writes, R the rest of
the residual stream and X the dense stream past the gap, folded into the consumer as W T. The walk that refits solves for
the consumer itself towards X - R, of which those are a part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pared.axes import Nested
from pared.blockparts import consumers_of, input_axes, is_sum, observe
from pared.plan import kept_sizes
from pared.spill import States
from pared.stream import Stream
from pared.structure import SUBLAYERS, Layout, sublayer_of

Kept = dict[str, Tensor | Nested]


def skipped_in(keep: Kept) -> frozenset[str]:
    """The sublayers of which a selection leaves nothing."""
    return frozenset(a for a, n in kept_sizes(keep).items() if a in SUBLAYERS and n == 0)


def goes(layout: Layout, layer: int, consumer: str, skipped: frozenset[str]) -> bool:
    """Whether a consumer (local name) goes with its sublayer."""
    return any(sublayer_of(a) in skipped for a in input_axes(layout, layer, consumer))


def gap_behind(kept: Sequence[Kept | None], i: int) -> bool:
    """Whether a layer, or a sublayer of the next one, goes right behind layer i. kept: by layer; None: the layer goes."""
    after = kept[i + 1] if i + 1 < len(kept) else {}
    return after is None or bool(skipped_in(after))


@torch.no_grad()
def past_gap(stream: Stream, kept: Sequence[Kept | None], i: int, x: States) -> States:
    """The dense stream, x behind layer i, after the layers and the leading sublayers behind it that go."""
    for j in range(i + 1, stream.num_layers):
        keep = kept[j]
        if keep is None:
            with stream.block(j) as block:
                x = stream.through(block, j, x, keep=True)
            continue
        if skipped := skipped_in(keep):
            with stream.block(j) as block:
                weights = dict(block.named_parameters())
                seen = observe(stream, block, j, x, list(consumers_of(stream.layout, j, weights)), [])
            if is_sum(seen, x[0]):
                gone = [n for n in seen.order if goes(stream.layout, j, n, skipped)]
                for name in [n for n, first in zip(gone, seen.order, strict=False) if n == first]:
                    x = stream.pool.store(t + y for t, y in zip(x, seen.outputs[name], strict=True))
        break
    return x
