"""The search for sizes: on budget at every move, never worse than its start, the same under the same seed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pared
import tiny
from pared.budget import Amount, Budget
from pared.budget.levels import measure_levels
from pared.budget.search import Shape, combined, mutate, search
from pared.budget.trials import ENOUGH, MOST_NEAR, NEAR, Judges
from pared.budget.uniform import allocate_uniform, per_layer, uniform_shapes
from pared.calibration import Batch
from pared.compensate import compensate
from pared.errors import UsageError
from pared.journal import Journal
from pared.plan import Plan, layer_plan
from pared.source import Source
from pared.stream import Stream
from pared.structure import Layout
from pared.surgery import cut_refitted
from pared.walk import Method

AXES = ("kv", "query", "ffn")


@lru_cache
def layout(family: str) -> Layout:
    return Source.open(tiny.model(family)).layout


def start_of(budget: Budget) -> Shape:
    full = {i: {a: budget.layout.sizes_at(i)[a] for a in budget.axes} for i in range(budget.layout.num_layers)}
    return {i: {**full[i], **s} for i, s in per_layer(budget, allocate_uniform(budget)).items()}


def removed(budget: Budget, shape: Shape) -> float:
    return 1 - budget.count(list(shape.items())).amount(budget.amount.of) / budget.before.amount(budget.amount.of)


@given(st.sampled_from([0.1, 0.3, 0.5]), st.sampled_from(["block-params", "params", "flops"]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_every_move_meets_the_budget_by_less_than_the_last_step(share: float, of: str, seed: int) -> None:
    budget = Budget(layout("llama"), Amount(share, of), AXES, align=4)
    rng, shape = torch.Generator().manual_seed(seed), start_of(budget)
    for _ in range(8):
        moved = mutate(budget, shape, rng)
        if moved is None:
            continue
        shape = moved
        assert removed(budget, shape) >= share - 1e-9
        for i, sizes in shape.items():
            full = budget.layout.sizes_at(i)
            assert all(1 <= n <= full[a] and (n == full[a] or n % budget.step(a) == 0) for a, n in sizes.items())
            wider = {**shape, i: {**sizes, "ffn": min(full["ffn"], sizes["ffn"] + budget.step("ffn"))}}
            assert wider == shape or removed(budget, wider) < share, "a step that the budget would have paid for"


def valley(shapes: list[Shape], share: float) -> list[float]:
    """A loss that wants the last layers wide."""
    return [sum((i + 1) / s["ffn"] + 0.1 / (s["kv"] * s["query"]) for i, s in shape.items()) for shape in shapes]


@pytest.mark.parametrize("seed", range(3))
def test_a_search_improves_and_its_seed_says_how(seed: int) -> None:
    budget = Budget(layout("llama"), Amount(0.3), AXES, align=1)
    start = start_of(budget)
    one, two = (search(budget, [start], valley, generations=25, seed=seed) for _ in range(2))
    assert one == two and one.generations <= 25  # fewer where there is no move left to try
    assert one.kl < one.start == valley([start], 1.0)[0] and valley([one.shape], 1.0)[0] == one.kl
    assert one.shape[2]["ffn"] > one.shape[0]["ffn"] and removed(budget, one.shape) >= 0.3


def test_a_search_that_finds_nothing_gives_back_its_best_start() -> None:
    budget = Budget(layout("llama"), Amount(0.3), AXES, align=1)
    starts = [start_of(budget), *({i: dict(s.sizes) for i in range(3)} for s in uniform_shapes(budget))]
    flat = search(budget, starts, lambda shapes, share: [1.0] * len(shapes), generations=3)
    assert flat.shape == starts[0] and flat.kl == flat.start == 1.0
    best = search(budget, starts, valley, generations=1)
    assert best.start == min(valley(starts, 1.0)) >= best.kl


def test_a_search_goes_on_from_any_generation_to_the_same_end(tmp_path: Path) -> None:
    budget = Budget(layout("llama"), Amount(0.3), AXES, align=1)
    start, whole = start_of(budget), {}
    for generations in range(1, 6):  # each goes on from where the one before it ended
        journal = Journal(tmp_path, {})
        done = search(budget, [start], valley, generations=generations, seed=4, journal=journal)
        whole[generations] = done
    assert done == search(budget, [start], valley, generations=5, seed=4) and done.generations == 5
    assert whole[1].start == done.start and done.kl < whole[1].kl

    def unwanted(shapes: list[Shape], share: float) -> list[float]:
        raise AssertionError("nothing is judged anew")

    assert search(budget, [start], unwanted, generations=5, seed=4, journal=Journal(tmp_path, {})) == done


@given(st.sampled_from([0.1, 0.3, 0.5]), st.lists(st.floats(-1, 1), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_moves_taken_together_meet_the_budget(share: float, shares: list[float], seed: int) -> None:
    budget = Budget(layout("llama"), Amount(share), AXES, align=4)
    rng, shape = torch.Generator().manual_seed(seed), start_of(budget)
    children = [c for _ in shares if (c := mutate(budget, shape, rng)) is not None]
    together = combined(budget, shape, children, shares)
    if together is not None:
        assert removed(budget, together) >= share - 1e-9
        for i, sizes in together.items():
            full = budget.layout.sizes_at(i)
            assert all(1 <= n <= full[a] and (n == full[a] or n % budget.step(a) == 0) for a, n in sizes.items())
    assert combined(budget, shape, children, [0.0] * len(children)) is None


def test_moves_that_gain_are_taken_together_and_those_that_lose_backwards() -> None:
    """Where what layers lose adds up, one generation goes further than its best child."""
    budget = Budget(layout("llama"), Amount(0.3), ("ffn",), align=1)
    start = start_of(budget)
    seen: list[tuple[int, float]] = []

    def judge(shapes: list[Shape], share: float) -> list[float]:
        losses = [10.0 - sum(0.01 * i * s["ffn"] for i, s in shape.items()) for shape in shapes]
        seen.append((len(shapes), min(losses)))
        return losses

    found = search(budget, [start], judge, generations=1, seed=1)
    (_, _), (_, best_child), (judged, best) = seen
    assert judged == 3 and found.kl == best < best_child


def test_protected_layers_are_not_moved() -> None:
    budget = Budget(layout("llama"), Amount(0.1), ("ffn",), frozenset([0]), align=1)
    shape = start_of(budget)
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        shape = mutate(budget, shape, rng) or shape
        assert shape[0]["ffn"] == 48


def rows(n: int, seed: int = 0) -> list[Batch]:
    return [Batch(row, None) for row in tiny.tokens(n, 16, seed=seed).split(1)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2"])
def test_a_trial_is_what_the_walk_would_make_of_that_shape(family: str) -> None:
    model = tiny.model(family)
    source = Source.open(model)
    stream = Stream(model, source.layout)
    axes = tuple(a for a in AXES if source.layout.prunable(a))
    judges = Judges(stream, axes, rows(16), 4)
    full = source.layout.sizes_at(1)
    shape = {1: {"ffn": full["ffn"] // 2}, 2: {"ffn": full["ffn"] - 8}}
    got, none = judges.sequential([shape, {}], 1.0)
    assert none == 0.0 < got
    levels = judges._levels
    layers = [layer_plan(i, levels[i].select(shape.get(i, {})), full) for i in range(source.layout.num_layers)]
    budget = Budget(source.layout, Amount(0.2), axes)
    plan = Plan(
        model_type=source.layout.model_type, shape="per-layer", before=budget.before, after=budget.before, layers=layers
    )
    walk = compensate(stream, plan, judges.fit, Method(inputs=False, guarded=False))
    cut, _ = cut_refitted(model, source.layout, plan, walk)
    ids = torch.cat([b.input_ids for b in judges.judged])
    p, q = (torch.log_softmax(tiny.logits(m, ids).float(), -1) for m in (model, cut))
    assert got == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_trials_side_by_side_are_trials_one_by_one() -> None:
    model = tiny.model("llama")
    stream = Stream(model, layout("llama"))
    judges = Judges(stream, AXES, rows(16), 4)
    shapes: list[Shape] = [
        {0: {"ffn": 24}},
        {0: {"ffn": 24}, 2: {"query": 1}},
        {0: {"ffn": 24}, 1: {"kv": 3}, 2: {"query": 1}},
        {},
    ]
    for judge in (lambda s: judges.sequential(s, 0.5), judges.quick):
        together = judge(shapes)
        assert together == [judge([s])[0] for s in shapes] and together[3] == 0.0 < together[0]


def test_uniform_shapes_that_come_near_each_other_are_compared_as_the_walk_would_make_them() -> None:
    stream = Stream(tiny.model("llama"), layout("llama"))
    shapes: list[Shape] = [{i: s for i in range(3)} for s in ({"ffn": 24}, {"ffn": 32, "query": 1}, {"ffn": 26}, {"ffn": 4})]
    few, enough = (Judges(stream, AXES, rows(n), 4) for n in (ENOUGH - 1, ENOUGH))
    assert few.uniform(shapes) == few.quick(shapes)
    quick, again = enough.quick(shapes), enough.uniform(shapes)
    least = min(quick)
    near = [k for k, loss in enumerate(quick) if loss <= NEAR * least]
    assert 1 < len(near) <= MOST_NEAR < len(shapes) and min(again[k] for k in range(4) if k not in near) > NEAR * least
    # The order among these is that of the walk: the same sequences to fit to and to judge by.
    walked = Judges(stream, AXES, rows(ENOUGH), 4)
    walked.fit, walked.judged = walked.again, walked.compared
    found = walked.sequential([shapes[k] for k in near], 1.0)
    ratios = [again[k] / loss for k, loss in zip(near, found, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(near))
    assert again[min(near, key=quick.__getitem__)] == pytest.approx(least)


def test_parts_of_a_sequence_give_the_divergence_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    judges = Judges(Stream(tiny.model("llama"), layout("llama")), AXES, rows(16), 4)
    shapes: list[Shape] = [{0: {"ffn": 24}}, {}]
    whole = judges.quick(shapes)
    monkeypatch.setattr("pared.budget.trials.FEW", 5)
    assert judges.quick(shapes) == pytest.approx(whole, rel=1e-5) and whole[1] == 0.0


def test_one_elimination_gives_every_size_its_units_and_its_refit() -> None:
    model = tiny.model("llama")
    stream = Stream(model, layout("llama"))
    hidden = stream.embed(rows(8))
    with stream.block(0) as block, torch.no_grad():
        _, alone = measure_levels(stream, block, 0, hidden, AXES)
        _, together = measure_levels(stream, block, 0, hidden, AXES)
        sizes = [{"ffn": n} for n in (40, 24, 8)]
        together.prepare(sizes, stream.pool)
        for own in sizes:
            keep = together.select(own)
            (name,) = together.tensors(block, keep)
            solved = alone.tensors(block, keep)[name]
            assert len(keep["ffn"]) == own["ffn"] and torch.allclose(together.tensors(block, keep)[name], solved, atol=1e-4)


def test_a_search_needs_second_order_selection() -> None:
    with pytest.raises(UsageError, match="second-order"):
        tiny.cut(tiny.model("llama"), shape="per-layer", allocate="search")
    with pytest.raises(UsageError, match="its own size"):
        tiny.cut(tiny.model("llama"), shape="uniform", allocate="search")


def pruned(model: Any, **settings: Any) -> Any:
    ids = tiny.tokens(16, 16)
    return pared.prune(model, **{"calibration": ids, "remove": 0.3, "align": 1, "batch": 4, "search_steps": 2, **settings})


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_what_a_dry_run_plans_is_what_is_cut_and_refitted(shape: str, tmp_path: Any) -> None:
    model = tiny.model("llama")
    model.save_pretrained(tmp_path / "dense")
    planned = pruned(tmp_path / "dense", shape=shape, dry_run=True).plan
    live = pruned(model, shape=shape)
    pruned(tmp_path / "dense", shape=shape, out=tmp_path / "out")
    assert planned.layers == live.plan.layers == Plan.load(tmp_path / "out" / "plan.json").layers
    assert planned.after == live.plan.after and planned.removed >= 0.3
    written = pared.load(tmp_path / "out")
    assert tiny.equal_states(written, live.model)
    sum_of = sum(p.numel() for n, p in written.named_parameters() if ".layers." in n)
    assert sum_of == planned.after.block_params


def test_a_search_that_ran_is_recorded_in_the_plan() -> None:
    found = pruned(tiny.model("llama"), shape="per-layer").plan.provenance["search"]
    assert found["kl"] <= found["start"] and found["generations"] == 2
