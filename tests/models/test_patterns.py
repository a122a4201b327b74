"""Regular expressions that never end are refused by a deadline."""

import json
import time

import pytest

from falign.errors import ModelError
from falign.models import add_lora, load_adapter, load_model, load_tokenizer, patterns
from tests.models.tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("patterns") / "m")


@pytest.fixture
def with_pattern(folder, tmp_path):
    """Return a function that loads the tokenizer with a split by a pattern before its own."""

    def load(pattern):
        content = json.loads((folder / "tokenizer.json").read_text())
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        for name in ("config.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        return load_tokenizer(tmp_path)

    return load


@pytest.mark.parametrize("pattern", ["(a+)+$", r"(\w+\d?)+$", "(a|a)*b", "((ab)*)*c"])
def test_a_tokenizer_with_an_exponential_pattern_is_refused(with_pattern, monkeypatch, pattern):
    monkeypatch.setattr(patterns, "DEADLINE", 1.0)
    begin = time.monotonic()
    with pytest.raises(ModelError, match=r"The tokenizer of .* has the pattern .*(is not done after 1 s|fails)"):
        with_pattern(pattern)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+",
        r"(\d{3})+",
    ],
)
def test_patterns_of_real_tokenizers_are_read(with_pattern, pattern):
    assert with_pattern(pattern)("ab 12").input_ids


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "(.*.*)*x(.*.*)*y(.*.*)*"},
        {"exclude_modules": "((([a-z_.0-9])+)+)+!"},
        {"rank_pattern": {"(([a-z.0-9]+)+)+!": 3}},
        {"target_modules": "(q_proj"},
    ],
)
def test_an_adapter_with_a_slow_or_broken_pattern_is_refused(folder, tmp_path, monkeypatch, change):
    monkeypatch.setattr(patterns, "DEADLINE", 1.0)
    add_lora(load_model(folder), r=2, alpha=4, seed=0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    begin = time.monotonic()
    with pytest.raises(ModelError, match=rf"adapter_config.json: {next(iter(change))} has the pattern"):
        load_adapter(load_model(folder), tmp_path, trainable=False)
    assert time.monotonic() - begin < 30
