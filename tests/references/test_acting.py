import pytest
import torch

from falign.errors import ModelError
from falign.references import (
    AdapterOff,
    AdapterReference,
    Cached,
    FrozenModel,
    MovingAverage,
    MovingReference,
    Reference,
)
from falign.rollouts import SamplingParams, TransformersEngine
from falign.scoring import PromptTree, completion_scores, pad
from tests.references.test_adapter_reference import with_reference
from tests.scoring.models import TREES, tiny_model, with_lora

BATCH = pad(TREES, pad_token_id=2)


@pytest.mark.parametrize("kind", ["frozen", "off", "adapter", "moving"])
def test_what_acts_has_the_logprobs_of_the_reference_also_while_it_writes(kind):
    policy = with_reference(with_lora(tiny_model(), trained=True)).eval()
    before = completion_scores(policy, BATCH).logprobs
    reference = {
        "frozen": FrozenModel(tiny_model(seed=4)),
        "off": AdapterOff(),
        "adapter": AdapterReference(),
        "moving": MovingReference(AdapterReference(), rule=MovingAverage(alpha=0.5, every=1)),
    }[kind]
    expected = reference.logprobs(policy, BATCH)
    with reference.acting(policy) as model, torch.no_grad():
        torch.testing.assert_close(completion_scores(model.eval(), BATCH).logprobs, expected, rtol=0, atol=1e-6)
        engine = TransformersEngine(model, pad_token_id=2)
        engine.publish(model, 0)
        rollout = engine.sample([TREES[0].prompt_ids], 1, SamplingParams(6), version=0, seed=3)[0]
    written = pad([PromptTree(rollout.prompt_ids, (rollout.completion_ids,))], pad_token_id=2)
    assert rollout.logprobs == pytest.approx(reference.logprobs(policy, written)[0].tolist(), abs=1e-5)
    assert torch.equal(completion_scores(policy, BATCH).logprobs, before)
    assert not torch.allclose(expected, before)


def test_values_from_disk_write_nothing():
    values, refused = Cached.__new__(Cached), pytest.raises(ModelError, match="only has values of known completions")
    with refused, values.acting(tiny_model()):
        pass


def test_a_reference_that_only_scores_says_so_by_default():
    class Uniform(Reference):
        def identity(self):
            return {"kind": "uniform"}

        def logprobs(self, policy_model, batch):
            return torch.zeros(batch.completion_mask.shape)

        def states(self, policy_model, batch, *, weighting="none"):
            raise ModelError("A uniform reference has no states.")

    with pytest.raises(ModelError, match="A Uniform cannot generate completions, only score them: define its method"):
        Uniform().acting(tiny_model())
