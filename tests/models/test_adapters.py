import json
import math

import pytest
import torch
from peft import PeftModel

from falign.errors import ConfigError, ModelError
from falign.models import add_lora, enable_gradient_checkpointing, load_adapter, load_model, transplant_adapter
from falign.models.structure import adapter_matrix, adapter_weights, lora_layers
from tests.models.tiny import fill_adapter, save_tiny

IDS = torch.tensor([[0, 20, 33, 7, 100, 41]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_a_new_adapter_changes_nothing_and_alone_is_trainable(tiny):
    base = load_model(tiny, dtype="bfloat16")
    expected = logits(base)
    model = add_lora(base, r=4, alpha=6, dropout=0.25, seed=1)
    assert torch.equal(logits(model), expected)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 14
    assert all(".default." in name and parameter.dtype is torch.float32 for name, parameter in trainable.items())
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 6, 0.25)
    layer = lora_layers(model, "default")["model.layers.1.mlp.down_proj"]
    assert layer.scaling["default"] == 6 / 4


def test_rslora_scales_by_the_root_of_the_rank(tiny):
    model = add_lora(load_model(tiny), r=4, alpha=6, seed=1, rslora=True)
    assert lora_layers(model, "default")["model.layers.1.mlp.down_proj"].scaling["default"] == 3.0


def test_the_start_depends_on_the_seed_alone(tiny):
    state = torch.get_rng_state()
    first = adapter_weights(add_lora(load_model(tiny), r=4, alpha=8, seed=1), "default")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    for other in (load_model(tiny, dtype="bfloat16"), load_model(tiny, quantization="nf4")):
        again = adapter_weights(add_lora(other, r=4, alpha=8, seed=1), "default")
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name], again[name]) for name in first)
    changed = adapter_weights(add_lora(load_model(tiny), r=4, alpha=8, seed=2), "default")
    downs = [name for name in first if "lora_A" in name]
    assert not any(torch.equal(first[name], changed[name]) for name in downs)


def test_the_start_has_pefts_distribution(tiny):
    model = add_lora(load_model(tiny), r=64, alpha=8, seed=1)
    down = adapter_matrix(lora_layers(model, "default")["model.layers.0.mlp.gate_proj"].lora_A, "default")
    assert down.abs().max() <= 1 / math.sqrt(64)
    assert down.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.05)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_gpt2_layers_are_adapted(tmp_path, quantization):
    base = load_model(save_tiny(tmp_path / "m", "gpt2"), quantization=quantization)
    model = add_lora(base, r=4, alpha=8, seed=1)
    assert len(lora_layers(model, "default")) == 8
    expected = logits(model)
    assert not torch.equal(logits(fill_adapter(model)), expected)


def test_only_the_named_layers_are_adapted(tiny):
    model = add_lora(load_model(tiny), r=4, alpha=8, seed=1, target_modules=["q_proj", "layers.1.mlp.up_proj"])
    assert sorted(lora_layers(model, "default")) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], r"'q_prj' matches no linear layer of this model. Did you mean 'q_proj'\?.*\['down_proj', 'gate"),
        (["embed_tokens"], r"'embed_tokens' matches no linear layer"),
        ([], "target_modules is empty"),
        ("q_proj", r"target_modules='q_proj': give 'all-linear' or a list of names out of \['down_proj'"),
    ],
)
def test_targets_that_match_nothing_list_what_exists(tiny, targets, message):
    with pytest.raises(ConfigError, match=message):
        add_lora(load_model(tiny), r=4, alpha=8, seed=1, target_modules=targets)


def test_a_quantized_base_is_not_converted(tiny):
    base = load_model(tiny, quantization="nf4", dtype="bfloat16")
    before = {name: (parameter.dtype, parameter.data_ptr()) for name, parameter in base.named_parameters()}
    model = add_lora(base, r=4, alpha=8, seed=1)
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): (parameter.dtype, parameter.data_ptr())
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    }
    assert after == before
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".lora_" not in name)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_checkpointing_gives_the_same_gradients(tiny, quantization, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = fill_adapter(add_lora(load_model(tiny, quantization=quantization), r=4, alpha=8, seed=1)).train()
        if checkpointing:
            enable_gradient_checkpointing(model, reentrant=reentrant)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*gradients, strict=True))
    assert min(gradient.norm().item() for gradient in gradients[0]) > 0


def test_only_reentrant_checkpointing_makes_the_inputs_require_gradients(tiny):
    model = add_lora(load_model(tiny), r=4, alpha=8, seed=1)
    embed = model.get_base_model().get_input_embeddings()
    enable_gradient_checkpointing(model)
    assert not embed(IDS).requires_grad
    enable_gradient_checkpointing(model, reentrant=True)
    assert embed(IDS).requires_grad


@pytest.fixture
def saved(tiny, tmp_path):
    model = fill_adapter(add_lora(load_model(tiny), r=4, alpha=8, seed=1))
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.mark.parametrize("trainable", [True, False])
def test_a_saved_adapter_is_the_same_model_again(tiny, saved, trainable):
    model, folder = saved
    again = load_adapter(load_model(tiny), folder, trainable=trainable)
    assert torch.equal(logits(again), logits(model))
    states = {parameter.requires_grad for name, parameter in again.named_parameters() if ".lora_" in name}
    assert states == {trainable}


def test_a_frozen_second_adapter_leaves_the_trained_one_active_and_in_training(tiny, saved):
    model, folder = saved
    policy = add_lora(load_model(tiny), r=2, alpha=8, seed=3).train()
    expected = logits(policy)
    policy.train()
    assert load_adapter(policy, folder, trainable=False, name="ref") is policy
    assert policy.training
    assert policy.active_adapter == "default"
    assert torch.equal(logits(policy), expected)
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 28
    assert all(".default." in name for name in trainable)
    policy.set_adapter("ref")
    assert torch.equal(logits(policy), logits(model))


def test_a_name_in_use_is_refused(tiny, saved):
    with pytest.raises(ModelError, match="has an adapter 'default' already"):
        load_adapter(saved[0], saved[1], trainable=False)


def test_a_missing_adapter_suggests_its_sibling(tiny, saved):
    with pytest.raises(ModelError, match=r"no adapter_config.json\): did you mean .*/adapter\?"):
        load_adapter(load_model(tiny), saved[1].parent / "adaptor", trainable=False)


def test_pickled_adapter_weights_are_not_read(tiny, saved):
    (saved[1] / "adapter_model.safetensors").rename(saved[1] / "adapter_model.bin")
    with pytest.raises(ModelError, match="never loaded"):
        load_adapter(load_model(tiny), saved[1], trainable=False)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_model.safetensors", ""),
        ("adapter_model.safetensors", "cut short"),
        ("adapter_config.json", "{"),
        ("adapter_config.json", "[]"),
    ],
)
def test_a_damaged_adapter_is_named(tiny, saved, name, content):
    (saved[1] / name).write_text(content)
    with pytest.raises(ModelError, match=rf"{name}.* is damaged .*restore it"):
        load_adapter(load_model(tiny), saved[1], trainable=False)


@pytest.mark.parametrize(("field", "value"), [("r", {"a": 1}), ("target_modules", 3), ("task_type", {}), ("r", "x")])
def test_a_configuration_of_another_form_is_refused(tiny, saved, field, value):
    _, folder = saved
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ModelError):
        load_adapter(load_model(tiny), folder, trainable=False)


@pytest.mark.filterwarnings("ignore:.* was made for .*:UserWarning")
def test_an_adapter_of_another_model_is_refused(saved, tmp_path):
    with pytest.raises(ModelError, match=r"does not fit this model: .*Load the base that it was made for"):
        load_adapter(load_model(save_tiny(tmp_path / "g", "gpt2")), saved[1], trainable=False)


def test_weights_that_the_adapter_lacks_or_the_model_ignores_are_errors(tiny, saved):
    from safetensors.torch import load_file, save_file

    path = saved[1] / "adapter_model.safetensors"
    weights = load_file(path)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({key: value for key, value in weights.items() if key != name}, path)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.lora_B"):
        load_adapter(load_model(tiny), saved[1], trainable=False)
    save_file({**weights, name.replace("layers.1", "layers.7"): weights[name].clone()}, path)
    with pytest.raises(ModelError, match=r"layers\.7\.mlp\.up_proj\.lora_B"):
        load_adapter(load_model(tiny), saved[1], trainable=False)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_transplanted_adapter_does_what_the_original_does(tmp_path, kind):
    folder = save_tiny(tmp_path / "m", kind)
    source = fill_adapter(add_lora(load_model(folder), r=4, alpha=9, seed=1))
    copy = transplant_adapter(source, load_model(folder))
    assert isinstance(copy, PeftModel)
    assert torch.equal(logits(copy), logits(source))
    assert not any(parameter.requires_grad for parameter in copy.parameters())
