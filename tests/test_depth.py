"""What goes whole is found as its paper says: runs by their angle, what costs least by measuring again after each removal."""

from __future__ import annotations

import math

import pytest
from torch.nn import functional as F
from transformers import PreTrainedModel

import tiny
from pared.budget import Amount, Budget
from pared.calibration import Batch
from pared.criteria import get_criterion
from pared.depth import Depth
from pared.errors import UsageError
from pared.estimate import estimate
from pared.proof import proved_layout
from pared.scores import Scores
from pared.stream import Stream
from pared.structure import Layout
from pared.surgery import cut_model

IDS = tiny.tokens(8, 24)


def scores(model: PreTrainedModel, name: str, axes: tuple[str, ...], depth: Depth) -> Scores:
    return estimate(Stream(model, proved_layout(model.config)), get_criterion(name), axes, [Batch(IDS, None)], depth=depth)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_run_with_the_least_angle_goes(n: int) -> None:
    model = tiny.model("llama", num_hidden_layers=6)
    states = tiny.hidden_states(model, IDS)

    def angle(start: int) -> float:
        cosine = F.cosine_similarity(states[start].double(), states[start + n].double(), dim=-1)
        return float(cosine.arccos().mean()) / math.pi

    best = min(range(7 - n), key=angle)
    found = scores(model, "angular", ("layer",), Depth(n)).of[None, "layer"]
    assert sorted(found.argsort(stable=True)[:n].tolist()) == list(range(best, best + n))
    assert abs(float(found.min()) - angle(best)) < 1e-6
    plan = tiny.cut(model, structures=("layer",), criterion="angular", remove=n / 6, calibration=IDS, dry_run=True).plan
    assert sorted({0, 1, 2, 3, 4, 5} - {layer.source for layer in plan.layers}) == list(range(best, best + n))


def test_runs_leave_protected_layers_alone() -> None:
    model = tiny.model("llama", num_hidden_layers=6)
    for keep in range(4):
        plan = tiny.cut(
            model,
            structures=("layer",),
            criterion="angular",
            remove=0.3,
            keep_first=keep // 2,
            keep_last=keep - keep // 2,
            dry_run=True,
        ).plan
        kept = [layer.source for layer in plan.layers]
        assert kept[: keep // 2] == list(range(keep // 2)) and set(range(6 - keep + keep // 2, 6)) <= set(kept)


def test_a_run_that_may_not_go_is_said() -> None:
    with pytest.raises(UsageError, match="no 3 layers in a row"):
        scores(tiny.model("llama", num_hidden_layers=6), "angular", ("layer",), Depth(3, protected=frozenset({2, 4})))


def loss_without(model: PreTrainedModel, layout: Layout, gone: list[tuple[int, str]]) -> float:
    skips = [[k for j, k in gone if j == i] for i in range(layout.num_layers)]
    out = cut_model(model, layout, tiny.skipping(layout, skips))(input_ids=IDS, use_cache=False).logits
    return float(F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).detach())


def test_sublayers_go_in_the_order_of_what_they_cost_for_what_they_save() -> None:
    model = tiny.model("llama")
    layout = proved_layout(model.config)
    budget = Budget(layout, Amount(0.5), ("attention", "mlp"))
    found = scores(model, "perplexity", budget.axes, Depth(0, budget.target, budget.saves))
    gone: list[tuple[int, str]] = []
    while sum(budget.saves(i, {k: 0}) for i, k in gone) < budget.target:
        now = loss_without(model, layout, gone)
        left = [(i, k) for i in range(3) for k in budget.axes if (i, k) not in gone]
        gone.append(min(left, key=lambda u: (loss_without(model, layout, [*gone, u]) - now) / budget.saves(u[0], {u[1]: 0})))
    price = {u: float(v) / budget.saves(u[0], {u[1]: 0}) for u, v in found.of.items() if u[0] is not None}
    assert [u for u in sorted(price, key=lambda u: price[u]) if price[u] < 0] == gone
    plan = tiny.cut(
        model, structures=budget.axes, criterion="perplexity", shape="per-layer", remove=0.5, calibration=IDS, dry_run=True
    ).plan
    left = {layer.source: layer.skip for layer in plan.layers}
    assert {(i, k) for i in range(3) for k in budget.axes if i not in left or k in left[i]} <= set(gone)


def test_block_influence_of_a_sublayer_is_how_far_it_turns_the_output() -> None:
    model = tiny.model("llama")
    layout = proved_layout(model.config)
    found = scores(model, "block_influence", ("attention", "mlp"), Depth())
    states = tiny.hidden_states(model, IDS)
    for kind in ("attention", "mlp"):
        other = tiny.hidden_states(cut_model(model, layout, tiny.skipping(layout, [[kind], [], []])), IDS)
        cosine = F.cosine_similarity(states[1], other[1], dim=-1).mean()
        assert abs(float(found.of[0, kind]) - float(1 - cosine)) < 1e-6


@pytest.mark.parametrize("criterion", ["angular", "wanda_sp"])
def test_what_a_criterion_does_not_score_is_said(criterion: str) -> None:
    with pytest.raises(UsageError, match="does not score"):
        tiny.cut(tiny.model("llama"), structures=("attention",), criterion=criterion, shape="per-layer")
