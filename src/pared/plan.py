"""The plan: which units stay, in which layers, and exactly what that leaves. JSON, to be read, diffed and kept in git."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from pared.accounting import Account, account
from pared.axes import Nested, Selection
from pared.errors import UsageError
from pared.structure import Layout
from pared.vocabulary import Numbering

FORMAT = "pared-plan/1"
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
# No axis of any model comes near; a plan from elsewhere can not make pared fill the memory with indices.
_MOST_UNITS = 2**24
_SIBLINGS = "apply a plan to the model it was made for, or to a fine-tune of the same base"


def to_ranges(indices: Iterable[int]) -> str:
    """Ascending indices as text: 0,1,2,5 -> "0-2 5"."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def from_ranges(text: str) -> Tensor:
    """The reverse of to_ranges: int64 [n]. UsageError unless the indices ascend."""
    out: list[int] = []
    for part in text.split():
        found = _RANGE.fullmatch(part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last < _MOST_UNITS:
            raise UsageError(f"{part!r} is not a range of indices", where="plan")
        out.extend(range(first, last + 1))
    if any(b <= a for a, b in itertools.pairwise(out)):
        raise UsageError("kept indices must ascend", where="plan")
    return torch.tensor(out, dtype=torch.long)


class LayerPlan(BaseModel):
    """One layer of the result: the source layer that it is, and the units it keeps of each axis (not named: all).

    A nested axis (query heads in KV groups) lists one range for each kept unit of its parent.
    skip: sublayers that it loses whole.
    """

    model_config = ConfigDict(extra="forbid")
    source: int = Field(ge=0)
    keep: dict[str, str | list[str]] = Field(default_factory=dict)
    skip: list[Literal["attention", "mlp"]] = Field(default_factory=list)


class Plan(BaseModel):
    """What to keep. `removed` is the share of `of` that the plan really removes; `requested` what was asked for.

    vocab: the token ids that stay; the i-th of them becomes token i. rotated: the hidden channels are those of a basis
    that was measured for this model; a head that shared the embeddings is one of its own then. biases: matrices back into
    the residual stream got biases that the model does not have; they are counted in `after`.
    """

    model_config = ConfigDict(extra="forbid", ignored_types=(cached_property,))
    format: Literal["pared-plan/1"] = "pared-plan/1"
    model_type: str
    shape: Literal["uniform", "per-layer"] = "uniform"
    requested: float | None = None
    of: str = "params"
    removed: float = 0.0
    before: Account
    after: Account
    hidden: str | None = None
    rotated: bool = False
    biases: bool = False
    vocab: str | None = None
    layers: list[LayerPlan]
    provenance: dict[str, Any] = Field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json())

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan. UsageError where the file is not one."""
        try:
            return cls.model_validate_json(Path(path).read_text())
        except OSError as error:
            raise UsageError(f"can not read the plan: {error.strerror}", where=path) from error
        except (ValidationError, UnicodeDecodeError) as error:
            raise UsageError(f"not a plan: {_first(error)}", where=path, fix="make one with pared plan") from error

    def selection(self, layer: int | None, layout: Layout) -> dict[str, Tensor | Nested]:
        """What stays in the result's layer (None: outside of the blocks), for axes.take."""
        out: dict[str, Tensor | Nested] = {}
        if self.hidden is not None:
            out["hidden"] = from_ranges(self.hidden)
        if layer is None and self.vocab is not None:
            out["vocab"] = from_ranges(self.vocab)
        if layer is None and len(self.layers) < layout.sizes.get("layer", 0):  # tables with a part for each layer
            out["layer"] = torch.tensor([own.source for own in self.layers])
        if layer is not None:
            for axis, kept in self.layers[layer].keep.items():
                if isinstance(kept, str):
                    out[axis] = from_ranges(kept)
                else:
                    out[axis] = _nested(axis, [from_ranges(row) for row in kept], layout)
            out.update({kind: torch.zeros(0, dtype=torch.long) for kind in self.layers[layer].skip})
        return out

    def changes_blocks(self, layout: Layout) -> bool:
        """Whether a layer, or anything in one, goes, or the basis that they are in is another."""
        return self.rotated or len(self.layers) < layout.num_layers or any(layer.keep or layer.skip for layer in self.layers)

    def with_layer(self, i: int, layer: LayerPlan) -> Plan:
        """The plan with other units kept in the result's layer i, as many as before."""
        return self.model_copy(update={"layers": [*self.layers[:i], layer, *self.layers[i + 1 :]]})

    def numbering(self, layout: Layout) -> Numbering | None:
        """Old token ids to new ones; None where the vocabulary is kept whole."""
        return None if self.vocab is None else Numbering(from_ranges(self.vocab).tolist(), layout.sizes["vocab"])

    def sizes(self, layer: int | None, layout: Layout) -> dict[str, int]:
        """Units of every axis in the result's layer."""
        source = None if layer is None else self.layers[layer].source
        return {**layout.sizes_at(source), **kept_sizes(self.selection(layer, layout))}

    def check(self, layout: Layout) -> None:
        """UsageError where the plan does not fit the model."""
        if self.model_type != layout.model_type:
            raise UsageError(f"the plan is for {self.model_type!r} and the model is {layout.model_type!r}", where="plan")
        if not self.layers:
            raise UsageError("the plan keeps no layer", where="plan")
        now = account(layout, context=self.before.context)
        for name in ("layers", "params", "block_params", "kv_cache"):
            if getattr(now, name) != getattr(self.before, name):
                raise UsageError(
                    f"the plan was made for a model with {getattr(self.before, name):,} {name}, this one has {getattr(now, name):,}",
                    where="plan",
                    fix=_SIBLINGS,
                )
        for i, layer in enumerate(self.layers):
            if layer.source >= layout.num_layers:
                raise UsageError(f"the plan keeps layer {layer.source} of a model of {layout.num_layers} layers", where="plan")
            sizes = layout.sizes_at(layer.source)
            for kind in layer.skip:
                if not sizes.get(kind):
                    raise UsageError(
                        f"the plan removes the {kind} of layer {layer.source}, which this model can not do without",
                        where="plan",
                        fix=_SIBLINGS,
                    )
            for axis, kept in self.selection(i, layout).items():
                index = kept.index if isinstance(kept, Nested) else kept
                if axis in layer.skip:
                    continue
                if axis not in sizes or not index.numel() or int(index.max()) >= sizes[axis]:
                    raise UsageError(
                        f"the plan keeps units of {axis!r} in layer {layer.source} that this model does not have",
                        where="plan",
                        fix=_SIBLINGS,
                    )
                if isinstance(kept, Nested) and len(index) != self.sizes(i, layout)[kept.parent]:
                    raise UsageError(
                        f"the plan lists {len(index)} rows of {axis!r} in layer {layer.source}, not one for each {kept.parent!r} it keeps",
                        where="plan",
                    )
        if self.vocab is not None and (not self.vocab or int(from_ranges(self.vocab)[-1]) >= layout.sizes["vocab"]):
            raise UsageError("the plan keeps tokens that this model does not have", where="plan", fix=_SIBLINGS)


def _nested(axis: str, rows: list[Tensor], layout: Layout) -> Nested:
    if axis not in layout.parents or not rows or any(len(row) != len(rows[0]) for row in rows):
        raise UsageError(f"{axis!r} can not be kept as lists of units of these lengths", where="plan")
    return Nested(layout.parents[axis], torch.stack(rows))


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        e = error.errors()[0]
        return f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}"
    return str(error)


def kept_sizes(selection: Selection) -> dict[str, int]:
    """Units that a selection leaves of each axis that it names."""
    return {a: k.index.shape[1] if isinstance(k, Nested) else len(k) for a, k in selection.items()}


def layer_plan(source: int, selection: Mapping[str, Tensor | Nested], sizes: Mapping[str, int]) -> LayerPlan:
    """A LayerPlan from index tensors; axes that keep everything are left out. Sublayers with no unit are skipped."""
    keep: dict[str, str | list[str]] = {}
    skip: list[Any] = sorted(a for a, n in kept_sizes(selection).items() if n == 0)
    for axis, kept in selection.items():
        whole = kept_sizes({axis: kept})[axis] == sizes[axis] or axis in skip
        if isinstance(kept, Nested):
            if not whole:
                keep[axis] = [to_ranges(sorted(row)) for row in kept.index.tolist()]
        elif not whole:
            keep[axis] = to_ranges(sorted(kept.tolist()))
    return LayerPlan(source=source, keep=keep, skip=skip)
