import pytest
import torch

from falign.errors import ModelError
from falign.references import AdapterOff
from falign.scoring import completion_scores, completion_states, pad
from tests.scoring.models import TREES, tiny_model, with_lora

BATCH = pad(TREES, pad_token_id=2)


def test_it_gives_the_base_model_under_a_trained_adapter_with_dropout_in_training():
    with torch.no_grad():
        base = completion_scores(tiny_model().eval(), BATCH).logprobs
    policy = with_lora(tiny_model(attention_dropout=0.5), trained=True, lora_dropout=0.5).train()
    logprobs = AdapterOff().logprobs(policy, BATCH)
    torch.testing.assert_close(logprobs, base, rtol=0, atol=1e-6)
    assert not logprobs.requires_grad


def test_the_policy_is_left_as_it_was():
    policy = with_lora(tiny_model(), trained=True, lora_dropout=0.5).train()
    with torch.no_grad():
        adapter_on = completion_scores(policy.eval(), BATCH).logprobs
    policy.train()
    policy.get_base_model().model.layers[0].eval()
    policy.get_base_model().model.layers[1].self_attn.q_proj.lora_A.requires_grad_(False)
    before = [m.training for m in policy.modules()], [p.requires_grad for p in policy.parameters()]
    AdapterOff().logprobs(policy, BATCH)
    assert ([m.training for m in policy.modules()], [p.requires_grad for p in policy.parameters()]) == before
    with torch.no_grad():
        torch.testing.assert_close(completion_scores(policy.eval(), BATCH).logprobs, adapter_on)


def test_a_gradient_of_the_policy_survives_the_reference_between_forward_and_backward():
    policy = with_lora(tiny_model(), trained=True).train()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    expected = torch.autograd.grad(completion_scores(policy, BATCH).logprobs.sum(), parameters)
    loss = completion_scores(policy, BATCH).logprobs.sum()
    AdapterOff().logprobs(policy, BATCH)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), expected)


def test_a_model_without_adapter_is_refused():
    with pytest.raises(ModelError, match=r"LlamaForCausalLM has no adapter.*get_peft_model"):
        AdapterOff().logprobs(tiny_model(), BATCH)


def test_a_base_that_is_trained_too_is_refused_and_stays_trainable():
    policy = with_lora(tiny_model())
    norm = policy.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"1 parameters outside the adapter.*model\.norm\.weight"):
        AdapterOff().logprobs(policy, BATCH)
    assert norm.requires_grad


def test_a_head_trained_in_full_beside_the_adapter_is_off_too():
    with torch.no_grad():
        base = completion_scores(tiny_model().eval(), BATCH).logprobs
    policy = with_lora(tiny_model(), modules_to_save=["lm_head"])
    torch.nn.init.normal_(policy.get_base_model().lm_head.modules_to_save.default.weight)
    torch.testing.assert_close(AdapterOff().logprobs(policy, BATCH), base, rtol=0, atol=1e-6)


def test_identity_names_the_kind_and_the_weights():
    assert AdapterOff(weights="abc").identity() == {"kind": "adapter_off", "weights": "abc"}


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], ["v_proj", "lm_head"]])
def test_whole_distributions_are_the_base_models_also_where_the_head_has_an_adapter(target_modules):
    policy = with_lora(tiny_model(), trained=True, target_modules=target_modules).train()
    states = AdapterOff().states(policy, BATCH)
    base = completion_states(tiny_model().eval(), BATCH).distribution
    logits = [d.head.logits(d.head.embeddings(d.hidden)) for d in (states.distribution, base)]
    torch.testing.assert_close(*[each.detach() for each in logits], rtol=0, atol=1e-6)
    assert not states.distribution.hidden.requires_grad
    assert states.token_weights is None
