"""The refit of experts, and which of their channels stay: each one's matrix back into the residual stream, to the tokens that are sent to it.

For one expert y = W a over its tokens, C = E[a a^T] on the pruned stream: W' = argmin E||W a - W' a_S||^2 + ridge, as for
any consumer. What the router makes of the outputs is left as it is, so the drift has no place in the target. Second-order
selection uses the same second moments, each expert's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pared.axes import Name, Nested, Selection, names, take, units
from pared.distributed import once, total_of
from pared.elimination import HELD_OUT, Elimination, choose_units, elimination_costs
from pared.leastsquares import refit_guarded
from pared.moments import Moments2
from pared.spill import States
from pared.stream import Stream, observed
from pared.structure import Layout

# Bytes of second moments that are held at once; the experts of a block go in as many passes as that takes.
ROOM = 1 << 30


def stacks_of(layout: Layout, i: int, keep: Selection) -> dict[str, str]:
    """The stacks of matrices in block i (local names) whose input is cut inside experts, and the axis along it."""
    found: dict[str, str] = {}
    for full in layout.block_tensors(i):
        dims, at = layout.tensors[full].dims, layout.consumers.get(full)
        if at is not None and len(dims) == 3 and dims[0] == Name("expert"):
            found |= {layout.local(full): a for a in names(dims[at]) if isinstance(keep.get(a), Nested)}
    return found


def refit_experts(
    stream: Stream,
    module: nn.Module,
    i: int,
    name: str,
    axis: str,
    entered: States,
    w: Tensor,
    keep: Selection,
    *,
    choose: bool = False,
) -> tuple[Tensor, Nested]:
    """The stack `name` of block i, refitted and cut, and the channels that each expert keeps. w: what it is in the dense
    block, [experts, .., ..].

    module: the block with every channel of its experts still there, the experts that stay and all else as it will be.
    entered: what enters it. choose: each expert's channels are chosen anew, as many as before, by what the best refit to its
    own tokens leaves without them. Experts that too few tokens are sent to keep their weights, and the channels in `keep`.
    """
    layout, sizes = stream.layout, stream.layout.sizes_at(i)
    full = f"{layout.prefix}.{i}.{name}"
    signature, at, nested = layout.tensors[full], layout.consumers[full], keep[axis]
    assert isinstance(nested, Nested)
    staying = {"expert": units(keep, "expert", sizes)}
    whole = _oriented(take(w, signature, sizes, staying), at)
    new: list[Tensor] = []
    index: list[Tensor] = []
    for e, fit, held in sums_of_experts(stream, module, i, name, whole, entered):
        kept = nested.index[e].to(whole.device)
        if choose and fit.count:
            state = Elimination.from_sums(fit, whole[e], centred=False, scale=fit.scale(centred=False), own=True)
            wanted = {axis: len(kept)}
            found = once(lambda s=state, n=wanted: choose_units(s, signature.dims[at], sizes, {}, n))[axis]  # type: ignore[misc]
            assert isinstance(found, Tensor)
            kept = found.to(whole.device)
        new.append(_refit(fit, held, whole[e], kept))
        index.append(kept.cpu())
    stacked = _oriented(torch.stack(new), at)
    return stacked.to(w.dtype).contiguous(), Nested(nested.parent, torch.stack(index))


def removal_costs(stream: Stream, block: nn.Module, i: int, name: str, entered: States) -> Tensor:
    """What removing each channel of each expert costs at the expert's output after the best refit, with down-dating.

    name: of a stack of matrices in block i. Returns float64 [experts, n], by the mean over all tokens, so that experts count
    by the tokens sent to them. Of experts that no token is sent to, channels with the least weights are the cheapest, and all
    are cheaper than those of others.
    """
    full = f"{stream.layout.prefix}.{i}.{name}"
    whole = _oriented(block.get_parameter(name).detach(), stream.layout.consumers[full])
    tokens = total_of(sum(h.shape[0] * h.shape[1] for h in entered.like()))
    out: list[Tensor] = []
    for e, fit, held in sums_of_experts(stream, block, i, name, whole, entered):
        sums = fit.plus(held)
        if not sums.count:
            power = whole[e].double().square().sum(0).cpu()
            out.append(power / power.max().clamp(min=1e-300) * torch.finfo(torch.float32).tiny)
            continue
        state = Elimination.from_sums(sums, whole[e], centred=False, scale=sums.scale(centred=False), own=True)
        out.append(elimination_costs(state, torch.arange(whole.shape[2])[:, None]) * (sums.count / tokens))
    return torch.stack(out)


def sums_of_experts(
    stream: Stream, module: nn.Module, i: int, name: str, whole: Tensor, entered: States
) -> Iterator[tuple[int, Moments2, Moments2]]:
    """For each expert in turn the sums over the tokens sent to it: those to fit to, and those to judge by.

    whole: the stack, [experts, out, n]. module is run over what enters it in as many passes as `ROOM` takes.
    """
    experts, out, n = whole.shape
    at_once = max(1, ROOM // (2 * 4 * n * n))
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
            yield e, fit, held
        sums.clear()


def _oriented(stack: Tensor, at: int) -> Tensor:
    """A stack as [experts, out, in], or the reverse. at: the dimension of its input."""
    return stack if at == 2 else stack.transpose(1, 2)


def _refit(fit: Moments2, held: Moments2, w: Tensor, kept: Tensor) -> Tensor:
    """One expert: W' [out, kept] from W [out, n]."""
    if not held.count:
        return w[:, kept].double()
    scale = fit.scale(centred=False)
    fit, held = (m.of_output(w).at(kept) for m in (fit, held))
    return refit_guarded(fit, held, w[:, kept], centred=False, scale=scale)[0]
