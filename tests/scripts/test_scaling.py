"""The cost model's counts are those of real configurations, and its memory is near to what was measured."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM

from falign.models import add_lora, load_model
from falign.references import AdapterOff
from falign.scoring import PromptTree, completion_scores, pack
from tests.models.tiny import VOCABULARY

scaling = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "scaling.py"))
TINY = scaling["Shape"](2, 64, 128, 4, 2, VOCABULARY)
SHAPES = {**scaling["SHAPES"], "tiny": TINY}


class Counter(TorchDispatchMode):
    """Counts operations by torch's own formulas; its FlopCounterMode hooks modules, and autograd.grad forbids that."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        self.operations += 0 if formula is None else formula(*args, **(kwargs or {}), out_val=result)
        return result


def on_meta(shape):
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_model(name):
    shape = SHAPES[name]
    assert shape.parameters() == sum(parameter.numel() for parameter in on_meta(shape).parameters())


@pytest.mark.parametrize("name", ["smollm2-135m", "8b", "tiny"])
@pytest.mark.parametrize("rank", [1, 16])
def test_lora_parameters_are_those_of_peft(name, rank):
    adapted = add_lora(on_meta(SHAPES[name]), r=rank, alpha=rank, seed=0)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert SHAPES[name].lora_parameters(rank) == trained


def test_adapter_bytes_are_weights_gradients_and_both_moments(tiny):
    model = add_lora(load_model(tiny, dtype="bfloat16"), r=4, alpha=8, seed=0).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.tensor([[4, 5, 6]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = [*trained, *(parameter.grad for parameter in trained), *moments]
    assert scaling["adapter_bytes"](TINY, 4) == sum(tensor.nbytes for tensor in held)


def test_quantised_weights_take_what_bitsandbytes_stores(tiny):
    model = load_model(tiny, quantization="nf4")
    stored = 0
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            scales = module.weight.quant_state
            stored += module.weight.nbytes + scales.absmax.nbytes + scales.state2.absmax.nbytes
    # The last block of scales is not full in so small a layer.
    assert TINY.linear_parameters() * scaling["NF4"] == pytest.approx(stored, rel=0.01)


def test_memory_is_within_a_sixth_of_what_was_measured():
    for tokens, measured in scaling["MEASURED_MEMORY"].items():
        assert scaling["memory_of_the_benchmark"](tokens) == pytest.approx(measured, rel=1 / 6)


@pytest.mark.parametrize("live", [True, False])
def test_operations_are_within_a_tenth_of_what_torch_counts(live):
    shape = replace(TINY, layers=4, hidden=128, intermediate=256, vocabulary=1000)
    step = scaling["Step"](2, 2, 96, 32, checkpointing=False, live_reference=live)
    policy = add_lora(on_meta(shape).to_empty(device="cpu"), r=4, alpha=8, seed=0).train()
    tree = PromptTree((7,) * 96, ((8,) * 32, (9,) * 32), (1.0, 0.0))
    batch = pack([tree] * 2, pad_token_id=0)
    assert (batch.input_ids.numel(), int(batch.completion_mask.sum())) == (step.tokens, step.scored)
    with Counter() as counter:
        if live:
            AdapterOff().logprobs(policy, batch)
        completion_scores(policy, batch).logprobs.sum().backward()
    # torch counts no attention on a CPU; the first block's inputs take no gradient, which the model leaves out.
    attention = step.passes * scaling["attention_operations"](shape, step)
    predicted = scaling["step_operations"](shape, step, rank=4) - attention
    assert predicted == pytest.approx(counter.operations, rel=0.1)


def test_products_alone_take_less_than_the_measured_step_and_more_than_half_of_it():
    assert 0.5 < scaling["step_seconds"]() / scaling["STEP_SECONDS"] < 1


def test_sharding_divides_what_is_held_and_costs_exchange():
    step, how = scaling["Step"](), {"nf4": False, "rank": 16, "num_gpus": 8, "utilization": 0.4}
    shape, gpu = SHAPES["8b"], scaling["GPUS"]["h100"]
    whole, share = (scaling["cost"](shape, gpu, step, sharded=sharded, **how) for sharded in (False, True))
    assert share.weights * 8 == whole.weights == 2 * shape.parameters()
    assert share.adapter * 8 == whole.adapter
    assert share.activations == whole.activations
    assert share.exchange - whole.exchange == pytest.approx(4 * 7 / 8 * whole.weights / gpu.inside)


def test_a_tree_reads_the_prompt_once_and_leaves_the_scored_tokens_alone():
    step = scaling["Step"](prompts=3, completions=8, prompt_tokens=100, completion_tokens=50)
    padded = replace(step, tree=False)
    assert (step.tokens, padded.tokens) == (3 * (100 + 400), 3 * 8 * 150)
    assert step.scored == padded.scored == 1200
    operations = scaling["block_operations"]
    assert operations(SHAPES["8b"], padded) / operations(SHAPES["8b"], step) == pytest.approx(2.4, rel=0.01)
