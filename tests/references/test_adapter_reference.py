import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from falign.errors import ModelError
from falign.models.adapter_copies import add_copy
from falign.references import AdapterReference, check_same_at_start
from falign.scoring import completion_scores, completion_states, pad, token_scores
from tests.models.tiny import fill_adapter
from tests.scoring.models import TREES, tiny_model, with_lora

BATCH = pad(TREES, pad_token_id=2)
REF = {"r": 3, "lora_dropout": 0.5, "task_type": "CAUSAL_LM"}


def with_reference(policy, *, targets=("q_proj", "o_proj"), seed=3, **options):
    """A second adapter over other modules, frozen and not active."""
    policy.add_adapter("ref", LoraConfig(target_modules=list(targets), **REF, **options))
    return fill_adapter(policy, seed=seed, scale=0.5, name="ref")


def alone(*, targets=("q_proj", "o_proj"), seed=3, like=None):
    """The oracle: the same base under that adapter and no other."""
    model = with_lora(tiny_model(), **{**REF, "target_modules": list(targets)})
    fill_adapter(model, seed=seed, scale=0.5)
    if like is not None:
        weights = {name.replace(".ref.", "."): p for name, p in like.named_parameters() if ".ref." in name}
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.data = weights[name.replace(".default.", ".")].detach().clone()
    return model.eval()


def everything(model):
    layers = [
        (layer.active_adapters, layer.disable_adapters)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    return layers, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.fixture
def policy():
    return with_reference(with_lora(tiny_model(), trained=True, lora_dropout=0.5)).train()


def test_it_gives_the_base_under_that_adapter_alone_without_dropout(policy):
    with torch.no_grad():
        expected = completion_scores(alone(like=policy), BATCH).logprobs
    logprobs = AdapterReference().logprobs(policy, BATCH)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-6)
    assert not logprobs.requires_grad


def test_the_policy_is_left_as_it_was(policy):
    layers = [layer for layer in policy.modules() if isinstance(layer, BaseTunerLayer)]
    layers[0].set_adapter(["default", "ref"], inference_mode=True)  # irregular on purpose
    layers[1].lora_A.requires_grad_(False)
    layers[1].eval()
    for name, parameter in policy.named_parameters():
        if ".ref." in name:
            parameter.requires_grad_(False)
    before, scores = everything(policy), completion_scores(policy.eval(), BATCH).logprobs
    policy.train()
    layers[1].eval()
    AdapterReference().logprobs(policy, BATCH)
    AdapterReference().states(policy, BATCH)
    assert everything(policy) == before
    torch.testing.assert_close(completion_scores(policy.eval(), BATCH).logprobs, scores)


def test_it_acts_also_while_adapters_are_off_and_they_stay_off(policy):
    expected = AdapterReference().logprobs(policy, BATCH)
    with policy.disable_adapter():
        before = everything(policy)
        torch.testing.assert_close(AdapterReference().logprobs(policy, BATCH), expected, rtol=0, atol=0)
        assert everything(policy) == before


def test_an_exception_leaves_the_policy_as_it_was(policy, monkeypatch):
    before = everything(policy)

    def fails(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(policy.get_base_model().model.layers[1].mlp, "forward", fails)
    with pytest.raises(KeyboardInterrupt):
        AdapterReference().logprobs(policy, BATCH)
    assert everything(policy) == before


def test_a_gradient_of_the_policy_survives_the_reference_between_forward_and_backward(policy):
    policy.eval()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    assert parameters
    expected = torch.autograd.grad(completion_scores(policy, BATCH).logprobs.sum(), parameters)
    loss = completion_scores(policy, BATCH).logprobs.sum()
    AdapterReference().logprobs(policy, BATCH)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), expected)


@pytest.mark.parametrize("policy_targets", [["v_proj"], ["v_proj", "lm_head"]])
@pytest.mark.parametrize("reference_targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_whole_distributions_are_that_adapters_also_where_the_head_has_one(policy_targets, reference_targets):
    policy = with_lora(tiny_model(), trained=True, target_modules=policy_targets)
    with_reference(policy, targets=reference_targets).train()
    states = AdapterReference().states(policy, BATCH)
    expected = completion_states(alone(targets=reference_targets, like=policy), BATCH).distribution
    with torch.no_grad():
        logits = [d.head.logits(d.head.embeddings(d.hidden)) for d in (states.distribution, expected)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-6)


def test_a_head_with_both_adapters_gives_the_policy_its_own_gradient():
    from falign import divergences
    from falign.objectives import DivergenceTo

    targets = ["v_proj", "lm_head"]
    policy = with_reference(with_lora(tiny_model(), trained=True, target_modules=targets), targets=targets).eval()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    measures, ids = {"divergence": DivergenceTo(divergences.get("forward_kl"))}, torch.zeros(1, dtype=torch.long)

    def gradients(reference):
        ours = completion_states(policy, BATCH).distribution
        targets = ids.expand(len(ours.hidden))
        scores = token_scores(ours, targets, measures=measures, references={"reference": reference}, chunk_tokens=3)
        total = scores.measures["divergence"].sum()
        return total, torch.autograd.grad(total, parameters)

    value, found = gradients(AdapterReference().states(policy, BATCH).distribution)
    with torch.no_grad():
        oracle = completion_states(alone(targets=targets, like=policy), BATCH).distribution
    expected_value, expected = gradients(oracle)
    assert value.item() == pytest.approx(expected_value.item(), rel=1e-5)
    torch.testing.assert_close(found, expected)


def test_a_copy_of_the_policy_is_the_policy_and_another_adapter_is_not(policy):
    with pytest.raises(ModelError, match="'kind': 'adapter', 'path': 'sft'"):
        check_same_at_start(policy, AdapterReference(path="sft"), BATCH)
    same = with_lora(tiny_model(), trained=True)
    add_copy(same)
    check_same_at_start(same, AdapterReference(), BATCH)


def test_what_would_move_or_is_not_there_is_refused(policy):
    with pytest.raises(ModelError, match=r"LlamaForCausalLM has no adapter 'ref' .*it has \[\]"):
        AdapterReference().logprobs(tiny_model(), BATCH)
    with pytest.raises(ModelError, match=r"no adapter 'sft' .*it has \['default', 'ref'\].*name='sft'"):
        AdapterReference(adapter="sft").logprobs(policy, BATCH)
    norm = policy.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"1 parameters outside the adapter.*model\.norm\.weight"):
        AdapterReference().logprobs(policy, BATCH)
    norm.requires_grad_(False)
    policy.set_requires_grad("ref")
    with pytest.raises(ModelError, match=r"reference's adapter 'ref' are trained"):
        AdapterReference().logprobs(policy, BATCH)


def test_identity_names_the_kind_the_path_and_the_weights():
    identity = AdapterReference(weights="abc", path="runs/sft").identity()
    assert identity == {"kind": "adapter", "path": "runs/sft", "weights": "abc"}
