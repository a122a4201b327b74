"""KTO on the enumerated world: gradients against a dense formula, reference points against expectations."""

import math

import pytest
import torch

from falign import divergences
from falign.data.labels import label_counts, mismatched
from falign.divergences.estimators import full_vocabulary
from falign.errors import DataError
from falign.methods import SequenceMatch
from falign.objectives import CompletionBatch, Unpaired
from falign.scoring import PromptTree
from tests.reference.world import WORLD, random_logits, sequence_logprobs, token_logprobs

# f'(u) of each divergence with a barrier, as functions of u, in normal form.
LINKS = {
    "reverse_kl": torch.log,
    "forward_kl": lambda u: 1 - 1 / u,
    "jensen_shannon": lambda u: torch.log(2 * u / (1 + u)),
    "alpha(0.3)": lambda u: (1 - u**-0.3) / 0.3,
    "alpha(1.5)": lambda u: (1 - u**-1.5) / 1.5,
    "jeffreys": lambda u: torch.log(u) + 1 - 1 / u,
    "squared_hellinger": lambda u: 1 - u**-0.5,
    "neyman_chi2": lambda u: 1 - u**-2.0,
    "chi2_kl": lambda u: u - 1 + torch.log(u),
    "generalized_js(0.3)": lambda u: 0.3 * torch.log(u / (0.3 * u + 0.7)),
}
BETA, DESIRABLE, UNDESIRABLE = 0.4, 1.3, 0.7
REFERENCE = random_logits(1)
LABELS = (torch.arange(len(WORLD.tokens)) % 3 > 0).double()


def world_batch(logits, **fields):
    return CompletionBatch(
        logprobs=token_logprobs(logits),
        reference_logprobs=token_logprobs(REFERENCE),
        completion_mask=WORLD.mask,
        prompt_index=torch.arange(len(LABELS)),
        preference=LABELS,
        **fields,
    )


@pytest.mark.parametrize("name", LINKS)
def test_value_and_gradient_are_those_of_the_dense_formula(name):
    logits = random_logits(0).requires_grad_()
    point = 0.17
    objective = Unpaired(divergences.get(name), BETA, DESIRABLE, UNDESIRABLE)
    batch = world_batch(logits, step_means={"reference_point": torch.full_like(LABELS, point)})
    loss = objective(batch).mean()
    reward = BETA * LINKS[name](torch.exp(sequence_logprobs(logits) - sequence_logprobs(REFERENCE)))
    gain = torch.where(LABELS == 1, reward - point, point - reward)
    weight = torch.where(LABELS == 1, DESIRABLE, UNDESIRABLE)
    expected = (weight * (1 - 1 / (1 + torch.exp(-gain)))).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    found, wanted = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    assert wanted.abs().max() > 1e-4
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", LINKS)
def test_the_mean_over_samples_is_the_mean_reward_of_the_policy(name):
    logits = random_logits(0)
    probabilities = sequence_logprobs(logits).exp()
    log_u = sequence_logprobs(logits) - sequence_logprobs(REFERENCE)
    objective = Unpaired(divergences.get(name), BETA, reference_point="samples")
    values = objective.step_means["reference_point"](world_batch(logits)).values
    expected = BETA * (probabilities * LINKS[name](log_u.exp())).sum()
    assert (probabilities * values).sum().item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-14)
    if name == "forward_kl":
        assert expected.item() == pytest.approx(0, abs=1e-14)
    else:
        assert (expected > 0) == (name not in ("alpha(1.5)", "neyman_chi2"))


def test_the_divergence_along_completions_is_on_average_that_of_whole_completions_for_the_reverse_kl():
    logits, kl = random_logits(0), divergences.get("reverse_kl")
    at_prefix = full_vocabulary(kl, logits.log_softmax(-1), REFERENCE.log_softmax(-1))
    batch = world_batch(logits, measures={"divergence": at_prefix[WORLD.prefix]})
    point = Unpaired(kl, BETA, reference_point="vocabulary")(batch).metrics["reference_point"]
    probabilities = sequence_logprobs(logits).exp()
    divergence = (probabilities * (sequence_logprobs(logits) - sequence_logprobs(REFERENCE))).sum()
    assert (probabilities * point).sum().item() == pytest.approx(BETA * divergence.item(), rel=1e-12)


def test_a_published_reference_point_is_not_negative_and_an_unbiased_one_may_be():
    logits, given = random_logits(0), {"step_means": {"reference_point": torch.full_like(LABELS, -0.3)}}
    kl = divergences.get("reverse_kl")
    points = {
        choice: Unpaired(kl, BETA, reference_point=choice)(world_batch(logits, **given)).metrics["reference_point"]
        for choice in ("mismatched", "samples", "zero")
    }
    assert [points[choice][0].item() for choice in points] == pytest.approx([0.0, -0.3, 0.0])
    with pytest.raises(ValueError, match=r"step_means\['reference_point'\], which is missing"):
        Unpaired(kl)(world_batch(logits))
    # Without a given mean, the batch is the whole step.
    own = Unpaired(kl, BETA, reference_point="samples")
    assert own(world_batch(logits)).metrics["reference_point"][0].item() == pytest.approx(
        own.step_means["reference_point"](world_batch(logits)).values.mean().item(), rel=1e-12
    )


def test_balanced_weights_are_recommended_by_the_papers_rule():
    kl = divergences.get("reverse_kl")
    assert Unpaired(kl).label_remark(100, 100) is None
    assert SequenceMatch().label_remark(100, 1) is None
    assert "no completion is labeled false, samples of the model" in SequenceMatch().label_remark(100, 0)
    assert "no completion is labeled true, the data" in SequenceMatch().label_remark(0, 100)
    assert Unpaired(kl).label_remark(133, 100) is None
    assert "set undesirable_weight between 2.25 and 3" in Unpaired(kl).label_remark(300, 100)
    assert "set desirable_weight between 4 and 5.33" in Unpaired(kl, undesirable_weight=2.0).label_remark(50, 100)
    assert Unpaired(kl, undesirable_weight=3.0).label_remark(300, 100) is None
    assert "with one label only" in Unpaired(kl).label_remark(10, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta=0.0 must be positive"),
        ({"desirable_weight": 0.0}, r"desirable_weight=0.0 must be positive"),
        ({"undesirable_weight": math.inf}, "undesirable_weight=inf must be positive"),
        ({"divergence": divergences.get("pearson_chi2")}, r"its f'\(0\+\) = -2 is finite"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Unpaired(**{"divergence": divergences.get("reverse_kl"), **changes})


def test_prompts_are_paired_with_the_next_other_prompt_and_labels_are_counted():
    rows = [
        PromptTree((1, 1), ((5, 2), (6,)), (1.0, 0.0), "a:1"),
        PromptTree((1, 1), ((6, 2),), (0.0,), "a:2"),
        PromptTree((3,), ((7, 7, 7, 2),), (1.0,), "a:3"),
    ]
    paired = mismatched(rows)
    assert [tree.mismatched_ids for tree in paired] == [((7, 7, 7),), ((7, 7, 7),), ((5, 2), (6,))]
    assert [tree.mismatched.completion_ids for tree in paired] == [tree.mismatched_ids for tree in paired]
    assert label_counts(rows) == (2, 2)
    with pytest.raises(DataError, match=r"a:1: all 2 rows have the same prompt"):
        mismatched(rows[:2])
    with pytest.raises(DataError, match=r"b:7: the row has no label.*column 'label'"):
        label_counts([PromptTree((1,), ((2,),), place="b:7")])
    with pytest.raises(DataError, match=r"b:8: the row has the score 0.5, and this objective needs labels"):
        label_counts([PromptTree((1,), ((2,), (3,)), (1.0, 0.5), place="b:8")])
