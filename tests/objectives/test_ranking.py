import itertools
import math

import pytest
import torch

from falign.divergences import get
from falign.objectives import TopK, Vocabulary, get_measure
from falign.objectives.ranking import RankTopK
from tests.scoring.measure_world import M, V, assert_exact


def of_order(scores, order):
    """``log P(order)`` of Plackett–Luce, drawn one by one without replacement."""
    total, left = 0.0, list(order)
    for token in order:
        total = total + scores[token] - torch.logsumexp(scores[left], 0)
        left.remove(token)
    return total


def test_the_likelihoods_of_all_orders_of_three_tokens_sum_to_one():
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    likelihood = {}
    for order in itertools.permutations(range(3)):
        reference = torch.empty(3, dtype=torch.float64)
        reference[list(order)] = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
        at = Vocabulary(p[None], torch.tensor([0]), {"reference": reference[None]})
        likelihood[order] = RankTopK(3)(at).neg().exp().item()
        assert likelihood[order] == pytest.approx(of_order(p, order).exp().item(), abs=1e-12)
    assert sum(likelihood.values()) == pytest.approx(1.0, abs=1e-12)
    # A prefix sum would give each order the likelihood of its reverse.
    assert max(likelihood, key=likelihood.__getitem__) == (1, 2, 0)
    assert min(likelihood, key=likelihood.__getitem__) == (0, 2, 1)


def orders(whole, k):
    return [sorted(range(V), key=lambda v: -row[v])[:k] for row in whole.q().tolist()]


@pytest.mark.parametrize("trained_head", [False, True])
def test_it_is_the_negative_log_likelihood_among_the_top(trained_head):
    def formula(whole):
        return torch.stack([-of_order(z, order) for z, order in zip(whole.logits, orders(whole, 4), strict=True)])

    assert_exact(RankTopK(4), formula, trained_head=trained_head, padded=True)


@pytest.mark.parametrize("k", [1, 4, V])
def test_whole_ranks_the_top_before_all_others(k):
    def formula(whole):
        values = []
        for z, order in zip(whole.logits, orders(whole, k), strict=True):
            left, value = list(range(V)), 0.0
            for token in order:
                value = value + torch.logsumexp(z[left], 0) - z[token]
                left.remove(token)
            values.append(value)
        return torch.stack(values)

    assert_exact(RankTopK(k, whole=True), formula)


@pytest.mark.parametrize("k", [3, V])
@pytest.mark.parametrize("trained_head", [False, True])
def test_pld_puts_the_target_first_and_weights_each_choice_by_the_reference(trained_head, k):
    def formula(whole):
        values = []
        for row in range(M):
            y = int(whole.targets[row])
            order = [y, *(v for v in orders(whole, k)[row] if v != y)]
            left, z, value = list(range(V)), whole.logits[row], 0.0
            for token in order:
                value = value + whole.q()[row, token] * (torch.logsumexp(z[left], 0) - z[token])
                left.remove(token)
            values.append(value)
        return torch.stack(values)

    measure = RankTopK(k, weights="reference", target_first=True, whole=True)
    assert_exact(measure, formula, trained_head=trained_head, padded=True)


def test_one_token_that_is_the_target_is_the_cross_entropy():
    measure = RankTopK(1, target_first=True, whole=True, weights="equal")
    reference = torch.tensor([[0.1, 0.8, 0.1]]).log()
    at = Vocabulary(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([1]), {"reference": reference})
    torch.testing.assert_close(measure(at), -torch.tensor([0.3]).log())


def test_it_is_finite_far_apart():
    generator = torch.Generator().manual_seed(0)
    p, q = ((3000 * torch.randn(5, V, generator=generator)).log_softmax(-1) for _ in range(2))
    leaf = p.requires_grad_()
    for measure in (RankTopK(4), RankTopK(4, whole=True), RankTopK(V, target_first=True, weights="reference")):
        value = measure(Vocabulary(leaf, torch.zeros(5, dtype=torch.long), {"reference": q}))
        assert value.isfinite().all()
        assert (value >= 0).all()
        assert torch.autograd.grad(value.sum(), leaf)[0].isfinite().all()


def test_names_and_refusals():
    name = "rank_top_k(10, teacher, weights=reference, target_first=true)"
    assert get_measure(name) == RankTopK(10, "teacher", "reference", target_first=True)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        RankTopK(0)
    with pytest.raises(ValueError, match="k=1 ranks one token among itself"):
        RankTopK(1)
    with pytest.raises(ValueError, match=r"rank_top_k\(3, whole=maybe\)'.* whole=maybe must be true or false"):
        get_measure("rank_top_k(3, whole=maybe)")


def test_the_policys_candidates_are_ranked_in_the_references_order():
    generator = torch.Generator().manual_seed(3)
    policy, teacher = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64).log_softmax(dim=-1)
    at = Vocabulary(policy, targets=torch.zeros(5, dtype=torch.long), references={"teacher": teacher})
    values = RankTopK(3, "teacher", candidates="policy")(at)
    for row in range(5):
        own = sorted(sorted(range(8), key=lambda v: -policy[row, v])[:3], key=lambda v: -teacher[row, v])
        probability = 1.0
        for i in range(3):
            remaining = sum(math.exp(policy[row, v]) for v in own[i:])
            probability *= math.exp(policy[row, own[i]]) / remaining
        assert values[row].item() == pytest.approx(-math.log(probability), abs=1e-13)


@pytest.mark.parametrize(
    "measure",
    [
        RankTopK(10, "teacher", candidates="policy"),
        RankTopK(10, "teacher"),
        TopK(get("forward_kl"), 10, "teacher"),
        TopK(get("forward_kl"), 10, "teacher", temperature=2.0),
        TopK(get("forward_kl"), 2, "teacher", stray=1.0, stray_top=10),
    ],
)
def test_more_tokens_than_the_vocabulary_has_are_refused(measure):
    at = Vocabulary(
        torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([0]), {"teacher": torch.tensor([[0.2, 0.5, 0.3]]).log()}
    )
    with pytest.raises(ValueError, match="k=10 must be between 1 and the 3 tokens of the vocabulary"):
        measure(at)
