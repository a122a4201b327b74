"""Distillation from a teacher behind another prompt, with real references."""

import pytest
import torch

from falign import divergences
from falign.methods import ContextDistillation, PrivilegedDistillation
from falign.references import AdapterOff, Prompted, objective_inputs
from falign.scoring import completion_scores, pad
from tests.references.test_prompted import OTHERS
from tests.scoring.models import TREES, tiny_model, with_lora
from tests.scoring.test_vocabulary import FAMILIES, family

BATCH = pad(TREES, pad_token_id=2)
TEACHER = Prompted(AdapterOff(), OTHERS, template="{hint}{prompt}")


def whole(model, prompts):
    """Log-probabilities of all tokens at each completion token, from whole logits of one row at a time."""
    rows = []
    for (prompt, completion), place in zip(BATCH.token_ids(), BATCH.place, strict=True):
        ids = prompts.get((place, tuple(prompt)), tuple(prompt))
        rows.append(model(torch.tensor([[*ids, *completion]])).logits[0, len(ids) - 1 : -1].double().log_softmax(-1))
    return torch.cat(rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_context_distillation_is_the_divergence_to_the_base_behind_the_context(name):
    policy, objective = with_lora(tiny_model(), trained=True), ContextDistillation(family(name))
    weights = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    completions = objective_inputs(policy, BATCH, references={"teacher": TEACHER}, objective=objective).completions
    loss = objective(completions).mean()
    with policy.disable_adapter(), torch.no_grad():
        log_q = whole(policy, OTHERS)
    log_p = whole(policy, {})
    wanted = (log_q.exp() * family(name).f(log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-6)
    found = torch.autograd.grad(loss, weights)
    expected = torch.autograd.grad(wanted, weights)
    scale = max(each.abs().max() for each in expected)
    assert all((a - b).abs().max() <= 1e-3 * scale for a, b in zip(found, expected, strict=True))


def test_privileged_distillation_from_sampled_tokens_has_the_score_function_of_the_reverse_kl():
    policy, objective = with_lora(tiny_model(), trained=True), PrivilegedDistillation(level="token")
    own = completion_scores(policy, BATCH).logprobs
    completions = objective_inputs(policy, BATCH, references={"teacher": TEACHER}, objective=objective).completions
    teacher = TEACHER.logprobs(policy, BATCH)
    (found,) = torch.autograd.grad(objective(completions).mean(), completions.logprobs)
    log_ratio = (own.detach() - teacher).masked_fill(~BATCH.completion_mask, 0.0)
    torch.testing.assert_close(found, log_ratio / BATCH.completion_mask.sum(), rtol=1e-4, atol=1e-6)
    assert objective == PrivilegedDistillation(divergences.get("reverse_kl"), level="token")
