"""Budgets: met from above by less than one step, exactly as counted, and within what may be touched."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen2Config

import tiny
from pared.accounting import AMOUNTS, account
from pared.budget import Amount, Budget, Sizes
from pared.budget.ranked import allocate_ranked
from pared.budget.select import make_plan
from pared.budget.uniform import FEW_MEASURED, MOST_MEASURED, Shape, allocate_uniform, layers_under, uniform_shapes
from pared.errors import UsageError
from pared.plan import Plan
from pared.proof import proved_layout
from pared.scores import Scores
from pared.structure import Layout

SIZES: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 16, "vocab_size": 500}
GROUPED: dict[str, Any] = {**SIZES, "intermediate_size": 704, "num_key_value_heads": 4, "head_dim": 16}
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**GROUPED),
    "gpt2": GPT2Config(**SIZES),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
}
WIDTHS = ("kv", "query", "ffn")
CHOICES: list[tuple[str, ...]] = [
    ("ffn",),
    ("kv",),
    ("kv", "query"),
    WIDTHS,
    ("layer",),
    ("layer", "ffn"),
    ("hidden",),
    ("hidden", *WIDTHS),
]
LOOK = settings(max_examples=50, deadline=None)


@lru_cache
def layout_of(name: str) -> Layout:
    return proved_layout(MODELS[name])


def budget_of(name: str, share: float, axes: tuple[str, ...], of: str = "block-params", **options: Any) -> Budget:
    return Budget(layout_of(name), Amount(share, of), axes, **options)


def possible(name: str, axes: tuple[str, ...], of: str) -> bool:
    return all(layout_of(name).prunable(a) for a in axes) and (of != "kv-cache" or name != "gpt2")


def shared(budget: Budget, shape: Shape) -> int:
    """What a uniform shape leaves, counted anew from the signatures."""
    layers = layers_under(budget, shape.sizes, shape.layers)
    return account(budget.layout, layers, hidden=shape.hidden, context=budget.context, experts_used=budget.experts_used).amount(
        budget.amount.of
    )


def wider(budget: Budget, shape: Shape) -> Iterator[Shape]:
    """The shape with one step given back, along each axis in turn."""
    full = budget.layout.sizes_at(0)
    for axis in budget.axes:
        now = {"layer": shape.layers, "hidden": shape.hidden}.get(axis, shape.sizes.get(axis))
        whole = budget.layout.num_layers if axis == "layer" else full[axis]
        if now is None or now == whole:
            continue
        fine = axis == "hidden" and not budget.width_axes and budget.align is None
        step = 1 if axis == "layer" else budget.grain(axis) if fine else budget.step(axis)
        more = min(whole, (now // step + 1) * step)
        if axis == "layer":
            yield Shape(shape.sizes, more, shape.hidden, 0)
        elif axis == "hidden":
            yield Shape(shape.sizes, shape.layers, more, 0)
        else:
            yield Shape({**shape.sizes, axis: more}, shape.layers, shape.hidden, 0)


SHARES = st.floats(0.01, 0.9)
NAMES = st.sampled_from(sorted(MODELS))


@LOOK
@given(NAMES, SHARES, st.sampled_from(CHOICES), st.sampled_from(AMOUNTS), st.sampled_from([None, 4, 8, 64]))
def test_uniform_meets_the_budget_by_less_than_a_step(
    name: str, share: float, axes: tuple[str, ...], of: str, align: int | None
) -> None:
    assume(possible(name, axes, of))
    budget = budget_of(name, share, axes, of, align=align)
    total = budget.before.amount(of)
    try:
        shape = allocate_uniform(budget)
    except UsageError as error:
        assert f"{share:.1%}" in error.what and "can give between" in error.what
        return
    left = shared(budget, shape)
    assert shape.removed == total - left
    assert left <= total * (1 - share)
    back = [shared(budget, other) for other in wider(budget, shape)]
    fine = [n for n in back if n > left]
    assert not fine or max(fine) > total * (1 - share), "a step could be given back along every axis"
    for axis in {"ffn", "hidden"} & set(shape.sizes):
        assert shape.sizes[axis] == layout_of(name).sizes_at(0)[axis] or shape.sizes[axis] % (align or 1) == 0
    assert all(1 <= n <= layout_of(name).sizes_at(0)[a] for a, n in shape.sizes.items()) and shape.layers >= 1


@settings(max_examples=20, deadline=None)
@given(NAMES, st.sampled_from(CHOICES), st.sampled_from(AMOUNTS))
def test_what_is_out_of_reach_is_said_with_what_is_not(name: str, axes: tuple[str, ...], of: str) -> None:
    assume(possible(name, axes, of) and (of != "kv-cache" or {"kv", "layer"} & set(axes)))
    budget = budget_of(name, 0.99999, axes, of)
    with pytest.raises(UsageError) as error:
        allocate_uniform(budget)
    most = float(error.value.what.rsplit("and ", 1)[1].rstrip("%")) / 100
    assert 0 < most < 1
    assert allocate_uniform(budget_of(name, most, axes, of)).removed >= most * budget.before.amount(of)
    with pytest.raises(UsageError):
        allocate_uniform(budget_of(name, min(most + 0.0011, 0.99999), axes, of))


@pytest.mark.parametrize("align", [1, 16, 48, 64])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_a_split_that_spares_the_heads_is_compared_however_coarse_the_channels_are(share: float, align: int) -> None:
    budget = budget_of("llama", share, ("kv", "query", "ffn"), align=align)
    full = budget.full()
    shapes = uniform_shapes(budget)
    assert any(s.sizes["kv"] == full["kv"] and s.sizes["query"] == full["query"] for s in shapes)
    assert allocate_uniform(budget) in shapes and len(shapes) <= MOST_MEASURED


def test_in_brief_splits_along_one_axis_are_three_of_the_many_and_others_as_many_as_ever() -> None:
    line, plane = budget_of("gpt2", 0.2, ("kv", "ffn")), budget_of("llama", 0.2, ("kv", "query", "ffn"))
    many, few = uniform_shapes(line), uniform_shapes(line, brief=True)
    groups = [s.sizes["kv"] for s in few]
    assert len(few) == FEW_MEASURED < len(many) <= MOST_MEASURED
    assert {min(groups), max(groups)} == {min(s.sizes["kv"] for s in many), max(s.sizes["kv"] for s in many)}
    assert allocate_uniform(line) in few
    assert uniform_shapes(plane, brief=True) == uniform_shapes(plane) and len(uniform_shapes(plane)) > FEW_MEASURED


def scored(layout: Layout, axes: tuple[str, ...], seed: int, *, comparable: bool) -> Scores:
    """Random scores, some layers better than others."""
    g = torch.Generator().manual_seed(seed)
    out = Scores(comparable=comparable)
    for axis in axes:
        if axis in ("layer", "hidden"):
            out.of[None, axis] = torch.rand(layout.num_layers if axis == "layer" else layout.sizes["hidden"], generator=g)
            continue
        for i in range(layout.num_layers):
            sizes = layout.sizes_at(i)
            n = sizes[axis] * sizes.get(layout.parents.get(axis, ""), 1)
            out.of[i, axis] = torch.rand(n, generator=g) * (1 + 3 * float(torch.rand((), generator=g)))
    return out


def left_by(budget: Budget, sizes: Mapping[int, Sizes]) -> int:
    return account(budget.layout, sorted(sizes.items()), context=budget.context).amount(budget.amount.of)


PROTECTED = st.sampled_from([frozenset(), frozenset({0}), frozenset({0, 1, 5})])


@LOOK
@given(
    NAMES,
    SHARES,
    st.sampled_from([("ffn",), ("kv", "query"), WIDTHS]),
    st.sampled_from(AMOUNTS),
    st.integers(0, 9),
    st.booleans(),
    PROTECTED,
    st.sampled_from([None, 8, 64]),
)
def test_global_meets_the_budget_by_less_than_a_step(
    name: str, share: float, axes: tuple[str, ...], of: str, seed: int, comparable: bool, protected: Any, align: int | None
) -> None:
    assume(possible(name, axes, of))
    budget = budget_of(name, share, axes, of, protected=protected, align=align)
    layout, total = budget.layout, budget.before.amount(of)
    scores = scored(layout, axes, seed, comparable=comparable)
    try:
        sizes = allocate_ranked(budget, scores)
    except UsageError as error:
        assert "can give between" in error.what
        least = {a: budget.step(a) if a == "ffn" else 1 for a in axes}
        assert left_by(budget, {i: {} if i in protected else least for i in range(layout.num_layers)}) > total * (1 - share)
        return
    assert left_by(budget, sizes) <= total * (1 - share)
    for i, own in sizes.items():
        full = layout.sizes_at(i)
        for axis, n in own.items():
            assert 1 <= n <= full[axis] and (i not in protected or n == full[axis])
            step = budget.step(axis)
            assert n == full[axis] or n % step == 0
            if n < full[axis]:
                more = {**sizes, i: {**own, axis: min(full[axis], (n // step + 1) * step)}}
                gained = left_by(budget, more)
                assert gained > total * (1 - share) or gained == left_by(budget, sizes), (
                    f"{axis} of layer {i} can have a step back"
                )


@pytest.mark.parametrize("axes", [WIDTHS, ("ffn",), ("layer", "ffn"), ("hidden", *WIDTHS), ("layer",)])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_what_stays_is_what_scores_best(name: str, axes: tuple[str, ...]) -> None:
    layout = layout_of(name)
    scores = scored(layout, axes, 4, comparable=True)
    plan = make_plan(budget_of(name, 0.3, axes), scores, shape="uniform", allocate="uniform")
    if "layer" in axes:
        value = scores.of[None, "layer"]
        sources = [layer.source for layer in plan.layers]
        assert sources == sorted(value.argsort(descending=True)[: len(sources)].tolist())
    for i, layer in enumerate(plan.layers):
        sizes = layout.sizes_at(layer.source)
        chosen = plan.selection(i, layout)
        for axis, kept in chosen.items():
            value = scores.of[None if axis == "hidden" else layer.source, axis]
            parent = layout.parents.get(axis)
            if parent is None:
                rows, indices = [value], [kept]
            else:
                outer = chosen.get(parent, torch.arange(sizes[parent]))
                rows, indices = list(value.reshape(sizes[parent], -1)[outer]), list(kept.index)  # type: ignore[union-attr, index]
            for row, index in zip(rows, indices, strict=True):
                gone = torch.ones(len(row), dtype=torch.bool).index_fill(0, index, False)  # type: ignore[arg-type]
                assert not gone.any() or row[gone].max() <= row[~gone].min()


def test_ties_go_to_the_lower_index_and_the_plan_counts_what_it_leaves() -> None:
    layout = layout_of("llama")
    scores = Scores(
        {(i, a): torch.ones(layout.sizes_at(i)["ffn"] if a == "ffn" else 4) for i in range(6) for a in ("ffn", "kv")}
    )
    plan = make_plan(budget_of("llama", 0.25, ("ffn", "kv")), scores, shape="uniform", allocate="uniform")
    assert all(
        kept == f"0-{plan.sizes(i, layout)[a] - 1}" for i, layer in enumerate(plan.layers) for a, kept in layer.keep.items()
    )
    layers = [(layer.source, plan.sizes(i, layout)) for i, layer in enumerate(plan.layers)]
    assert plan.after == account(layout, layers) and plan.before == account(layout)
    assert plan.removed == 1 - plan.after.block_params / plan.before.block_params


@pytest.mark.parametrize("axes", [("layer",), ("layer", "ffn")])
def test_protected_layers_stay_as_they_are(axes: tuple[str, ...]) -> None:
    layout, protected = layout_of("llama"), frozenset({0, 1, 5})
    scores = scored(layout, axes, 0, comparable=True)
    scores.of[None, "layer"][0] = -9
    plan = make_plan(budget_of("llama", 0.3, axes, protected=protected), scores, shape="per-layer", allocate="uniform")
    assert protected <= {layer.source for layer in plan.layers}
    assert all(not layer.keep for layer in plan.layers if layer.source in protected) and plan.removed >= 0.3


def test_settings_that_exclude_each_other_are_refused() -> None:
    scores = scored(layout_of("llama"), ("ffn", "layer"), 0, comparable=True)

    def plan(axes: tuple[str, ...], protected: frozenset[int] = frozenset(), **how: Any) -> Plan:
        return make_plan(budget_of("llama", 0.2, axes, protected=protected), scores, **how)

    for how in (
        {"axes": ("ffn",), "shape": "uniform", "allocate": "global"},
        {"axes": ("ffn", "layer"), "shape": "per-layer", "allocate": "global"},
        {"axes": ("ffn",), "shape": "uniform", "allocate": "uniform", "protected": frozenset({0})},
        {"axes": ("ffn",), "shape": "uniform", "allocate": "knapsack"},
    ):
        with pytest.raises(UsageError):
            plan(**how)  # type: ignore[arg-type]


@pytest.mark.parametrize("remove", [0, 1, -0.1, 1.5, math.nan, math.inf, True, "0.2", None])
def test_shares_that_are_none_are_refused(remove: Any) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        Amount(remove)


def test_a_share_of_nothing_known_is_refused() -> None:
    with pytest.raises(UsageError, match="block-params"):
        Amount(0.2, "latency")


def test_a_uniform_shape_is_one_that_a_config_can_say() -> None:
    asked: list[tuple[Sizes, int | None]] = []

    def written_as(sizes: Sizes, hidden: int | None) -> str | None:
        asked.append((sizes, hidden))
        heads = sizes.get("kv", 4) * sizes.get("query", 4)
        return "llama" if heads in (16, 4) else "mistral" if heads == 12 else None

    shares = [s / 100 for s in range(5, 60, 5)]
    shapes = [allocate_uniform(budget_of("llama", s, WIDTHS, written_as=written_as)) for s in shares]
    heads = [s.sizes["kv"] * s.sizes["query"] for s in shapes]
    assert asked and set(heads) <= {16, 12, 4}
    free = [allocate_uniform(budget_of("llama", s, WIDTHS)) for s in shares]
    assert any(s.sizes["kv"] * s.sizes["query"] not in (16, 12, 4) for s in free)
    with pytest.raises(UsageError, match="per-layer"):
        allocate_uniform(budget_of("llama", 0.3, WIDTHS, written_as=lambda sizes, hidden: None))


def test_rows_of_stacked_experts_stay_a_multiple_of_16_bytes() -> None:
    for axes in (("ffn",), ("hidden",), ("hidden", *WIDTHS)):
        for share in (0.07, 0.23, 0.41):
            shape = allocate_uniform(budget_of("mixtral", share, axes, align=3 if share == 0.41 else None))
            assert shape.sizes.get("ffn", 8) % 8 == 0 and (shape.hidden or 8) % 8 == 0
    model = tiny.cut(tiny.model("mixtral"), structures=("ffn",), remove=0.13).model
    assert model is not None and model.config._experts_implementation != "eager" and bool(tiny.logits(model).isfinite().all())


def test_a_dear_unit_is_bought_at_its_present_price() -> None:
    """What a KV group saves shrinks with its query heads: the order must not go by what it would have saved before."""
    layout = layout_of("llama")
    scores = Scores(comparable=True)
    for i in range(6):
        scores.of[i, "kv"] = torch.full((4,), 10.0) if i else torch.tensor([1.0, 10.0, 10.0, 10.0])
        scores.of[i, "query"] = torch.full((16,), 10.0) if i else torch.tensor([0.01, 0.01, 0.01, 10.0] * 4)
        scores.of[i, "ffn"] = torch.full((704,), 0.03)
    head, channel = 2 * 16 * 256, 3 * 256
    group, thinned, query = 5 * head, 2 * head, 4 * head  # whole; with one query head left; one query head of each group
    assert 4 * 0.01 / query < 1.0 / group < 0.03 / channel < 1.0 / thinned
    share = (3 * query + 8 * channel) / account(layout).block_params
    sizes = allocate_ranked(budget_of("llama", share, WIDTHS), scores)
    assert sizes[0]["query"] == 1 and sizes[0]["kv"] == 4


def test_a_coarse_last_step_gives_fine_ones_back() -> None:
    layout = layout_of("llama")
    scores = Scores(comparable=True)
    for i in range(6):
        scores.of[i, "ffn"] = torch.full((704,), 99.0 if i else 0.001)
        scores.of[i, "kv"] = torch.full((4,), 1.0)
    step = budget_of("llama", 0.5, ("ffn",)).step("ffn") * 3 * 256
    share = (700 * 3 * 256 + step) / account(layout).block_params  # one step more than layer 0's channels can give
    budget = budget_of("llama", share, ("ffn", "kv"))
    sizes = allocate_ranked(budget, scores)
    assert sum(4 - own["kv"] for own in sizes.values()) == 1 and 4 < sizes[0]["ffn"] < 704
    assert 0 <= budget.before.block_params * (1 - share) - left_by(budget, sizes) < step
