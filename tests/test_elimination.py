"""What a removal is said to cost is what it costs, and the order in which units go is the best where greed is exact."""

from __future__ import annotations

import itertools

import pytest
import torch

from pared.axes import Nested, parse
from pared.elimination import Elimination, choose_units, elimination_costs
from pared.inverses import WAITING, DenseInverse, FewInverse
from pared.leastsquares import DAMPING, ridge
from test_leastsquares import correlated, moments, refit, rows


@pytest.mark.parametrize("width", [1, 2])
def test_the_first_cost_is_the_error_that_the_best_refit_leaves(width: int) -> None:
    a, w = correlated(500, 8), torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    problem = moments(a, a @ w.T).problem(centred=False)
    blocks = torch.arange(8).reshape(-1, width)
    costs = elimination_costs(Elimination.of(problem.c, w, damping=1e-12), blocks, rounds=1000)
    first = int(costs.argmin())
    errors = []
    for block in blocks:
        kept = torch.tensor([i for i in range(8) if i not in block])
        errors.append(problem.at(kept).error(refit(problem, w, kept, 1e-12)))
    assert first == min(range(len(errors)), key=errors.__getitem__)
    assert float(costs[first]) == pytest.approx(errors[first], rel=1e-3)


def test_down_dated_costs_add_up_to_the_error_of_the_whole_removal() -> None:
    a, w = correlated(500, 8, seed=3), torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    problem = moments(a, a @ w.T).problem(centred=False)
    costs = elimination_costs(Elimination.of(problem.c, w, damping=1e-12), torch.arange(8)[:, None], rounds=1000)
    order = costs.argsort()
    for gone in range(1, 5):
        kept = order[gone:].sort().values
        whole = problem.at(kept).error(refit(problem, w, kept, 1e-12))
        # Costs are made to ascend, so their sum may only be above; here they ascend of themselves.
        assert float(costs[order[:gone]].sum()) == pytest.approx(whole, rel=2e-2)


def test_independent_channels_go_in_the_order_that_brute_force_finds() -> None:
    c = torch.diag(torch.tensor([1.0, 4.0, 0.5, 2.0, 3.0, 0.1]))
    w = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))
    costs = elimination_costs(Elimination.of(c, w, damping=1e-12), torch.arange(6)[:, None], rounds=1000)
    alone = c.diagonal() * w.square().sum(0)
    for gone in range(1, 5):
        best = min(itertools.combinations(range(6), gone), key=lambda s: float(alone[list(s)].sum()))
        assert set(costs.argsort()[:gone].tolist()) == set(best)


def test_rounds_and_single_steps_agree_where_channels_are_independent() -> None:
    c, w = torch.diag(torch.rand(40) + 0.1), torch.randn(5, 40)
    blocks = torch.arange(40)[:, None]
    assert torch.equal(
        elimination_costs(Elimination.of(c, w), blocks, rounds=4).argsort(),
        elimination_costs(Elimination.of(c, w), blocks, rounds=1000).argsort(),
    )


def test_the_cost_of_any_removal_is_the_error_that_the_best_refit_leaves() -> None:
    a, w = correlated(500, 9, seed=7), torch.randn(4, 9, generator=torch.Generator().manual_seed(7))
    problem = moments(a, a @ w.T).problem(centred=False)
    for gone in [[0], [3, 5], [1, 2, 8]]:
        state, total = Elimination.of(problem.c, w, damping=1e-12), 0.0
        for column in gone:
            total += float(state.costs(torch.tensor([[column]]))[0])
            state.remove(torch.tensor([column]))
        kept = torch.tensor([i for i in range(9) if i not in gone])
        best = refit(problem, w, kept, 1e-12)
        assert total == pytest.approx(problem.at(kept).error(best), rel=1e-2)
        assert torch.allclose(state.weights.double(), best, atol=1e-3), "what is left is the refit itself"
        at_once = Elimination.of(problem.c, w, damping=1e-12)
        assert float(at_once.costs(torch.tensor([gone]))[0]) == pytest.approx(total, rel=1e-3)


def test_chosen_channels_are_those_that_brute_force_keeps_where_greed_is_exact() -> None:
    c = torch.diag(torch.tensor([1.0, 4.0, 0.5, 2.0, 3.0, 0.1]))
    w = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))
    alone = c.diagonal() * w.square().sum(0)
    for n in range(1, 6):
        found = choose_units(Elimination.of(c, w), parse("ffn").dims[0], {"ffn": 6}, {}, {"ffn": n})["ffn"]
        best = max(itertools.combinations(range(6), n), key=lambda s: float(alone[list(s)].sum()))
        assert tuple(found.tolist()) == best


def test_every_kept_group_keeps_as_many_heads_and_the_cheapest_of_all_go() -> None:
    sizes = {"kv": 4, "query": 3, "d": 2}
    a, w = correlated(600, 24, seed=8), torch.randn(5, 24, generator=torch.Generator().manual_seed(8))
    problem = moments(a, a @ w.T).problem(centred=False)
    node = parse("(kv query d)").dims[0]
    found = choose_units(Elimination.of(problem.c, w), node, sizes, {"query": "kv"}, {"kv": 3, "query": 2})
    heads = found["query"]
    assert isinstance(heads, Nested) and heads.parent == "kv" and heads.index.shape == (3, 2)
    assert len(found["kv"]) == 3 and bool((heads.index[:, 1] > heads.index[:, 0]).all())

    def error(groups: tuple[int, ...]) -> float:
        kept = torch.tensor([6 * k + j for k in groups for j in range(6)])
        return problem.at(kept).error(refit(problem, w, kept))

    assert tuple(found["kv"].tolist()) == min(itertools.combinations(range(4), 3), key=error)
    one = choose_units(Elimination.of(problem.c, w), node, sizes, {"query": "kv"}, {"query": 2})["query"]
    assert isinstance(one, Nested) and one.index.shape == (4, 2)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("tokens", [6, 12])
def test_few_tokens_are_eliminated_as_their_second_moments_are(width: int, centred: bool, own: bool, tokens: int) -> None:
    g = torch.Generator().manual_seed(9)
    a, w, t = correlated(tokens, 48, seed=9), torch.randn(5, 48, generator=g), torch.randn(tokens, 5, generator=g)
    blocks = torch.arange(48).reshape(-1, width)
    states = [
        Elimination.from_sums(known(a, t), w, centred=centred, scale=0.5, own=own)  # type: ignore[operator]
        for known in (moments, rows)
    ]
    assert isinstance(states[1].h, FewInverse if tokens == 6 else DenseInverse)
    copies = [state.copy() for state in states]
    for start in range(0, len(blocks) - 4, 4):
        alive = blocks[start:]
        assert torch.allclose(states[0].costs(alive), states[1].costs(alive), rtol=1e-3, atol=1e-5)
        for state in states:
            state.remove(alive[:4].reshape(-1))
        assert torch.allclose(states[0].weights, states[1].weights, atol=1e-3)
    assert torch.allclose(copies[0].costs(blocks), copies[1].costs(blocks), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("step", [7, WAITING, 2 * WAITING + 5])
def test_the_inverse_follows_what_goes_before_and_after_it_is_brought_up_to_date(step: int) -> None:
    n = 5 * WAITING
    a, w = correlated(4 * n, n, seed=11), torch.randn(3, n, generator=torch.Generator().manual_seed(11))
    c = (a.T @ a / len(a)).double() + 0.1 * torch.eye(n, dtype=torch.float64)
    state, order = Elimination.of(c, w), torch.randperm(n, generator=torch.Generator().manual_seed(12))
    added = ridge(float(c.diagonal().mean()), DAMPING)
    for start in range(0, 4 * WAITING, step):
        state.remove(order[start : start + step])
        left = order[start + step :].sort().values
        exact = torch.linalg.inv(c[left][:, left] + added * torch.eye(len(left), dtype=torch.float64))
        for now in (state, state.copy()):
            at = now._place[left]
            assert torch.allclose(now.h.diagonal()[at], exact.diagonal(), rtol=1e-9)
            assert torch.allclose(now.h.rows(at[:5])[:, at], exact[:5], rtol=1e-9, atol=1e-9)
            assert torch.allclose(now.h.squares(at[None, -4:])[0], exact[-4:, -4:], rtol=1e-9, atol=1e-9)
            best = w[:, left].double() + w[:, order[: start + step]].double() @ c[order[: start + step]][:, left] @ exact
            assert torch.allclose(now.weights.double(), best, atol=1e-4)


def test_errors_weighed_by_a_diagonal_are_those_weighed_by_its_matrix() -> None:
    a, w = correlated(500, 9, seed=5), torch.randn(4, 9, generator=torch.Generator().manual_seed(5))
    c, power = a.T @ a / len(a), torch.tensor([0.1, 2.0, 0.0, 7.0])
    costs = []
    for fisher in (power, torch.diag(power)):
        state = Elimination.of(c, w)
        state.weigh(fisher)
        costs.append(elimination_costs(state, torch.arange(9)[:, None], rounds=1000))
    assert torch.allclose(costs[0], costs[1], rtol=1e-4)
    assert not torch.allclose(costs[0], elimination_costs(Elimination.of(c, w), torch.arange(9)[:, None], rounds=1000))
