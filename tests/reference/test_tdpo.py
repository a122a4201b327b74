"""TDPO against the paper's formulas, written with softmax and log over a small vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from falign import TDPO, CompletionBatch, divergences
from falign.divergences.estimators import full_vocabulary
from falign.scoring import Distribution, Head, token_scores

PAIRS, T, V = 3, 4, 6
BETA, ALPHA = 0.3, 0.7
LENGTHS = torch.tensor([4, 2, 1, 4, 3, 3])  # preferred, other, preferred, ...
GENERATOR = torch.Generator().manual_seed(4)
POLICY, REFERENCE = (1.5 * torch.randn(2 * PAIRS, T, V, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
TOKENS = torch.randint(V, (2 * PAIRS, T), generator=GENERATOR)
WEIGHTS = torch.rand(2 * PAIRS, T, generator=GENERATOR, dtype=torch.float64)
ONES = torch.ones_like(WEIGHTS)

# Σ_v at one position, from probabilities p of the policy and q of the reference.
TEXTBOOK = {
    "forward_kl": lambda p, q: sum(q[v] * torch.log(q[v] / p[v]) for v in range(V)),
    "reverse_kl": lambda p, q: sum(p[v] * torch.log(p[v] / q[v]) for v in range(V)),
    "pearson_chi2": lambda p, q: sum((p[v] - q[v]) ** 2 / q[v] for v in range(V)),
    "jensen_shannon": lambda p, q: sum(
        p[v] * torch.log(2 * p[v] / (p[v] + q[v])) + q[v] * torch.log(2 * q[v] / (p[v] + q[v])) for v in range(V)
    ),
}


def ours(objective, logits: Tensor, weights: Tensor | None) -> Tensor:
    logprobs, reference = logits.log_softmax(-1), REFERENCE.log_softmax(-1)
    mask = torch.arange(T) < LENGTHS[:, None]
    batch = CompletionBatch(
        logprobs=logprobs.gather(-1, TOKENS[..., None]).squeeze(-1),
        reference_logprobs=reference.gather(-1, TOKENS[..., None]).squeeze(-1),
        measures={"divergence": full_vocabulary(objective.divergence, logprobs, reference)},
        token_weights=weights,
        completion_mask=mask,
        prompt_index=torch.arange(PAIRS).repeat_interleave(2),
        preference=torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(PAIRS),
    )
    return objective(batch).terms[0].losses


def from_scoring(objective, logits: Tensor) -> Tensor:
    """The same from falign.scoring, in chunks; the logits are the hidden states of a head that changes nothing."""
    mask, head = torch.arange(T) < LENGTHS[:, None], Head(embeddings=torch.nn.Identity())
    scores = token_scores(
        Distribution(logits[mask], head),
        TOKENS[mask],
        measures=objective.measures,
        references={"reference": Distribution(REFERENCE[mask], head)},
        chunk_tokens=5,
    )
    nowhere = torch.full(mask.shape, torch.nan, dtype=torch.float64)
    batch = CompletionBatch(
        logprobs=nowhere.masked_scatter(mask, scores.logprobs),
        reference_logprobs=nowhere.masked_scatter(mask, scores.references["reference"]),
        measures={"divergence": nowhere.masked_scatter(mask, scores.measures["divergence"])},
        completion_mask=mask,
        prompt_index=torch.arange(PAIRS).repeat_interleave(2),
        preference=torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(PAIRS),
    )
    return objective(batch).terms[0].losses


def papers(variant: int, name: str, logits: Tensor, weights: Tensor) -> Tensor:
    """The losses, pair by pair and token by token."""
    losses = []
    for pair in range(PAIRS):
        sums = []
        for row in (2 * pair, 2 * pair + 1):
            m, delta = 0.0, 0.0
            for t in range(int(LENGTHS[row])):
                p, q, token = logits[row, t].softmax(-1), REFERENCE[row, t].softmax(-1), TOKENS[row, t]
                m = m + weights[row, t] * torch.log(p[token] / q[token])
                delta = delta + weights[row, t] * TEXTBOOK[name](p, q)
            sums.append((m, delta))
        (m_w, delta_w), (m_l, delta_l) = sums
        if variant == 1:
            logit = BETA * (m_w - m_l) - BETA * (delta_l - delta_w)
        else:
            logit = BETA * (m_w - m_l) - ALPHA * BETA * (delta_l - delta_w.detach())
        losses.append(-torch.log(torch.sigmoid(logit)))
    return torch.stack(losses)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", TEXTBOOK)
@pytest.mark.parametrize("variant", [1, 2])
def test_losses_and_gradients_of_the_logits_are_the_papers(variant, name, weights):
    weighting = "none" if weights is None else "activations"
    objective = TDPO(name, BETA, None if variant == 1 else ALPHA, variant, weighting)
    logits, expected_logits = POLICY.clone().requires_grad_(), POLICY.clone().requires_grad_()
    losses = ours(objective, logits, weights)
    expected = papers(variant, name, expected_logits, ONES if weights is None else weights)
    torch.testing.assert_close(losses, expected, rtol=1e-11, atol=1e-13)
    mixed = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    (losses * mixed).sum().backward()
    (expected * mixed).sum().backward()
    torch.testing.assert_close(logits.grad, expected_logits.grad, rtol=1e-9, atol=1e-13)
    assert logits.grad.abs().max() > 0.01


@pytest.mark.parametrize("name", TEXTBOOK)
@pytest.mark.parametrize("variant", [1, 2])
def test_losses_and_gradients_from_scoring_in_chunks_are_the_papers(variant, name):
    objective = TDPO(name, BETA, None if variant == 1 else ALPHA, variant)
    logits, expected_logits = POLICY.clone().requires_grad_(), POLICY.clone().requires_grad_()
    losses, expected = from_scoring(objective, logits), papers(variant, name, expected_logits, ONES)
    torch.testing.assert_close(losses, expected, rtol=1e-11, atol=1e-13)
    losses.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(logits.grad, expected_logits.grad, rtol=1e-9, atol=1e-13)


def test_variant_2_moves_the_preferred_completion_as_dpo_does_but_for_the_size_of_the_step():
    """Its δ is a constant, so each preferred row's gradient is a multiple of DPO's; in variant 1 it is not."""
    gradients = {}
    for label, objective in {
        "dpo": TDPO(beta=BETA, alpha=0.0),
        "tdpo2": TDPO(beta=BETA, alpha=ALPHA),
        "tdpo1": TDPO(beta=BETA, variant=1),
    }.items():
        logits = POLICY.clone().requires_grad_()
        ours(objective, logits, None).sum().backward()
        gradients[label] = logits.grad.flatten(1)
    cosine = lambda a, b, rows: torch.cosine_similarity(gradients[a][rows], gradients[b][rows])  # noqa: E731
    preferred, other = slice(0, None, 2), slice(1, None, 2)
    torch.testing.assert_close(cosine("tdpo2", "dpo", preferred), torch.ones(PAIRS, dtype=torch.float64))
    assert (cosine("tdpo2", "dpo", other) < 0.999).all()
    assert (cosine("tdpo1", "dpo", preferred) < 0.999).all()


def test_the_forward_kl_of_this_test_is_the_registrys():
    p, q = POLICY[0, 0].softmax(-1), REFERENCE[0, 0].softmax(-1)
    value = full_vocabulary(divergences.get("forward_kl"), p.log(), q.log())
    torch.testing.assert_close(value, torch.nn.functional.kl_div(p.log(), q, reduction="sum"))
