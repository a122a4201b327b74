"""Small random models, with a byte tokenizer, that are saved and loaded in milliseconds."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from falign.models.structure import adapter_matrix, lora_layers

TEMPLATE = "{% for m in messages %}{{ '<s>' + m['role'] + m['content'] + '</s>' }}{% endfor %}"
VOCABULARY = 260


def tiny_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<unk>", "<x>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


def tiny_model(kind, seed=0):
    torch.manual_seed(seed)
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shared, **sizes, tie_word_embeddings=False))
    if kind == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shared, **sizes, **experts))
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shared, **sizes, tie_word_embeddings=True))
    return GPT2LMHeadModel(GPT2Config(**shared, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2))


def save_tiny(folder: Path, kind="llama", dtype=torch.float32, seed=0):
    model = tiny_model(kind, seed).to(dtype)
    model.generation_config.eos_token_id = [1, 3]
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def fill_adapter(model, seed=5, scale=0.1, name="default"):
    """Stand in for training: B away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model, name).values():
        up = adapter_matrix(layer.lora_B, name)
        up.data = scale * torch.randn(up.shape, generator=generator)
    return model


def swap_tokens(folder, one, two):
    """Give two tokens of a saved tokenizer each other's id."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
