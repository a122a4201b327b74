import math

import pytest
import torch

from falign import divergences
from falign.objectives import CompletionBatch, DivergenceTo, Entropy, Vocabulary, get_measure
from falign.objectives.token_gates import (
    DivergenceBetween,
    EntropyGap,
    EntropyGate,
    EntropyPrefix,
    QuantileFilter,
    ReferenceEntropy,
    quantile_filter,
)
from falign.objectives.weights import get_weight, token_factor

LENGTHS = [11, 1, 7, 2]
MASK = torch.arange(11) < torch.tensor(LENGTHS)[:, None]


def batch_of(**measures):
    return CompletionBatch(
        logprobs=torch.zeros(4, 11, dtype=torch.float64),
        completion_mask=MASK,
        prompt_index=torch.tensor([0, 0, 1, 1]),
        measures=measures,
    )


def draw(seed):
    return torch.rand(4, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.25, 0.4, 0.5, 0.9, 1.0])
def test_a_filter_keeps_what_reaches_the_quantile_of_each_completion_and_is_a_mean_over_it(keep):
    scores, losses = draw(1), draw(2)
    scores[0, 3] = scores[0, 5]  # a tie
    batch = batch_of(score=scores.requires_grad_())
    weights = token_factor([QuantileFilter(Entropy(), keep)], batch)
    assert not weights.requires_grad
    for row, n in enumerate(LENGTHS):
        own = scores[row, :n].detach()
        threshold = torch.quantile(own, torch.tensor(1 - keep, dtype=torch.float64))
        kept = own >= threshold - 1e-12
        assert weights[row, :n].gt(0).tolist() == kept.tolist()
        # The mean over kept tokens, from the mean over all.
        mean = (weights[row] * losses[row]).sum().item() / n
        assert mean == pytest.approx(losses[row, :n][kept].mean().item(), abs=1e-14)
    if keep == 1.0:
        assert torch.equal(weights, MASK.double())


def test_a_share_of_a_tenth_keeps_a_tenth_and_not_nine_tenths():
    scores = torch.arange(100.0)[None]
    batch = CompletionBatch(
        logprobs=torch.zeros(1, 100),
        completion_mask=torch.ones(1, 100, dtype=torch.bool),
        prompt_index=torch.tensor([0]),
        measures={"score": scores},
    )
    assert QuantileFilter(Entropy(), 0.1)(batch).nonzero()[:, 1].tolist() == list(range(90, 100))


def test_a_difference_of_two_measures_is_adaspecs_score():
    kl = divergences.get("forward_kl")
    made = quantile_filter(
        "divergence_to(forward_kl, teacher)", 0.4, minus="divergence_between(forward_kl, reference, teacher)"
    )
    assert made == QuantileFilter(DivergenceTo(kl, "teacher"), 0.4, DivergenceBetween(kl, "reference", "teacher"))
    first, second = draw(3), draw(4)
    found = made(batch_of(score=first, score_minus=second))
    alone = QuantileFilter(Entropy(), 0.4)(batch_of(score=first - second))
    assert torch.equal(found, alone)


def test_measures_of_references_are_sums_over_the_vocabulary():
    generator = torch.Generator().manual_seed(5)
    draft, teacher = torch.rand(2, 3, 6, generator=generator, dtype=torch.float64).softmax(dim=-1)
    at = Vocabulary(
        torch.zeros(3, 6, dtype=torch.float64).log_softmax(dim=-1),
        targets=torch.zeros(3, dtype=torch.long),
        references={"draft": draft.log(), "teacher": teacher.log()},
    )
    # KL(T‖draft), as in AdaSPEC.
    expected = (teacher * (teacher / draft).log()).sum(dim=-1)
    found = DivergenceBetween(divergences.get("forward_kl"), "draft", "teacher")(at)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(ReferenceEntropy("draft")(at), -(draft * draft.log()).sum(dim=-1), rtol=1e-13, atol=0)
    assert get_measure("entropy_of(teacher)") == ReferenceEntropy("teacher")


def test_two_gates_divide_the_tokens_and_a_tie_is_the_policys():
    policy, teacher = draw(6), draw(7)
    policy[0, 0] = teacher[0, 0]
    batch = batch_of(entropy=policy, entropy_teacher=teacher)
    forward, reverse = EntropyGate("reference")(batch), EntropyGate("policy")(batch)
    assert torch.equal(forward, (teacher > policy).double())
    assert torch.equal(forward + reverse, torch.ones(4, 11, dtype=torch.float64))
    assert reverse[0, 0] == 1
    soft = EntropyGate("policy", other=0.25)(batch)
    assert set(soft.unique().tolist()) == {0.25, 1.0}


def test_the_gap_is_the_sigmoid_of_the_difference():
    policy, teacher = draw(8).requires_grad_(), draw(9)
    weights = token_factor([EntropyGap()], batch_of(entropy=policy, entropy_teacher=teacher))
    assert weights[0, 2].item() == pytest.approx(1 / (1 + math.exp(teacher[0, 2].item() - policy[0, 2].item())))
    assert not weights.requires_grad


def test_a_prefix_ends_with_the_token_that_reaches_its_share_of_the_entropy():
    entropy = torch.tensor([[4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]] * 4)
    batch = batch_of(entropy=entropy)
    assert EntropyPrefix(0.5)(batch)[0].tolist() == [1.0] * 2 + [0.0] * 9  # 5 of 10
    assert EntropyPrefix(0.55)(batch)[0].tolist() == [1.0] * 3 + [0.0] * 8
    assert EntropyPrefix(0.3)(batch)[0].tolist() == [1.0] + [0.0] * 10
    # Its own length in each completion: 4 + 1 of two tokens.
    assert EntropyPrefix(0.5)(batch)[3].tolist()[:2] == [1.0, 0.0]
    assert token_factor([EntropyPrefix(1.0)], batch).equal(MASK.double())
    flat = token_factor([EntropyPrefix(0.5)], batch_of(entropy=torch.zeros(4, 11)))
    assert flat.sum(dim=-1).tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("quantile_filter", {"measure": "entropy", "keep": 0.0}, r"keep=0\.0 must be above 0"),
        ("quantile_filter", {"measure": "entropie", "keep": 0.5}, "did you mean 'entropy'"),
        ("entropy_gate", {"higher": "policy", "other": 2.0}, r"other=2\.0 must be between 0 and 1"),
        ("entropy_prefix", {"share": 1.5}, r"share=1\.5"),
    ],
)
def test_settings_out_of_range_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        get_weight(name, **settings)
