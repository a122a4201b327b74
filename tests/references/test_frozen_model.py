import pytest
import torch

from falign.errors import ModelError
from falign.references import FrozenModel
from falign.scoring import completion_scores, pad
from tests.scoring.models import TREES, tiny_model

BATCH = pad(TREES, pad_token_id=2)


def test_it_gives_its_own_model_at_rest_whatever_the_policy_is():
    with torch.no_grad():
        expected = completion_scores(tiny_model(seed=5).eval(), BATCH).logprobs
    reference = FrozenModel(tiny_model(seed=5, attention_dropout=0.5).train())
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())
    assert not any(module.training for module in reference.model.modules())
    reference.model.train()
    logprobs = reference.logprobs(tiny_model(seed=6), BATCH)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-6)
    assert not logprobs.requires_grad


def test_the_policy_itself_as_reference_is_refused():
    model = tiny_model()
    with pytest.raises(ModelError, match="are the same object"):
        FrozenModel(model).logprobs(model, BATCH)


def test_identity_names_the_kind_and_the_weights():
    assert FrozenModel(tiny_model(), weights="abc", config="d").identity() == {
        "kind": "frozen_model",
        "weights": "abc",
        "config": "d",
    }
