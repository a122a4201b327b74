from falign.models.loading import load_model, load_tokenizer
from falign.models.stop_tokens import stop_token_ids


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
