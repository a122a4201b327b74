import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from falign import divergences
from falign.objectives import (
    AdvantageList,
    CompletionBatch,
    Dads,
    DifficultyKernel,
    Hybrid,
    PolicyGradient,
    Rehearsal,
    ace,
    stcr,
)
from falign.objectives.advantages import ADVANTAGES, get_advantage
from tests.conformance.test_objectives import batch_for
from tests.reference.world import COMPLETIONS, WORLD, random_logits, token_logprobs

LENGTHS = torch.tensor([3, 1, 4, 2, 4, 3])
PROMPTS = torch.tensor([0, 0, 0, 1, 1, 1])
REWARDS = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)


def rollout(**given) -> CompletionBatch:
    generator = torch.Generator().manual_seed(3)
    draw = lambda: -torch.rand(6, 4, generator=generator, dtype=torch.float64)  # noqa: E731
    fields = {
        "logprobs": draw().requires_grad_(),
        "old_logprobs": draw(),
        "reference_logprobs": draw(),
        "completion_mask": torch.arange(4) < LENGTHS[:, None],
        "prompt_index": PROMPTS,
        "rewards": REWARDS,
    }
    return CompletionBatch(**{**fields, **given})


def advantages_of(advantage, batch, **fields):
    return PolicyGradient(advantage=advantage, **fields).prepare(batch).require("advantages")


@pytest.mark.parametrize("name", ADVANTAGES.names())
def test_a_name_a_function_and_a_list_of_one_are_the_same_to_the_bit(name):
    batch = rollout()
    plain = get_advantage(name)(REWARDS, PROMPTS)[:, None].expand(6, 4) * batch.completion_mask
    for form in (name, [name], get_advantage(name), (get_advantage(name),)):
        assert torch.equal(advantages_of(form, batch), plain)
    assert PolicyGradient(advantage=[name]) == PolicyGradient(advantage=name)


@pytest.mark.parametrize("length_norm", ["token", "none"])
@pytest.mark.parametrize("kernel", ["softplus", "relu"])
def test_ace_multiplies_negative_advantages_by_one_plus_alpha_times_the_kernel_of_the_log_ratio(kernel, length_norm):
    # Positive rewards for one completion only, so that advantages of both signs occur.
    batch = rollout(rewards=torch.tensor([0.0, 1.0, 0.3, 0.0, 0.9, 0.2], dtype=torch.float64))
    plain = advantages_of("group_normalised", batch)
    found = advantages_of(["group_normalised", ace(alpha=0.7, kernel=kernel, length_norm=length_norm)], batch)
    for i in range(6):
        c = sum((batch.logprobs[i, t] - batch.reference_logprobs[i, t]).item() for t in range(LENGTHS[i]))
        c = c / LENGTHS[i].item() if length_norm == "token" else c
        factor = 1 + 0.7 * (math.log(1 + math.exp(c)) if kernel == "softplus" else max(c, 0.0))
        for t in range(4):
            expected = plain[i, t].item() * (factor if plain[i, t] < 0 else 1.0)
            assert found[i, t].item() == pytest.approx(expected, abs=1e-14)
    assert (plain < 0).any()
    assert (plain > 0).any()


def test_aces_cap_bounds_the_factor_and_alpha_zero_changes_nothing():
    batch = rollout()
    plain = advantages_of("group_normalised", batch)
    assert torch.equal(advantages_of(["group_normalised", ace(alpha=0.0)], batch), plain)
    capped = advantages_of(["group_normalised", ace(alpha=50.0, cap=1.25)], batch)
    torch.testing.assert_close(capped, torch.where(plain < 0, 1.25 * plain, plain))


def test_stcr_grows_with_the_excess_over_the_mean_length_of_the_right_answers():
    batch = rollout(rewards=torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64))
    found = advantages_of(["leave_one_out", stcr(rate=0.5)], batch)[:, 0]
    plain = advantages_of("leave_one_out", batch)[:, 0]
    factors = [2 - 1.5**-2, 1.0, 2 - 1.5**-3, 1.0, 1.0, 1.0]  # completion 3 is shorter than the right ones' 3.5
    assert (found / plain).tolist() == pytest.approx(factors, abs=1e-14)
    # A prompt without a right answer has nothing to compare with.
    none_right = rollout(rewards=torch.tensor([0.5, 0.2, 0.1, 0.4, 0.3, 0.9], dtype=torch.float64))
    assert torch.equal(advantages_of(["leave_one_out", stcr()], none_right), advantages_of("leave_one_out", none_right))


def test_the_published_rate_of_stcr_gives_its_factor_at_a_thousand_tokens():
    batch = CompletionBatch(
        logprobs=torch.zeros(2, 2000, dtype=torch.float64),
        completion_mask=torch.arange(2000) < torch.tensor([[2000], [1000]]),
        prompt_index=torch.tensor([0, 0]),
        rewards=torch.tensor([0.0, 1.0]),
    )
    factor = stcr().transform(torch.ones(2, 2000, dtype=torch.float64), batch)[0, 0].item()
    assert factor == pytest.approx(1 + 1 - 1.00001**-1000, abs=1e-13)


def test_transforms_apply_in_order_to_a_value_heads_advantages_too():
    batch = rollout(values=torch.full((6, 4), 0.3, dtype=torch.float64))
    plain = advantages_of("gae", batch)
    found = advantages_of(["gae", lambda a, _: a - 1, lambda a, _: a * 2], batch)
    torch.testing.assert_close(found, ((plain - 1) * 2) * batch.completion_mask)
    assert PolicyGradient(advantage=["gae", "ace"]).needs >= {"values", "old_values", "reference_logprobs"}


@dataclass(frozen=True)
class TeacherGain:
    """A user's advantage of the batch: how much more likely a teacher finds each token."""

    @property
    def needs(self):
        return frozenset({"references.teacher"})

    def advantages(self, batch):
        return batch.require("references.teacher") - batch.sampling_logprobs


def test_an_advantage_of_the_batch_states_its_needs_and_is_per_token():
    objective = PolicyGradient(advantage=[TeacherGain(), "ace"])
    assert objective.needs >= {"references.teacher", "reference_logprobs"}
    assert objective.needs_to_prepare == {"references.teacher", "reference_logprobs"}
    assert Hybrid(objective, Rehearsal(divergences.get("forward_kl")), 1.0).needs_to_prepare
    batch = rollout(references={"teacher": torch.full((6, 4), -0.4, dtype=torch.float64)})
    expected = (-0.4 - batch.old_logprobs) * batch.completion_mask
    torch.testing.assert_close(advantages_of(TeacherGain(), batch), expected)


@pytest.mark.parametrize(
    ("advantage", "message"),
    [
        (["ace"], r"begins with 'ace', which only transforms advantages: begin the list with one of none, .*gae"),
        ([ace(), "group_normalised"], "begins with .*which only transforms"),
        ([], "empty list"),
        (["group_normalised", "acee"], "'acee' is unknown; did you mean 'ace'"),
        (["group_normalizd"], "did you mean 'group_normalised'"),
        (["none", TeacherGain()], "does not transform advantages"),
    ],
)
def test_a_list_that_cannot_work_is_refused(advantage, message):
    with pytest.raises(ValueError, match=message):
        PolicyGradient(advantage=advantage)


def test_what_is_no_function_is_refused():
    with pytest.raises(ValueError, match="3 after the first entry, which does not transform advantages"):
        AdvantageList.of(["none", 3])
    with pytest.raises(ValueError, match="advantage is 3: give a name, or a function"):
        AdvantageList.of(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ace(alpha=-1.0), r"ace: alpha=-1\.0 must be finite and not negative"),
        (lambda: ace(cap=0.5), r"ace: cap=0\.5"),
        (lambda: stcr(rate=0.0), r"stcr: rate=0\.0"),
        (lambda: stcr(pass_reward=math.nan), "stcr: pass_reward=nan"),
        (lambda: Dads(pass_reward=math.inf), "dads: pass_reward=inf"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_entry_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"shape \(6, 1\) for 6 completions of at most 4 tokens"):
        advantages_of(["none", lambda a, _: a[:, :1]], rollout())


# Ratios to a teacher (RLAD), and weights.


def test_a_ratio_with_all_weight_on_the_old_policy_is_grpo_to_the_bit_and_does_not_read_the_teacher():
    grpo = PolicyGradient(advantage="group_normalised", clip_low=0.2, clip_high=0.2, importance="token")
    to_teacher = replace(grpo, importance_reference="teacher", old_exponent=1.0)
    assert to_teacher.needs == grpo.needs
    batch = rollout()
    for plain, other in zip(grpo(batch).terms, to_teacher(batch).terms, strict=True):
        assert torch.equal(plain.losses, other.losses)


def test_at_the_first_step_the_ratio_is_that_of_policy_to_teacher_and_clips_there():
    """As published: where the teacher differs from the policy, tokens are clipped before anything has moved."""
    teacher = torch.full((6, 4), -0.4, dtype=torch.float64)
    batch = rollout(references={"teacher": teacher})
    batch = replace(batch, old_logprobs=batch.logprobs.detach())
    objective = PolicyGradient(
        importance="token", clip_low=0.2, clip_high=0.2, importance_reference="teacher", old_exponent=0.25
    )
    output = objective(batch)
    ratio = torch.exp(0.75 * (batch.logprobs - teacher)).detach()
    expected = [ratio[i, : LENGTHS[i]].mean().item() for i in range(6)]
    assert output.metrics["importance_weight"].tolist() == pytest.approx(expected, abs=1e-13)
    assert output.metrics["clip_ratio/low"].sum() > 0


@pytest.mark.parametrize("importance", ["sequence", "token"])
def test_the_mean_gradient_is_that_of_the_expected_ratio_times_the_advantage(importance):
    """Enumerated: samples of π_old, ratio ``π/(π_old^a T^(1-a))``, advantages that differ between completions."""
    a = 0.35
    policy = random_logits(1).requires_grad_()
    old, teacher = token_logprobs(random_logits(2)), token_logprobs(random_logits(3))
    rewards = torch.linspace(-1, 2, len(COMPLETIONS), dtype=torch.float64)
    probabilities = old.sum(dim=-1).exp()
    # Independently: ratios as probabilities, multiplied out.
    ratio = token_logprobs(policy).exp() / (old.exp() ** a * teacher.exp() ** (1 - a))
    if importance == "sequence":
        expected = (probabilities * rewards * ratio.prod(dim=-1)).sum()
    else:
        expected = (probabilities[:, None] * rewards[:, None] * ratio).masked_fill(~WORLD.mask, 0.0).sum()
    (true,) = torch.autograd.grad(expected, policy)
    batch = CompletionBatch(
        logprobs=token_logprobs(policy),
        old_logprobs=old,
        references={"teacher": teacher},
        completion_mask=WORLD.mask,
        prompt_index=torch.zeros(len(COMPLETIONS), dtype=torch.long),
        rewards=rewards,
    )
    objective = PolicyGradient(advantage="none", importance=importance, importance_reference="teacher", old_exponent=a)
    (found,) = torch.autograd.grad((-probabilities * objective(batch).terms[0].losses).sum(), policy)
    torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-14)


@dataclass(frozen=True)
class Given:
    """A weight that ignores the batch."""

    values: torch.Tensor
    needs = frozenset()
    measures = {}  # noqa: RUF012

    def __call__(self, batch):
        return self.values


@pytest.mark.parametrize("f", divergences.names())
def test_a_weighted_penalty_has_the_gradient_of_the_weighted_divergence(f):
    """``Σ_y w(y) π_ref(y) f(π/π_ref)``, with constants w(y); enumerated on samples of the policy."""
    divergence = divergences.get({"alpha": "alpha(0.3)", "generalized_js": "generalized_js(0.3)"}.get(f, f))
    policy = random_logits(4).requires_grad_()
    logprobs, reference = token_logprobs(policy), token_logprobs(random_logits(5))
    log_u = logprobs.sum(dim=-1) - reference.sum(dim=-1)
    weights = torch.linspace(0, 2, len(COMPLETIONS), dtype=torch.float64)
    value = (weights * reference.sum(dim=-1).exp() * divergence.f(log_u)).sum()
    (true,) = torch.autograd.grad(value, policy, retain_graph=True)
    objective = PolicyGradient(
        divergence, 0.6, "none", penalty_weights=[Given(weights[:, None].expand(WORLD.mask.shape))]
    )
    batch = CompletionBatch(
        logprobs=logprobs,
        reference_logprobs=reference,
        completion_mask=WORLD.mask,
        prompt_index=torch.zeros(len(COMPLETIONS), dtype=torch.long),
        rewards=torch.zeros(len(COMPLETIONS), dtype=torch.float64),
    )
    probabilities = logprobs.sum(dim=-1).exp().detach()
    (found,) = torch.autograd.grad((probabilities * objective(batch).terms[0].losses).sum() / 0.6, policy)
    torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)


def test_weights_multiply_each_tokens_gain_and_ones_change_nothing():
    batch = rollout()
    values = torch.linspace(0.2, 3, 24, dtype=torch.float64).reshape(6, 4)
    plain = PolicyGradient(importance="token")
    (base,) = torch.autograd.grad(plain(batch).mean(), batch.logprobs)
    weighted = replace(plain, weights=[Given(values)])
    (found,) = torch.autograd.grad(weighted(batch).mean(), batch.logprobs)
    torch.testing.assert_close(found, base * values * batch.completion_mask)
    for weights in ([Given(torch.ones_like(values))], [DifficultyKernel(0.0, 0.0)]):
        ones = replace(plain, weights=weights)
        assert torch.equal(ones(batch).terms[0].losses, plain(batch).terms[0].losses)


def test_penalty_weights_without_a_penalty_and_an_exponent_without_a_reference_are_refused():
    with pytest.raises(ValueError, match="penalty_weights without a penalty"):
        PolicyGradient(penalty_weights=[Dads()])
    with pytest.raises(ValueError, match=r"old_exponent=0\.5 without importance_reference"):
        PolicyGradient(old_exponent=0.5)
    with pytest.raises(ValueError, match=r"old_exponent=1\.5 must be between 0 and 1"):
        PolicyGradient(importance_reference="teacher", old_exponent=1.5)


def test_a_rollout_gets_the_references_that_its_advantages_read_although_measures_read_them_later():
    objective = PolicyGradient(divergences.get("reverse_kl"), 0.1, ["group_normalised", "ace"], level="vocabulary")
    assert objective.needs_to_prepare >= {"reference_logprobs"}
    prepared = objective.prepare(batch_for(objective))
    assert F.relu(-prepared.require("advantages")).max() > 0
