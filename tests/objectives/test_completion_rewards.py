"""The reward of each completion, and the metrics that are made of it."""

import pytest
import torch

from falign import FDPO, TDPO, CompletionBatch
from falign.divergences import ForwardKL
from falign.objectives import Listwise, Pairwise

OBJECTIVES = {
    "pairwise": FDPO("jensen_shannon", beta=0.3),
    "normalised": FDPO("alpha(0.4)", beta=0.3, length_norm="token"),
    "listwise": Listwise(ForwardKL(), beta=0.3),
    "tdpo1": TDPO("total_variation", beta=0.3, variant=1),
    "tdpo2": TDPO(beta=0.3, alpha=0.2),
    "weighted": TDPO(beta=0.3, alpha=0.2, weighting="activations"),
}


def batch_of(preference=(1.0, 0.0, 0.0, 1.0)) -> CompletionBatch:
    generator = torch.Generator().manual_seed(3)
    logprobs, reference, divergence, weights = torch.rand(4, 4, 5, generator=generator, dtype=torch.float64)
    return CompletionBatch(
        logprobs=(-logprobs).requires_grad_(),
        reference_logprobs=-reference,
        measures={"divergence": divergence.requires_grad_()},
        token_weights=weights,
        completion_mask=torch.arange(5) < torch.tensor([5, 2, 1, 4])[:, None],
        prompt_index=torch.tensor([0, 0, 1, 1]),
        preference=None if preference is None else torch.tensor(preference, dtype=torch.float64),
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_logged_rewards_are_the_completions_rewards(name):
    rewards = OBJECTIVES[name].completion_rewards(batch_of())
    metrics = OBJECTIVES[name](batch_of()).metrics
    assert rewards.shape == (4,)
    assert torch.equal(metrics["rewards/chosen"], rewards[[0, 3]].detach())
    assert torch.equal(metrics["rewards/rejected"], rewards[[1, 2]].detach())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rewards_need_no_preference_and_carry_the_gradient(name):
    batch = batch_of(preference=None)
    OBJECTIVES[name].completion_rewards(batch).sum().backward()
    assert batch.logprobs.grad is not None
    assert torch.equal(batch.logprobs.grad != 0, batch.completion_mask)
    assert OBJECTIVES[name].rewarding


def test_rewards_match_their_closed_forms():
    batch = batch_of()
    log_ratio = batch.sequence_sum(batch.logprobs - batch.reference_logprobs)
    expected = 0.3 * (2 / (1 + (-log_ratio).exp())).log()
    torch.testing.assert_close(OBJECTIVES["pairwise"].completion_rewards(batch), expected)
    delta = batch.sequence_sum(batch.measures["divergence"])
    torch.testing.assert_close(OBJECTIVES["tdpo2"].completion_rewards(batch), 0.3 * (log_ratio + 0.2 * delta))
    torch.testing.assert_close(OBJECTIVES["tdpo1"].completion_rewards(batch), 0.3 * (log_ratio + delta))


def test_rewards_of_ones_own_beside_an_inherited_link_are_refused():
    def halved(self, batch):
        return Pairwise.completion_rewards(self, batch) / 2

    with pytest.raises(TypeError, match=r"Halved defines completion_rewards and inherits link from Pairwise.*None"):
        type("Halved", (Pairwise,), {"completion_rewards": halved})
    honest = type("Honest", (Pairwise,), {"completion_rewards": halved, "link": None})
    below = type("Below", (honest,), {})
    assert below.link is None
