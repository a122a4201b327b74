"""Rows are filled with a token that the model has."""

import pytest

from falign.errors import ModelError
from falign.models.loading import load_model, load_tokenizer
from falign.models.tokenizers import check_token_rows, pad_token_id, stop_token_ids
from tests.models.tiny import VOCABULARY, tiny_tokenizer


def test_a_padding_token_that_the_model_has_no_embedding_of_does_not_fill_rows():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == VOCABULARY
    assert pad_token_id(tokenizer) < VOCABULARY


def test_a_token_without_a_row_is_refused_with_its_place_and_remedy(tiny):
    tokenizer = load_tokenizer(tiny)
    tokenizer.add_tokens(["<tool>"])
    rows = [("pairs.jsonl, row 1", [5, 6]), ("pairs.jsonl, row 2", [5, *tokenizer("<tool>").input_ids])]
    check_token_rows(rows, num_rows=261, model="m", tokenizer=tokenizer)
    with pytest.raises(ModelError, match=r"row 2: token '<tool>' has the id 260, and m has 260 rows.*resize_token"):
        check_token_rows(rows, num_rows=260, model="m", tokenizer=tokenizer)


def test_all_ids_of_model_and_tokenizer_count(tiny):
    tokenizer, model = load_tokenizer(tiny), load_model(tiny)
    assert model.generation_config.eos_token_id == [1, 3]
    tokenizer.eos_token = "<unk>"
    assert stop_token_ids(model, tokenizer) == {1, 2, 3}
    assert stop_token_ids(model.generation_config, tokenizer) == {1, 2, 3}
    model.generation_config.eos_token_id = 3
    assert stop_token_ids(model, tokenizer) == {2, 3}
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, tokenizer) == {2}


def test_they_are_known_without_weights(tiny):
    tokenizer = load_tokenizer(tiny)
    (tiny / "model.safetensors").unlink()
    assert stop_token_ids(tiny, tokenizer) == {1, 3}
    assert stop_token_ids(str(tiny), tokenizer) == {1, 3}
    (tiny / "generation_config.json").unlink()
    assert stop_token_ids(tiny, tokenizer) == {1}
