"""Block reconstruction: after a block is cut and refitted, gradient descent on its own weights towards the dense block.

The loss is the distance of the pruned stream's next hidden state to the dense stream's, so what earlier blocks lost is
repaired as far as this block can. One block is resident; nothing is differentiated but it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# Step of Adam, as a share of each tensor's root mean square: 3e-3 on weights of size 0.1.
RELATIVE_RATE = 3e-2
CHECKS = 5


def reconstruct(
    block: nn.Module,
    run: Callable[[nn.Module, Tensor], Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    steps: int,
    seed: int,
    held_out: int = 8,
) -> tuple[float, float]:
    """Train `block` in place so that run(block, inputs[b]) comes near targets[b], each [rows, s, hidden].

    Every `held_out`-th batch is kept aside: the weights that do best on it stay, and those are the ones the block came
    with if no step helped. Returns the held-out error before and after, relative to the targets' mean square.
    """
    aside = [b for b in range(len(inputs)) if b % held_out == held_out - 1] or [len(inputs) - 1]
    used = [b for b in range(len(inputs)) if b not in aside] or aside
    parameters = [p for p in block.parameters() if p.is_floating_point()]
    rates = [RELATIVE_RATE * float(p.detach().float().square().mean().sqrt()) for p in parameters]
    groups = [{"params": [p], "lr": r, "rate": r} for p, r in zip(parameters, rates, strict=True) if r > 0]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)

    def error() -> float:
        with torch.no_grad():
            wrong = sum(float((run(block, inputs[b]) - targets[b]).float().square().sum()) for b in aside)
            return wrong / sum(float(targets[b].float().square().sum()) for b in aside)

    before = best = error()
    kept = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * (1 - step / steps)
        b = used[int(torch.randint(len(used), (1,), generator=generator))]
        with torch.enable_grad():
            loss = (run(block, inputs[b]) - targets[b]).float().square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, steps // CHECKS) == 0 or step == steps - 1:
            now = error()
            if now < best:  # not a number is never less
                best, kept = now, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
            p.requires_grad_(False)
    return before, best
