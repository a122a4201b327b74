import pytest
import torch

from falign import divergences
from falign.errors import RewardError
from falign.rewards import call_reward
from falign.rewards.implicit import ImplicitReward
from falign.scoring import Scorer
from tests.models.tiny import tiny_model

PROMPT_IDS = [[5, 6, 7], [5, 6, 7], [9, 4], [5, 6, 7]]
COMPLETION_IDS = [[10, 11, 1], [12, 1], [13, 14, 15, 16, 1], [17]]


def logprob(model, prompt, completion):
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logprobs = model(ids).logits.double().log_softmax(-1)[0]
    return sum(logprobs[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion))


@pytest.mark.parametrize("layout", ["padded", "tree"])
@pytest.mark.parametrize("tokens_per_batch", [1, 12, 8192])
def test_it_is_beta_f_prime_of_the_ratio_of_two_models(layout, tokens_per_batch):
    policy, reference = tiny_model("llama", seed=0).eval(), tiny_model("llama", seed=1).eval()
    reward = ImplicitReward(
        policy, reference, divergences.get("forward_kl"), 0.3, Scorer(layout), tokens_per_batch=tokens_per_batch
    )
    pairs = list(zip(PROMPT_IDS, COMPLETION_IDS, strict=True))
    log_u = torch.tensor([logprob(policy, p, c) - logprob(reference, p, c) for p, c in pairs])
    expected = 0.3 * (1 - torch.exp(-log_u))
    columns = {"prompt_ids": PROMPT_IDS, "completion_ids": COMPLETION_IDS}
    values = call_reward(reward, ["p"] * 4, ["c"] * 4, columns, name="implicit").values
    torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-3, atol=1e-4)


def test_token_ids_must_be_there_and_none_empty():
    model = tiny_model("llama")
    reward = ImplicitReward(model, model, divergences.get("reverse_kl"), 0.1)
    with pytest.raises(RewardError, match="reward implicit reads the column 'prompt_ids'"):
        reward(["p"], ["c"])
    with pytest.raises(RewardError, match="r:1: every completion needs at least one token"):
        reward(["p"], ["c"], prompt_ids=[[5]], completion_ids=[[]], place=["r:1"])


def test_a_divergence_without_barrier_defines_none():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="no closed form under total_variation"):
        ImplicitReward(model, model, divergences.get("total_variation"), 0.1)
