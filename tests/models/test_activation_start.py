"""EVA: the adapter starts along the directions of its inputs, as PEFT's does, and changes nothing at first."""

import copy

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

from falign.errors import ConfigError
from falign.models import load_model, weights_hash
from falign.models.structure import lora_layers
from falign.runfile import AdapterConfig
from tests.models.tiny import save_tiny

# PEFT 0.21 reads an attribute that Transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = ["q_proj", "down_proj"]
ROWS = [torch.randint(5, 90, (40,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(80)]


def inputs_of(model, layer, rows):
    """What a layer reads at every token of the rows, one row of tokens at a time."""
    seen = []
    handle = layer.register_forward_hook(lambda module, given, output: seen.append(given[0][0].detach()))
    with torch.no_grad(), model.disable_adapter():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    handle.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("pattern", [{}, {"down_proj": 6}])
def test_the_first_directions_hold_the_variance_that_principal_components_hold(tmp_path, pattern):
    base = load_model(save_tiny(tmp_path / "tiny", "llama"))
    before = weights_hash(base)
    rows = [row[: 40 - 3 * (index % 7)] for index, row in enumerate(ROWS)]  # padded within batches
    section = AdapterConfig(r=4, target_modules=TARGETS, init_lora_weights="eva", rank_pattern=pattern)
    model = section.build(base, seed=0)
    section.start_from(model, rows, pad_token_id=0)
    for name, layer in lora_layers(model, "default").items():
        seen = inputs_of(model, layer.get_base_layer(), rows)
        seen = seen - seen.mean(0)
        rank = pattern.get(name.rpartition(".")[2], 4)
        found = layer.lora_A["default"].weight.double()
        assert found.shape[0] == rank
        torch.testing.assert_close(found @ found.T, torch.eye(rank).double(), rtol=0, atol=1e-5)
        held, best = (seen @ found.T).square().sum(), torch.linalg.svdvals(seen)[:rank].square().sum()
        assert 0.98 * best < held <= best * (1 + 1e-6)
        assert not layer.lora_B["default"].weight.any()
    assert weights_hash(model) == before


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage:UserWarning")
def test_the_directions_are_those_of_peft(tmp_path):
    base = load_model(save_tiny(tmp_path / "tiny", "llama"))
    config = LoraConfig(
        r=4, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(copy.deepcopy(base), config)
    batches = [{"input_ids": torch.tensor(ROWS)}]
    initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    section = AdapterConfig(r=4, target_modules=TARGETS, init_lora_weights="eva")
    ours = section.build(base, seed=0)
    section.start_from(ours, ROWS, pad_token_id=0)
    expected = lora_layers(theirs, "default")
    assert len(expected) == 4
    for name, layer in lora_layers(ours, "default").items():
        found, given = layer.lora_A["default"].weight, expected[name].lora_A["default"].weight
        torch.testing.assert_close(found, given, rtol=0, atol=1e-5)


def test_fewer_tokens_than_the_rank_are_refused(tmp_path):
    section = AdapterConfig(r=16, target_modules=TARGETS, init_lora_weights="eva")
    model = section.build(load_model(save_tiny(tmp_path / "tiny", "llama")), seed=0)
    with pytest.raises(ConfigError, match=r"init_lora_weights=eva with rank 16: .* there are 12: lower adapter.r"):
        section.start_from(model, [[5, 6, 7], [8] * 9], pad_token_id=0)
