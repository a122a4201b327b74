"""What fills rows is a token that the model has."""

from falign.models.tokenizers import pad_token_id
from tests.models.tiny import VOCABULARY, tiny_tokenizer


def test_a_padding_token_that_the_model_has_no_embedding_of_does_not_fill_rows():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == VOCABULARY
    assert pad_token_id(tokenizer) < VOCABULARY
