"""A block taken apart: what its matrices read and give, and the same block with other tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pared import surgery
from pared.axes import Name, Selection, names, take
from pared.spill import States
from pared.stream import Stream
from pared.structure import Layout


@dataclass
class Observed:
    """A dense block at work. after: what leaves it, for each batch. outputs: of the consumers, for each batch; order: in which they ran.

    groups: (how many consumers ran before, the producers that read one tensor).
    """

    after: States
    outputs: dict[str, States] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    groups: list[tuple[int, list[str]]] = field(default_factory=list)


def observe(
    stream: Stream, block: nn.Module, i: int, x: States, consumers: Sequence[str], producers: Sequence[str]
) -> Observed:
    """Run a block on every batch, and see what its consumers give and its producers read."""
    seen = Observed(stream.pool.store())
    first: list[tuple[int, str, Tensor]] = []  # of the first batch: which producers share an input
    now: list[Tensor] = []  # what enters the block
    handles = []
    for name in consumers:

        def gave(module: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> None:
            if name not in seen.outputs:
                seen.order.append(name)
            # MLPs beside experts see tokens of all sequences in one row.
            given = seen.outputs.setdefault(name, stream.pool.store())
            given.append(output.reshape(*now[0].shape[:2], -1))

        handles.append(owner(block, name).register_forward_hook(gave))
    for name in producers:

        def reads(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            if args[0].numel() != now[0].shape[:2].numel() * args[0].shape[-1]:
                return  # not all tokens come this way
            if any(name in group for _, group in seen.groups):
                return
            first.append((len(seen.order), name, args[0]))
            same = next((n for _, n, t in first[:-1] if t is args[0]), None)
            if same:
                next(g for _, g in seen.groups if same in g).append(name)
            else:
                seen.groups.append((len(seen.order), [name]))

        handles.append(owner(block, name).register_forward_pre_hook(reads))
    try:
        for h in x:
            now[:] = [h]
            seen.after.append(stream.run(block, i, h))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def is_sum(seen: Observed, x: Tensor) -> bool:
    """Whether what leaves a block is what entered it [b, s, hidden] plus its consumers' outputs, of the first batch seen."""
    if not seen.order:
        return False
    parts = [x, *(seen.outputs[n][0] for n in seen.order)]
    total, size = sum(parts[1:], x), sum((p.abs() for p in parts[1:]), x.abs())
    error = (total - seen.after[0]).abs()
    rounding = len(parts) * torch.finfo(x.dtype).eps * size
    return bool((error <= rounding).all() and error.norm() <= 1e-2 * (seen.after[0] - x).norm())


def cut(layout: Layout, i: int, name: str, tensor: Tensor, keep: Selection) -> Tensor:
    """One tensor of block i (local name) with only the kept units."""
    return take(tensor, layout.tensors[f"{layout.prefix}.{i}.{name}"], layout.sizes_at(i), keep)


def rebuilt(
    stream: Stream, block: nn.Module, i: int, keep: Selection, whole: Mapping[str, Tensor], final: Mapping[str, Tensor]
) -> nn.Module:
    """The block, built anew for the units in `keep`. whole: tensors in place of its own, still to be cut; final: cut ones."""
    tensors = {
        n: final[n] if n in final else cut(stream.layout, i, n, whole.get(n, t), keep) for n, t in block.state_dict().items()
    }
    return surgery.rebuilt(block, stream.model, stream.layout, i, keep, tensors)


def matrices(layout: Layout, i: int, weights: Mapping[str, Tensor]) -> list[str]:
    """The 2-D weights of a block that are multiplied with activations, by local name."""
    return [n for n, w in weights.items() if w.ndim == 2 and f"{layout.prefix}.{i}.{n}" in layout.consumers]


def input_axes(layout: Layout, i: int, name: str) -> frozenset[str]:
    """The axes along a matrix's input."""
    full = f"{layout.prefix}.{i}.{name}"
    return names(layout.tensors[full].dims[layout.consumers[full]])


def consumers_of(layout: Layout, i: int, weights: Mapping[str, Tensor]) -> dict[str, frozenset[str]]:
    """The matrices from a structure's channels back into the residual stream, and the axes that those channels have."""
    out = {}
    for name in matrices(layout, i, weights):
        full = f"{layout.prefix}.{i}.{name}"
        other = layout.tensors[full].dims[1 - layout.consumers[full]]
        axes = input_axes(layout, i, name)
        if other == Name("hidden") and axes and "hidden" not in axes:
            out[name] = axes
    return out


def sole_consumer(layout: Layout, i: int, axis: str) -> str | None:
    """The one matrix (local name) whose input runs along an axis; None where there are several, or stacks of experts."""
    found = [n for n in layout.block_tensors(i) if n in layout.consumers and axis in layout.tensors[n].axes]
    found = [n for n in found if axis in names(layout.tensors[n].dims[layout.consumers[n]])]
    return layout.local(found[0]) if len(found) == 1 and len(layout.shapes[found[0]]) == 2 else None


def oriented(layout: Layout, i: int, name: str, w: Tensor) -> Tensor:
    """A matrix as [out, in]."""
    return w if layout.consumers[f"{layout.prefix}.{i}.{name}"] == 1 else w.T


def stored(layout: Layout, full: str, w: Tensor, dtype: torch.dtype) -> Tensor:
    """The reverse of `oriented`. full: the tensor's name in the model."""
    return (w if layout.consumers[full] == 1 else w.T).to(dtype).contiguous()


def bias_of(name: str) -> str:
    """The name of the bias beside a weight."""
    return name.rpartition(".")[0] + ".bias"


def owner(block: nn.Module, name: str) -> nn.Module:
    """The module that holds a tensor, by its local name."""
    return block.get_submodule(name.rpartition(".")[0])
