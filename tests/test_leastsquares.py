"""The refit is the optimum, and what removal is said to cost is what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pared.fewrows import BetweenTokens, FewRows
from pared.leastsquares import DAMPING, DAMPINGS, best_bias, choose_damping, factored, inverse, refit_guarded, transfer
from pared.moments import Moments2, NormalEquations


def correlated(tokens: int, n: int, seed: int = 0) -> Tensor:
    """Inputs whose channels depend on each other, so that a refit has something to do."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g) / n**0.5 + torch.eye(n)
    return torch.randn(tokens, n, generator=g) @ mix + 0.5


def moments(a: Tensor, t: Tensor) -> Moments2:
    out = Moments2.zeros(a.shape[1], t.shape[1])
    out.add(a, t)
    return out


def rows(a: Tensor, t: Tensor) -> FewRows:
    """The same tokens, kept as they are."""
    out = FewRows()
    for s in range(0, len(a), 100):
        out.add(a[s : s + 100], t[s : s + 100])
    return out


def refit(problem: NormalEquations | BetweenTokens, w: Tensor, kept: Tensor | None = None, damping: float = DAMPING) -> Tensor:
    return problem.solved(w, damping) if kept is None else problem.at(kept).solved(w[:, kept], damping)


@pytest.mark.parametrize("known", [moments, rows])
@pytest.mark.parametrize("centred", [False, True])
def test_the_refit_is_what_lstsq_finds_and_any_other_weights_are_worse(
    centred: bool, known: Callable[[Tensor, Tensor], Moments2 | FewRows]
) -> None:
    a, w = correlated(400, 10), torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    t, kept = a @ w.T, torch.tensor([0, 2, 3, 7, 9])
    problem = known(a, t).problem(centred=centred)
    new = refit(problem, w, kept, damping=1e-9)
    inputs = a[:, kept].double()
    if centred:
        inputs = torch.cat([inputs, torch.ones(len(a), 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(inputs, t.double()).solution.T
    assert torch.allclose(new, best[:, : len(kept)], atol=1e-4)
    least = problem.at(kept).error(new)
    realised = ((t - a[:, kept] @ new.float().T - best_bias(problem.at(kept), new).float()) ** 2).sum(1).mean()
    assert least == pytest.approx(float(realised), rel=1e-3)
    for seed in range(20):
        step = 1e-3 * torch.randn(new.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert problem.at(kept).error(new + step) > least


def test_keeping_everything_changes_nothing() -> None:
    a, w = correlated(200, 8), torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    new = refit(moments(a, a @ w.T).problem(centred=False), w, torch.arange(8))
    assert torch.allclose(new.float(), w, atol=1e-3)


def test_the_guard_never_takes_weights_that_are_worse_on_held_out_tokens() -> None:
    w = torch.randn(4, 12, generator=torch.Generator().manual_seed(5))
    kept, taken = torch.arange(8), 0
    for seed in range(10):
        # Far too few tokens to fit on: a refit follows their noise.
        g = torch.Generator().manual_seed(seed)
        a, held = correlated(6, 12, seed), correlated(300, 12, seed + 100)
        noise = torch.randn(6, 4, generator=g)
        fit, check = moments(a, a @ w.T + 3 * noise), moments(held, held @ w.T)
        scale = fit.scale(centred=False)
        new, _, damping = refit_guarded(fit.at(kept), check.at(kept), w[:, kept], centred=False, scale=scale)
        if damping is None:
            assert torch.equal(new, w.double()[:, kept])
        else:
            problem, taken = check.problem(centred=False), taken + 1
            chosen = refit(fit.problem(centred=False), w, kept, damping)
            assert problem.at(kept).error(chosen) < problem.at(kept).error(w.double()[:, kept])
    assert taken < 10


@pytest.mark.parametrize("peak", range(4))
def test_the_damping_with_the_largest_gain_is_found_and_none_where_none_gains(peak: int) -> None:
    gains = {d: 1.0 - abs(k - peak) for k, d in enumerate(DAMPINGS)}
    assert choose_damping(gains.__getitem__) == DAMPINGS[peak]
    assert choose_damping(lambda d: gains[d] - 1.0) is None


def test_a_singular_matrix_is_lifted_and_still_solved() -> None:
    a = torch.randn(3, 6, generator=torch.Generator().manual_seed(6))
    square = (a.T @ a).double()
    factor = factored(square.clone, 0.0)
    assert torch.isfinite(factor).all() and torch.allclose(factor @ factor.T, square, atol=1e-6)


def test_an_inverse_takes_the_place_of_its_matrix() -> None:
    a = correlated(50, 7).double()
    square = a.T @ a
    given = square.clone()
    found = inverse(lambda: given, 0.5)
    eye = torch.eye(7, dtype=torch.float64)
    assert torch.allclose(found @ (square + 0.5 * eye), eye, atol=1e-9) and found.data_ptr() == given.data_ptr()


@pytest.mark.parametrize("n", [7, 700])
def test_sums_of_squares_by_strips_are_those_of_the_whole(n: int) -> None:
    a = correlated(64, n, seed=12)
    found = moments(a, a[:, :3])
    assert torch.allclose(found.aa, a.T @ a, rtol=1e-4, atol=1e-3)
    kept = torch.arange(0, n, 3)
    assert torch.equal(found.at(kept).aa, found.aa[kept][:, kept])


@pytest.mark.parametrize("biased", [False, True])
def test_moments_of_derived_targets_are_those_of_the_targets_themselves(biased: bool) -> None:
    g = torch.Generator().manual_seed(9)
    a, w = correlated(300, 7, 9), torch.randn(5, 7, generator=g)
    bias = torch.randn(5, generator=g) if biased else None
    inputs = Moments2.zeros(7, 5)
    inputs.add_inputs(a)
    own, same = inputs.of_output(w, bias), moments(a, a @ w.T + (0.0 if bias is None else bias))
    for name in ("count", "aa", "ta", "a", "t"):
        assert torch.allclose(torch.as_tensor(getattr(own, name)), torch.as_tensor(getattr(same, name)), rtol=1e-3, atol=1e-2)
    assert own.tt == pytest.approx(same.tt, rel=1e-4)


@pytest.mark.parametrize("kept", [6, 4])
@pytest.mark.parametrize("centred", [False, True])
def test_a_transfer_is_the_refit_of_every_matrix_at_once(centred: bool, kept: int) -> None:
    """kept: of the channels, the first of which are all that is read."""
    g = torch.Generator().manual_seed(13)
    h = correlated(400, 6, 13)
    drifted = (h + 0.3 * torch.randn(400, 6, generator=g))[:, :kept]
    w, bias = torch.randn(9, 6, generator=g), torch.randn(9, generator=g)
    fit, held = moments(drifted[:300], h[:300]), moments(drifted[300:], h[300:])
    change, shift, damping = transfer(fit, held, [w[:4], w[4:]], centred=centred)
    assert damping is not None and change is not None
    moved = w[:, :kept] + change.onto(w)
    target = h @ w.T + (bias if centred else 0.0)
    direct = moments(drifted, target).problem(centred=centred)
    new = refit(direct, w[:, :kept], None, damping)
    assert torch.allclose(moved.double(), new, atol=1e-3)
    if centred:
        assert torch.allclose(bias + w.double() @ shift, best_bias(direct, new), atol=1e-3)
    error = (target - drifted @ moved.T - (bias + w @ shift.float() if centred else 0.0)).square().sum()
    assert error < (target - drifted @ w[:, :kept].T - (bias if centred else 0.0)).square().sum()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("centred", [False, True])
def test_a_mixed_target_is_the_mixture_of_targets(alpha: float, centred: bool) -> None:
    g = torch.Generator().manual_seed(11)
    a, t, w = correlated(300, 6, 11), torch.randn(300, 4, generator=g), torch.randn(4, 6, generator=g)
    bias = torch.randn(4, generator=g) if centred else None
    local = a @ w.T + (0.0 if bias is None else bias)
    got = moments(a, t).mixed(w, bias, alpha).problem(centred=centred)
    want = moments(a, (1 - alpha) * local + alpha * t).problem(centred=centred)
    kept = torch.tensor([0, 2, 5])
    one, two = refit(got, w, kept), refit(want, w, kept)
    assert torch.allclose(one, two, atol=1e-3)
    assert got.at(kept).error(one) == pytest.approx(want.at(kept).error(two), rel=1e-2)
    assert torch.allclose(best_bias(got.at(kept), one), best_bias(want.at(kept), two), atol=1e-3)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("n", [60, 700])
def test_few_tokens_give_what_their_second_moments_give(centred: bool, n: int) -> None:
    g = torch.Generator().manual_seed(14)
    a, held = correlated(40, n, 14), correlated(9, n, 15)
    w, bias = torch.randn(5, n, generator=g), torch.randn(5, generator=g) if centred else None
    t, aim = torch.randn(40, 5, generator=g), torch.randn(9, 5, generator=g)
    kept = torch.arange(0, n, 2)
    found: list[Any] = []
    for one, other in ((moments, moments), (rows, rows), (moments, rows)):
        fit, by = one(a, t).mixed(w, bias, 0.7), other(held, aim).mixed(w, bias, 0.7)
        scale = fit.scale(centred=centred)
        problem = fit.at(kept).problem(centred=centred, scale=scale)
        new = problem.solved(w[:, kept], 1e-2)
        gain = by.at(kept).problem(centred=centred).gain(w[:, kept], new)
        whole = fit.plus(by).at(kept).problem(centred=centred, scale=scale)  # type: ignore[arg-type]
        found.append((scale, new, gain, problem.error(new), best_bias(problem, new), whole.solved(w[:, kept], 1e-1)))
    for want, *others in zip(*found, strict=True):
        close(want, *others)


def close(want: Tensor | float, *others: Tensor | float) -> None:
    """Equal but for rounding, which is relative to the largest number."""
    want = torch.as_tensor(want)
    for got in others:
        assert torch.allclose(want, torch.as_tensor(got), atol=1e-3 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("known", [Moments2, FewRows])
def test_a_tokens_weight_is_how_often_it_counts(known: type[Moments2] | type[FewRows], centred: bool) -> None:
    g = torch.Generator().manual_seed(17)
    a, t, w = correlated(60, 12, 17), torch.randn(60, 5, generator=g), torch.randn(5, 12, generator=g)
    bias, times = torch.randn(5, generator=g) if centred else None, torch.randint(1, 5, (60,), generator=g)
    found: list[Any] = []
    for weighted in (True, False):
        parts = []
        for at in (slice(0, 40), slice(40, 60)):
            sums = known() if known is FewRows else Moments2.zeros(12, 5)
            if weighted:
                sums.add(a[at], t[at], times[at] / 7)
            else:
                sums.add(a[at].repeat_interleave(times[at], 0), t[at].repeat_interleave(times[at], 0))
            parts.append(sums.mixed(w, bias, 0.7))
        fit, by = parts
        new = refit(fit.problem(centred=centred), w)
        gain = by.problem(centred=centred).gain(w, new)
        scale, own = fit.scale(centred=centred), fit.of_output(w, bias).problem(centred=centred)
        every = fit.plus(by).problem(centred=centred)  # type: ignore[arg-type]
        found.append((scale, new, gain, own.error(new), every.solved(w, 1e-1), best_bias(every, new)))
    for got, want in zip(*found, strict=True):
        close(want, got)


@pytest.mark.parametrize("kept", [30, 22])
@pytest.mark.parametrize("centred", [False, True])
def test_few_tokens_are_moved_as_their_second_moments_are(centred: bool, kept: int) -> None:
    g = torch.Generator().manual_seed(16)
    h = correlated(50, 30, 16)
    drifted = (h @ (torch.eye(30) + 0.1 * torch.randn(30, 30, generator=g)))[:, :kept]
    weights = [torch.randn(4, 30, generator=g), torch.randn(7, 30, generator=g)]
    (change, shift, damping), *others = (
        transfer(fit(drifted[:40], h[:40]), by(drifted[40:], h[40:]), weights, centred=centred)  # type: ignore[operator]
        for fit, by in ((moments, moments), (rows, rows), (moments, rows))
    )
    assert damping is not None and change is not None
    for other, other_shift, other_damping in others:
        assert damping == other_damping and other is not None
        assert torch.allclose(change.onto(weights[1]), other.onto(weights[1]), atol=1e-3)
        assert torch.allclose(shift, other_shift, atol=1e-3)
