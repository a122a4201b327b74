import dataclasses
import math

import pytest
import torch

from falign import CompletionBatch, divergences
from falign.objectives import (
    BaseObjective,
    DivergenceTo,
    Objective,
    ObjectiveOutput,
    PolicyGradient,
    reduce_terms,
    total_weights,
)
from tests.reference.test_estimators import NAMES

LENGTHS = torch.tensor([3, 1, 4, 2, 4, 3])
PROMPTS = torch.tensor([0, 0, 1, 1, 1, 0])
REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.5, -2.0], dtype=torch.float64)
JS = divergences.get("jensen_shannon")


def rollout(seed=0, dtype=torch.float64, **given) -> CompletionBatch:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), 4)
    draw = lambda scale: (-scale * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype)  # noqa: E731
    fields = {
        "logprobs": draw(2.0).requires_grad_(),
        "completion_mask": torch.arange(4) < LENGTHS[:, None],
        "prompt_index": PROMPTS,
        "reference_logprobs": draw(2.0),
        "old_logprobs": draw(2.0),
        "measures": {"divergence": -draw(0.3)},
        "rewards": REWARDS.to(dtype),
        "values": draw(1.0).requires_grad_(),
        "old_values": draw(1.0),
    }
    return CompletionBatch(**{**fields, **given})


def gradient_of(objective, batch):
    return torch.autograd.grad(objective(batch).mean(), batch.logprobs)[0]


OBJECTIVES = {
    "rloo": PolicyGradient(),
    "reinforce": PolicyGradient(JS, 0.2, "none"),
    "batch_mean": PolicyGradient(divergences.get("reverse_kl"), 0.2, "batch_mean"),
    "grpo": PolicyGradient(
        divergences.get("reverse_kl"),
        0.04,
        "group_normalised",
        clip_low=0.2,
        clip_high=0.28,
        importance="token",
        level="token",
        reduction="sequence_mean",
    ),
    "dapo": PolicyGradient(
        advantage="group_normalised", clip_low=0.2, clip_high=0.28, importance="token", reduction="token_mean"
    ),
    "ppo": PolicyGradient(
        divergences.get("alpha(0.3)"),
        0.1,
        "gae",
        clip_low=0.2,
        clip_high=0.2,
        importance="token",
        level="vocabulary",
        credit="returns",
        reduction="token_mean",
        value_coefficient=0.5,
        gamma=0.99,
        lam=0.9,
    ),
    "returns": PolicyGradient(JS, 0.5, level="token", credit="returns", clip_high=3.0),
}


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    return OBJECTIVES[request.param]


def test_the_gradient_of_rloo_is_minus_the_advantage_over_n():
    batch = rollout(old_logprobs=None)
    expected = torch.tensor([1.0 - (0 - 2) / 2, 0 - (1 - 2) / 2, 0, 0, 0, -2 - (1 + 0) / 2])
    expected = -expected[:, None].double() * batch.completion_mask / 6
    torch.testing.assert_close(gradient_of(PolicyGradient(), batch), expected)


def test_reductions_divide_reward_and_penalty_alike():
    """One term, so β trades the same two things whatever is divided by."""
    batch = rollout(old_logprobs=None)
    parts = {}
    for reduction in ("sequence_sum", "sequence_mean", "token_mean"):
        reward = gradient_of(PolicyGradient(reduction=reduction), batch)
        both = gradient_of(PolicyGradient(JS, 0.7, level="token", reduction=reduction), batch)
        parts[reduction] = reward, both - reward
    for part in range(2):
        mean, sums = parts["sequence_mean"][part], parts["sequence_sum"][part]
        torch.testing.assert_close(mean * LENGTHS[:, None], sums)
        torch.testing.assert_close(parts["token_mean"][part] * LENGTHS.sum() / len(LENGTHS), sums)


def test_a_prompt_whose_completions_all_have_one_reward_gives_no_gradient():
    for advantage in ("leave_one_out", "group_centred", "group_normalised"):
        objective = PolicyGradient(advantage=advantage, clip_low=0.2, clip_high=0.2, importance="token")
        output, batch = objective(rollout()), rollout()
        assert (gradient_of(objective, batch)[PROMPTS == 1] == 0).all()
        assert (gradient_of(objective, batch)[PROMPTS == 0] != 0).any()
        assert output.metrics["zero_variance_groups"].tolist() == [0, 0, 1, 1, 1, 0]
        assert output.metrics["reward_std"][2].item() == 0.0


@pytest.mark.parametrize(
    ("log_weight", "advantage", "passes"),
    [
        (math.log(1.27), 1.0, True),
        (math.log(1.29), 1.0, False),  # above 1 + clip_high
        (math.log(1.29), -1.0, True),
        (math.log(0.81), -1.0, True),
        (math.log(0.79), -1.0, False),  # below 1 - clip_low
        (math.log(0.79), 1.0, True),
    ],
)
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_clipping_acts_at_the_named_bounds_and_on_the_named_side(importance, log_weight, advantage, passes):
    """The token importance looks at the first token alone, the sequence importance at the sum of both."""
    objective = PolicyGradient(clip_low=0.2, clip_high=0.28, importance=importance)
    old = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    change = torch.tensor([[log_weight, 0.0]], dtype=torch.float64)
    batch = CompletionBatch(
        logprobs=(old + change).requires_grad_(),
        old_logprobs=old,
        completion_mask=torch.ones(1, 2, dtype=torch.bool),
        prompt_index=torch.tensor([0]),
        rewards=torch.zeros(1, dtype=torch.float64),
        advantages=torch.full((1, 2), advantage, dtype=torch.float64),
    )
    gradient, weight = gradient_of(objective, batch)[0], math.exp(log_weight)
    untouched = -advantage if importance == "token" else -advantage * weight * passes
    assert gradient.tolist() == pytest.approx([-advantage * weight * passes, untouched])
    clipped = objective(batch).metrics
    share = (0.5 if importance == "token" else 1.0) * (not passes)
    assert clipped["clip_ratio/high"].item() == (share if log_weight > 0 else 0.0)
    assert clipped["clip_ratio/low"].item() == (share if log_weight < 0 else 0.0)


def test_one_bound_alone_leaves_the_other_side_free():
    batch = rollout()
    free = gradient_of(PolicyGradient(importance="token"), batch)
    for side in ("clip_low", "clip_high"):
        objective = PolicyGradient(importance="token", **{side: 0.01})
        bounded = gradient_of(objective, batch)
        positive = (objective.prepare(batch).advantages > 0) & (batch.logprobs != batch.old_logprobs)
        other_side = positive if side == "clip_low" else ~positive
        torch.testing.assert_close(bounded[other_side], free[other_side])
        assert (bounded != free).any()
        assert set(objective(batch).metrics) >= {f"clip_ratio/{side.removeprefix('clip_')}"}


def test_the_penalty_is_never_clipped():
    batch = rollout(rewards=torch.zeros(6, dtype=torch.float64))
    clipped = PolicyGradient(JS, 0.3, clip_low=1e-3, clip_high=1e-3, importance="token", level="token")
    torch.testing.assert_close(gradient_of(clipped, batch), gradient_of(PolicyGradient(JS, 0.3, level="token"), batch))


def test_the_baseline_of_the_penalty_is_the_mean_over_the_others_of_the_prompt():
    batch = rollout()
    baseline = PolicyGradient(JS, 0.3).prepare(batch).baseline
    slope = JS.f_prime(batch.sequence_sum(batch.logprobs - batch.reference_logprobs))
    assert baseline[0].item() == pytest.approx((slope[1] + slope[5]).item() / 2)
    assert baseline[3].item() == pytest.approx((slope[2] + slope[4]).item() / 2)
    assert not baseline.requires_grad


def test_micro_batches_of_a_prepared_rollout_add_up_to_the_whole(objective):
    prepared = objective.prepare(rollout())
    output = objective(prepared)
    whole = gradient_of(objective, prepared)
    for cut in ([PROMPTS == 0, PROMPTS == 1], [torch.arange(6) == i for i in range(6)]):
        parts = [prepared.select(rows) for rows in cut]
        outputs = [objective(part) for part in parts]
        denominators = torch.stack([total_weights(part.terms) for part in outputs]).sum(0)
        total = torch.stack([reduce_terms(part.terms, denominators) for part in outputs]).sum()
        torch.testing.assert_close(total, output.mean(), rtol=1e-12, atol=1e-14)
        (gradient,) = torch.autograd.grad(total, prepared.logprobs)
        torch.testing.assert_close(gradient, whole, rtol=1e-12, atol=1e-14)


def test_a_rollout_that_was_not_prepared_prepares_itself(objective):
    batch = rollout()
    own, prepared = objective(batch), objective(objective.prepare(batch))
    torch.testing.assert_close(own.mean(), prepared.mean())
    assert own.metrics.keys() == prepared.metrics.keys()


def test_padding_changes_nothing(objective):
    batch = rollout()
    pad = lambda x, value: torch.nn.functional.pad(x, (0, 3), value=value)  # noqa: E731
    padded = dataclasses.replace(
        batch,
        completion_mask=pad(batch.completion_mask, False),
        logprobs=pad(batch.logprobs.masked_fill(~batch.completion_mask, math.nan), math.nan),
        **{
            name: pad(getattr(batch, name).masked_fill(~batch.completion_mask, math.nan), math.inf)
            for name in ("reference_logprobs", "old_logprobs", "values", "old_values")
        },
        measures={
            name: pad(values.masked_fill(~batch.completion_mask, math.nan), math.inf)
            for name, values in batch.measures.items()
        },
    )
    a, b = objective(batch), objective(padded)
    torch.testing.assert_close(b.mean(), a.mean(), rtol=1e-13, atol=1e-15)
    for name, values in a.metrics.items():
        torch.testing.assert_close(b.metrics[name], values, rtol=1e-13, atol=1e-15)
    (gradient,) = torch.autograd.grad(b.mean(), batch.logprobs)
    torch.testing.assert_close(gradient, gradient_of(objective, batch), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("name", NAMES)
def test_everything_is_finite_to_ten_thousand_nats(name, level, dtype):
    extremes = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 3.0], [1e4, 1e4, -300.0], [0.0, 0.0, 0.0]])
    zeros = torch.zeros(4, 3)
    for importance in ("token", "sequence"):
        objective = PolicyGradient(divergences.get(name), 0.1, importance=importance, level=level)
        for reference, old in ((-extremes, zeros), (zeros, -extremes), (-extremes, -extremes), (extremes, -extremes)):
            logprobs = torch.zeros(4, 3, dtype=dtype, requires_grad=True)
            batch = CompletionBatch(
                logprobs=logprobs,
                reference_logprobs=reference.to(dtype),
                old_logprobs=old.to(dtype),
                completion_mask=torch.ones(4, 3, dtype=torch.bool),
                prompt_index=torch.tensor([0, 0, 1, 1]),
                rewards=torch.tensor([1.0, 0.0, 2.0, -1.0]),
            )
            output = objective(batch)
            output.mean().backward()
            assert torch.isfinite(output.mean())
            assert torch.isfinite(logprobs.grad).all()
            assert all(torch.isfinite(values.double().sum()) for values in output.metrics.values())


def test_an_empty_batch_has_terms_without_weight(objective):
    empty = objective.prepare(rollout()).select(torch.zeros(6, dtype=torch.bool))
    for batch in (empty, dataclasses.replace(empty, advantages=None)):
        output = objective(batch)
        assert output.mean().item() == 0.0
        assert [term.weights.sum().item() for term in output.terms] == [0.0] * len(output.terms)


def test_needs_are_what_is_read(objective):
    given = {"logprobs", "completion_mask", "prompt_index"} | objective.needs
    batch = rollout()
    least = CompletionBatch(**{name: getattr(batch, name) for name in given}, measures=batch.measures)
    assert isinstance(objective(least), ObjectiveOutput)
    for name in objective.needs - {"old_logprobs", "old_values"}:  # these two have a meaning where they are None
        with pytest.raises(ValueError, match=f"{name}, which is None"):
            objective(dataclasses.replace(least, **{name: None}))
    assert isinstance(objective, Objective)
    assert isinstance(objective, BaseObjective)
    if objective.measures:
        with pytest.raises(ValueError, match=r"measures\['divergence'\], which is missing"):
            objective(dataclasses.replace(least, measures={}))


def test_needs_by_name():
    assert PolicyGradient(JS, beta=0.0).needs == {"rewards", "old_logprobs"}
    assert PolicyGradient(JS, 0.1).needs == {"rewards", "old_logprobs", "reference_logprobs"}
    assert OBJECTIVES["ppo"].needs == {
        *("rewards", "old_logprobs", "reference_logprobs", "values", "old_values"),
    }
    assert OBJECTIVES["ppo"].measures == {"divergence": DivergenceTo(divergences.get("alpha(0.3)"))}
    assert OBJECTIVES["grpo"].measures == {}


def test_values_learn_what_the_advantages_say():
    objective = PolicyGradient(advantage="gae", gamma=1.0, lam=1.0, value_coefficient=2.0)
    batch = rollout()
    policy, values = objective(batch).terms
    assert (policy.scale, values.scale) == (1.0, 2.0)
    (gradient,) = torch.autograd.grad(values.share(values.weights.sum()), batch.values)
    expected = 2.0 * (batch.values - REWARDS[:, None]).masked_fill(~batch.completion_mask, 0.0) / LENGTHS.sum()
    torch.testing.assert_close(gradient, expected.detach())
    assert torch.autograd.grad(policy.losses.sum(), batch.values, allow_unused=True)[0] is None


def test_metrics_are_one_detached_value_per_completion(objective):
    for name, values in objective(rollout()).metrics.items():
        assert values.shape == (6,), name
        assert not values.requires_grad, name


def test_a_function_of_ones_own_is_an_advantage():
    def ranks(rewards, prompt_index):
        return torch.argsort(torch.argsort(rewards)).to(rewards.dtype)

    prepared = PolicyGradient(advantage=ranks).prepare(rollout())
    assert prepared.advantages[0].tolist() == [5.0, 5.0, 5.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.1}, "without a divergence"),
        ({"level": "token"}, "without a divergence"),
        ({"divergence": JS, "beta": -0.1}, "must be finite and not negative"),
        ({"divergence": JS, "beta": math.nan}, "must be finite and not negative"),
        ({"divergence": JS, "beta": 0.1, "credit": "returns"}, "no later prefixes"),
        ({"divergence": JS, "beta": 0.0, "credit": "returns"}, "no later prefixes"),
        ({"advantage": "leave_one"}, "did you mean 'leave_one_out'"),
        ({"lam": 0.9}, r"lam=0.9 is only for advantage='gae', not 'leave_one_out'"),
        ({"gamma": 1.0}, "gamma=1.0 is only for"),
        ({"value_coefficient": 0.1, "advantage": "none"}, "is only for advantage='gae'"),
        ({"advantage": "gae", "lam": 1.5}, "lam=1.5 must be between"),
        ({"advantage": "gae", "value_coefficient": 0.0}, "must be positive"),
        ({"clip_low": 0.0}, r"clip_low=0.0 must be in \(0, 1\]"),
        ({"clip_high": -0.2}, "clip_high=-0.2 must be positive"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PolicyGradient(**arguments)


@pytest.mark.parametrize("field", ["importance", "level", "credit", "reduction"])
def test_unknown_choices_are_refused(field):
    with pytest.raises((ValueError, TypeError), match=field):  # TypeError where annotations are checked first
        PolicyGradient(JS, 0.1, **{field: "word"})


def test_clips_without_the_old_log_probs_are_refused():
    with pytest.raises(ValueError, match="old_logprobs is None: set it"):
        PolicyGradient(clip_high=0.2)(rollout(old_logprobs=None))
