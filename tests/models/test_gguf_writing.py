"""GGUF files that falign writes, read back by transformers."""

import json
import re

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import falign
from falign.errors import ModelError
from falign.models.gguf import read_model, read_tokenizer
from falign.models.gguf_writing import pre_tokenizer_name, write_gguf
from falign.models.probe import probe_ids, probe_logits
from falign.runfile import parse_run
from falign.training import train
from tests.models.tiny import tiny_model, tiny_tokenizer
from tests.training.pairs import run_data, write_pairs

DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def merging_tokenizer():
    """The byte tokenizer with two merges, which splits off digits; two rows of the embeddings have no token."""
    plain = tiny_tokenizer()
    rules = json.loads(plain.backend_tokenizer.to_str())
    rules["model"]["vocab"] |= {"he": 260, "Ġt": 261}
    rules["model"]["merges"] = [["h", "e"], ["Ġ", "t"]]
    rules["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=plain.chat_template,
    )


@pytest.fixture
def saved(tmp_path):
    def save(kind="llama"):
        model = tiny_model(kind)
        model.resize_token_embeddings(264, mean_resizing=False)
        model.generation_config.eos_token_id = [1]
        model.save_pretrained(tmp_path / kind)
        merging_tokenizer().save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return save


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_holds_the_weights_tokens_and_template(saved, tmp_path, kind, dtype):
    folder, tokenizer = saved(kind), merging_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", name="tiny")
    reread, own = read_model(tmp_path / "m.gguf"), read_tokenizer(tmp_path / "m.gguf")
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(dtype).float()
    rows = probe_ids(tokenizer)
    assert probe_ids(own) == rows
    torch.testing.assert_close(probe_logits(reread, rows), probe_logits(rounded, rows), rtol=0, atol=1e-4)
    assert (own.chat_template, own.eos_token, own.bos_token) == (tokenizer.chat_template, "</s>", "<s>")
    assert reread.config.tie_word_embeddings == (kind == "qwen2")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_a_run_is_exported_with_a_proof_and_a_card(saved, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", n=12)
    train(parse_run(run_data(saved(), data, tmp_path / "run", training={"max_steps": 2})), console=Console(quiet=True))
    exported = falign.export(tmp_path / "run", "gguf", dtype="float32")
    assert exported.proof.max_abs_logit_difference <= 1e-4 * exported.proof.max_abs_logit
    assert exported.proof.max_abs_change_against_base > 1e-2
    assert {file.name for file in exported.path.iterdir()} == {"run-F32.gguf", "README.md"}
    card = (exported.path / "README.md").read_text(encoding="utf-8")
    assert "llama-cli -m run-F32.gguf" in card
    falign.export(tmp_path / "run", "gguf", dtype="float16", overwrite=True)
    assert (exported.path / "run-F16.gguf").is_file()


def test_what_is_not_written_is_refused_with_the_reason_and_the_command(tmp_path):
    command = "python llama.cpp/convert_hf_to_gguf.py"
    scaled = LlamaConfig(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    )
    words = merging_tokenizer()
    rules = json.loads(words.backend_tokenizer.to_str())
    rules["pre_tokenizer"] = {"type": "Whitespace"}
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)), eos_token="</s>")
    for model, tokenizer, reason in (
        (
            tiny_model("gpt2"),
            merging_tokenizer(),
            "its architecture is gpt2, and it writes llama, mistral",
        ),
        (LlamaForCausalLM(scaled), merging_tokenizer(), "its positions are scaled (linear)"),
        (tiny_model("llama"), words, "its tokenizer splits words by a rule"),
    ):
        with pytest.raises(ModelError, match=f"{re.escape(reason)}.*{re.escape(command)}"):
            write_gguf(model, tokenizer, tmp_path / "m.gguf", name="m")
    assert not list(tmp_path.glob("*.gguf"))


def test_the_rules_of_words_have_the_names_of_llama_cpp():
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": llama3}, "behavior": "Isolated", "invert": False}
    after = {**BYTES, "use_regex": False}
    for parts, name in (
        ([BYTES], "gpt-2"),
        ([DIGITS, BYTES], "smollm"),
        ([split, after], "llama-bpe"),
        ([{**split, "pattern": {"Regex": llama3.replace("{1,3}", "")}}, after], "qwen2"),
        ([{**split, "pattern": {"Regex": "x"}}, after], None),
        ([DIGITS], None),
    ):
        assert pre_tokenizer_name({"type": "Sequence", "pretokenizers": parts}) == name
    assert pre_tokenizer_name(BYTES) == "gpt-2"
    assert pre_tokenizer_name(None) is None
