"""The refit of experts: each one's matrix back into the residual stream, to the tokens that are sent to it.

For one expert y = W a over its tokens, C = E[a a^T] on the pruned stream: W' = argmin E||W a - W' a_S||^2 + ridge, as for
any consumer. What the router makes of the outputs is left as it is, so the drift has no place in the target.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pared.axes import Name, Nested, Selection, names, take, units
from pared.leastsquares import refit_guarded
from pared.moments import Moments2
from pared.spill import States
from pared.stream import Stream, observed
from pared.structure import Layout

# Bytes of second moments that are held at once; the experts of a block go in as many passes as that takes.
ROOM = 1 << 30
# One of an expert's tokens in this many tells how far the fit to the others can be trusted.
HELD_OUT = 8


def stacks_of(layout: Layout, i: int, keep: Selection) -> dict[str, str]:
    """The stacks of matrices in block i (local names) whose input is cut inside experts, and the axis along it."""
    found: dict[str, str] = {}
    for full in layout.block_tensors(i):
        dims, at = layout.tensors[full].dims, layout.consumers.get(full)
        if at is not None and len(dims) == 3 and dims[0] == Name("expert"):
            found |= {layout.local(full): a for a in names(dims[at]) if isinstance(keep.get(a), Nested)}
    return found


def refit_experts(
    stream: Stream, module: nn.Module, i: int, name: str, axis: str, entered: States, w: Tensor, keep: Selection
) -> Tensor:
    """The stack `name` of block i, refitted and cut. w: what it is in the dense block, [experts, .., ..].

    module: the block with every channel of its experts still there, the experts that stay and all else as it will be.
    entered: what enters it. Experts that too few tokens are sent to keep their weights.
    """
    layout, sizes = stream.layout, stream.layout.sizes_at(i)
    full = f"{layout.prefix}.{i}.{name}"
    signature, at, nested = layout.tensors[full], layout.consumers[full], keep[axis]
    assert isinstance(nested, Nested)
    staying = {"expert": units(keep, "expert", sizes)}
    whole = take(w, signature, sizes, staying)
    whole = whole if at == 2 else whole.transpose(1, 2)
    experts, out, n = whole.shape
    at_once = max(1, ROOM // (2 * 4 * n * n))
    new: list[Tensor] = []
    for first in range(0, experts, at_once):
        sums = [[Moments2.zeros(n, out, whole.device) for _ in range(2)] for _ in range(min(at_once, experts - first))]

        def add(_: str, a: Tensor, expert: int | None, first: int = first, sums: list[list[Moments2]] = sums) -> None:
            if expert is not None and 0 <= expert - first < len(sums):
                fit, held = sums[expert - first]
                judged = torch.arange(len(a), device=a.device) % HELD_OUT == HELD_OUT - 1
                fit.add_inputs(a[~judged])
                held.add_inputs(a[judged])

        with observed(module, [name], add):
            for hidden in entered:
                stream.run(module, i, hidden)
        for e, (fit, held) in enumerate(sums, first):
            fit.total()
            held.total()
            new.append(_refit(fit, held, whole[e], nested.index[e].to(whole.device)))
    stacked = torch.stack(new)
    return (stacked if at == 2 else stacked.transpose(1, 2)).to(w.dtype).contiguous()


def _refit(fit: Moments2, held: Moments2, w: Tensor, kept: Tensor) -> Tensor:
    """One expert: W' [out, kept] from W [out, n]."""
    if not held.count:
        return w[:, kept].double()
    scale = fit.scale(centred=False)
    fit, held = (m.of_output(w).at(kept) for m in (fit, held))
    return refit_guarded(fit, held, w[:, kept], centred=False, scale=scale)[0]
