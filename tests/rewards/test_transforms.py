"""Transforms of rewards, against enumerated win rates, closed-form optima and a direct maximization."""

import json
import math

import pytest
import torch

from falign import CompletionBatch
from falign.divergences import get
from falign.errors import ConfigError, DataError, RewardError
from falign.objectives import PolicyGradient
from falign.rewards import RewardSum, WeightedReward, reward_identities
from falign.rewards.transforms import best_of_n, calibrated, exponential, inference_transform, worst_of_n
from tests.reference.world import COMPLETIONS, WORLD, random_logits, sequence_logprobs, token_logprobs

COUNTS = torch.tensor([1, 2, 3, 4, 6, 4])
REWARDS = [1.0, -0.5, 0.5, 0.5, 1.0, -2.0]  # ties across and within values


def sample_file(path, rewards_by_prompt, name="reward"):
    rows = [
        {"prompt": prompt, "completion": f"text {i}", name: reward}
        for prompt, rewards in rewards_by_prompt.items()
        for i, reward in enumerate(rewards)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def samples(tmp_path):
    """Samples of two references that hold each reward exactly as often as it comes."""
    often = [reward for reward, count in zip(REWARDS, COUNTS.tolist(), strict=True) for _ in range(count)]
    return sample_file(tmp_path / "reference.jsonl", {"p": often, "q": [0.0, 1.0]})


def enumerated_win_rate(reward):
    share = COUNTS.double() / COUNTS.sum()
    return sum(
        p * (1.0 if other < reward else 0.5 if other == reward else 0.0)
        for p, other in zip(share.tolist(), REWARDS, strict=True)
    )


def test_the_win_rate_is_the_enumerated_one_with_half_of_the_ties(samples):
    rewards = [*REWARDS, -3.0, 0.7, 9.0]
    found = calibrated(samples)(rewards, ["p"] * len(rewards))
    assert found == pytest.approx([enumerated_win_rate(reward) for reward in rewards], abs=1e-15)
    # Over the reference's own samples its mean is 1/2, ties or not.
    assert sum(c * f for c, f in zip(COUNTS.tolist(), found[:6], strict=True)) / 20 == pytest.approx(0.5, abs=1e-15)
    assert calibrated(samples)([0.5, None], ["q", "q"]) == [0.5, None]


@pytest.mark.parametrize("t", [3.0, -3.0])
def test_kl_rl_on_the_transformed_reward_arrives_at_the_tilted_reference(samples, t):
    """The natural gradient of a softmax solves KL-RL in one step, if the gradient is that of the named quantity."""
    beta = 0.4
    reference = (COUNTS.double() / COUNTS.sum()).log()
    transformed = torch.tensor(exponential(samples, t)(REWARDS, ["p"] * 6), dtype=torch.float64)
    rates = torch.tensor([enumerated_win_rate(reward) for reward in REWARDS], dtype=torch.float64)
    expected = (reference + math.copysign(1, t) * (t * rates).exp() / beta).softmax(0)
    logits = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    batch = CompletionBatch(
        logprobs=logits.log_softmax(-1)[:, None],
        reference_logprobs=reference[:, None],
        completion_mask=torch.ones(6, 1, dtype=torch.bool),
        prompt_index=torch.arange(6),
        rewards=transformed,
    )
    losses = PolicyGradient(get("reverse_kl"), beta, "none")(batch).terms[0].losses
    (gradient,) = torch.autograd.grad((logits.softmax(-1).detach() * losses).sum(), logits)
    policy = logits.detach().softmax(0)
    arrived = (logits.detach() - gradient / policy / beta).softmax(0)
    torch.testing.assert_close(arrived, expected, rtol=0, atol=1e-12)


def test_sequences_of_the_world_arrive_at_their_tilted_reference(tmp_path):
    """The same at sequence level, with enumerated C: the exact gradient vanishes at π_ref e^{Φ(C)/β} alone."""
    beta, t = 0.5, 2.0
    reference = random_logits(1)
    weights = sequence_logprobs(reference).exp()
    rewards = torch.tensor([float(len(set(tokens))) for tokens in COMPLETIONS], dtype=torch.float64)
    rates = ((rewards[None] < rewards[:, None]).double() + 0.5 * (rewards[None] == rewards[:, None])) @ weights
    transform = exponential(sample_file(tmp_path / "one.jsonl", {"p": [0.0]}), t).function
    log_target = (weights.log() + transform(rates) / beta).log_softmax(0)
    # The autoregressive policy of the target: a prefix's token has the mass of all that continues so.
    prefixes = sorted({tokens[:k] for tokens in COMPLETIONS for k in range(len(tokens))})
    mass = torch.zeros(len(prefixes), 4, dtype=torch.float64)
    for tokens, value in zip(COMPLETIONS, log_target.exp(), strict=True):
        for k, token in enumerate(tokens):
            mass[prefixes.index(tokens[:k]), token] += value
    for start, vanishes in ((mass.log(), True), (reference, False)):
        logits = start.clone().requires_grad_()
        batch = CompletionBatch(
            logprobs=token_logprobs(logits),
            reference_logprobs=token_logprobs(reference),
            completion_mask=WORLD.mask,
            prompt_index=torch.arange(len(COMPLETIONS)),
            rewards=transform(rates),
        )
        losses = PolicyGradient(get("reverse_kl"), beta, "none")(batch).terms[0].losses
        mean = (sequence_logprobs(logits).exp().detach() * losses).sum()
        (gradient,) = torch.autograd.grad(mean, logits)
        assert (gradient.abs().max() < 1e-12) == vanishes


@pytest.mark.parametrize(("n", "beta"), [(1, 0.3), (2, 0.3), (4, 0.3)])
@pytest.mark.parametrize("best", [True, False])
def test_the_transform_of_best_of_n_maximizes_the_win_rate_after_it(n, beta, best):
    """Against a direct maximization of win rate - β KL over all densities on 100 cells."""
    cells = 100
    edges = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    logits = torch.zeros(cells, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss(log_mass):
        mass = log_mass.exp()
        cumulative = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
        # E over the reference's n of P(policy's n beat it): F is linear within a cell, so Simpson's rule is close.
        middle = (cumulative[1:] + cumulative[:-1]) / 2
        centers = (edges[1:] + edges[:-1]) / 2
        if best:
            integrand = [1 - f**n for f in (cumulative[:-1], middle, cumulative[1:])]
            weights = [n * u ** (n - 1) for u in (edges[:-1], centers, edges[1:])]
        else:
            integrand = [(1 - f) ** n for f in (cumulative[:-1], middle, cumulative[1:])]
            weights = [n * (1 - u) ** (n - 1) for u in (edges[:-1], centers, edges[1:])]
        products = [a * b for a, b in zip(integrand, weights, strict=True)]
        win_rate = ((products[0] + 4 * products[1] + products[2]) / 6 / cells).sum()
        return beta * (mass * (log_mass + math.log(cells))).sum() - win_rate

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    density = (inference_transform(n, beta, best=best, num_points=20 * cells + 1) / beta).exp()
    found = ((density[1:] + density[:-1]) / 2).reshape(cells, 20).sum(dim=1).log().log_softmax(0)
    torch.testing.assert_close(found.exp() * cells, logits.detach().softmax(0) * cells, rtol=2e-3, atol=2e-3)
    assert loss(found) <= loss(logits.detach().log_softmax(0)) + 1e-7


@pytest.mark.parametrize(("n", "beta"), [(2, 0.02), (32, 0.1), (128, 1.0)])
@pytest.mark.parametrize("best", [True, False])
def test_the_transform_of_many_fulfills_its_equation(tmp_path, n, beta, best):
    """Φ gives the optimum's F, and F gives Φ again: within 1e-4 of its range."""
    near_one = 1 - torch.linspace(0, 1, 40_001, dtype=torch.float64) ** 4  # where F^{n-1} v^{n-1} varies
    v = torch.cat([near_one, 1 - near_one, torch.linspace(0, 1, 40_001, dtype=torch.float64)]).unique()

    def integral(values):
        steps = (values[1:] + values[:-1]) / 2 * v.diff()
        return torch.cat([steps.new_zeros(1), steps.cumsum(0)])

    transform = (best_of_n if best else worst_of_n)(sample_file(tmp_path / "s.jsonl", {"p": [0.0]}), n, beta)
    values = transform.function(v)
    below = integral((values / beta).exp())
    below = below / below[-1]
    if best:
        expected = integral(below ** (n - 1) * v ** (n - 1))
    else:
        expected = integral((1 - below) ** (n - 1) * (1 - v) ** (n - 1))
    expected = n * n * (expected - expected[-1])
    assert (values - expected).abs().max() < 1e-4 * (values.max() - values.min())


def test_transforms_of_n_interpolate_their_table(samples):
    table = inference_transform(4, 0.1, best=True)
    found = best_of_n(samples, 4, 0.1)([9.0, -9.0], ["p", "p"])
    assert found == pytest.approx([0.0, table[0].item()], abs=1e-15)
    assert worst_of_n(samples, 4, 0.1)([9.0], ["p"]) == [0.0]
    assert calibrated(samples)([0.5], ["q"])[0] - 1 == pytest.approx(best_of_n(samples, 1, 0.1)([0.5], ["q"])[0])


def test_a_sum_counts_the_transformed_reward_and_logs_and_judges_the_plain_one(samples):
    rewards = RewardSum(
        (
            WeightedReward(
                "value", lambda completions: [float(text) for text in completions], 2.0, calibrated(samples)
            ),
            WeightedReward("one", lambda completions: [1.0 for _ in completions], 0.0),
        )
    )
    result = rewards(["p", "q"], ["0.5", "0.5"])
    assert result.total == pytest.approx([2 * enumerated_win_rate(0.5), 1.0], abs=1e-15)
    assert result.parts["value"] == [0.5, 0.5]
    assert rewards.passing == "value"
    assert rewards.without_transforms()(["p", "q"], ["0.5", "0.5"]).total == [1.0, 1.0]
    assert rewards.without_transforms().passing is None


def test_prompts_without_samples_are_told_before_training_with_the_remedy(samples):
    rewards = RewardSum(
        (WeightedReward("value", lambda completions: [0.0 for _ in completions], 1.0, calibrated(samples)),)
    )
    fine, missing = rewards.row_errors(["p", "r"], place=["a:1", "a:2"])
    assert fine is None
    assert "reference.jsonl has no sample of the reference for this prompt" in missing
    with pytest.raises(RewardError, match=r"a:2: .*has no sample"):
        rewards(["p", "r"], ["x", "y"], place=["a:1", "a:2"])
    # The same words as a conversation are another prompt.
    assert rewards.row_errors([[{"role": "user", "content": "p"}]])[0] is not None


def test_the_identity_follows_the_samples_and_the_parameters(samples, tmp_path):
    def identity(transform):
        return reward_identities(RewardSum((WeightedReward("v", sum, 1.0, transform),)))["v"]

    first = identity(exponential(samples, 3.0))
    copy = tmp_path / "copy.jsonl"
    copy.write_text(samples.read_text())
    assert identity(exponential(copy, 3.0)) == first
    assert identity(exponential(samples, 4.0)) != first
    assert identity(None) != first
    copy.write_text(samples.read_text().replace('"reward": -2.0', '"reward": -3.0'))
    assert identity(exponential(copy, 3.0)) != first


def test_bad_files_and_parameters_are_refused(tmp_path, samples):
    with pytest.raises(DataError, match=r"nothing.jsonl: there is no such file of samples. Draw .* falign sample"):
        calibrated(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty.jsonl has no samples: draw them from the reference"):
        calibrated(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"reference.jsonl:1: there is no column 'grade' with the reward"):
        calibrated(samples, column="grade")
    with pytest.raises(ConfigError, match=r"t=0.0 must be a number other than 0"):
        exponential(samples, 0.0)
    with pytest.raises(ConfigError, match=r"t=-1000.0 must be .* of at most 700 in size"):
        exponential(samples, -1000.0)
    with pytest.raises(ConfigError, match=r"n=0 must be a whole number of at least 1"):
        best_of_n(samples, 0, 0.1)
    with pytest.raises(ConfigError, match=r"beta=nan must be positive and finite"):
        worst_of_n(samples, 2, float("nan"))
    with pytest.raises(RewardError, match=r"completion 0: the reward is nan, which is neither above nor below"):
        calibrated(samples)([float("nan")], ["p"])
