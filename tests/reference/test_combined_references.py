"""Where distillation from combinations of references leads, with exact expectations over the enumerated world."""

import pytest
import torch

from falign import CompletionBatch, divergences
from falign.objectives import Distillation, DistributionMatching, ExponentialReward
from falign.scoring import Distribution, Head, token_scores
from falign.scoring.combinations import GeometricPredictions, MixturePredictions
from tests.reference.world import COMPLETIONS, PREFIXES, WORLD, random_logits, sequence_logprobs, token_logprobs
from tests.scoring.test_vocabulary import FAMILIES, family

TEACHER, BASE = random_logits(1), random_logits(2)
BEYOND, HALVES = {"teacher": 1.25, "base": -0.25}, {"teacher": 0.5, "base": 0.5}
HEAD = Head(embeddings=torch.nn.Identity())
SMOOTH = [name for name in FAMILIES if name != "total_variation"]  # whose gradient does not vanish at the optimum


def members():
    return {"teacher": Distribution(TEACHER, HEAD), "base": Distribution(BASE, HEAD)}


def optimum(kind):
    teacher, base = TEACHER.softmax(-1), BASE.softmax(-1)
    if kind == "mixture":
        return 0.5 * teacher + 0.5 * base
    product = teacher**1.25 * base**-0.25
    return product / product.sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", ["mixture", "geometric"])
@pytest.mark.parametrize("name", SMOOTH)
def test_distillation_arrives_at_the_mixture_and_beyond_the_teacher_under_every_divergence(name, kind):
    made = {"mixture": (MixturePredictions, HALVES), "geometric": (GeometricPredictions, BEYOND)}[kind]
    target, objective = made[0](members(), made[1]), Distillation(family(name), "target")
    logits = BASE.clone().requires_grad_()
    targets = torch.zeros(len(PREFIXES), dtype=torch.long)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        scores = token_scores(
            Distribution(logits, HEAD), targets, measures=objective.measures, references={"target": target}
        )
        batch = CompletionBatch(
            logprobs=scores.logprobs[:, None],
            completion_mask=torch.ones(len(PREFIXES), 1, dtype=torch.bool),
            prompt_index=torch.arange(len(PREFIXES)),
            measures={measure: values[:, None] for measure, values in scores.measures.items()},
        )
        loss = objective(batch).mean()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    torch.testing.assert_close(logits.softmax(-1).detach(), optimum(kind), rtol=0, atol=1e-5)


def test_at_sequence_level_f_dpg_to_the_unnormalized_combination_has_the_gradient_of_the_divergence_to_its_optimum():
    logits = random_logits(3).requires_grad_()
    weighted = 1.25 * token_logprobs(TEACHER) - 0.25 * token_logprobs(BASE)
    log_target = weighted.sum(-1) - weighted.sum(-1).logsumexp(0)
    n = len(COMPLETIONS)
    for name in SMOOTH:
        divergence = divergences.get(name) if name != "mine" else family(name)
        batch = CompletionBatch(
            logprobs=token_logprobs(logits),
            reference_logprobs=weighted,
            completion_mask=WORLD.mask,
            prompt_index=torch.zeros(n, dtype=torch.long),
            features=torch.zeros(n, 1, dtype=torch.float64),
            log_partition=weighted.sum(-1).logsumexp(0).expand(n),
        )
        losses = DistributionMatching(divergence, ExponentialReward(1.0), baseline="none")(batch).terms[0].losses
        (found,) = torch.autograd.grad((sequence_logprobs(logits).exp().detach() * losses).sum(), logits)
        value = (log_target.exp() * divergence.f(sequence_logprobs(logits) - log_target)).sum()
        (expected,) = torch.autograd.grad(value, logits)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
