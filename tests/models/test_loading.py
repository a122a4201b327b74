import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from falign.errors import ConfigError, ModelError
from falign.models import add_lora, describe, export_adapter, export_merged, verify_export, weights_hash
from falign.models.loading import load_model, load_tokenizer
from tests.models.tiny import TEMPLATE, fill_adapter, save_tiny, tiny_tokenizer

IDS = torch.tensor([[0, 20, 33, 7, 100, 41]])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_default_type_is_the_checkpoints(tmp_path, stored):
    model = load_model(save_tiny(tmp_path / "m", dtype=stored))
    assert {parameter.dtype for parameter in model.parameters()} == {stored}
    assert not model.training


def test_auto_reads_the_weights_where_the_configuration_is_silent(tmp_path):
    folder = save_tiny(tmp_path / "m", dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).dtype is torch.bfloat16


def test_a_named_type_is_used(tiny):
    assert load_model(tiny, dtype="bfloat16").dtype is torch.bfloat16


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_the_model_is_the_one_on_disk(tmp_path, kind):
    folder = save_tiny(tmp_path / "m", kind)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        assert torch.equal(load_model(folder)(IDS).logits, expected)
    assert load_model(folder).name_or_path == str(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_four_bit_weights_are_near_the_originals(tmp_path, kind):
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    folder = save_tiny(tmp_path / "m", kind)
    plain, quantized = load_model(folder), load_model(folder, quantization="nf4")
    layers = {name: module for name, module in quantized.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == {"llama": 14, "gpt2": 8}[kind]
    assert not any("lm_head" in name for name in layers)
    for name, module in layers.items():
        original = plain.get_submodule(name).weight
        original = original.T if kind == "gpt2" else original
        restored = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        assert 0.05 < (restored - original).norm() / original.norm() < 0.12
        assert module.weight.dtype is torch.bfloat16  # storage, for FSDP
        assert module.compute_dtype is torch.bfloat16
        assert module.weight.quant_state.nested


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_four_bit_models_are_the_same_before_and_after_use_and_still_give_gradients(tmp_path, kind):
    model = load_model(save_tiny(tmp_path / "m", kind), quantization="nf4")
    before = {name: value.detach().clone() for name, value in model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        evaluated = model.eval()(IDS).logits
        trained = model.train()(IDS).logits
    assert torch.equal(evaluated, trained)
    after = model.state_dict(keep_vars=True)
    for name, value in before.items():
        assert after[name].dtype is value.dtype
        assert torch.equal(after[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
    model.get_submodule("model.layers.0.self_attn.q_proj")(embedded).sum().backward()
    assert embedded.grad.norm() > 0


def test_the_repacking_inference_kernel_is_off_in_every_layer(tiny):
    from bitsandbytes.nn.modules import Linear4bit

    layers = [m for m in load_model(tiny, quantization="nf4").modules() if isinstance(m, Linear4bit)]
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [False] * 14


def test_unknown_options_are_refused(tiny):
    with pytest.raises(ConfigError, match="quantization='int4' is unknown; choose 'nf4' or 'int8'"):
        load_model(tiny, quantization="int4")
    with pytest.raises(ConfigError, match="dtype='half' is unknown"):
        load_model(tiny, dtype="half")


def test_missing_weights_are_not_made_up(tiny):
    weights = load_file(tiny / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights of LlamaForCausalLM, .*\['lm_head.weight'\]"):
        load_model(tiny)


def test_remote_code_is_not_run(tiny):
    config = json.loads((tiny / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}}
    (tiny / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="Set trust_remote_code only if you trust that code"):
        load_model(tiny)


def test_a_hub_name_while_offline_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'no-such/model'.*not in the local hub cache and offline mode is on"):
        load_model("no-such/model")
    with pytest.raises(ModelError, match="Cannot load the tokenizer 'no-such/model'"):
        load_tokenizer("no-such/model")


def test_a_missing_pad_token_becomes_eos(tiny):
    tokenizer = load_tokenizer(tiny)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("</s>", 1)
    assert tokenizer.chat_template == TEMPLATE


def test_an_existing_pad_token_stays(tiny):
    tokenizer = load_tokenizer(tiny)
    tokenizer.pad_token = "<x>"
    tokenizer.save_pretrained(tiny)
    assert load_tokenizer(tiny).pad_token == "<x>"


def test_a_tokenizer_without_eos_is_refused(tiny):
    tokenizer = load_tokenizer(tiny)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tiny)
    with pytest.raises(ModelError, match="has no EOS token"):
        load_tokenizer(tiny)


def test_a_chat_template_is_a_string_or_a_file(tiny, tmp_path):
    template = "{{ messages[0]['content'] }}!"
    (tmp_path / "own.jinja").write_text(template)
    messages = [{"role": "user", "content": "Hi"}]
    for given in (template, tmp_path / "own.jinja", str(tmp_path / "own.jinja")):
        tokenizer = load_tokenizer(tiny, chat_template=given)
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "Hi!"
    with pytest.raises(ConfigError, match="chat_template='chatml' is neither a Jinja template nor an existing file"):
        load_tokenizer(tiny, chat_template="chatml")


@pytest.mark.parametrize("size", [0, 5, 4000])
def test_truncated_weights_are_named(tiny, size):
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"Cannot load the model .*tiny.*A file of its weights is damaged"):
        load_model(tiny)


@pytest.mark.parametrize(
    ("load", "name"),
    [(load_model, "config.json"), (load_tokenizer, "tokenizer.json"), (load_tokenizer, "tokenizer_config.json")],
)
def test_a_damaged_json_file_is_an_error_of_the_folder(tiny, load, name):
    (tiny / name).write_text("{")
    with pytest.raises(ModelError, match=r"Cannot load the (model|tokenizer) .*tiny"):
        load(tiny)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": ["</s>"]}),
        ("tokenizer_config.json", []),
        ("tokenizer.json", {"model": 3}),
        ("config.json", []),
        ("config.json", {"model_type": "llama", "hidden_size": "wide"}),
        ("config.json", {"model_type": "llama", "num_hidden_layers": -1}),
    ],
)
def test_files_of_another_form_are_refused(tiny, name, content):
    (tiny / name).write_text(json.dumps(content))
    load = load_model if name == "config.json" else load_tokenizer
    with pytest.raises(ModelError):
        load(tiny)


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    source = save_tiny(tmp_path_factory.mktemp("plain"))
    folder = tmp_path_factory.mktemp("nf4")
    load_model(source, quantization="nf4").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return source, folder


def test_a_checkpoint_that_is_stored_in_four_bits_is_the_model_that_was_quantized(four_bits):
    source, folder = four_bits
    ids = torch.tensor([[5, 9, 30, 7]])
    with torch.no_grad():
        expected = load_model(source, quantization="nf4")(ids).logits
        for asked in (None, "nf4"):
            model = load_model(folder, quantization=asked)
            assert torch.equal(model(ids).logits, expected)
    assert describe(model).quantization == "nf4"
    assert weights_hash(model) == weights_hash(load_model(source, quantization="nf4"))


def test_an_adapter_over_it_is_merged_into_the_sixteen_bit_model_that_is_named(four_bits, tmp_path):
    source, folder = four_bits
    tokenizer = load_tokenizer(folder)
    policy = fill_adapter(add_lora(load_model(folder), r=2, alpha=4, seed=0))
    with pytest.raises(
        ModelError, match=r"is stored quantized \(nf4\).*give the 16-bit model.*\(`base_name_or_path`\)"
    ):
        export_merged(policy, tokenizer, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    export_merged(policy, tokenizer, tmp_path / "merged", base_name_or_path=source)
    proof = verify_export(policy, tmp_path / "merged", tokenizer=tokenizer, kind="merged", base_name_or_path=source)
    assert proof.max_abs_export_error < 1e-4 < proof.max_abs_change_against_base
    other = save_tiny(tmp_path / "other", seed=9)
    with pytest.raises(
        ModelError, match=r"other is not the model that .* was quantized from: .*_proj.weight differs by"
    ):
        export_merged(policy, tokenizer, tmp_path / "wrong", base_name_or_path=other)
    assert not (tmp_path / "wrong").exists()
    export_adapter(policy, tokenizer, tmp_path / "adapter")
    assert verify_export(policy, tmp_path / "adapter", tokenizer=tokenizer, kind="adapter").max_abs_export_error == 0


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        *(({"quant_method": method}, method) for method in ("awq", "mxfp4", "fp8", "compressed-tensors", "torchao")),
    ],
)
def test_other_stored_quantizations_are_refused_by_name(tiny, stored, name):
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    with pytest.raises(ModelError, match=rf"is stored quantized \({name}\).*give the 16-bit model"):
        load_model(tiny)


def test_another_quantization_than_the_stored_one_is_refused(four_bits, tmp_path):
    folder = shutil.copytree(four_bits[1], tmp_path / "fp4")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantization='nf4': .* is stored as fp4 already; leave it out"):
        load_model(folder, quantization="nf4")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_more_layers_than_there_are_tensors_are_refused_at_once(tmp_path, kind):
    folder = save_tiny(tmp_path / "m", kind)
    config = json.loads((folder / "config.json").read_text())
    field = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    (folder / "config.json").write_text(json.dumps(config | {field: 10**12}))
    with pytest.raises(ModelError, match=rf"config\.json: {field} is 1000000000000, and the weights are \d+ tensors"):
        load_model(folder)


def test_sizes_that_are_not_those_of_the_weights_are_called_so(tiny):
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"intermediate_size": 130}))
    with pytest.raises(ModelError, match=r"the sizes in its config\.json differ from those of its weights"):
        load_model(tiny)
