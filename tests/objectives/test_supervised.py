import math

import pytest
import torch

from falign import CompletionBatch, divergences
from falign.methods import FSFT
from falign.objectives import Objective, Supervised
from tests.reference.test_estimators import NAMES

LENGTHS = torch.tensor([3, 1, 2])
MASK = torch.arange(3) < LENGTHS[:, None]
ALLOWED = [name for name in NAMES if math.isinf(divergences.get(name).f_prime_at_infinity)]


def batch_of(log_ratio, reference=None):
    reference = torch.full_like(log_ratio, -1.0) if reference is None else reference
    return CompletionBatch(
        logprobs=log_ratio + reference,
        reference_logprobs=reference,
        completion_mask=MASK,
        prompt_index=torch.arange(3),
    )


def ratios(dtype=torch.float64):
    return (1.5 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)


def test_plain_is_the_mean_over_tokens_of_the_negative_log_likelihood():
    log_ratio = ratios().requires_grad_()
    loss = Supervised()(batch_of(log_ratio)).mean()
    loss.backward()
    assert loss.item() == pytest.approx(-(log_ratio - 1)[MASK].mean().item())
    torch.testing.assert_close(log_ratio.grad, -MASK.double() / 6)
    assert Supervised().needs == frozenset()


@pytest.mark.parametrize("name", ALLOWED)
def test_the_loss_is_the_conjugate_and_its_weight_the_inverse_slope(name):
    divergence, beta = divergences.get(name), 0.4
    log_ratio = ratios().requires_grad_()
    output = Supervised(divergence, beta)(batch_of(log_ratio))
    output.mean().backward()
    y = -beta * log_ratio.detach()
    assert output.mean().item() == pytest.approx(divergence.conjugate(y)[MASK].mean().item() / beta)
    weights = divergence.f_prime_inverse(y).exp()
    torch.testing.assert_close(log_ratio.grad, -weights * MASK / 6)
    h = 1e-6  # the conjugate's own slope, by differences
    slope = (divergence.conjugate(y + h) - divergence.conjugate(y - h)) / (2 * h)
    torch.testing.assert_close(log_ratio.grad, -slope * MASK / 6, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ALLOWED)
def test_at_the_reference_and_for_small_beta_it_is_plain_fine_tuning(name):
    log_ratio = ratios().requires_grad_()
    small = Supervised(divergences.get(name), 1e-7)(batch_of(log_ratio)).mean()
    torch.testing.assert_close(torch.autograd.grad(small, log_ratio)[0], -MASK.double() / 6, rtol=1e-6, atol=0)
    zero = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    loss = Supervised(divergences.get(name), 3.0)(batch_of(zero)).mean()
    torch.testing.assert_close(torch.autograd.grad(loss, zero)[0], -MASK.double() / 6)


def test_tokens_that_were_learned_weigh_less_and_lost_ones_more():
    chi2 = Supervised(divergences.get("pearson_chi2"), 1.0)
    log_ratio = torch.tensor([[2.0, 1.0, -2.0]] * 3, dtype=torch.float64, requires_grad=True)
    chi2(batch_of(log_ratio)).terms[0].losses.sum().backward()
    # φ(x) = x - x²/4 of the paper turns over at x = 2: nothing is left to learn.
    assert log_ratio.grad[0].tolist() == pytest.approx([0.0, -0.5 / 3, -2.0 / 3])


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(ALLOWED)))
def test_a_bounded_slope_is_refused_with_the_reason(name):
    reason = r"is finite, so the loss.*is infinite as soon as.*Set max_weight.*choose.*plain fine-tuning"
    with pytest.raises(ValueError, match=reason):
        Supervised(divergences.get(name), 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALLOWED)
def test_losses_and_gradients_are_finite_to_ten_thousand_nats(name, dtype):
    for beta in (0.01, 1.0):
        log_ratio = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 0, 0], [300.0, -300.0, 0]]).requires_grad_()
        loss = Supervised(divergences.get(name), beta)(batch_of(log_ratio.to(dtype))).mean()
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(log_ratio.grad).all()


@pytest.mark.parametrize("objective", [Supervised(), Supervised(divergences.get("jeffreys"), 0.3)])
def test_padding_changes_nothing(objective):
    batch = batch_of(ratios().masked_fill(~MASK, math.nan))
    pad = lambda x, value: torch.nn.functional.pad(x, (0, 2), value=value)  # noqa: E731
    padded = CompletionBatch(
        logprobs=pad(batch.logprobs, math.nan),
        reference_logprobs=pad(batch.reference_logprobs, -math.inf),
        completion_mask=pad(MASK, False),
        prompt_index=batch.prompt_index,
    )
    torch.testing.assert_close(objective(padded).mean(), objective(batch).mean())
    for name, values in objective(batch).metrics.items():
        torch.testing.assert_close(objective(padded).metrics[name], values)


def test_divergence_and_beta_come_together():
    with pytest.raises(ValueError, match="give both, or neither"):
        Supervised(beta=0.1)
    with pytest.raises(ValueError, match="give both, or neither"):
        Supervised(divergences.get("jeffreys"))
    with pytest.raises(ValueError, match=r"beta=0\.0 must be positive"):
        Supervised(divergences.get("jeffreys"), 0.0)


def test_supervised_is_an_objective_that_names_its_needs():
    objective = Supervised(divergences.get("jeffreys"), 0.3)
    assert isinstance(objective, Objective)
    assert objective.needs == {"reference_logprobs"}
    with pytest.raises(ValueError, match="reference_logprobs, which is None"):
        objective(CompletionBatch(torch.zeros(3, 3), MASK, torch.arange(3)))


@pytest.mark.parametrize("name", NAMES)
def test_a_bounded_weight_continues_the_loss_as_its_tangent(name):
    divergence, beta, bound = divergences.get(name), 0.7, 3.0
    log_ratio = torch.linspace(-12, 12, 9, dtype=torch.float64).reshape(3, 3).requires_grad_()
    output = Supervised(divergence, beta, bound)(batch_of(log_ratio))
    slope = torch.autograd.grad(output.mean(), log_ratio)[0]
    y, at = -beta * log_ratio.detach(), divergence.f_prime(torch.tensor(math.log(bound), dtype=torch.float64))
    weights = torch.where(y >= at, bound, divergence.f_prime_inverse(torch.minimum(y, at - 1e-12)).exp())
    torch.testing.assert_close(slope, -weights * MASK / 6, rtol=1e-9, atol=1e-12)
    inside = divergence.conjugate(torch.minimum(y, at - 1e-12))
    expected = (inside + bound * (y - at).clamp(min=0))[MASK].mean() / beta
    assert output.mean().item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)


def test_the_papers_divergences_are_those_of_f_sft():
    log_ratio = ratios() / 2  # x > -1: beyond lies the pole of the second one
    x = 0.4 * log_ratio[MASK]
    assert x.min() > -0.9
    for name, phi in {"pearson_chi2": x - x**2 / 4, "squared_hellinger": x / (1 + x)}.items():
        losses = FSFT(name, 0.4, max_weight=1e6)._losses(batch_of(log_ratio))[0]
        torch.testing.assert_close(losses[MASK], -phi / 0.4, rtol=1e-10, atol=1e-12)
    assert FSFT("total_variation", 0.4) == Supervised()
    assert FSFT("jensen_shannon", 0.4).max_weight == 10
    for bound, message in {1.0: "larger than 1", math.inf: "must be finite"}.items():
        with pytest.raises(ValueError, match=message):
            Supervised(divergences.get("jeffreys"), 0.3, bound)
    with pytest.raises(ValueError, match="without a divergence"):
        Supervised(max_weight=2.0)
