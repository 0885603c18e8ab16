import pytest
import torch

from moesmith.build import routerfit
from moesmith.build.routerfit import (
    SCALE,
    SCALE_FP16,
    expert_output_norms,
    fit_ridge_router,
    kept_share,
    picked_share,
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_recovers_a_linear_ranking():
    x = torch.randn(500, 12, generator=generator(0))
    truth = torch.randn(6, 12, generator=generator(1))
    target = 10 + x @ truth.T  # positive: norms are
    weight = fit_ridge_router(x[:400], target[:400])
    assert weight.shape == (6, 12)
    got, best = kept_share(target[400:], x[400:] @ weight.T, 2), kept_share(target[400:], target[400:], 2)
    assert 1 / 3 < got <= best and got > best - 0.01


def test_logits_are_so_close_that_a_softmax_is_uniform():
    x = torch.randn(300, 8, generator=generator(2))
    weight = fit_ridge_router(x, torch.rand(300, 4, generator=generator(3)) * 1e4)
    logits = x @ weight.T
    spread = (logits - logits.mean(dim=1, keepdim=True)).square().mean().sqrt()
    torch.testing.assert_close(spread, torch.tensor(1e-4))
    torch.testing.assert_close(logits.softmax(dim=1), torch.full((300, 4), 0.25), atol=1e-3, rtol=0)


def test_one_huge_token_does_not_decide():
    x = torch.randn(300, 8, generator=generator(4))
    target = (5 + x @ torch.randn(4, 8, generator=generator(5)).T).clamp_min(0.1)
    shouting = target.clone()
    shouting[0] *= 1e6
    torch.testing.assert_close(fit_ridge_router(x, shouting), fit_ridge_router(x, target))


def test_output_norms_are_those_of_the_parts():
    h, down = torch.randn(9, 12), torch.randn(5, 12)
    members = torch.randperm(12).view(3, 4)
    norms = expert_output_norms(h, down, members)
    for e in range(3):
        part = torch.zeros_like(h)
        part[:, members[e]] = h[:, members[e]]
        torch.testing.assert_close(norms[:, e], (part @ down.T).norm(dim=1))


def test_kept_share_bounds():
    target = torch.rand(50, 8)
    assert kept_share(target, target, 8) == 1
    assert kept_share(target, -target, 3) < kept_share(target, target, 3)
    assert kept_share(torch.ones(5, 8), torch.rand(5, 8), 2) == 0.25


def test_picked_share_counts_the_largest():
    target = torch.tensor([[5.0, 4, 3, 2], [1, 2, 3, 4]])
    logits = torch.tensor([[9.0, 0, 8, 0.5], [0, 0, 1, 2]])
    assert picked_share(target, logits, 2) == 0.75  # experts 0 and 2 instead of 0 and 1; then both
    assert picked_share(target, target, 3) == 1 == picked_share(target, -target, 4)
    assert picked_share(target, -target, 2) == 0


def test_tokens_in_pieces_give_the_same_fit(monkeypatch):
    x = torch.randn(100, 12, generator=generator(6)).bfloat16()
    target = torch.rand(100, 5, generator=generator(7))
    whole = fit_ridge_router(x, target)
    monkeypatch.setattr(routerfit, "CHUNK", 7)
    torch.testing.assert_close(fit_ridge_router(x, target), whole, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, SCALE), (torch.bfloat16, SCALE), (torch.float16, SCALE_FP16)]
)
def test_small_rows_keep_the_ranking_when_rounded(dtype, scale):
    """Against the same fit in fp64; chance is 0.75. The weights of the chosen stay within 2 % of 1/k."""
    x = torch.randn(2000, 256, generator=generator(8))
    x[:, 3] *= 20  # a channel with massive activations
    truth = (5 + x @ torch.randn(16, 256, generator=generator(9)).T / 16).clamp_min(0.05)
    weight = fit_ridge_router(x, truth, scale=scale)
    logits = (x.to(dtype) @ weight.to(dtype).T).float()
    assert picked_share(x.double() @ weight.double().T, logits, 12) > 0.998
    chosen = logits.softmax(dim=1).topk(12, dim=1).values
    assert (12 * chosen / chosen.sum(dim=1, keepdim=True) - 1).abs().max() < 0.02
