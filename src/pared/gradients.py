"""Gradients block by block: forward once storing each block's input, then walk back, recomputing one block at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pared.blockparts import consumers_of, is_sum, observe
from pared.calibration import Batch
from pared.distributed import total_by_name, total_of
from pared.errors import ModelError
from pared.spill import States
from pared.stream import Stream


class Backward:
    """A pass forth, which stores the inputs of every block, and back, from the gradient that reaches the last one.

    inputs: of each block, where they are at hand; those of the others that are still wanted come from `read`.
    gradients: at what leaves the last of the blocks that are `left`, of the loss summed over tokens (the mean's would
    underflow in half precision), None before the way back. forward: how many blocks ran. loss: its mean, over `tokens`
    of all processes. last: for each block, its last matrix (local name) if that one's output is only added to what leaves
    the block.
    """

    def __init__(self, layers: int, read: Callable[[int], States] | None = None) -> None:
        self.inputs: dict[int, States] = {}
        self.gradients: States | None = None
        self.forward, self.left = 0, layers
        self.loss, self.tokens = 0.0, 0
        self.last: list[str | None] = []
        self._read = read

    def waiting(self) -> range:
        """Blocks whose inputs are still wanted, and are known: on the way forth the next one's are what enters it."""
        return range(min(self.forward + 1, self.left) if self.gradients is None else self.left)

    def take(self, i: int) -> States:
        """Inputs of a block, which are given up."""
        found = self.inputs.pop(i, None)
        if found is None:
            if self._read is None:
                raise LookupError(f"the inputs of block {i} were given up")
            found = self._read(i)
        return found

    def record(self) -> dict[str, Any]:
        """All but the tensors."""
        return {n: getattr(self, n) for n in ("forward", "left", "loss", "tokens", "last")}

    def restore(self, record: dict[str, Any], gradients: States | None) -> None:
        """The reverse of `record`."""
        for name, value in record.items():
            setattr(self, name, value)
        self.gradients = gradients


Went = Callable[[Backward, str], None]


def nowhere(state: Backward, step: str) -> None:
    """Notes nothing."""


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Summed cross-entropy of each next token: logits [b, s, vocab], ids [b, s]."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def forward_with_loss(
    stream: Stream, batches: Sequence[Batch], state: Backward | None = None, went: Went = nowhere
) -> Backward:
    """Forward over all batches; the loss is the mean over every predicted token of every batch.

    state: how far an earlier one had come. went: is told of each block, and of the loss.
    """
    state = state or Backward(stream.num_layers)
    if state.gradients is not None:
        stream.embed(batches)  # it shows what the blocks are called with
        return state

    def visit(i: int, block: nn.Module, hidden: States) -> States:
        state.inputs[i] = hidden
        names = consumers_of(stream.layout, i, dict(block.named_parameters()))
        first = observe(stream, block, i, hidden[:1], list(names), [])
        state.last.append(first.order[-1] if is_sum(first, hidden[0]) else None)
        return first.after + stream.through(block, i, hidden[1:], keep=True)

    def after(i: int, hidden: States) -> None:
        state.forward = i + 1
        if state.forward < stream.num_layers:
            state.inputs[state.forward] = hidden
            went(state, "inputs of a block")

    k = state.forward
    last = stream.forward(batches, visit, start=(k, state.take(k)) if k else None, after=after)
    state.tokens = int(total_of(sum(b.input_ids.shape[0] * (b.input_ids.shape[1] - 1) for b in batches)))
    gradients, total = stream.pool.store(), 0.0
    with stream.outside(front=False):
        for hidden, batch in zip(last.drain(), batches, strict=True):
            rows = []
            # One sequence at a time: the logits of a large vocabulary are the largest tensor of all.
            for row, ids in zip(hidden.split(1), batch.input_ids.to(hidden.device).split(1), strict=True):
                leaf = row.detach().requires_grad_(True)
                with torch.enable_grad():
                    loss = next_token_loss(stream.logits(leaf), ids)
                (grad,) = torch.autograd.grad(loss, leaf)
                rows.append(grad)
                total += float(loss.detach())
            gradients.append(torch.cat(rows))
    total = total_of(total)
    if not math.isfinite(total):
        raise ModelError(
            "the loss on the calibration text is not finite", fix="check the weights with pared verify, or try --dtype float32"
        )
    state.gradients, state.loss = gradients, total / state.tokens
    went(state, "loss")
    return state


@dataclass
class WeightGradients:
    """Of one block, by local tensor name, fp32: the gradient of the mean loss and, if asked for, the mean over
    sequences of the squared gradient of each sequence's mean loss."""

    first: dict[str, Tensor] = field(default_factory=dict)
    squared: dict[str, Tensor] = field(default_factory=dict)


def walk_back(
    stream: Stream,
    batches: Sequence[Batch],
    state: Backward,
    visit: Callable[[int, nn.Module, WeightGradients], None],
    *,
    weights: bool = True,
    squared: bool = False,
    around: Callable[[int, nn.Module], contextlib.AbstractContextManager[object]] | None = None,
    went: Went = nowhere,
) -> None:
    """From the last block that is left to the first: recompute it, send the gradient through it, show its weight gradients.

    squared wants one backward pass for each sequence. weights: False sends the gradient through without computing any
    for the weights. around: a context in which a block runs forward and backward, to hang hooks in. went: is told of each
    block.
    """
    sequences = int(total_of(sum(b.input_ids.shape[0] for b in batches)))
    gradients = state.gradients
    assert gradients is not None
    for i in reversed(range(state.left)):
        inputs = state.take(i)
        with stream.block(i) as block:
            parameters = {n: p for n, p in block.named_parameters() if weights and p.is_floating_point()}
            found = WeightGradients()
            with (
                _differentiated(parameters.values()),
                _without_value(block, state.last[i]),
                around(i, block) if around else contextlib.nullcontext(),
            ):
                for b, hidden in enumerate(inputs.drain()):
                    gradients[b] = _through_block(
                        stream, block, i, hidden, gradients[b], state.tokens, parameters, found, squared, sequences
                    )
            total_by_name(found.first, parameters)
            if squared:
                total_by_name(found.squared, parameters)
            with torch.no_grad():
                visit(i, block, found)
        state.left = i
        if i:
            went(state, "scores of a block")


@contextlib.contextmanager
def _differentiated(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Parameters take gradients, and have none yet; what a live model has there already is not of this loss."""
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
            p.grad = None
        yield
    finally:
        for p, flag, grad in before:
            p.grad = grad
            p.requires_grad_(flag)


class _LinearWithoutValue(torch.autograd.Function):
    """y = x W^T with its exact gradients, and zeros in place of y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        at_x = gradient @ weight if ctx.needs_input_grad[0] else None
        at_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return at_x, at_weight


@contextlib.contextmanager
def _without_value(block: nn.Module, name: str | None) -> Iterator[None]:
    """Spare the product of a block's last matrix (local name) while only gradients are wanted: they do not depend on it."""
    module = block.get_submodule(name.rpartition(".")[0]) if name else None
    if type(module) is not nn.Linear:
        yield
        return

    def forward(x: Tensor) -> Tensor:
        y: Tensor = _LinearWithoutValue.apply(x, module.weight)
        return y if module.bias is None else y + module.bias

    module.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del module.forward


def _through_block(
    stream: Stream,
    block: nn.Module,
    i: int,
    hidden: Tensor,
    gradient: Tensor,
    tokens: int,
    parameters: dict[str, nn.Parameter],
    found: WeightGradients,
    squared: bool,
    sequences: int,
) -> Tensor:
    """The gradient at a block's input from that at its output, for one batch; weight gradients are added to `found`."""
    parts = hidden.split(1) if squared else (hidden,)
    grads = gradient.split(1) if squared else (gradient,)
    through = []
    names = {p: n for n, p in parameters.items()}
    for part, upstream in zip(parts, grads, strict=True):
        leaf = part.detach().requires_grad_(True)
        own = part.shape[0] * (part.shape[1] - 1)

        def take(p: nn.Parameter, own: int = own) -> None:
            # Each gradient is added up and let go as soon as it is there: together they are as large as the block.
            g, p.grad = p.grad, None
            assert g is not None
            if squared:
                _accumulate(found.squared, names[p], (g.float() / own).square_().div_(sequences))
            _accumulate(found.first, names[p], g.float().div_(tokens))

        handles = [p.register_post_accumulate_grad_hook(take) for p in parameters.values()]
        try:
            with torch.enable_grad():
                out = stream.run(block, i, leaf)
                torch.autograd.backward(out, upstream, inputs=[leaf, *parameters.values()])
        finally:
            for handle in handles:
                handle.remove()
        assert leaf.grad is not None
        through.append(leaf.grad)
    return torch.cat(through)


def _accumulate(store: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in store:
        store[name].add_(value)
    else:
        store[name] = value
