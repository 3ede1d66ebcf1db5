"""Two plans, one after the other, as one plan for the first model."""

from __future__ import annotations

import torch
from torch import Tensor

from pared.axes import Nested
from pared.plan import Plan, layer_plan, to_ranges
from pared.structure import Layout


def compose(first: Plan, second: Plan, dense: Layout, middle: Layout) -> Plan:
    """The plan that does to the dense model what `first` and then `second` do. middle: the layout between the two."""
    layers = []
    for i, layer in enumerate(second.layers):
        before = first.selection(layer.source, dense)
        after = second.selection(i, middle)
        source = first.layers[layer.source].source
        sizes = dense.sizes_at(source)
        keep: dict[str, Tensor | Nested] = {}
        for axis in before.keys() | after.keys():
            if axis == "hidden":
                continue
            parent = dense.parents.get(axis)
            if parent is None:
                keep[axis] = _through(before.get(axis), after.get(axis), sizes[axis])
            else:
                keep[axis] = _nested(parent, axis, before, after, sizes)
        layers.append(layer_plan(source, keep, sizes))
    before, after = first.selection(None, dense), second.selection(None, middle)
    outside = {
        a: to_ranges(_through(before.get(a), after[a], dense.sizes[a]).tolist()) if a in after else getattr(first, a)
        for a in ("hidden", "vocab")
    }
    return second.model_copy(update={"layers": layers, **outside, "model_type": first.model_type, "before": first.before})


def _through(before: Tensor | Nested | None, after: Tensor | Nested | None, n: int) -> Tensor:
    first = torch.arange(n) if before is None else before
    if isinstance(first, Nested) or isinstance(after, Nested):
        raise TypeError("a nested axis is composed row by row")
    return first if after is None else first[after]


def _nested(
    parent: str, axis: str, before: dict[str, Tensor | Nested], after: dict[str, Tensor | Nested], sizes: dict[str, int]
) -> Nested:
    first, second = before.get(axis), after.get(axis)
    kept_first = _through(before.get(parent), None, sizes[parent])
    rows = first.index if isinstance(first, Nested) else torch.arange(sizes[axis]).expand(len(kept_first), -1)
    chosen = after.get(parent)
    rows = rows if chosen is None else rows[chosen]  # type: ignore[index]
    return Nested(parent, rows.gather(1, second.index) if isinstance(second, Nested) else rows)
