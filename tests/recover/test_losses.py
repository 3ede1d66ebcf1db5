"""The losses: sums in fp32 that are zero exactly where they should be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pared.recover import losses


def some(rows: int = 7, vocab: int = 50, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, vocab, generator=g), 3 * torch.randn(rows, vocab, generator=g)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_forward_kl_is_the_divergence_in_float64(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK", 100)  # two rows at a time
    ours, theirs = some()
    log_p, log_q = ((z.double() / temperature).log_softmax(-1) for z in (theirs, ours))
    want = (log_p.exp() * (log_p - log_q)).sum() * temperature**2
    assert float(losses.forward_kl(ours, theirs, temperature)) == pytest.approx(float(want), rel=1e-5)
    assert float(losses.cross_entropy(ours, torch.arange(7))) == pytest.approx(
        float(F.cross_entropy(ours, torch.arange(7), reduction="sum")), rel=1e-6
    )


@pytest.mark.parametrize("k", [0, 5, 50])
def test_learning_from_oneself_has_no_loss_and_no_gradient(k: int) -> None:
    ours = some()[0].requires_grad_(True)
    theirs = ours.detach()
    loss = losses.top_k_kl(ours, losses.top_k(theirs, k)) if k else losses.forward_kl(ours, theirs)
    loss.backward()
    assert abs(float(loss)) < 1e-5 and ours.grad is not None and float(ours.grad.abs().max()) < 1e-6


def test_what_is_kept_of_the_teacher_bounds_the_divergence_from_below() -> None:
    ours, theirs = some()
    full = float(losses.forward_kl(ours, theirs))
    found = [float(losses.top_k_kl(ours, losses.top_k(theirs, k))) for k in (1, 5, 20, 49, 50)]
    assert found == sorted(found) and found[0] > 0  # more outcomes tell more apart
    assert found[-1] == pytest.approx(full, rel=1e-5)
    assert found[-1] >= found[-2] - 1e-6


def test_the_gradient_of_top_k_is_that_of_float64() -> None:
    ours, theirs = (z.double() for z in some())

    def exact(z: torch.Tensor) -> torch.Tensor:
        log_p, ids = theirs.log_softmax(-1).topk(5)
        log_q = z.log_softmax(-1).gather(-1, ids)
        rest_p, rest_q = (1 - x.exp().sum(-1) for x in (log_p, log_q))
        return (log_p.exp() * (log_p - log_q)).sum() + (rest_p * (rest_p / rest_q).log()).sum()

    z = ours.clone().requires_grad_(True)
    exact(z).backward()
    y = ours.float().requires_grad_(True)
    losses.top_k_kl(y, losses.top_k(theirs.float(), 5)).backward()
    assert torch.allclose(y.grad, z.grad.float(), atol=1e-4)
