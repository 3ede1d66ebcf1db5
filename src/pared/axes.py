"""The notation that says which axes a tensor has, and the indices that a selection of units means for it.

A signature gives each dimension of a tensor as a product of factors, slowest first (as in einops):

    "(kv g d) hidden"              q_proj.weight: KV groups, query heads of a group, head size; hidden channels
    "[kv g d | kv d | kv d] hidden"  a fused projection: three parts one behind the other
    "(kv [g d | d | d]) hidden"    the same, interleaved by KV group
    "(2 ffn) hidden"               a number is a fixed factor
    "_ hidden"                     a dimension that nothing selects from

An axis that stands in several tensors is the coupled structure: one selection cuts them all.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from pared.errors import ModelError

_TOKEN = re.compile(r"\s*([A-Za-z][A-Za-z0-9_.]*|\d+|[()\[\]|_])")


@dataclass(frozen=True)
class Name:
    """An axis."""

    name: str


@dataclass(frozen=True)
class Fixed:
    """A factor of constant size; None takes whatever the tensor has there."""

    size: int | None


@dataclass(frozen=True)
class Product:
    factors: tuple[Node, ...]


@dataclass(frozen=True)
class Concat:
    parts: tuple[Node, ...]


Node = Name | Fixed | Product | Concat


@dataclass(frozen=True)
class Signature:
    """The parsed form of one tensor's signature."""

    text: str
    dims: tuple[Node, ...]

    def __str__(self) -> str:
        return self.text

    @cached_property
    def axes(self) -> frozenset[str]:
        return frozenset().union(*(names(d) for d in self.dims))

    def dims_of(self, axis: str) -> list[int]:
        """The dimensions in which `axis` stands."""
        return [i for i, d in enumerate(self.dims) if axis in names(d)]


@lru_cache(maxsize=4096)
def parse(text: str) -> Signature:
    """Parse a signature; ModelError with the text on bad syntax."""
    tokens: list[str] = []
    at = 0
    while at < len(text.rstrip()):
        m = _TOKEN.match(text, at)
        if not m:
            raise ModelError(f"can not read the signature {text!r}", where=f"character {at}")
        tokens.append(m.group(1))
        at = m.end()
    dims: list[Node] = []
    while tokens:
        dims.append(_factor(tokens, text))
    return Signature(text, tuple(dims))


def _factor(tokens: list[str], text: str) -> Node:
    if not tokens:
        raise ModelError(f"the signature {text!r} ends too early")
    t = tokens.pop(0)
    if t == "_":
        return Fixed(None)
    if t.isdigit():
        return Fixed(int(t))
    if t == "(":
        node = _sequence(tokens, text)
        _expect(tokens, ")", text)
        return node
    if t == "[":
        parts = [_sequence(tokens, text)]
        while tokens and tokens[0] == "|":
            tokens.pop(0)
            parts.append(_sequence(tokens, text))
        _expect(tokens, "]", text)
        return Concat(tuple(parts))
    if t in ")]|":
        raise ModelError(f"unexpected {t!r} in the signature {text!r}")
    return Name(t)


def _sequence(tokens: list[str], text: str) -> Node:
    factors: list[Node] = []
    while tokens and tokens[0] not in (")", "]", "|"):
        factors.append(_factor(tokens, text))
    if not factors:
        raise ModelError(f"an empty part in the signature {text!r}")
    return factors[0] if len(factors) == 1 else Product(tuple(factors))


def _expect(tokens: list[str], token: str, text: str) -> None:
    if not tokens or tokens.pop(0) != token:
        raise ModelError(f"a missing {token!r} in the signature {text!r}")


@lru_cache(maxsize=4096)
def names(node: Node) -> frozenset[str]:
    """The axes that a node names."""
    match node:
        case Name(name):
            return frozenset([name])
        case Product(children) | Concat(children):
            return frozenset().union(*(names(c) for c in children))
    return frozenset()


def size(node: Node, sizes: Mapping[str, int]) -> int | None:
    """Units along a node; None where it holds a free dimension (`_`)."""
    match node:
        case Name(name):
            return sizes[name]
        case Fixed(n):
            return n
        case Product(factors):
            total = 1
            for f in factors:
                if (n := size(f, sizes)) is None:
                    return None
                total *= n
            return total
        case Concat(parts):
            counts = [size(p, sizes) for p in parts]
            return None if None in counts else sum(c for c in counts if c is not None)


@dataclass(frozen=True)
class Nested:
    """Kept units of an axis chosen anew inside each kept unit of `parent`: query heads in KV groups, channels in experts.

    index: int64 [kept parents, n], ascending in each row; row r belongs to the r-th kept unit of the parent.
    """

    parent: str
    index: Tensor


# Which units stay, per axis, in ascending order; an axis that is not named is kept whole. Plain indices are int64 [n].
Selection = Mapping[str, Tensor | Nested]


def coordinates(node: Node, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """For each axis of a node, the unit that every position belongs to: int64 [positions], -1 where the axis is absent."""
    n = _known(node, sizes)
    match node:
        case Name(name):
            return {name: torch.arange(n)}
        case Product(factors):
            out: dict[str, Tensor] = {}
            inner, outer = n, 1
            for f in factors:
                width = _known(f, sizes)
                inner //= width
                for axis, at in coordinates(f, sizes).items():
                    out[axis] = at.repeat_interleave(inner).repeat(outer)
                outer *= width
            return out
        case Concat(parts):
            per_part = [(coordinates(p, sizes), _known(p, sizes)) for p in parts]
            absent = {axis for at, _ in per_part for axis in at}
            return {axis: torch.cat([at.get(axis, torch.full((w,), -1)) for at, w in per_part]) for axis in absent}
    return {}


def _known(node: Node, sizes: Mapping[str, int]) -> int:
    n = size(node, sizes)
    if n is None:
        raise ModelError("a free dimension can not stand inside a product or a concatenation")
    return n


def indices(node: Node, sizes: Mapping[str, int], keep: Selection, extent: int) -> Tensor | None:
    """Positions kept along one dimension of `extent` entries: int64 [n], or None where all of them stay.

    Raises ModelError where the signature does not account for `extent`.
    """
    total = size(node, sizes)
    if total is not None and total != extent:
        raise ModelError(f"a dimension has {extent} entries where its signature says {total}")
    chosen = names(node) & keep.keys()
    if not chosen:
        return None
    at = coordinates(node, sizes)
    stays = torch.ones(extent, dtype=torch.bool)
    for axis in chosen:
        kept, here = keep[axis], at[axis]
        if isinstance(kept, Nested):
            if kept.parent not in at:
                raise ModelError(f"the axis {axis!r} is chosen per {kept.parent!r}, which does not stand around it")
            allowed = torch.zeros(sizes[kept.parent], sizes[axis], dtype=torch.bool)
            allowed[units(keep, kept.parent, sizes)[:, None], kept.index] = True
            inside = allowed[at[kept.parent], here]
        else:
            allowed = torch.zeros(sizes[axis], dtype=torch.bool)
            allowed[kept] = True
            inside = allowed[here]
        stays &= inside | (here < 0)
    return None if bool(stays.all()) else stays.nonzero()[:, 0]


def units(keep: Selection, axis: str, sizes: Mapping[str, int]) -> Tensor:
    """The kept units of an axis that is not nested: int64 [n]."""
    kept = keep.get(axis)
    if isinstance(kept, Nested):
        raise ModelError(f"the axis {axis!r} is chosen per {kept.parent!r}")
    return torch.arange(sizes[axis]) if kept is None else kept


def take(tensor: Tensor, signature: Signature, sizes: Mapping[str, int], keep: Selection) -> Tensor:
    """`tensor` with only the kept units along every axis of its signature; the same object where nothing is cut.

    Raises ModelError where tensor and signature do not fit each other.
    """
    if tensor.ndim != len(signature.dims):
        raise ModelError(f"a tensor of shape {tuple(tensor.shape)} does not fit the signature {signature.text!r}")
    if (across := _nested_across(signature, keep)) is not None:
        return _take_across(tensor, signature, sizes, keep, *across)
    for dim, node in enumerate(signature.dims):
        index = indices(node, sizes, keep, tensor.shape[dim])
        if index is not None:
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def _nested_across(signature: Signature, keep: Selection) -> tuple[str, int] | None:
    """A nested axis whose parent is another dimension of the same tensor, and that dimension."""
    for axis, kept in keep.items():
        if isinstance(kept, Nested) and axis in signature.axes and kept.parent in signature.axes:
            parent_dims = signature.dims_of(kept.parent)
            if signature.dims_of(axis) != parent_dims:
                return axis, parent_dims[0]
    return None


def _take_across(
    tensor: Tensor, signature: Signature, sizes: Mapping[str, int], keep: Selection, axis: str, parent_dim: int
) -> Tensor:
    nested = keep[axis]
    if not isinstance(nested, Nested) or signature.dims[parent_dim] != Name(nested.parent):
        raise ModelError(f"{axis!r} can not be chosen per unit of another axis in {signature.text!r}")
    parents = units(keep, nested.parent, sizes)
    inner = Signature(signature.text, signature.dims[:parent_dim] + signature.dims[parent_dim + 1 :])
    rest = {a: k for a, k in keep.items() if a not in (axis, nested.parent)}
    rows = [
        take(tensor.select(parent_dim, int(p)), inner, sizes, {**rest, axis: nested.index[r]}) for r, p in enumerate(parents)
    ]
    return torch.stack(rows, parent_dim)


def zero_(tensor: Tensor, signature: Signature, sizes: Mapping[str, int], keep: Selection) -> None:
    """Set every entry that `take` would remove to zero, in place."""
    if (across := _nested_across(signature, keep)) is not None:
        axis, parent_dim = across
        nested = keep[axis]
        inner = Signature(signature.text, signature.dims[:parent_dim] + signature.dims[parent_dim + 1 :])
        rest = {a: k for a, k in keep.items() if a != axis}
        zero_(tensor, signature, sizes, rest)
        if isinstance(nested, Nested):
            for row, parent in zip(nested.index, units(keep, nested.parent, sizes), strict=True):
                zero_(tensor.select(parent_dim, int(parent)), inner, sizes, {axis: row})
        return
    for dim, node in enumerate(signature.dims):
        kept = indices(node, sizes, keep, tensor.shape[dim])
        if kept is not None:
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
            gone[kept] = False
            tensor.index_fill_(dim, gone.nonzero()[:, 0], 0)


def count(signature: Signature, sizes: Mapping[str, int], shape: tuple[int, ...]) -> int:
    """Entries of a tensor under other axis sizes; `shape` fills the dimensions that no axis accounts for."""
    total = 1
    for dim, node in enumerate(signature.dims):
        n = size(node, sizes) if names(node) else None
        total *= shape[dim] if n is None else n
    return total


def reduce_to_units(values: Tensor, signature: Signature, sizes: Mapping[str, int], axes: tuple[str, ...]) -> Tensor | None:
    """Sum an elementwise quantity over everything that belongs to each unit: fp32 [units]; None where no entry does.

    axes: one axis, or an axis and its parent before it, as ("kv", "query") for query heads; units then count parent-major.
    An axis that stands in two dimensions of one tensor (hidden, in a square matrix) is counted in both.
    """
    total: Tensor | None = None
    for where in _placements(signature, axes):
        left = sorted(set(where))
        unit = torch.zeros([1] * len(left), dtype=torch.long)
        for axis, dim in zip(axes, where, strict=True):
            at = coordinates(signature.dims[dim], sizes)[axis].reshape([-1 if d == dim else 1 for d in left])
            unit = torch.where((at < 0) | (unit < 0), -1, unit * sizes[axis] + at)
        others = [d for d in range(values.ndim) if d not in left]
        summed = (values.sum(others) if others else values).float()
        at_unit = unit.expand(summed.shape).flatten().to(summed.device)
        part = torch.zeros(math.prod(sizes[axis] for axis in axes), dtype=torch.float32, device=summed.device)
        part.index_add_(0, at_unit[at_unit >= 0], summed.flatten()[at_unit >= 0])
        total = part if total is None else total + part
    return total


def _placements(signature: Signature, axes: tuple[str, ...]) -> list[tuple[int, ...]]:
    """The dimensions in which the axes stand, one for each: all in the same one or, as with channels of experts, in several."""
    together = [dim for dim, node in enumerate(signature.dims) if set(axes) <= names(node)]
    if together:
        return [(dim,) * len(axes) for dim in together]
    return list(itertools.product(*(signature.dims_of(axis) for axis in axes)))
