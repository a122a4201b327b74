import pytest
import torch
from peft import PeftModel

from falign.models import add_lora, load_adapter, load_model, load_tokenizer
from falign.models.export import export_adapter
from falign.models.structure import lora_layers
from tests.models.tiny import save_tiny


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "tiny")


def trained(folder, dtype):
    model = add_lora(load_model(folder, dtype=dtype), r=4, alpha=8, seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model, "default").values():
        up = layer.lora_B["default"].weight
        up.data = 0.05 * torch.randn(up.shape, generator=generator)
    return model


IDS = torch.arange(3, 23)[None]


def saved_bytes(model):
    """What the forward pass keeps for the backward pass, each storage once."""
    kept = {}

    def record(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        logits = model(input_ids=IDS.repeat(8, 1)).logits
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return logits, sum(size for pointer, size in kept.items() if pointer not in parameters)


def distance(mine, theirs):
    return ((mine - theirs).float().norm() / theirs.float().norm()).item()


def test_over_float32_weights_nothing_changes(folder):
    model = trained(folder, "float32")
    layers = lora_layers(model, "default").values()
    mine = model(input_ids=IDS).logits
    for layer in layers:
        layer.cast_input_dtype_enabled = True
        layer.lora_A["default"].__class__ = layer.lora_B["default"].__class__ = torch.nn.Linear
    assert torch.equal(model(input_ids=IDS).logits, mine)


def test_over_bfloat16_weights_less_is_kept_and_the_result_is_that_of_float32_arithmetic_to_rounding(folder):
    model = trained(folder, "bfloat16")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    logits, kept = saved_bytes(model)
    logits.float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}

    model.zero_grad()
    for layer in lora_layers(model, "default").values():
        layer.cast_input_dtype_enabled = True
        layer.lora_A["default"].__class__ = layer.lora_B["default"].__class__ = torch.nn.Linear
    theirs, kept_by_peft = saved_bytes(model)
    theirs.float().square().mean().backward()
    assert kept < 0.8 * kept_by_peft
    assert distance(logits, theirs) < 0.03
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert distance(gradients[name], parameter.grad) < 0.1, name


# PEFT 0.21 reads an attribute that Transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_loaded_adapter_is_treated_alike_and_plain_peft_reads_its_files(folder, tmp_path):
    model = trained(folder, "bfloat16")
    export_adapter(model, load_tokenizer(folder), tmp_path / "adapter")
    loaded = load_adapter(load_model(folder, dtype="bfloat16"), tmp_path / "adapter", trainable=False)
    assert torch.equal(loaded(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    plain = PeftModel.from_pretrained(load_model(folder, dtype="bfloat16"), tmp_path / "adapter")
    assert distance(loaded(input_ids=IDS).logits, plain(input_ids=IDS).logits) < 0.03
