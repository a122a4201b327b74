import dataclasses
import math

import pytest
import torch

from falign import CompletionBatch, divergences
from falign.objectives import (
    BaseObjective,
    BinaryConstraint,
    DistributionMatching,
    ExponentialReward,
    MomentConstraints,
    Objective,
    ProductTarget,
    reduce_terms,
    total_weights,
)
from tests.reference.test_estimators import NAMES

LENGTHS = torch.tensor([3, 1, 4, 2, 4, 3])
PROMPTS = torch.tensor([0, 0, 1, 1, 1, 0])
BOTH = ProductTarget((BinaryConstraint(), ExponentialReward(0.5)))
OBJECTIVES = [
    DistributionMatching(divergences.get("jensen_shannon"), BOTH),
    DistributionMatching(divergences.get("forward_kl"), BOTH, "constant"),
    DistributionMatching(divergences.get("reverse_kl"), MomentConstraints((0.5, -1.0)), "none"),
]


def rollout(dtype=torch.float64, **given) -> CompletionBatch:
    generator = torch.Generator().manual_seed(1)
    draw = lambda: -2 * torch.rand((6, 4), generator=generator, dtype=torch.float64)  # noqa: E731
    fields = {
        "logprobs": draw().to(dtype).requires_grad_(),
        "completion_mask": torch.arange(4) < LENGTHS[:, None],
        "prompt_index": PROMPTS,
        "reference_logprobs": draw().to(dtype),
        "old_logprobs": draw().to(dtype),
        "features": torch.tensor([[1, 0.5], [0, 0.1], [1, -1], [1, 0.3], [0, 0.2], [1, 0.7]], dtype=dtype),
        "log_partition": torch.tensor([-0.3, -0.2, 0.1, -math.inf, 0.4, 0.2], dtype=dtype),
    }
    return CompletionBatch(**{**fields, **given})


def gradient_of(objective, batch):
    return torch.autograd.grad(objective(batch).mean(), batch.logprobs)[0]


@pytest.mark.parametrize("target", [BinaryConstraint(), BOTH])
@pytest.mark.parametrize("name", NAMES)
def test_an_infinite_slope_is_refused_for_targets_with_zeros_with_the_alternatives(name, target):
    divergence = divergences.get(name)
    if math.isfinite(divergence.f_prime_at_infinity):
        DistributionMatching(divergence, target)
        return
    with pytest.raises(ValueError, match=r"f'\(∞\) is infinite.*jensen_shannon.*or a target without zeros"):
        DistributionMatching(divergence, target)
    DistributionMatching(divergence, ExponentialReward(1.0))


def test_samples_without_an_estimate_of_z_weigh_nothing_and_are_counted():
    for objective in OBJECTIVES:
        output = objective(rollout())
        assert output.terms[0].weights.tolist() == [1, 1, 1, 0, 1, 1]
        assert output.metrics["partition_missing"].tolist() == [0, 0, 0, 1, 0, 0]
        assert (gradient_of(objective, rollout())[3] == 0).all()
        assert len(output.metrics["log_partition"]) == 5


def test_the_baseline_leaves_out_samples_without_an_estimate():
    objective = OBJECTIVES[0]
    pseudo = objective(rollout()).metrics["pseudo_reward"]  # of rows 0, 1, 2, 4, 5
    baseline = objective.prepare(rollout()).baseline
    assert baseline[2].item() == pytest.approx(pseudo[3].item())
    assert baseline[3].item() == pytest.approx((pseudo[2] + pseudo[3]).item() / 2)
    assert baseline[0].item() == pytest.approx((pseudo[1] + pseudo[4]).item() / 2)


def test_without_any_estimate_there_is_no_gradient_and_no_nan():
    for objective in OBJECTIVES:
        batch = rollout(log_partition=torch.full((6,), -math.inf, dtype=torch.float64))
        output = objective(batch)
        assert output.mean().item() == 0.0
        assert (gradient_of(objective, batch) == 0).all()
        assert "log_partition" not in output.metrics


def test_estimates_of_z_are_made_of_the_rollout_where_none_are_given():
    objective, batch = OBJECTIVES[0], rollout(log_partition=None)
    prepared = objective.prepare(batch)
    weights = objective.log_weights(batch).exp()
    assert weights[1].item() == 0.0
    assert prepared.log_partition[0].exp().item() == pytest.approx((weights[1] + weights[5]).item() / 2)
    assert prepared.log_partition[2].exp().item() == pytest.approx((weights[3] + weights[4]).item() / 2)
    torch.testing.assert_close(objective(batch).mean(), objective(prepared).mean())


def test_log_weights_are_target_over_the_sampling_law():
    objective, batch = OBJECTIVES[2], rollout()
    expected = batch.sequence_sum(batch.reference_logprobs - batch.old_logprobs)
    torch.testing.assert_close(
        objective.log_weights(batch), expected + batch.features @ torch.tensor([0.5, -1.0]).double()
    )
    on_policy = objective.log_weights(dataclasses.replace(batch, old_logprobs=None))
    assert not on_policy.requires_grad
    torch.testing.assert_close(
        on_policy - objective.log_weights(batch), batch.sequence_sum(batch.old_logprobs - batch.logprobs).detach()
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_of_a_prepared_rollout_add_up_to_the_whole(objective):
    prepared = objective.prepare(rollout())
    output, whole = objective(prepared), gradient_of(objective, prepared)
    for cut in ([PROMPTS == 0, PROMPTS == 1], [torch.arange(6) == i for i in range(6)]):
        outputs = [objective(prepared.select(rows)) for rows in cut]
        denominators = torch.stack([total_weights(part.terms) for part in outputs]).sum(0)
        total = torch.stack([reduce_terms(part.terms, denominators) for part in outputs]).sum()
        torch.testing.assert_close(total, output.mean(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(torch.autograd.grad(total, prepared.logprobs)[0], whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_changes_nothing(objective):
    batch = rollout()
    pad = lambda x, value: torch.nn.functional.pad(x, (0, 3), value=value)  # noqa: E731
    padded = dataclasses.replace(
        batch,
        completion_mask=pad(batch.completion_mask, False),
        **{
            name: pad(getattr(batch, name).masked_fill(~batch.completion_mask, math.nan), -math.inf)
            for name in ("logprobs", "reference_logprobs", "old_logprobs")
        },
    )
    a, b = objective(batch), objective(padded)
    torch.testing.assert_close(b.mean(), a.mean(), rtol=1e-13, atol=1e-15)
    for name, values in a.metrics.items():
        torch.testing.assert_close(b.metrics[name], values, rtol=1e-13, atol=1e-15)
        assert not values.requires_grad
    torch.testing.assert_close(
        torch.autograd.grad(b.mean(), batch.logprobs)[0], gradient_of(objective, batch), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_everything_is_finite_to_ten_thousand_nats(name, dtype):
    extremes = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 3.0], [1e4, 1e4, -300.0], [0.0, 0.0, 0.0]])
    zeros = torch.zeros(4, 3)
    for reference, old in ((-extremes, zeros), (zeros, -extremes), (-extremes, -extremes), (extremes, -extremes)):
        logprobs = torch.zeros(4, 3, dtype=dtype, requires_grad=True)
        batch = CompletionBatch(
            logprobs=logprobs,
            reference_logprobs=reference.to(dtype),
            old_logprobs=old.to(dtype),
            completion_mask=torch.ones(4, 3, dtype=torch.bool),
            prompt_index=torch.tensor([0, 0, 1, 1]),
            features=torch.tensor([[1.0], [0.0], [2.0], [-1.0]], dtype=dtype),
            log_partition=torch.tensor([1e4, -1e4, 0.0, 1e4], dtype=dtype),
        )
        output = DistributionMatching(divergences.get(name), ExponentialReward(0.1))(batch)
        output.mean().backward()
        assert torch.isfinite(output.mean())
        assert torch.isfinite(logprobs.grad).all()
        assert all(torch.isfinite(values.double().sum()) for values in output.metrics.values())


def test_metrics_say_how_far_the_target_is_reached():
    metrics = OBJECTIVES[0](rollout()).metrics
    assert metrics["target/satisfied"].tolist() == [1, 0, 1, 1, 0, 1]
    assert metrics["target/feature_1"].tolist() == [0.5, 0.1, -1, 0.3, 0.2, 0.7]
    assert "target/satisfied" not in OBJECTIVES[2](rollout()).metrics


def test_a_lone_sample_is_refused_with_the_remedy():
    lone = rollout().select(torch.arange(6) == 2)
    with pytest.raises(ValueError, match=r"baseline='leave_one_out' needs others.*choose 'constant'"):
        OBJECTIVES[0].prepare(lone)
    with pytest.raises(ValueError, match=r"baseline='constant' needs others.*choose 'none'"):
        OBJECTIVES[1].prepare(lone)
    assert torch.isfinite(OBJECTIVES[2](lone).mean())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_needs_are_what_is_read(objective):
    assert isinstance(objective, Objective)
    assert isinstance(objective, BaseObjective)
    batch = rollout()
    least = CompletionBatch(
        **{name: getattr(batch, name) for name in {"logprobs", "completion_mask", "prompt_index"} | objective.needs}
    )
    objective(least)
    for name in ("features", "reference_logprobs"):
        with pytest.raises(ValueError, match=f"{name}, which is None"):
            objective(dataclasses.replace(least, **{name: None}))


def test_an_unknown_baseline_is_refused():
    with pytest.raises((ValueError, TypeError), match="baseline"):
        DistributionMatching(divergences.get("js"), BOTH, "mean")
