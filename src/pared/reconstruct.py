"""Block reconstruction: after a block is cut and refitted, gradient descent on its own weights towards the dense block.

The loss is the distance of the pruned stream's next hidden state to the dense stream's, so what earlier blocks lost is
repaired as far as this block can. It is taken relative to each token's own size, as everything that reads the stream
normalises it first; without that, a few tokens of great size would be all that counts. One block is resident; nothing is
differentiated but it.
"""

from __future__ import annotations

import math
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
    with if no step helped. Returns the held-out error before and after: the
    mean over tokens of the squared distance relative to the target's mean square.
    """
    aside = [b for b in range(len(inputs)) if b % held_out == held_out - 1] or [len(inputs) - 1]
    used = [b for b in range(len(inputs)) if b not in aside] or aside
    parameters = [p for p in block.parameters() if p.is_floating_point()]
    rates = [RELATIVE_RATE * float(p.detach().float().square().mean().sqrt()) for p in parameters]
    groups = [{"params": [p], "lr": r, "rate": r} for p, r in zip(parameters, rates, strict=True) if r > 0]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)

    def loss_on(b: int) -> Tensor:
        wrong = (run(block, inputs[b]) - targets[b]).float().square().mean(-1)
        return (wrong / targets[b].float().square().mean(-1).clamp(min=1e-12)).mean()

    def error() -> float:
        with torch.no_grad():
            return sum(float(loss_on(b)) for b in aside) / len(aside)

    before = best = error()
    kept = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    order: list[int] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * (1 + math.cos(math.pi * step / steps)) / 2
        order = order or torch.randperm(len(used), generator=generator).tolist()
        with torch.enable_grad():
            loss_on(used[order.pop()]).backward()
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
