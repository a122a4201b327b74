"""Losses of methods made of advantages and weights, by the formulas of their papers on whole distributions."""

import math
from dataclasses import replace

import pytest
import torch

from falign import divergences
from falign.methods import ACE, APO, BDKD, PACED, RLAD, TSDKD, AdaSPEC, SparsePO
from falign.objectives import CompletionBatch, Distillation, PolicyGradient, Vocabulary, reduce_terms, total_weights
from tests.conformance.test_objectives import batch_for

N, T, V = 4, 6, 7
LENGTHS = torch.tensor([6, 2, 5, 3])
MASK = torch.arange(T) < LENGTHS[:, None]
PROMPTS = torch.tensor([0, 0, 1, 1])


def logits(seed):
    return 2 * torch.randn(N, T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER, DRAFT = (logits(seed) for seed in (1, 2, 3))
REFERENCES = {"teacher": TEACHER.log_softmax(-1), "reference": DRAFT.log_softmax(-1)}
REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)


def batch_of(objective, student):
    """The measures that the objective reads, from whole distributions."""
    tokens = torch.zeros(N * T, dtype=torch.long)
    logprobs = student.log_softmax(-1)
    at = Vocabulary(
        logprobs.flatten(0, 1), tokens, references={name: each.flatten(0, 1) for name, each in REFERENCES.items()}
    )
    return CompletionBatch(
        logprobs=logprobs[..., 0],
        reference_logprobs=REFERENCES["reference"][..., 0],
        references={"teacher": REFERENCES["teacher"][..., 0]},
        completion_mask=MASK,
        prompt_index=PROMPTS,
        rewards=REWARDS,
        measures={name: measure(at).reshape(N, T) for name, measure in objective.measures.items()},
    )


def value_and_gradient(objective):
    student = STUDENT.clone().requires_grad_()
    value = objective(batch_of(objective, student)).mean()
    return value, torch.autograd.grad(value, student)[0]


def assert_is(objective, formula):
    """The loss and its gradient are those of a formula of the student's distributions."""
    value, gradient = value_and_gradient(objective)
    student = STUDENT.clone().requires_grad_()
    expected = formula(student.softmax(-1))
    (true,) = torch.autograd.grad(expected, student)
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(gradient, true, rtol=1e-10, atol=1e-12)


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def entropy(p):
    return -(p * p.log()).sum(-1)


def mean(per_token):
    return per_token[MASK].sum() / MASK.sum()


Q, D = TEACHER.softmax(-1), DRAFT.softmax(-1)


def test_adaspec_is_the_mean_of_the_forward_kl_over_the_tokens_with_the_largest_gap():
    def formula(p):
        gap, losses = (kl(Q, p) - kl(Q, D)).detach(), kl(Q, p)
        means = []
        for row, n in enumerate(LENGTHS.tolist()):
            kept = gap[row, :n] >= torch.quantile(gap[row, :n], 0.6) - 1e-12
            means.append(losses[row, :n][kept].mean() * n)
        return torch.stack(means).sum() / MASK.sum()

    assert_is(AdaSPEC(keep=0.4), formula)
    plain = value_and_gradient(Distillation(divergences.get("forward_kl")))
    for found, expected in zip(value_and_gradient(AdaSPEC(keep=1.0)), plain, strict=True):
        assert torch.equal(found, expected)


def test_bdkds_gate_takes_the_forward_kl_where_the_teacher_is_less_certain():
    def formula(p):
        unsure = entropy(Q) > entropy(p).detach()
        return mean(torch.where(unsure, kl(Q, p), kl(p, Q)))

    assert_is(BDKD(), formula)

    def soft(p):
        unsure = entropy(Q) > entropy(p).detach()
        return mean(torch.where(unsure, kl(Q, p) + 0.25 * kl(p, Q), kl(p, Q) + 0.25 * kl(Q, p)))

    assert_is(BDKD(other=0.25), soft)


def test_tsdkd_is_the_sum_of_its_three_terms():
    m, keep, share = 0.9, 0.3, 0.4

    def formula(p):
        mixture = m * p + (1 - m) * Q
        divergence = m * kl(p, mixture) + (1 - m) * kl(Q, mixture)
        gated = mean(torch.sigmoid(entropy(p) - entropy(Q)).detach() * divergence)
        uncertain, ranked = 0.0, 0.0
        for row, n in enumerate(LENGTHS.tolist()):
            h = entropy(p)[row, :n]
            kept = h.detach() >= torch.quantile(h.detach(), 1 - keep) - 1e-12
            uncertain = uncertain + h[kept].mean() * n / MASK.sum()
            spent = 0.0
            for t in range(n):
                if spent >= share * h.sum().item():
                    break
                own = p[row, t].detach().topk(3).indices.tolist()
                order = sorted(own, key=lambda v, at=(row, t): -Q[at][v])
                for i in range(3):
                    ranked = ranked - (p[row, t, order[i]] / p[row, t, order[i:]].sum()).log() / MASK.sum()
                spent += h[t].item()
        return gated + 0.7 * uncertain + 0.1 * ranked

    assert_is(TSDKD(m, 0.7, 0.1, keep=keep, k=3, prefix=share), formula)


def test_paced_weights_prompts_by_their_pass_rate():
    # Prompt 0 passes half of the time, prompt 1 never.
    def formula(p):
        return (0.5**2 * 0.5**3 * kl(Q, p))[:2][MASK[:2]].sum() / MASK.sum()

    assert_is(PACED(a=2.0, b=3.0), formula)
    plain = value_and_gradient(Distillation(divergences.get("forward_kl")))
    for found, expected in zip(value_and_gradient(PACED(a=0.0, b=0.0)), plain, strict=True):
        assert torch.equal(found, expected)


def test_paced_switches_from_the_forward_to_the_reverse_kl():
    objective = PACED(switch=10)
    assert [objective.at(step).divergence.name for step in (0, 9, 10)] == ["forward_kl", "forward_kl", "reverse_kl"]
    assert PACED(switch=10, then=None) == PACED()


GRPO = PolicyGradient(
    advantage="group_normalised", clip_low=0.2, clip_high=0.2, importance="token", reduction="token_mean"
)


def test_ace_with_alpha_zero_and_rlad_with_exponent_one_are_grpo_to_the_bit():
    batch = batch_for(ACE())
    (expected,) = GRPO(batch).terms
    assert torch.equal(ACE(alpha=0.0)(batch).terms[0].losses, expected.losses)
    (found,) = RLAD(old_exponent=1.0, reduction="token_mean")(batch).terms
    assert torch.equal(found.losses, expected.losses)
    assert not torch.equal(ACE()(batch).terms[0].losses, expected.losses)


def test_apo_scales_the_penalty_of_right_answers_and_the_advantages_of_wrong_ones():
    objective = APO("forward_kl", 0.5, rate=0.1)
    student = STUDENT.clone()
    rewards = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    batch = batch_of(objective, student)
    batch = replace(batch, rewards=rewards, old_logprobs=batch.logprobs)
    reverse = replace(objective, beta=0.0, penalty_weights=())
    penalty = (objective(batch).terms[0].losses - reverse(batch).terms[0].losses) / 0.5
    plain = replace(objective, penalty_weights=())
    unweighted = (plain(batch).terms[0].losses - reverse(batch).terms[0].losses) / 0.5
    factors = [1.0, 1 - math.exp(-math.e / 2), 1.0, 1.0]  # of prompt 1 every answer is right
    torch.testing.assert_close(penalty, unweighted * torch.tensor(factors, dtype=torch.float64))
    grpo = GRPO.prepare(batch).require("advantages")[:, 0]
    found = objective.prepare(batch).require("advantages")[:, 0]
    assert found[0].item() == pytest.approx(grpo[0].item() * (2 - 1.1**-4), abs=1e-14)
    assert found[1].item() == grpo[1].item()


@pytest.mark.parametrize(
    "objective", [AdaSPEC(keep=0.4), BDKD(), TSDKD(k=3), PACED()], ids=lambda each: type(each).__name__
)
def test_micro_batches_of_whole_prompts_add_up(objective):
    batch = batch_of(objective, STUDENT)
    outputs = [objective(batch.select(prompt == PROMPTS)) for prompt in (0, 1)]
    denominators = torch.stack([total_weights(output.terms) for output in outputs]).sum(dim=0)
    total = torch.stack([reduce_terms(output.terms, denominators) for output in outputs]).sum()
    torch.testing.assert_close(total, objective(batch).mean(), rtol=1e-13, atol=0)


def test_sparsepo_is_the_first_variant_of_tdpo_with_the_papers_mask():
    made = SparsePO(beta=0.8)
    assert (made.variant, made.weighting, made.beta, made.divergence.name) == (1, "mapo", 0.8, "forward_kl")
