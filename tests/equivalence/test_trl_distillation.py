"""The loss of TRL's GKDTrainer on the same logits: its JSD(β) is ``generalized_js(1-β)``, with the KLs at its ends."""

import os

import pytest
import torch

from falign import divergences
from falign.objectives import CompletionBatch, Distillation, DivergenceTo
from falign.scoring import Distribution, Head, token_scores

N, T, H, V = 3, 5, 6, 17


@pytest.fixture(scope="module")
def generalized_jsd_loss():
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss


def named(beta):
    if beta in (0.0, 1.0):
        return divergences.get("forward_kl" if beta == 0.0 else "reverse_kl")
    return divergences.get(f"generalized_js({1 - beta})")


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_loss_and_its_gradient(generalized_jsd_loss, beta, temperature, trained_head):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.nn.Linear(H, V, bias=False, dtype=torch.float64) for _ in range(2))
    for layer in (student, teacher):
        layer.weight.data = torch.randn(V, H, generator=generator, dtype=torch.float64)
    student.requires_grad_(trained_head)
    hidden, of_teacher = torch.randn(2, N, T, H, generator=generator, dtype=torch.float64)
    leaves = [hidden.requires_grad_(), *(student.parameters() if trained_head else ())]
    mask = torch.tensor([[True] * n + [False] * (T - n) for n in (5, 2, 4)])
    targets = torch.randint(V, (N, T), generator=generator)

    labels = targets.masked_fill(~mask, -100)
    wanted = generalized_jsd_loss(
        student(hidden), teacher(of_teacher).detach(), labels=labels, beta=beta, temperature=temperature
    )
    expected = torch.autograd.grad(wanted, leaves)

    objective = Distillation(named(beta), temperature=temperature)
    scores = token_scores(
        Distribution(hidden[mask], Head(embeddings=student)),
        targets[mask],
        measures=objective.measures,
        references={"teacher": Distribution(of_teacher[mask], Head(embeddings=teacher.requires_grad_(False)))},
        chunk_tokens=4,
    )
    batch = CompletionBatch(
        logprobs=_rows(scores.logprobs, mask),
        measures={name: _rows(values, mask) for name, values in scores.measures.items()},
        completion_mask=mask,
        prompt_index=torch.arange(N),
    )
    loss = objective(batch).mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected, rtol=1e-10, atol=1e-12)


def _rows(values, mask):
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask, values)


def test_half_of_the_registrys_jensen_shannon_is_the_textbooks(generalized_jsd_loss):
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 4, V, generator=generator, dtype=torch.float64)
    heads = [Head(embeddings=torch.nn.Identity())] * 2
    found = token_scores(
        Distribution(student, heads[0]),
        torch.zeros(4, dtype=torch.long),
        measures={"js": DivergenceTo(divergences.get("jensen_shannon"), "teacher")},
        references={"teacher": Distribution(teacher, heads[1])},
    ).measures["js"]
    wanted = generalized_jsd_loss(student[None], teacher[None], labels=torch.zeros(1, 4), beta=0.5)
    torch.testing.assert_close(found.mean() / 2, wanted, rtol=1e-12, atol=0)
