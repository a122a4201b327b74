"""SAFE's core, TCOD, Correlated Proxies and annealed sums: exact gradients on the small world."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from falign import CompletionBatch, divergences
from falign.methods import SAFE, TCOD, CorrelatedProxies, ProRL
from falign.objectives import Distillation, Linear, PolicyGradient, Scheduled, Sum
from tests.reference.world import WORLD, random_logits, sequence_logprobs, token_logprobs

POLICY, REFERENCE = random_logits(3), random_logits(4)
REWARDS = torch.linspace(-1, 1, len(WORLD.tokens), dtype=torch.float64).cos()


def batch(logits: Tensor, **fields: Tensor) -> CompletionBatch:
    return CompletionBatch(
        logprobs=token_logprobs(logits),
        reference_logprobs=token_logprobs(REFERENCE),
        references={"teacher": token_logprobs(REFERENCE)},
        completion_mask=WORLD.mask,
        prompt_index=torch.zeros(len(WORLD.tokens), dtype=torch.long),
        rewards=REWARDS,
        old_logprobs=token_logprobs(logits).detach(),
        **fields,
    )


def losses(output, name: str) -> Tensor:
    (term,) = (term for term in output.terms if term.name == name)
    return term.scale * term.losses


def mean_gradient(per_completion: Tensor, logits: Tensor) -> Tensor:
    drawn = sequence_logprobs(logits).detach().exp()
    (gradient,) = torch.autograd.grad((drawn * per_completion).sum(), logits, retain_graph=True)
    return gradient


@pytest.mark.parametrize("step", [0, 5, 6, 12, 100])
def test_tcod_distills_the_first_tokens_alone(step):
    logits = POLICY.clone().requires_grad_()
    growing = TCOD(unit=1, every=6, longest=3, reduction="sequence_sum")
    found = mean_gradient(losses(growing.at(step)(batch(logits)), "distillation"), logits)
    # Σ over prefixes shorter than the horizon of KL(π‖T) at them, under the policy's own distribution of prefixes.
    horizon = min(1 + step // 6, 3)
    table, teacher = logits.log_softmax(-1), REFERENCE.log_softmax(-1)
    at_prefix = (table.exp() * (table - teacher)).sum(-1)[WORLD.prefix]
    within = WORLD.mask & (torch.arange(WORLD.mask.shape[1]) < horizon)
    expected = mean_gradient((at_prefix * within).sum(-1), logits)
    assert (found - expected).abs().max() < 1e-12
    if horizon == 3:
        plain = Distillation(divergences.get("reverse_kl"), level="token", importance="token", reduction="sequence_sum")
        whole = mean_gradient(losses(plain(batch(logits)), "distillation"), logits)
        assert (found - whole).abs().max() < 1e-14


def test_safe_is_ppo_at_the_controllers_beta_and_an_entropy_bonus():
    logits = POLICY.clone().requires_grad_()
    table = logits.log_softmax(-1)
    entropy = -(table.exp() * table).sum(-1)[WORLD.prefix]
    zeros = torch.zeros_like(WORLD.mask, dtype=torch.float64)
    given = {
        "values": zeros.requires_grad_(),
        "old_values": zeros.detach(),
        "measures": {"entropy.divergence": entropy},
    }
    safe = SAFE(target=0.5, start=0.3, entropy=0.02)
    assert set(safe.measures) == {"entropy.divergence"}
    assert safe.observed({"ppo/divergence/reverse_kl": 0.7}) == {"ppo.beta": 0.7}
    now = safe.controlled({"ppo.beta": 0.4}).at(0)
    output = now(batch(logits, **given))
    bonus = mean_gradient(losses(output, "entropy.distillation"), logits)
    # A mean over tokens: its weights, the lengths, are those of the term.
    (term,) = (term for term in output.terms if term.name == "entropy.distillation")
    lengths = WORLD.mask.sum(-1)
    assert torch.equal(term.weights, lengths.to(term.weights))
    expected = mean_gradient(-0.02 * (entropy * WORLD.mask).sum(-1) / lengths, logits)
    assert (bonus - expected).abs().max() < 1e-12
    ppo = PolicyGradient(
        divergences.get("reverse_kl"),
        0.4,
        "gae",
        clip_low=0.2,
        clip_high=0.2,
        importance="token",
        level="token",
        reduction="token_mean",
    )
    plain = ppo(batch(logits, **{k: v for k, v in given.items() if k != "measures"}))
    found = losses(output, "ppo.policy_gradient")
    assert torch.equal(found, losses(plain, "policy_gradient"))


def test_correlated_proxies_starts_at_the_floor_and_follows_the_root():
    proxies = CorrelatedProxies(strength=0.5, floor=0.01, smoothing=0.0)
    (controller,) = proxies.controllers.values()
    assert proxies.at(0).beta == pytest.approx(0.5 / 0.2)
    assert controller.value(controller.after(controller.start_state(), 0.25)) == pytest.approx(0.5)
    assert proxies.at(0).divergence.name == "pearson_chi2"
    assert CorrelatedProxies("jensen_shannon", strength=0.5).at(0).divergence.name == "jensen_shannon"


def test_an_annealed_weight_of_a_teacher_is_kdrl_at_each_step():
    logits = POLICY.clone().requires_grad_()
    parts = {
        "grpo": PolicyGradient(advantage="group_normalised", importance="token", reduction="token_mean"),
        "teacher": (Distillation(divergences.get("reverse_kl"), level="token", importance="token"), 5e-3),
    }
    annealed = Scheduled(Sum(parts), {"terms.teacher.1": Linear(5e-3, 1e-3, steps=200)})
    for step, weight in ((0, 5e-3), (100, 3e-3), (300, 1e-3)):
        plain = Sum({**parts, "teacher": (parts["teacher"][0], weight)})
        found = mean_gradient(sum(losses(annealed.at(step)(batch(logits)), t) for t in TERMS), logits)
        expected = mean_gradient(sum(losses(plain(batch(logits)), t) for t in TERMS), logits)
        assert (found - expected).abs().max() < 1e-15


TERMS = ("grpo.policy_gradient", "teacher.distillation")


def test_prorl_is_grpo_with_its_clips():
    assert ProRL("jensen_shannon", 0.01) == PolicyGradient(
        divergences.get("jensen_shannon"),
        0.01,
        "group_normalised",
        clip_low=0.2,
        clip_high=0.4,
        importance="token",
        level="token",
        reduction="token_mean",
    )
