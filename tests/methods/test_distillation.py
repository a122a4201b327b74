"""Methods that learn from a teacher: what they are composed of, where they lead, and their run files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from falign import CompletionBatch, divergences
from falign.methods import ADPA, DCKD, KD, KDRL, OPD, PSKD, ExOPD
from falign.objectives import Distillation, Selected, Sum, Supervised, Vocabulary
from falign.runfile import load_run_file
from tests.reference.world import WORLD, random_logits, sequence_logprobs, token_logprobs

TEACHER, BASE, N = random_logits(1), random_logits(3), len(WORLD.tokens)


def batch_of(objective, logits: Tensor, references: dict[str, Tensor], **given) -> CompletionBatch:
    """Every completion of the small world; references by their logits at each prefix."""
    log_pi = logits.log_softmax(-1)
    whole = {name: each.log_softmax(-1) for name, each in references.items()}
    at = Vocabulary(log_pi, torch.zeros(len(log_pi), dtype=torch.long), whole)
    return CompletionBatch(
        logprobs=token_logprobs(logits),
        references={name: token_logprobs(each) for name, each in references.items()},
        measures={name: measure(at)[WORLD.prefix] for name, measure in objective.measures.items()},
        completion_mask=WORLD.mask,
        prompt_index=torch.arange(N),
        **given,
    )


def follow(objective, references, value, law=None) -> Tensor:
    """The policy at the end of L-BFGS along the objective's exact mean gradient; the value sizes the steps."""
    logits = BASE.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=120, tolerance_grad=1e-11, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        losses = objective(batch_of(objective, logits, references)).terms[0].losses
        drawn = sequence_logprobs(logits.detach() if law is None else law).exp()
        (logits.grad,) = torch.autograd.grad((drawn * losses).sum(), logits)
        return value(logits.detach())

    optimizer.step(closure)
    return logits.detach()


@pytest.mark.parametrize("strength", [1.0, 1.25, 0.5])
def test_exopd_leads_to_the_geometric_target_of_whole_completions(strength):
    mixed = strength * sequence_logprobs(TEACHER) + (1 - strength) * sequence_logprobs(BASE)
    target = mixed.log_softmax(0)  # over all completions: its normalizer is unknown to the objective
    objective = ExOPD(level="sequence")
    assert objective.accepts_unnormalized
    # Log-probabilities per token, whose sum over a completion is unnormalized, as of a combination of references.
    per_token = strength * token_logprobs(TEACHER) + (1 - strength) * token_logprobs(BASE)
    logits = BASE.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=120, tolerance_grad=1e-11, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        batch = CompletionBatch(
            logprobs=token_logprobs(logits),
            references={"target": per_token},
            completion_mask=WORLD.mask,
            prompt_index=torch.arange(N),
        )
        drawn = sequence_logprobs(logits.detach())
        (logits.grad,) = torch.autograd.grad((drawn.exp() * objective(batch).terms[0].losses).sum(), logits)
        return (drawn.exp() * (drawn - target)).sum()

    optimizer.step(closure)
    torch.testing.assert_close(sequence_logprobs(logits.detach()), target, rtol=0, atol=1e-5)
    assert not ExOPD("forward_kl", level="sequence").accepts_unnormalized
    assert not ExOPD().accepts_unnormalized


@pytest.mark.parametrize("level", ["token", "vocabulary"])
@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "forward_kl"])
def test_dense_exopd_leads_to_the_geometric_target_at_each_prefix(level, name):
    target = (1.25 * TEACHER.log_softmax(-1) - 0.25 * BASE.log_softmax(-1)).log_softmax(-1)
    divergence = divergences.get(name)
    objective = ExOPD(name, level=level, reduction="sequence_sum")
    law = torch.zeros_like(BASE)  # fixed prefixes: those of a distribution that does not move

    def value(logits: Tensor) -> Tensor:
        at_prefix = (target.exp() * divergence.f(logits.log_softmax(-1) - target)).sum(-1)
        return (sequence_logprobs(law).exp() * (at_prefix[WORLD.prefix] * WORLD.mask).sum(-1)).sum()

    if level == "token":  # sampled tokens are the policy's, so its own distribution of prefixes takes part
        logits = BASE.clone().requires_grad_()
        losses = objective(batch_of(objective, logits, {"target": target})).terms[0].losses
        (slope,) = torch.autograd.grad((sequence_logprobs(logits.detach()).exp() * losses).sum(), logits)
        at_prefix = (target.exp() * divergence.f(logits.log_softmax(-1) - target)).sum(-1)
        whole = (at_prefix[WORLD.prefix] * WORLD.mask).sum(-1)
        (exact,) = torch.autograd.grad((sequence_logprobs(logits.detach()).exp() * whole).sum(), logits)
        torch.testing.assert_close(slope, exact, rtol=0, atol=1e-10)
        return
    found = follow(objective, {"target": target}, value, law)
    torch.testing.assert_close(found.softmax(-1), target.exp(), rtol=0, atol=1e-4)


def sides() -> dict[str, Tensor]:
    """The completions as pairs: even rows are chosen, odd rows rejected."""
    return {
        "prompt_index": torch.arange(N) // 2,
        "preference": (torch.arange(N) % 2 == 0).double(),
    }


def pairs_of(objective, logits: Tensor, references: dict[str, Tensor]) -> CompletionBatch:
    batch = batch_of(objective, logits, references)
    return CompletionBatch.of({**batch.tensors(), **sides()})


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def test_adpa_is_fine_tuning_where_both_teachers_agree_and_else_raises_the_expected_advantage():
    logits, objective = random_logits(0).requires_grad_(), ADPA(gamma=1.5)
    same = pairs_of(objective, logits, {"teacher": TEACHER, "base": TEACHER})
    sft = Selected(Supervised(), "chosen")
    assert torch.equal(gradient(objective(same).mean(), logits), gradient(sft(same).mean(), logits))
    batch = pairs_of(objective, logits, {"teacher": TEACHER, "base": BASE})
    advantage = (TEACHER.log_softmax(-1) - BASE.log_softmax(-1)).clamp(min=-16, max=16)
    own = (logits.softmax(-1) * advantage).sum(-1)[WORLD.prefix]
    rejected = torch.arange(N) % 2 == 1
    exact = sft(batch).mean() - 1.5 * own[rejected][WORLD.mask[rejected]].mean()
    torch.testing.assert_close(gradient(objective(batch).mean(), logits), gradient(exact, logits))


def test_dckd_is_fine_tuning_and_the_forward_kl_of_each_side():
    logits, objective = random_logits(0).requires_grad_(), DCKD(alpha=0.2)
    batch = pairs_of(objective, logits, {"teacher": TEACHER})
    log_t, log_pi = TEACHER.log_softmax(-1), logits.log_softmax(-1)
    kl = (log_t.exp() * (log_t - log_pi)).sum(-1)[WORLD.prefix]
    chosen = torch.arange(N) % 2 == 0
    exact = -token_logprobs(logits)[chosen][WORLD.mask[chosen]].mean()
    for side in (chosen, ~chosen):
        exact = exact + 0.2 * kl[side][WORLD.mask[side]].mean()
    torch.testing.assert_close(objective(batch).mean(), exact)
    torch.testing.assert_close(gradient(objective(batch).mean(), logits), gradient(exact, logits))


def test_pskd_is_the_cross_entropy_to_targets_softened_by_the_past():
    logits, objective = random_logits(0).requires_grad_(), PSKD(steps=10, alpha=0.8).at(5)
    alpha = objective.weights["past"]
    assert alpha == pytest.approx((0.08 + 0.8) / 2)
    batch = batch_of(objective, logits, {"teacher": TEACHER})
    log_pi = logits.log_softmax(-1)[WORLD.prefix]
    hard = torch.nn.functional.one_hot(WORLD.tokens, 4).double()
    soft = (1 - alpha) * hard + alpha * TEACHER.softmax(-1)[WORLD.prefix]
    exact = -(soft * log_pi).sum(-1)[WORLD.mask].mean()
    torch.testing.assert_close(gradient(objective(batch).mean(), logits), gradient(exact, logits))


def test_the_other_methods_are_compositions():
    js = divergences.get("jensen_shannon")
    assert OPD("jensen_shannon", level="token") == Distillation(js, level="token")
    assert KD("jensen_shannon", temperature=2.0) == Distillation(js, temperature=2.0, reduction="token_mean")
    assert KD(supervised=0.5).objectives["sft"] == Supervised()
    annealed = KDRL(beta=0.4, last_beta=0.2, steps=10)
    assert [annealed.at(step).weights["teacher"] for step in (0, 5, 99)] == pytest.approx([0.4, 0.3, 0.2])
    assert isinstance(KDRL(last_beta=None), Sum)
    assert KDRL(level="sequence", last_beta=None).objectives["teacher"].level == "sequence"
    with pytest.raises(ValueError, match="alpha=1"):
        PSKD(steps=10, alpha=1.0)


CONFIGS = {
    "opd-arithmetic": OPD(),
    "kd-polite": KD(),
    "exopd-arithmetic": ExOPD(),
    "kdrl-arithmetic": KDRL(steps=20).at(0),
    "dckd-polite": DCKD(),
    "adpa-polite": ADPA(),
    "pskd-polite": PSKD(steps=20).at(0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_run_file_of_a_method_has_its_objective(name):
    config = load_run_file(Path(__file__).parents[2] / "configs" / f"{name}.yaml")
    assert config.check().at(0) == CONFIGS[name]


@pytest.mark.parametrize("supervised", [0.0, -0.5, float("inf")])
def test_a_share_of_fine_tuning_that_is_not_positive_is_refused(supervised):
    with pytest.raises(ValueError, match=r"supervised=.* must be positive and finite: leave it out"):
        KD("forward_kl", supervised=supervised)
