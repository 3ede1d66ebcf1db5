"""Laws of the notation: what a selection means for a tensor, against labels that numpy gives every entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pared.axes import Nested, Selection, count, indices, parse, reduce_to_units, take, units, zero_
from pared.errors import ModelError
from pared.plan import kept_sizes

Labels = list[tuple[str, np.ndarray]]  # (axis, the unit that every entry of the tensor belongs to, -1 for none)
Sizes = Mapping[str, int]
NESTED = {"query": "kv", "expert_ffn": "expert"}


def box(s: Sizes, names: str, *shape: int) -> dict[str, np.ndarray]:
    """Labels of a tensor with one dimension for each name, reshaped to `shape`."""
    axes = names.split()
    grids = np.indices([s.get(a, 2) for a in axes])
    return {a: g.reshape(shape) for a, g in zip(axes, grids, strict=True)}


def joined(dim: int, *parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    absent = [np.full(next(iter(p.values())).shape, -1) for p in parts]
    names = {a for p in parts for a in p}
    return {a: np.concatenate([p.get(a, none) for p, none in zip(parts, absent, strict=True)], dim) for a in names}


def fused(s: Sizes) -> dict[str, np.ndarray]:
    q, k = box(s, "kv query d hidden", -1, s["hidden"]), box(s, "kv d hidden", -1, s["hidden"])
    return joined(0, q, k, k)


def interleaved(s: Sizes) -> dict[str, np.ndarray]:
    kv, d, h = s["kv"], s["d"], s["hidden"]
    k = box(s, "kv d hidden", kv, d, h)
    rows = joined(1, box(s, "kv query d hidden", kv, s["query"] * d, h), k, k)
    return {a: x.reshape(-1, h) for a, x in rows.items()}


def experts(s: Sizes) -> dict[str, np.ndarray]:
    part = box(s, "expert expert_ffn hidden", s["expert"], s["expert_ffn"], s["hidden"])
    return joined(1, part, part)


FORMS: dict[str, Callable[[Sizes], dict[str, np.ndarray]]] = {
    "(kv query d) hidden": lambda s: box(s, "kv query d hidden", -1, s["hidden"]),
    "hidden (kv query d)": lambda s: box(s, "hidden kv query d", s["hidden"], -1),
    "(kv d)": lambda s: box(s, "kv d", -1),
    "(kv query d)": lambda s: box(s, "kv query d", -1),
    "[kv query d | kv d | kv d] hidden": fused,
    "(kv [query d | d | d]) hidden": interleaved,
    "(2 ffn) hidden": lambda s: box(s, "two ffn hidden", -1, s["hidden"]),
    "(ffn 2) hidden": lambda s: box(s, "ffn two hidden", -1, s["hidden"]),
    "[ffn | ffn] hidden": lambda s: joined(0, *[box(s, "ffn hidden", s["ffn"], s["hidden"])] * 2),
    "hidden ffn": lambda s: box(s, "hidden ffn", s["hidden"], s["ffn"]),
    "hidden hidden": lambda s: box(s, "hidden other", s["hidden"], s["hidden"]),
    "_ hidden": lambda s: box(s, "two hidden", 2, s["hidden"]),
    "(2 [kv d | ffn]) hidden": lambda s: {
        a: x.reshape(-1, s["hidden"])
        for a, x in joined(
            1, box(s, "two kv d hidden", 2, -1, s["hidden"]), box(s, "two ffn hidden", 2, s["ffn"], s["hidden"])
        ).items()
    },
    "expert [expert_ffn | expert_ffn] hidden": experts,
    "expert hidden expert_ffn": lambda s: box(s, "expert hidden expert_ffn", s["expert"], s["hidden"], s["expert_ffn"]),
    "expert hidden": lambda s: box(s, "expert hidden", s["expert"], s["hidden"]),
}


def labels(text: str, s: Sizes) -> Labels:
    found = FORMS[text]({**s, "other": s["hidden"]})
    return [("hidden" if a == "other" else a, x) for a, x in found.items() if a != "two"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, dict[str, int], dict[str, Tensor | Nested]]:
    """A form, sizes for its axes, and a selection along some of them, with rows of their own for nested ones."""
    text = draw(st.sampled_from(sorted(FORMS)))
    axes = sorted(parse(text).axes)
    s = {a: draw(st.integers(1, 5)) for a in ("kv", "query", "d", "hidden", "ffn", "expert", "expert_ffn")}

    def some(n: int, at_least: int = 1, at_most: int | None = None) -> Tensor:
        chosen = draw(st.sets(st.integers(0, n - 1), min_size=at_least, max_size=at_most or n))
        return torch.tensor(sorted(chosen))

    keep: dict[str, Tensor | Nested] = {}
    for axis in draw(st.sets(st.sampled_from(axes))):
        if axis not in NESTED:
            keep[axis] = some(s[axis])
    for axis, parent in NESTED.items():
        if axis in axes and draw(st.booleans()):
            n = draw(st.integers(1, s[axis]))
            rows = len(units(keep, parent, s))
            keep[axis] = Nested(parent, torch.stack([some(s[axis], n, n) for _ in range(rows)]))
    return text, s, keep


def stays(text: str, s: Sizes, keep: Selection) -> np.ndarray:
    """Which entries remain, entry by entry."""
    marks = labels(text, s)
    mask = np.ones(marks[0][1].shape, bool)
    for axis, at in marks:
        kept = keep.get(axis)
        if isinstance(kept, Nested):
            parent = dict(marks)[kept.parent]
            pairs = {(int(p), int(u)) for p, row in zip(units(keep, kept.parent, s), kept.index, strict=True) for u in row}
            inside = np.vectorize(lambda p, u, pairs=pairs: (p, u) in pairs)(parent, at)
            mask &= inside | (at < 0)
        elif kept is not None:
            mask &= np.isin(at, kept.numpy()) | (at < 0)
    return mask


def numbered(text: str, s: Sizes) -> Tensor:
    """A tensor of the form's shape, every entry of it different and none zero."""
    shape = labels(text, s)[0][1].shape
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)


@settings(max_examples=400, deadline=None)
@given(cases())
def test_take_leaves_what_the_labels_say_in_the_same_order(case: Any) -> None:
    text, s, keep = case
    tensor = numbered(text, s)
    got = take(tensor, parse(text), s, keep)
    assert got.flatten().tolist() == tensor.numpy()[stays(text, s, keep)].tolist()
    after = {**s, **kept_sizes(keep)}
    assert tuple(got.shape) == labels(text, after)[0][1].shape


@settings(max_examples=300, deadline=None)
@given(cases())
def test_zeroing_is_taking_without_moving(case: Any) -> None:
    text, s, keep = case
    tensor, masked = numbered(text, s), numbered(text, s)
    zero_(masked, parse(text), s, keep)
    assert torch.equal(masked, tensor * torch.from_numpy(stays(text, s, keep)))
    assert torch.equal(take(masked, parse(text), s, keep), take(tensor, parse(text), s, keep))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_counts_are_those_of_the_cut_tensor(case: Any) -> None:
    text, s, keep = case
    tensor = numbered(text, s)
    assert count(parse(text), s, tuple(tensor.shape)) == tensor.numel()
    assert count(parse(text), {**s, **kept_sizes(keep)}, tuple(tensor.shape)) == take(tensor, parse(text), s, keep).numel()


@settings(max_examples=200, deadline=None)
@given(cases())
def test_keeping_everything_is_the_same_tensor(case: Any) -> None:
    text, s, keep = case
    tensor, everything = numbered(text, s), {a: torch.arange(s[a]) for a in keep if a not in NESTED}
    assert take(tensor, parse(text), s, {}) is tensor
    assert take(tensor, parse(text), s, everything) is tensor
    zero_(tensor, parse(text), s, everything)
    assert torch.equal(tensor, numbered(text, s))


def shuffled(tensor: Tensor, text: str, s: Sizes, axis: str, order: list[int]) -> Tensor:
    """The tensor with unit order[j] of an axis in the place of unit j, wherever the axis stands."""
    places = [at for name, at in labels(text, s) if name == axis]
    for dim, at in zip(parse(text).dims_of(axis), places, strict=True):
        line = np.moveaxis(at, dim, 0).reshape(at.shape[dim], -1)[:, 0]
        source = np.arange(len(line))
        for j, unit in enumerate(order):
            source[line == j] = np.flatnonzero(line == unit)
        tensor = tensor.index_select(dim, torch.from_numpy(source))
    return tensor


@settings(max_examples=200, deadline=None)
@given(cases(), st.data())
def test_taking_commutes_with_permuting_units(case: Any, data: st.DataObject) -> None:
    text, s, keep = case
    tensor, plain = numbered(text, s), {a: k for a, k in keep.items() if not isinstance(k, Nested)}
    axis = data.draw(st.sampled_from(sorted(parse(text).axes)))
    order = data.draw(st.permutations(range(s[axis])))
    chosen = plain.get(axis, torch.arange(s[axis])).tolist()
    there = [j for j in range(s[axis]) if order[j] in chosen]
    got = take(shuffled(tensor, text, s, axis, order), parse(text), s, {**plain, axis: torch.tensor(there)})
    want = take(tensor, parse(text), s, plain)
    after = {**s, **kept_sizes(plain)}
    assert torch.equal(got, shuffled(want, text, after, axis, [chosen.index(order[j]) for j in there]))


@settings(max_examples=200, deadline=None)
@given(cases(), st.data())
def test_taking_twice_is_taking_once(case: Any, data: st.DataObject) -> None:
    text, s, keep = case
    first = {a: k for a, k in keep.items() if not isinstance(k, Nested)}
    after = {**s, **kept_sizes(first)}
    second = {
        a: torch.tensor(sorted(data.draw(st.sets(st.integers(0, after[a] - 1), min_size=1)))) for a in sorted(parse(text).axes)
    }
    once = {a: first.get(a, torch.arange(s[a]))[k] for a, k in second.items()}
    tensor = numbered(text, s)
    twice = take(take(tensor, parse(text), s, first), parse(text), after, second)
    assert torch.equal(twice, take(tensor, parse(text), s, once))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_sums_over_units_are_those_of_a_plain_loop(case: Any) -> None:
    text, s, _ = case
    tensor, marks = numbered(text, s), labels(text, s)
    for axis in parse(text).axes:
        axes = (NESTED[axis], axis) if axis in NESTED else (axis,)
        want = [0.0] * math.prod(s[a] for a in axes)
        outer = dict(marks).get(axes[0])
        for name, at in marks:
            if name != axis:
                continue
            for i in range(tensor.numel()):
                unit = int(at.flat[i])
                if unit >= 0:
                    parent = int(outer.flat[i]) if axis in NESTED else 0  # type: ignore[union-attr]
                    want[parent * s[axis] + unit] += float(tensor.flatten()[i])
        got = reduce_to_units(tensor, parse(text), s, axes)
        assert got is not None and got.dtype == torch.float32 and got.tolist() == want


def test_a_tensor_without_the_axis_has_no_sums() -> None:
    assert reduce_to_units(torch.ones(4), parse("hidden"), {"hidden": 4}, ("ffn",)) is None
    assert reduce_to_units(torch.ones(4, 4), parse("(kv d) hidden"), {"hidden": 4, "kv": 2, "d": 2}, ("kv", "query")) is None


@pytest.mark.parametrize(
    "text", ["(kv d", "kv d)", "[kv | d", "[kv |] d", "kv | d", "()", "[]", "(kv d] hidden", "kv-d", "hidden *", "kv | (", "é"]
)
def test_a_signature_that_can_not_be_read_is_named(text: str) -> None:
    with pytest.raises(ModelError) as error:
        parse(text)
    assert repr(text) in error.value.what


@settings(max_examples=500, deadline=None)
@given(st.text("ab_ 12()[]|", max_size=14))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert str(parse(text)) == text
    except ModelError as error:
        assert repr(text) in error.what


SIZES = {"kv": 2, "query": 2, "d": 3, "hidden": 4}


@pytest.mark.parametrize(
    ("shape", "text", "keep", "says"),
    [
        ((12,), "(kv d) hidden", {}, "does not fit"),
        ((7, 4), "(kv d) hidden", {"kv": [0]}, "7 entries where its signature says 6"),
        ((6, 4), "(kv d) hidden", {"hidden": [0]}, None),
        ((6, 4), "(query d) hidden", {"query": ("kv", [[0], [1]])}, "does not stand around"),
        ((6, 4), "(_ d) hidden", {"d": [0]}, "free dimension"),
    ],
)
def test_tensors_and_selections_that_do_not_fit_are_refused(shape: Any, text: str, keep: Any, says: str | None) -> None:
    chosen = {a: Nested(k[0], torch.tensor(k[1])) if isinstance(k, tuple) else torch.tensor(k) for a, k in keep.items()}
    if says is None:
        assert take(torch.ones(shape), parse(text), SIZES, chosen).shape == (6, 1)
    else:
        with pytest.raises(ModelError, match=says):
            take(torch.ones(shape), parse(text), SIZES, chosen)


def test_positions_of_nested_heads() -> None:
    keep = {"kv": torch.tensor([1]), "query": Nested("kv", torch.tensor([[0]]))}
    (dim,) = parse("(kv query d)").dims
    assert indices(dim, SIZES, keep, 12).tolist() == [6, 7, 8]  # type: ignore[union-attr]
