import errno
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from falign.errors import ModelError
from falign.models import (
    add_lora,
    export_adapter,
    export_merged,
    load_adapter,
    load_model,
    load_tokenizer,
    verify_export,
)
from falign.models.structure import adapter_matrix, lora_layers
from tests.models.tiny import fill_adapter, save_tiny

IDS = torch.tensor([[0, 20, 33, 7, 100, 41]])
QUIET_PEFT = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def adapted(folder, **options):
    return fill_adapter(add_lora(load_model(folder, **options), r=4, alpha=8, seed=1))


@pytest.mark.filterwarnings(QUIET_PEFT)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_plain_peft_opens_an_exported_adapter(tmp_path, kind):
    folder = save_tiny(tmp_path / "m", kind)
    model = adapted(folder)
    out = export_adapter(model, load_tokenizer(folder), tmp_path / "out")
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(folder)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(
        AutoTokenizer.from_pretrained(out)("a b", return_tensors="pt")["input_ids"][0, :1], IDS.new_tensor([68])
    )


def test_an_exported_adapter_is_the_adapter_and_the_tokenizer_only(tiny, tmp_path):
    model = adapted(tiny)
    model.save_pretrained(tmp_path / "sft")
    load_adapter(model, tmp_path / "sft", trainable=False, name="ref")
    out = export_adapter(model, load_tokenizer(tiny), tmp_path / "out")
    assert sorted(entry.name for entry in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    weights = load_file(out / "adapter_model.safetensors")
    assert len(weights) == 28
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in weights)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["inference_mode"], config["task_type"]) == (
        4,
        8,
        True,
        "CAUSAL_LM",
    )
    assert model.peft_config["default"].inference_mode is False  # the model in memory still trains


def test_the_reference_is_never_exported(tiny, tmp_path):
    with pytest.raises(ModelError, match="'ref' is the frozen reference"):
        export_adapter(adapted(tiny), load_tokenizer(tiny), tmp_path / "out", adapter="ref")


def test_another_base_name_can_be_recorded(tiny, tmp_path):
    out = export_adapter(adapted(tiny), load_tokenizer(tiny), tmp_path / "out", base_name_or_path="org/base")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"


@pytest.mark.filterwarnings(QUIET_PEFT)
def test_an_adapter_on_embeddings_is_refused(tiny, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "embed_tokens"])
    model = get_peft_model(load_model(tiny), config)
    for export in (export_adapter, export_merged):
        with pytest.raises(ModelError, match="it is on an embedding, has a bias"):
            export(model, load_tokenizer(tiny), tmp_path / "out")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_merged_weights_are_the_base_plus_the_update_in_float64(tmp_path, kind):
    folder = save_tiny(tmp_path / "m", kind)
    model = adapted(folder)
    out = export_merged(model, load_tokenizer(folder), tmp_path / "out")
    before, after = load_model(folder).state_dict(), AutoModelForCausalLM.from_pretrained(out).state_dict()
    layers = lora_layers(model, "default")
    for name, weight in before.items():
        expected = weight.double()
        if (layer := layers.get(name.removesuffix(".weight"))) is not None and name.endswith(".weight"):
            up, down = adapter_matrix(layer.lora_B, "default"), adapter_matrix(layer.lora_A, "default")
            delta = 2.0 * up.double() @ down.double()
            expected = expected + (delta.T if kind == "gpt2" else delta)
            assert not torch.equal(after[name], weight)
        assert torch.allclose(after[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model), atol=1e-4)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("written", ["auto", "float32", "bfloat16", "float16"])
def test_a_merge_rounds_once_from_float32(tmp_path, stored, written):
    folder = save_tiny(tmp_path / "m", dtype=stored)
    model = adapted(folder)
    out = export_merged(model, load_tokenizer(folder), tmp_path / "out", dtype=written)
    dtype = stored if written == "auto" else getattr(torch, written)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    name = "model.layers.1.mlp.up_proj"
    layer = lora_layers(model, "default")[name]
    delta = 2.0 * adapter_matrix(layer.lora_B, "default") @ adapter_matrix(layer.lora_A, "default")
    exact = load_model(folder).get_submodule(name).weight.float() + delta
    assert torch.equal(merged.get_submodule(name).weight, exact.to(dtype))
    embeddings = load_model(folder).get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, embeddings.to(dtype))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_qlora_adapter_is_folded_into_the_original_weights(tmp_path, kind):
    folder = save_tiny(tmp_path / "m", kind)
    model, plain = adapted(folder, quantization="nf4"), adapted(folder)
    out = export_merged(model, load_tokenizer(folder), tmp_path / "out", base_name_or_path=folder)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert not merged.config.to_dict().get("quantization_config")
    # The same adapter, unmerged, over the unquantized base.
    assert torch.allclose(logits(merged), logits(plain), atol=1e-4)
    assert (logits(model) - logits(plain)).abs().max() > 1e-2


def test_a_merge_changes_nothing_in_memory(tiny, tmp_path):
    model = adapted(tiny)
    expected = logits(model)
    export_merged(model, load_tokenizer(tiny), tmp_path / "out", dtype="bfloat16")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_an_adapter_on_a_tied_head_leaves_the_embeddings_as_they_are(tmp_path, kind):
    folder = save_tiny(tmp_path / "m", kind)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = fill_adapter(add_lora(load_model(folder), r=2, alpha=4, seed=0, target_modules=["lm_head"]))
    merged = AutoModelForCausalLM.from_pretrained(export_merged(model, load_tokenizer(folder), tmp_path / "out"))
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)
    before = load_model(folder).get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, before)
    assert not torch.equal(merged.get_output_embeddings().weight, before)
    assert load_model(folder).config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_fully_trained_model_gives_its_own_weights(tmp_path, kind):
    folder = save_tiny(tmp_path / "m", kind)
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    out = export_merged(model, load_tokenizer(folder), tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1, 3]


def test_four_bit_weights_without_an_adapter_cannot_be_exported(tiny, tmp_path):
    with pytest.raises(ModelError, match="quantized weights cannot be exported without an adapter"):
        export_merged(load_model(tiny, quantization="nf4"), load_tokenizer(tiny), tmp_path / "out")


def test_the_wrong_base_is_noticed(tiny, tmp_path):
    other = save_tiny(tmp_path / "other", "llama")
    config = json.loads((other / "config.json").read_text())
    wide = type(load_model(other).config)(**{**config, "intermediate_size": 192})
    type(load_model(other))(wide).save_pretrained(other)
    with pytest.raises(ModelError, match=r"mlp.gate_proj is \(192, 64\) in the base and \(128, 64\) in the adapter"):
        export_merged(adapted(tiny), load_tokenizer(tiny), tmp_path / "out", base_name_or_path=other)


@pytest.mark.parametrize("export", [export_adapter, export_merged])
def test_an_occupied_folder_is_refused_and_replaced_when_asked(tiny, tmp_path, export):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ModelError, match="exists and is not empty"):
        export(adapted(tiny), load_tokenizer(tiny), out)
    export(adapted(tiny), load_tokenizer(tiny), out, overwrite=True)
    assert not (out / "mine").exists()
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize("export", [export_adapter, export_merged])
def test_a_full_disk_leaves_nothing(tiny, tmp_path, export, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    tokenizer = load_tokenizer(tiny)
    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)  # after the weights have been written
    with pytest.raises(ModelError, match=r"out: the disk is full .* MiB needed"):
        export(adapted(tiny), tokenizer, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("full", [False, True])
def test_generation_stops_where_the_trained_model_stops(tiny, tmp_path, full):
    """The template of many chat models ends turns with a token that their base's generation settings do not name."""
    (tiny / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "do_sample": True, "top_k": 7}))
    tokenizer = load_tokenizer(tiny)
    tokenizer.eos_token = "<x>"
    model = load_model(tiny)
    if full:
        model.get_parameter("lm_head.weight").data.mul_(1.5)
    else:
        model = fill_adapter(add_lora(model, r=4, alpha=8, seed=1))
    folder = export_merged(model, tokenizer, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert exported.generation_config.eos_token_id == [1, 3]
    assert (exported.generation_config.do_sample, exported.generation_config.top_k) == (True, 7)
    verify_export(model, folder, tokenizer=tokenizer, kind="merged")
    exported.lm_head.weight.data.zero_()
    exported.lm_head.bias = torch.nn.Parameter(torch.zeros(260))
    exported.lm_head.bias.data[3] = 9.0  # it says <x> and nothing else
    output = exported.generate(torch.tensor([[5, 6]]), max_new_tokens=5, do_sample=False)
    assert output.tolist() == [[5, 6, 3]]
    for changes, message in (
        ({"eos_token_id": 1}, r"eos_token_id is 1, .* stops at \[1, 3\]"),
        ({"top_k": 9}, "top_k is 9"),
    ):
        written = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps(written | changes))
        with pytest.raises(ModelError, match=message):
            verify_export(model, folder, tokenizer=tokenizer, kind="merged")
        (folder / "generation_config.json").write_text(json.dumps(written))
    if full:
        weights = load_file(folder / "model.safetensors")
        weights["model.embed_tokens.weight"][259, 3] += 1.0  # a token of no probe
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"embed_tokens\.weight has other values"):
            verify_export(model, folder, tokenizer=tokenizer, kind="merged")
