import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from falign.errors import ModelError
from falign.models import add_lora, load_model, load_tokenizer, resolve, stop_token_ids
from falign.models.gguf import cache_folder, plain_checkpoint
from falign.models.sources import demo_gguf


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [("/a", "/b", "/a"), ("", "/b", "/b/falign/models"), ("", "", f"{Path.home()}/.cache/falign/models")],
)
def test_the_cache_folder_follows_the_environment(monkeypatch, own, xdg, expected):
    monkeypatch.setenv("FALIGN_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert str(cache_folder()) == expected


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"<html>")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        plain_checkpoint(tmp_path / "m.gguf")


def test_a_missing_reader_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("FALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr("falign.models.gguf.is_gguf_available", lambda: False)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="needs the package gguf; run `pip install gguf`"):
        plain_checkpoint(tmp_path / "m.gguf")


def test_the_demonstration_model_becomes_a_plain_checkpoint_once(demo):
    folder = Path(resolve(demo))
    assert folder.parent == cache_folder()
    assert folder.name.startswith("SmolLM2-135M-Instruct.Q4_1-")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve(demo_gguf(demo)) == str(folder)  # by file too, and converted only once
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [entry.name for entry in folder.parent.iterdir() if entry.name.startswith(".")] == []


def test_the_weights_are_those_of_the_file(demo):
    from gguf import GGUFReader, dequantize

    model = load_model(demo)
    assert model.dtype is torch.float32
    tensors = {tensor.name: tensor for tensor in GGUFReader(demo_gguf(demo)).tensors}
    for stored, parameter in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
    }.items():
        values = torch.tensor(dequantize(tensors[stored].data, tensors[stored].tensor_type))
        assert torch.allclose(model.get_parameter(parameter), values, rtol=1e-6, atol=1e-7)


def test_the_tokenizer_cuts_digits_as_the_original_does(demo):
    tokenizer = load_tokenizer(demo)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("one:\n\n12  3")["input_ids"])
    # Without the cut before each digit these would be "Ċ", "Ċ" and "Ġ", "Ġ".
    assert tokens == ["one", ":", "ĊĊ", "1", "2", "ĠĠ", "3"]


def test_the_demonstration_model_talks(demo):
    tokenizer, model = load_tokenizer(demo), load_model(demo)
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt:])
    assert stop_token_ids(demo, tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_adapters_record_a_base_that_plain_transformers_opens(demo):
    adapted = add_lora(load_model(demo), r=2, alpha=4, seed=0, target_modules=["q_proj"])
    recorded = adapted.peft_config["default"].base_model_name_or_path
    assert recorded == resolve(demo)
    assert AutoModelForCausalLM.from_pretrained(recorded).config.model_type == "llama"
