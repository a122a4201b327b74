import pytest
import torch

from falign.errors import ModelError
from falign.references import AdapterOff, Cached, CacheKey, FrozenModel, check_same_at_start
from falign.scoring import pad
from tests.scoring.models import TREES, tiny_model, with_lora

BATCH = pad(TREES, pad_token_id=2)
KEY = CacheKey(weights="w", config="c", vocabulary=260, tokenizer="t", dtype="float32", attention="sdpa")


def fresh_policy():
    return with_lora(tiny_model(attention_dropout=0.4), lora_dropout=0.4).train()


@pytest.fixture(params=["adapter_off", "frozen_model", "cached"])
def reference(request, tmp_path):
    return {
        "adapter_off": AdapterOff,
        "frozen_model": lambda: FrozenModel(tiny_model()),
        "cached": lambda: Cached(AdapterOff(), directory=tmp_path, key=KEY),
    }[request.param]()


def test_a_fresh_policy_in_training_with_dropout_equals_every_kind(reference):
    policy = fresh_policy()
    check_same_at_start(policy, reference, BATCH)
    check_same_at_start(policy, reference, BATCH)
    assert policy.training


def test_a_trained_adapter_is_refused_with_place_and_difference(reference):
    policy = with_lora(tiny_model(), trained=True)
    with pytest.raises(ModelError, match=r"differ by \d\.\d+ nats .*completion token \d of a:\d.*'kind': "):
        check_same_at_start(policy, reference, BATCH)


def test_the_largest_difference_is_the_one_that_is_named():
    class Shifted(FrozenModel):
        def logprobs(self, policy_model, batch):
            logprobs = super().logprobs(policy_model, batch).clone()
            logprobs[1, 0] += 0.25
            logprobs[3, 4] -= 0.5
            return logprobs

    with pytest.raises(ModelError, match=r"differ by 0\.5 nats .*completion token 4 of a:2"):
        check_same_at_start(fresh_policy(), Shifted(tiny_model()), BATCH)
    check_same_at_start(fresh_policy(), Shifted(tiny_model()), BATCH, tolerance=0.6)


def test_scores_that_are_not_numbers_are_refused():
    broken = tiny_model()
    torch.nn.init.constant_(broken.model.norm.weight, torch.nan)
    with pytest.raises(ModelError, match="differ by nan"):
        check_same_at_start(fresh_policy(), FrozenModel(broken), BATCH)
