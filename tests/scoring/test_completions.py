from functools import partial

import pytest
import torch
from peft import PromptTuningConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

from falign.errors import ModelError
from falign.scoring import PromptTree, completion_scores, completion_states, pack, pad, read_backbone
from tests.scoring.models import FAMILIES, TREES, dense_logprobs, tiny_model, with_lora, with_peft


def rows(scores, batch):
    return [values[mask] for values, mask in zip(scores, batch.completion_mask, strict=True)]


@pytest.mark.parametrize("lay_out", [pack, pad, partial(pack, row_tokens=15)], ids=["tree", "padded", "rows"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_equal_those_of_one_completion_at_a_time(family, lay_out):
    model = tiny_model(family).eval()
    weights = torch.linspace(-1, 1, sum(len(ids) for tree in TREES for ids in tree.completion_ids))
    parameters = list(model.parameters())

    dense = torch.cat([row for tree in TREES for row in dense_logprobs(model, tree)])
    expected = torch.autograd.grad((weights * dense).sum(), parameters)
    batch = lay_out(TREES, pad_token_id=2)
    scores = completion_scores(model, batch, chunk_tokens=4)
    gradients = torch.autograd.grad((weights * torch.cat(rows(scores.logprobs, batch))).sum(), parameters)

    torch.testing.assert_close(torch.cat(rows(scores.logprobs, batch)), dense, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)
    assert dense.std() > 0.2  # Far from uniform predictions: the oracle can tell.


def test_masked_places_are_zero_and_entropy_is_detached():
    batch = pad(TREES, pad_token_id=2)
    scores = completion_scores(tiny_model(), batch)
    assert scores.logprobs.shape == scores.entropy.shape == batch.completion_mask.shape
    assert scores.logprobs.dtype == scores.entropy.dtype == torch.float32
    assert (scores.logprobs[~batch.completion_mask] == 0).all()
    assert (scores.entropy[~batch.completion_mask] == 0).all()
    assert (scores.entropy[batch.completion_mask] > 0).all()
    assert scores.logprobs.requires_grad
    assert not scores.entropy.requires_grad


def test_a_padded_row_gets_no_gradient_from_its_masked_places():
    model = tiny_model()
    batch = pad(TREES, pad_token_id=2)
    loss = completion_scores(model, batch).logprobs[~batch.completion_mask].sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_longer_companions_change_nothing(family):
    model = tiny_model(family).eval()
    companion = PromptTree(tuple(range(30, 45)), (tuple(range(45, 60)),), preference=(1.0,))
    alone, together = pad(TREES[:1], pad_token_id=2), pad([companion, TREES[0]], pad_token_id=2)
    with torch.no_grad():
        scores, others = completion_scores(model, alone), completion_scores(model, together)
    # Rows of another length are products of another shape, whose sums a CPU may take in another order: a few roundings
    # of float32 at the size of the values (about log(vocabulary)). A token seen or missed would change them by 1e-3.
    for found, expected in ((others.logprobs[1:, :3], scores.logprobs), (others.entropy[1:, :3], scores.entropy)):
        rounding = torch.finfo(torch.float32).eps * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=8 * rounding)


def test_the_order_of_trees_and_completions_changes_nothing():
    model = tiny_model().eval()
    swapped = [PromptTree(tree.prompt_ids, tree.completion_ids[::-1]) for tree in TREES[::-1]]
    with torch.no_grad():
        scores = completion_scores(model, pad(TREES, pad_token_id=2)).logprobs
        others = completion_scores(model, pad(swapped, pad_token_id=2)).logprobs
    torch.testing.assert_close(others.flip(0), scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 3])
def test_the_chunk_size_changes_neither_values_nor_gradients(chunk_tokens):
    model = tiny_model()
    batch = pad(TREES, pad_token_id=2)
    whole = completion_scores(model, batch, chunk_tokens=1000).logprobs
    chunked = completion_scores(model, batch, chunk_tokens=chunk_tokens).logprobs
    expected = torch.autograd.grad(whole.sum(), list(model.parameters()))
    gradients = torch.autograd.grad(chunked.sum(), list(model.parameters()))
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)


def test_only_positions_that_predict_completion_tokens_reach_the_head():
    model, reached = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: reached.append(len(inputs[0])))
    with torch.no_grad():
        completion_scores(model, pad(TREES, pad_token_id=2), chunk_tokens=6)
    assert reached == [6, 6, 4]


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], ["v_proj", "lm_head"]])
def test_adapters_act_also_on_the_head_and_can_be_switched_off(target_modules):
    base = dense_logprobs(tiny_model().eval(), TREES[0])
    model = with_lora(tiny_model(), trained=True, target_modules=target_modules).eval()
    batch = pad(TREES[:1], pad_token_id=2)
    with torch.no_grad():
        on = rows(completion_scores(model, batch).logprobs, batch)
        torch.testing.assert_close(on, dense_logprobs(model, TREES[0]), rtol=0, atol=1e-5)
        with model.disable_adapter():
            off = rows(completion_scores(model, batch).logprobs, batch)
    torch.testing.assert_close(off, [row.detach() for row in base], rtol=0, atol=1e-5)
    assert (torch.cat(on) - torch.cat(off)).abs().max() > 0.1


@pytest.mark.parametrize("lay_out", [pack, pad], ids=["tree", "padded"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_the_model_changes_no_gradient(use_reentrant, lay_out):
    def gradients(checkpointing):
        set_seed(0)
        model = with_lora(tiny_model(), trained=True, target_modules=["v_proj", "lm_head"], lora_dropout=0.3)
        model.train()
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        set_seed(1)
        completion_scores(model, lay_out(TREES, pad_token_id=2), chunk_tokens=5).logprobs.sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert any((gradient != 0).any() for gradient in plain.values())
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lay_out", [pack, pad], ids=["tree", "padded"])
def test_adapters_over_a_four_bit_base_are_scored_and_trained(tmp_path, lay_out):
    tiny_model(hidden_size=64, intermediate_size=64, head_dim=32).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    assert base.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    model = with_lora(base, trained=True).train()
    batch = lay_out(TREES[:1], pad_token_id=2)
    logprobs = completion_scores(model, batch, chunk_tokens=2).logprobs
    torch.testing.assert_close(rows(logprobs, batch), dense_logprobs(model, TREES[0]), rtol=0, atol=1e-5)
    logprobs.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert len(gradients) == 8
    assert all(gradient is not None and gradient.norm() > 0 for gradient in gradients)


def test_a_learned_prompt_is_refused_because_it_would_not_act():
    model = with_peft(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="learned prompt"):
        completion_scores(model, pad(TREES, pad_token_id=2))


def test_a_model_without_separate_head_is_refused():
    with pytest.raises(ModelError, match="LlamaModel has no backbone separate"):
        read_backbone(tiny_model().model)


def test_activation_weights_are_those_of_each_completion_alone_and_have_mean_one():
    model = tiny_model("qwen2").eval()
    batch = pack(TREES, pad_token_id=2)
    with torch.no_grad():
        weights = completion_states(model, batch, weighting="activations").token_weights
    expected = []
    for tree in TREES:
        for ids in tree.completion_ids:
            row = torch.tensor([tree.prompt_ids + ids])
            layers = model(input_ids=row, output_hidden_states=True).hidden_states[1:]
            sizes = [layer[0, len(tree.prompt_ids) - 1 : -1].abs().mean(-1) for layer in layers]
            expected.append(torch.stack([size / size.mean() for size in sizes]).mean(0))
    torch.testing.assert_close(rows(weights, batch), [e.detach() for e in expected], rtol=0, atol=1e-5)
    assert (weights[~batch.completion_mask] == 0).all()
    assert weights.sum(-1).tolist() == pytest.approx(batch.completion_mask.sum(-1).tolist(), abs=1e-4)
    assert weights[batch.completion_mask].std() > 0.01
