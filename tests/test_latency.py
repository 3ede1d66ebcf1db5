"""Sizes for a time: the table is measured on real blocks, and the choice from it is the best that there is."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import pared
import tiny
from pared.budget import Amount, Budget
from pared.budget.select import select
from pared.budget.timed import TICKS, Times, allocate_timed, knapsack, lost
from pared.effort import no_scores
from pared.errors import UsageError
from pared.latency import Workload, times_for
from pared.proof import proved_layout
from pared.scores import Scores
from pared.stream import Stream

IDS = tiny.tokens(8, 24)
WIDTH = ("kv", "query", "ffn")
OPTIONS = st.lists(st.tuples(st.integers(0, 50).map(float), st.integers(0, 30)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(OPTIONS.map(lambda o: [(0.0, 0), *o]), min_size=1, max_size=4), st.integers(0, 70))
def test_the_knapsack_is_the_best_of_all_choices(groups: list[list[tuple[float, int]]], target: int) -> None:
    every = itertools.product(*(range(len(g)) for g in groups))
    enough = [c for c in every if sum(groups[k][p][1] for k, p in enumerate(c)) >= target]
    found = knapsack(groups, target)
    if not enough:
        assert found is None
        return
    assert found is not None and tuple(found) in enough
    assert sum(groups[k][p][0] for k, p in enumerate(found)) == min(
        sum(groups[k][p][0] for k, p in enumerate(c)) for c in enough
    )


def budget_of(share: float, protected: frozenset[int] = frozenset()) -> Budget:
    return Budget(proved_layout(tiny.model("llama").config), Amount(share), WIDTH, protected)


def made_times(budget: Budget) -> Times:
    """Times like those of a device whose attention costs as much as it has heads, and whose FFN comes in tiles of 16."""
    heads = [({"kv": a, "query": b}, 8.0 - a * b) for a in (4, 2, 1) for b in (2, 1)]
    tiles = [({"ffn": n}, 6.0 - 2.0 * math.ceil(n / 16)) for n in (48, 40, 32, 16, 8)]
    parts = [[(s, 20.0 - saved) for s, saved in part] for part in (heads, tiles)]
    return Times((0,) * 3, {0: 20.0}, {0: parts})


def random_scores(budget: Budget, seed: int = 0) -> Scores:
    scores, generator = no_scores(budget.layout, WIDTH), torch.Generator().manual_seed(seed)
    scores.of = {k: torch.rand(v.shape, generator=generator) for k, v in scores.of.items()}
    scores.comparable = True
    return scores


@pytest.mark.parametrize("share", [0.1, 0.2, 0.35])
def test_no_sizes_in_the_table_that_are_as_fast_lose_less(share: float) -> None:
    budget = budget_of(share)
    times, scores = made_times(budget), random_scores(budget)
    sizes = allocate_timed(budget, scores, times, uniform=False)
    assert times.of(sizes) <= (1 - share) * times.total
    cheapest = math.inf
    shapes = [{**a, **f} for a, _ in times.parts[0][0] for f, _ in times.parts[0][1]]
    loss = {(i, k): lost(budget, scores, i, s) for i in range(3) for k, s in enumerate(shapes)}
    saved = [times.saved(0, s) for s in shapes]
    for picks in itertools.product(range(len(shapes)), repeat=3):
        # Each saving is rounded down to a tick of the whole.
        if sum(saved[p] for p in picks) >= share * times.total * (1 + 1 / TICKS) + 6 * times.total / TICKS:
            cheapest = min(cheapest, sum(loss[i, p] for i, p in enumerate(picks)))
    assert sum(lost(budget, scores, i, s) for i, s in sizes.items()) <= cheapest + 1e-9


@pytest.mark.parametrize("share", [0.1, 0.35])
def test_a_uniform_choice_is_the_best_of_all_that_are_alike(share: float) -> None:
    budget = budget_of(share)
    times, scores = made_times(budget), random_scores(budget, 1)
    sizes = allocate_timed(budget, scores, times, uniform=True)
    assert sizes[0] == sizes[1] == sizes[2] and times.of(sizes) <= (1 - share) * times.total
    apart = allocate_timed(budget, scores, times, uniform=False)
    assert sum(lost(budget, scores, i, s) for i, s in apart.items()) <= sum(
        lost(budget, scores, i, s) for i, s in sizes.items()
    )


def test_what_is_lost_is_the_score_of_the_units_that_go() -> None:
    budget = budget_of(0.2)
    scores = random_scores(budget, 2)
    for sizes in ({"kv": 2, "query": 1}, {"kv": 4, "query": 1}, {"kv": 3, "query": 2}, {"ffn": 40}):
        keep = select(budget.layout, scores, 1, sizes)
        want = 0.0
        if "ffn" in sizes:
            want = float(scores.of[1, "ffn"].sum() - scores.of[1, "ffn"][keep["ffn"]].sum())
        if "kv" in sizes:
            groups = keep["kv"] if "kv" in keep else torch.arange(4)
            want = float(scores.of[1, "kv"].sum() - scores.of[1, "kv"][groups].sum())
            rows = scores.of[1, "query"].reshape(4, 2)[groups]
            want += float(rows.sum() - rows.gather(1, keep["query"].index).sum()) if "query" in keep else 0.0
        assert abs(lost(budget, scores, 1, sizes) - want) < 1e-5


def test_protected_layers_stay_and_too_much_is_said_with_what_can_be_had() -> None:
    budget = budget_of(0.1, frozenset({0}))
    assert not allocate_timed(budget, random_scores(budget), made_times(budget), uniform=False)[0]
    with pytest.raises(UsageError, match=r"can give 54\.9%"):
        allocate_timed(budget_of(0.9), random_scores(budget), made_times(budget), uniform=False)


def test_blocks_are_timed_once_and_read_from_the_file_after(tmp_path: Path) -> None:
    model = tiny.model("llama", intermediate_size=512)
    budget = Budget(proved_layout(model.config), Amount(0.2), WIDTH)
    stream, file = Stream(model, budget.layout), tmp_path / "times.json"
    times = times_for(stream, budget, Workload(1, 64), file)
    assert times.like == (0, 0, 0) and times.total > 0
    for options in times.parts[0]:
        assert options[0][1] == times.whole[0] and all(t > 0 for _, t in options)
    before = file.read_bytes()
    assert times_for(stream, budget, Workload(1, 64), file) == times and file.read_bytes() == before
    times_for(stream, budget, Workload(2, 64), file)  # another workload is another table in the same file
    assert times_for(stream, budget, Workload(1, 64), file) == times and file.read_bytes() != before
    file.write_text("{}{")
    with pytest.raises(UsageError, match="not a file of measured times"):
        times_for(stream, budget, Workload(1, 64), file)


def test_blocks_of_other_tensors_or_attention_are_timed_apart() -> None:
    for family, like in (("gemma3_text", (0, 1, 1, 0)), ("qwen3_moe", (0, 1, 0))):
        model = tiny.model(family)
        layout = proved_layout(model.config)
        axes = tuple(a for a in ("kv", "query") if layout.prunable(a))
        assert times_for(Stream(model, layout), Budget(layout, Amount(0.2), axes), Workload(1, 16), None).like == like


@pytest.mark.parametrize("shape", ["uniform", "per-layer"])
def test_a_model_is_cut_to_the_sizes_that_were_chosen(shape: str, tmp_path: Path) -> None:
    model = tiny.save(tiny.model("llama", intermediate_size=2048), tmp_path / "dense")
    how = {"allocate": "latency", "shape": shape, "remove": 0.15, "context": 64, "latency_table": str(tmp_path / "times.json")}
    done = pared.prune(model, out=tmp_path / "out", calibration=IDS, **how)
    said = done.report["latency"]
    assert said["predicted"] <= (1 - 0.15) * said["dense"] and done.report["requested"] is None
    again = pared.prune(model, dry_run=True, calibration=IDS, **how)
    assert again.plan.layers == done.plan.layers and again.report["latency"] == said
    loaded = pared.load(tmp_path / "out") if shape == "per-layer" else AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in loaded.parameters()) == done.plan.after.params


def test_what_can_not_be_timed_or_compared_is_said() -> None:
    model = tiny.model("llama")
    with pytest.raises(UsageError, match="times heads and FFN channels"):
        tiny.cut(model, allocate="latency", structures=("ffn", "hidden"), criterion="taylor", context=16)
    with pytest.raises(UsageError, match="compare between layers"):
        tiny.cut(model, allocate="latency", criterion="wanda_sp", context=16)
