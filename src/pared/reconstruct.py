"""Block reconstruction: after a block is cut and refitted, gradient descent on its own weights towards the dense block.

The loss is the distance of the pruned stream's next hidden state to the dense stream's, so what earlier blocks lost is
repaired as far as this block can. It is taken relative to each token's own size, as everything that reads the stream
normalises it first; without that, a few tokens of great size would be all that counts. Where the power of the loss's
gradient in each channel was measured, channels count by it. One block is resident; nothing is differentiated but it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pared.distributed import Share, total_by_name, total_of
from pared.elimination import HELD_OUT

# Step of Adam on batches of so many sequences, as a share of each tensor's root mean square: 3e-3 on weights of size 0.1. On
# others it goes with the root of their number.
RELATIVE_RATE, SEQUENCES = 3e-2, 8
# Held-out batches are looked at so many times, but no more often than after four times as many steps.
CHECKS, APART = 5, 4
# What channels count for apart from the power of their gradient, as a share.
ALIKE = 0.1


def reconstruct(
    block: nn.Module,
    run: Callable[[nn.Module, Tensor], Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    steps: int,
    seed: int,
    sequences: int = SEQUENCES,
    held_out: int = HELD_OUT,
    power: Tensor | None = None,
    share: Share | None = None,
) -> tuple[float, float]:
    """Train `block` in place so that run(block, inputs[b]) comes near targets[b], each [rows, s, hidden].

    Every `held_out`-th batch is kept aside: the weights that do best on it stay, and those are the ones the block came
    with if no step helped. sequences: in a batch of all processes. power: the mean square of the loss's gradient at the block's output, [hidden]; channels are weighted
    by it. share: what of all batches is here, where several processes have a part of each; a step then
    takes the gradient over the rows of all of them. Returns the held-out error before and after: the
    mean over tokens of the squared distance, so weighted, relative to the target's mean square.
    """
    count = len(inputs) if share is None else share.batches
    place = {number: b for b, number in enumerate(range(count) if share is None else share.parts)}
    aside = [b for b in range(count) if b % held_out == held_out - 1] or [count - 1]
    used = [b for b in range(count) if b not in aside] or aside
    parameters = [p for p in block.parameters() if p.is_floating_point()]
    rate = RELATIVE_RATE * math.sqrt(sequences / SEQUENCES)
    rates = [rate * float(p.detach().float().square().mean().sqrt()) for p in parameters]
    groups = [{"params": [p], "lr": r, "rate": r} for p, r in zip(parameters, rates, strict=True) if r > 0]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)  # in one go: a third of the time on single sequences
    generator = torch.Generator().manual_seed(seed)
    weight = None if power is None else _weights(power).to(parameters[0].device)

    def loss_on(number: int) -> Tensor:
        """Of a batch's rows here, weighted by what they are of all."""
        b = place[number]
        wrong = (run(block, inputs[b]) - targets[b]).float().square()
        wrong = wrong.mean(-1) if weight is None else wrong @ weight / len(weight)
        loss = (wrong / targets[b].float().square().mean(-1).clamp(min=1e-12)).mean()
        return loss if share is None else loss * share.parts[number]

    def error() -> float:
        with torch.no_grad():
            here = sum(float(loss_on(b)) for b in aside if b in place)
        return (here if share is None else total_of(here)) / len(aside)

    every = between_looks(steps, len(aside))
    before = best = error()
    kept = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    order: list[int] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * (1 + math.cos(math.pi * step / steps)) / 2
        order = order or torch.randperm(len(used), generator=generator).tolist()
        number = used[order.pop()]
        if number in place:
            with torch.enable_grad():
                loss_on(number).backward()
        if share is not None:
            _sum_gradients(parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % every == 0 or step == steps - 1:
            now = error()
            if now < best:  # not a number is never less
                best, kept = now, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
            p.requires_grad_(False)
    return before, best


def between_looks(steps: int, aside: int) -> int:
    """Steps from one look at so many held-out batches to the next."""
    return max(1, steps // CHECKS, APART * aside)


def _weights(power: Tensor) -> Tensor:
    """What channels count for, with a mean of one."""
    power = power.float().clamp(min=0)
    return (1 - ALIKE) * power / power.mean().clamp(min=torch.finfo(torch.float32).tiny) + ALIKE


def _sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Over the processes; a tensor that has none in any keeps none."""
    found = {str(k): p.grad.float() for k, p in enumerate(parameters) if p.grad is not None}
    total_by_name(found, {str(k): p for k, p in enumerate(parameters)})
    for k, p in enumerate(parameters):
        p.grad = found[str(k)].to(p.dtype) if str(k) in found else None
