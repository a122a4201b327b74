import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from falign.errors import ConfigError, ModelError
from falign.models import (
    add_lora,
    export_adapter,
    export_merged,
    load_adapter,
    load_model,
    load_tokenizer,
    start_from_adapter,
    weights_hash,
)
from falign.models.new_tokens import add_rows, add_tokens
from falign.models.structure import trained_tokens
from falign.references import AdapterOff
from tests.models.tiny import VOCABULARY, fill_adapter, save_tiny

TOKENS = ["<plan>", "</plan>"]


def grown(folder, **options):
    model, tokenizer = load_model(folder, **options), load_tokenizer(folder)
    ids = add_tokens(tokenizer, TOKENS)
    add_rows(model, ids)
    return model, tokenizer, ids


def trained(folder, **options):
    """A model whose new tokens are trained, with rows away from their mean."""
    model, tokenizer, ids = grown(folder)
    model = fill_adapter(add_lora(model, r=2, alpha=4, seed=0, token_ids=ids, **options))
    for _, rows in trained_tokens(model, "default").values():
        rows.data += 0.3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))
    return model, tokenizer, ids


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=torch.tensor([[0, 40, ids[0], 61, ids[1], 70]]), use_cache=False).logits


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_new_rows_are_the_mean_of_the_older_and_the_rest_is_unchanged(tmp_path, kind):
    folder = save_tiny(tmp_path / "m", kind)
    before, (model, tokenizer, ids) = load_model(folder), grown(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a<plan>b")["input_ids"])[1] == "<plan>"
    for old, new in (
        (before.get_input_embeddings(), model.get_input_embeddings()),
        (before.get_output_embeddings(), model.get_output_embeddings()),
    ):
        assert torch.equal(new.weight[:VOCABULARY], old.weight)
        expected = old.weight.double().mean(dim=0).float()
        torch.testing.assert_close(new.weight[ids[0]], expected, rtol=0, atol=1e-8)
        assert torch.equal(new.weight[ids[0]], new.weight[ids[1]])
    tied = before.get_output_embeddings().weight is before.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert weights_hash(model) == weights_hash(grown(folder)[0])


def test_rows_that_pad_the_vocabulary_are_used_first(tmp_path):
    model = load_model(save_tiny(tmp_path / "m"))
    model.resize_token_embeddings(264, mean_resizing=False)
    shared = model.get_input_embeddings().weight
    kept = shared.detach().clone()
    add_rows(model, [260, 261])
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 264
    assert torch.equal(shared, kept)  # a model of the user's that shares the weights is not changed
    expected = kept[:260].double().mean(dim=0).float()
    torch.testing.assert_close(model.get_input_embeddings().weight[261], expected, rtol=0, atol=1e-8)
    assert torch.equal(model.get_input_embeddings().weight[262:], kept[262:])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_exports_load_in_transformers_and_peft_with_the_same_logits(tmp_path, kind):
    folder = save_tiny(tmp_path / "m", kind)
    model, tokenizer, ids = trained(folder)
    expected = logits(model, ids)
    export_merged(model, tokenizer, tmp_path / "merged", new_token_ids=ids)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids(TOKENS) == ids
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=1e-4)
    assert merged.config.tie_word_embeddings == (kind == "qwen2")
    export_adapter(model, tokenizer, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.resize_token_embeddings(max(ids) + 1)
    with_peft = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    columns = [*range(VOCABULARY), *ids]  # not a row between them that belongs to no token of the model
    torch.testing.assert_close(logits(with_peft, ids)[..., columns], expected[..., columns], rtol=0, atol=1e-4)


def test_without_the_adapter_the_model_is_the_base_with_the_same_vocabulary(tmp_path):
    folder = save_tiny(tmp_path / "m")
    (base, _, _), (model, _, ids) = grown(folder), trained(folder)
    with AdapterOff().acting(model):
        torch.testing.assert_close(logits(model, ids), logits(base, ids), rtol=0, atol=0)
    assert weights_hash(model) == weights_hash(base)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["a b", "a"], r"new_tokens.1='a' exists in the tokenizer already, with the id \d+"),
        (["<plan>", "<plan>"], r"new_tokens.1='<plan>' is given twice"),
        ([" "], r"new_tokens.0=' ': a token has at least one visible character"),
    ],
)
def test_tokens_that_are_not_new_are_refused(tiny, tokens, message):
    with pytest.raises(ConfigError, match=message):
        add_tokens(load_tokenizer(tiny), tokens)


def test_an_adapter_whose_tokens_the_model_lacks_is_refused_with_the_remedy(tiny, tmp_path):
    model, tokenizer, ids = trained(tiny)
    export_adapter(model, tokenizer, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"up to the id 261, and the model has 260 rows.*same model.new_tokens"):
        load_adapter(load_model(tiny), tmp_path / "adapter", trainable=False)
    plain = fill_adapter(add_lora(grown(tiny)[0], r=2, alpha=4, seed=0))
    export_adapter(plain, tokenizer, tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"does not train the rows of the new tokens \(first: id 260\)"):
        start_from_adapter(grown(tiny)[0], tmp_path / "plain", token_ids=ids)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_embeddings_trained_as_a_whole_beside_new_tokens(tmp_path):
    whole = trained(save_tiny(tmp_path / "llama"), modules_to_save=["embed_tokens"])[0]
    assert [*trained_tokens(whole, "default")] == ["lm_head"]
    with pytest.raises(ConfigError, match="embeddings and head of this Qwen2ForCausalLM share weights"):
        trained(save_tiny(tmp_path / "qwen2", "qwen2"), modules_to_save=["embed_tokens"])
