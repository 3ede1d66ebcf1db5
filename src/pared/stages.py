"""A block in stages: what runs up to each of its consumers, from the residual stream that enters that part alone.

Most blocks add one sublayer after the other to the residual stream. There the stream after the first is all that the
second needs, and a block can be walked stage by stage, each part of it run once; blocks of which this is not true
(sublayers side by side, norms after them) are run from their start every time. Which of the two a block is, is seen
by trying it on one sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pared.blockparts import Observed, bias_of, is_sum, observe, oriented, owner
from pared.spill import States
from pared.stream import Stream


class _Enough(Exception):
    """Raised inside a block's forward pass once what was wanted has been seen."""


@dataclass(frozen=True)
class Stages:
    """order: the consumers (local names), as they run; one stage each. groups: (stage, producers that read one tensor).

    apart: whether each stage runs from the residual stream that enters it. adds: whether the consumers' outputs are added
    to that stream, so that the drift has a place in their targets. rest: whether something runs after the last consumer
    that does not need it, as a stage of its own. passed: for each stage, the block's children that have run before it,
    with what they give.
    """

    order: list[str]
    groups: list[tuple[int, list[str]]]
    apart: bool
    adds: bool
    rest: bool
    passed: list[dict[str, Any]]

    def producers(self, stage: int) -> list[list[str]]:
        """Those that run in a stage, by what they read."""
        return [group for at, group in self.groups if at == stage]


@dataclass(frozen=True)
class Seen:
    """One consumer at work. a: its input [b, s, n], None where it was not kept; residual [b, s, hidden]: the stream
    before its output is added.

    y: its output; after: what leaves the block; None where the run ended before.
    """

    a: Tensor | None
    residual: Tensor
    y: Tensor | None = None
    after: Tensor | None = None


def stages_of(
    stream: Stream, block: nn.Module, i: int, hidden: Tensor, consumers: Sequence[str], producers: Sequence[str]
) -> Stages:
    """Take block i apart on one sequence, hidden [1, s, hidden]."""
    children = {n.partition(".")[0] for n in consumers}
    given: dict[str, Any] = {}
    inputs: dict[str, Tensor] = {}
    handles = [block.get_submodule(c).register_forward_hook(lambda m, a, out, c=c: given.__setitem__(c, out)) for c in children]
    for n in consumers:
        handles.append(owner(block, n).register_forward_pre_hook(lambda m, a, n=n: inputs.__setitem__(n, a[0])))
    try:
        seen = observe(stream, block, i, stream.pool.store([hidden]), consumers, producers)
    finally:
        for handle in handles:
            handle.remove()
    order = seen.order
    adds = is_sum(seen, hidden)
    passed = [
        {c: _nothing(given[c]) for c in dict.fromkeys(n.partition(".")[0] for n in order[:k])} for k in range(len(order) + 1)
    ]
    one = Stages(order, seen.groups, True, True, False, passed)

    def holds(stage: int) -> bool:
        return _runs_from(stream, block, i, one, stage, seen, hidden)

    products = all(_multiplies(stream, block, i, n, inputs[n], seen.outputs[n][0]) for n in order)
    apart = products and all(holds(k) for k in range(1, len(order)))
    rest = apart and not adds and bool(order) and holds(len(order))
    return Stages(order, seen.groups, apart, adds or (apart and len(order) > 1) or rest, rest, passed)


def _runs_from(stream: Stream, block: nn.Module, i: int, stages: Stages, stage: int, seen: Observed, hidden: Tensor) -> bool:
    """Whether a block gives what it gives from the stream that enters a stage, what ran before it passed by."""
    children = [n.partition(".")[0] for n in stages.order]
    if set(children[:stage]) & set(children[stage:]) or any(v is None for v in stages.passed[stage].values()):
        return False
    entered = sum((seen.outputs[n][0] for n in stages.order[:stage]), hidden)
    with passing(block, stages.passed[stage], entered):
        after = stream.run(block, i, entered)
    return bool(((after - seen.after[0]).norm() <= 1e-3 * (seen.after[0] - hidden).norm()).item())


def _multiplies(stream: Stream, block: nn.Module, i: int, name: str, a: Tensor, y: Tensor) -> bool:
    """Whether a consumer gives W a (+ b) and nothing else."""
    weights = dict(block.named_parameters())
    own = F.linear(a, oriented(stream.layout, i, name, weights[name]), weights.get(bias_of(name)))
    return own.numel() == y.numel() and bool(((own.reshape(y.shape) - y).norm() <= 1e-3 * y.norm()).item())


def _nothing(given: Any) -> Any:
    """What a child gives, as a pattern: where its hidden states stand. None where there is none to be seen."""
    if isinstance(given, Tensor):
        return given[:1, :1]
    if isinstance(given, tuple) and given and isinstance(given[0], Tensor):
        return (given[0][:1, :1], *(None for _ in given[1:]))
    return None


class _Passed(nn.Module):
    """Stands where a child has run already: gives zeros, and the rest of what it gave as None."""

    def __init__(self, child: nn.Module, pattern: Any, like: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "_child", child)
        zeros = like.new_zeros(()).expand(like.shape)
        object.__setattr__(self, "_out", (zeros, *pattern[1:]) if isinstance(pattern, tuple) else zeros)

    def __getattr__(self, name: str) -> Any:  # what a block reads off its children
        return getattr(self._child, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._out


@contextlib.contextmanager
def passing(block: nn.Module, passed: dict[str, Any], like: Tensor) -> Iterator[None]:
    """Some children of a block give nothing. like: hidden states of the shape that theirs have."""
    before = {name: block._modules[name] for name in passed}
    try:
        for name, pattern in passed.items():
            child = before[name]
            assert child is not None
            block._modules[name] = _Passed(child, pattern, like)
        yield
    finally:
        block._modules.update(before)


def run_from(stream: Stream, block: nn.Module, i: int, stages: Stages, stage: int, hidden: Tensor) -> Tensor:
    """What leaves the block, from the stream that enters a stage."""
    with passing(block, stages.passed[stage], hidden):
        return stream.run(block, i, hidden)


def reads(stream: Stream, block: nn.Module, i: int, stages: Stages, stage: int, name: str, hidden: Tensor) -> Tensor:
    """What a matrix of a stage is multiplied with: [b, s, n]. hidden: what enters the stage, or the block."""
    return _there(_seen(stream, block, i, stages, stage, name, hidden, until="input").a)


def consumer_at(
    stream: Stream, block: nn.Module, i: int, stages: Stages, stage: int, hidden: Tensor, *, until: str = "input"
) -> Seen:
    """A stage's consumer at work. until: the run ends at its "input", its "output", or goes on to the "end"."""
    return _seen(stream, block, i, stages, stage, stages.order[stage], hidden, until=until)


def _seen(
    stream: Stream, block: nn.Module, i: int, stages: Stages, stage: int, name: str, hidden: Tensor, *, until: str
) -> Seen:
    read: list[Tensor] = []
    given: list[Tensor] = []
    before: list[Tensor] = []

    def reading(m: nn.Module, args: tuple[Any, ...]) -> None:
        read.append(args[0])
        if until == "input":
            raise _Enough

    def giving(m: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        given.append(output)
        if until == "output":
            raise _Enough

    held = {} if stages.apart else dict(block.named_parameters())
    handles = [_listen(block, n, before) for n in stages.order[:stage] if n in held]
    handles.append(owner(block, name).register_forward_pre_hook(reading))
    handles.append(owner(block, name).register_forward_hook(giving))
    after = None
    try:
        with passing(block, stages.passed[stage] if stages.apart else {}, hidden):
            after = stream.run(block, i, hidden)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    residual = hidden
    for output in before:
        residual = residual + output.reshape(hidden.shape)
    shape = hidden.shape[:2]
    return Seen(read[0].reshape(*shape, -1), residual, given[0].reshape(*shape, -1) if given else None, after)


class Dense:
    """The dense stream on its way through a block.

    at: what enters the present stage, or the block where its stages do not run apart; at the end what leaves the block.
    Each stage's consumer is asked for once with every batch, which takes that batch to the next stage.
    """

    def __init__(self, stream: Stream, block: nn.Module, i: int, stages: Stages, x: States) -> None:
        self.stream, self.block, self.i, self.stages, self.at = stream, block, i, stages, x

    def entering(self, stage: int) -> States:
        """What enters a stage that has not begun; a list of its own."""
        return self.at[:]

    def consumer(self, stage: int, b: int) -> Seen:
        """A stage's consumer on batch b."""
        last = stage == len(self.stages.order) - 1 and not self.stages.rest
        until = "end" if last else "output"
        seen = consumer_at(self.stream, self.block, self.i, self.stages, stage, self.at[b], until=until)
        if last:
            self.at[b] = _there(seen.after)
        elif self.stages.apart:
            self.at[b] = seen.residual + _there(seen.y)
        return seen

    def finish(self) -> None:
        """What runs after the last consumer."""
        if self.stages.rest or not self.stages.order:
            for b in range(len(self.at)):
                self.at[b] = run_from(self.stream, self.block, self.i, self.stages, len(self.stages.order), self.at[b])


class Remembered(Dense):
    """The same for several walks: the first `few` batches' consumers are remembered, the others run through at once."""

    def __init__(self, stream: Stream, block: nn.Module, i: int, stages: Stages, x: States, few: int) -> None:
        super().__init__(stream, block, i, stages, x[:few])
        self._entering: list[States] = []
        self._seen: list[list[Seen]] = []
        for stage in range(len(stages.order)):
            self._entering.append(self.at[:])
            found = [super(Remembered, self).consumer(stage, b) for b in range(few)]
            self._seen.append([Seen(None, s.residual, s.y) for s in found])
        super().finish()
        self.at = self.at + stream.through(block, i, x[few:], keep=True)
        self._x = x

    def entering(self, stage: int) -> States:
        return self._entering[stage] + self._x[len(self._entering[stage]) :] if self._entering else self._x[:]

    def consumer(self, stage: int, b: int) -> Seen:
        return self._seen[stage][b]

    def finish(self) -> None:
        pass


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _listen(block: nn.Module, name: str, into: list[Tensor]) -> torch.utils.hooks.RemovableHandle:
    return owner(block, name).register_forward_hook(lambda m, args, output: into.append(output))
