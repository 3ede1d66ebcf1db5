"""The refit is the optimum, and what removal is said to cost is what it costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pared.leastsquares import Guarded, Moments2, cholesky, refit, refit_guarded


def correlated(tokens: int, n: int, seed: int = 0) -> Tensor:
    """Inputs whose channels depend on each other, so that a refit has something to do."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g) / n**0.5 + torch.eye(n)
    return torch.randn(tokens, n, generator=g) @ mix + 0.5


def moments(a: Tensor, t: Tensor) -> Moments2:
    out = Moments2.zeros(a.shape[1], t.shape[1])
    out.add(a, t)
    return out


@pytest.mark.parametrize("centred", [False, True])
def test_the_refit_is_what_lstsq_finds_and_any_other_weights_are_worse(centred: bool) -> None:
    a, w = correlated(400, 10), torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    t, kept = a @ w.T, torch.tensor([0, 2, 3, 7, 9])
    problem = moments(a, t).problem(centred=centred)
    new = refit(problem, w, kept, damping=1e-9)
    inputs = a[:, kept].double()
    if centred:
        inputs = torch.cat([inputs, torch.ones(len(a), 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(inputs, t.double()).solution.T
    assert torch.allclose(new, best[:, : len(kept)], atol=1e-4)
    least = problem.error(new, kept)
    realised = ((t - a[:, kept] @ new.float().T - problem.bias(new, kept).float()) ** 2).sum(1).mean()
    assert least == pytest.approx(float(realised), rel=1e-3)
    for seed in range(20):
        step = 1e-3 * torch.randn(new.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert problem.error(new + step, kept) > least


def test_keeping_everything_changes_nothing() -> None:
    a, w = correlated(200, 8), torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    new = refit(moments(a, a @ w.T).problem(centred=False), w, torch.arange(8))
    assert torch.allclose(new.float(), w, atol=1e-3)


def test_the_guard_never_takes_weights_that_are_worse_on_held_out_tokens() -> None:
    w = torch.randn(4, 12, generator=torch.Generator().manual_seed(5))
    kept = torch.arange(8)
    for seed in range(10):
        # Far too few tokens to fit on: a refit follows their noise.
        g = torch.Generator().manual_seed(seed)
        a, held = correlated(6, 12, seed), correlated(300, 12, seed + 100)
        noise = torch.randn(6, 4, generator=g)
        fit, check = moments(a, a @ w.T + 3 * noise), moments(held, held @ w.T)
        parts = [m.problem(centred=False) for m in (fit, check, fit.plus(check))]
        new, _, damping = refit_guarded(Guarded(*parts), w, kept)
        if damping is None:
            assert torch.equal(new, w.double()[:, kept])
        else:
            problem = check.problem(centred=False)
            chosen = refit(fit.problem(centred=False), w, kept, damping)
            assert problem.error(chosen, kept) < problem.error(w.double()[:, kept], kept)


def test_a_singular_matrix_is_lifted_and_still_solved() -> None:
    a = torch.randn(3, 6, generator=torch.Generator().manual_seed(6))
    factor = cholesky((a.T @ a).double())
    assert torch.isfinite(factor).all() and torch.allclose(factor @ factor.T, (a.T @ a).double(), atol=1e-6)


@pytest.mark.parametrize("biased", [False, True])
def test_moments_of_derived_targets_are_those_of_the_targets_themselves(biased: bool) -> None:
    g = torch.Generator().manual_seed(9)
    a, h, w = correlated(300, 7, 9), correlated(300, 7, 10), torch.randn(5, 7, generator=g)
    bias = torch.randn(5, generator=g) if biased else None
    shift = 0.0 if bias is None else bias
    through = moments(a, h).through(w, bias)
    direct = moments(a, h @ w.T + shift)
    inputs = Moments2.zeros(7, 5)
    inputs.add_inputs(a)
    own, same = inputs.of_output(w, bias), moments(a, a @ w.T + shift)
    for got, want in ((through, direct), (own, same)):
        for name in ("count", "aa", "ta", "a", "t"):
            assert torch.allclose(
                torch.as_tensor(getattr(got, name)), torch.as_tensor(getattr(want, name)), rtol=1e-3, atol=1e-2
            )
    assert own.tt == pytest.approx(same.tt, rel=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("centred", [False, True])
def test_a_mixed_target_is_the_mixture_of_targets(alpha: float, centred: bool) -> None:
    g = torch.Generator().manual_seed(11)
    a, t, w = correlated(300, 6, 11), torch.randn(300, 4, generator=g), torch.randn(4, 6, generator=g)
    bias = torch.randn(4, generator=g) if centred else None
    local = a @ w.T + (0.0 if bias is None else bias)
    got = moments(a, t).problem(centred=centred).mixed(w, bias, alpha)
    want = moments(a, (1 - alpha) * local + alpha * t).problem(centred=centred)
    kept = torch.tensor([0, 2, 5])
    one, two = refit(got, w, kept), refit(want, w, kept)
    assert torch.allclose(one, two, atol=1e-3)
    assert got.error(one, kept) == pytest.approx(want.error(two, kept), rel=1e-2)
    assert torch.allclose(got.bias(one, kept), want.bias(two, kept), atol=1e-3)
