import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from falign.errors import ConfigError, ModelError, RewardError
from falign.rewards import reward_identity
from falign.rewards.classifier import ClassifierReward, load_classifier
from tests.models.tiny import VOCABULARY, save_tiny, tiny_tokenizer

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
PROMPTS = ["Name a color: "] * 4
COMPLETIONS = ["blue.", "", "a long answer with many words", "red"]


def llama(num_labels=1, pad_token_id=None):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_labels=num_labels, pad_token_id=pad_token_id, num_key_value_heads=2)
    return LlamaForSequenceClassification(config).eval()


def bert(num_labels=3):
    torch.manual_seed(0)
    config = BertConfig(**SIZES, num_labels=num_labels, pad_token_id=2)
    config.id2label = {0: "negative", 1: "neutral", 2: "positive"}
    return BertForSequenceClassification(config).eval()


def alone(model, text):
    ids = torch.tensor([tiny_tokenizer()(text).input_ids])
    with torch.no_grad():
        return model(input_ids=ids).logits[0]


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 10_000])
@pytest.mark.parametrize("model", [llama(), llama(pad_token_id=2)], ids=["no padding token", "padding token"])
def test_a_score_is_the_heads_value_whatever_the_batch(model, tokens_per_batch):
    before = model.config.pad_token_id
    reward = ClassifierReward(model, tiny_tokenizer(), tokens_per_batch=tokens_per_batch)
    expected = [alone(model, p + c).item() for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert model.config.pad_token_id == before


def test_outputs_of_a_label_by_name_or_index():
    model, tokenizer = bert(), tiny_tokenizer()
    expected = torch.stack([alone(model, c) for c in ("blue.", "red")])
    arguments = {"text": "completion", "label": "positive"}
    for output, values in [
        ("score", expected[:, 2]),
        ("logprob", expected.log_softmax(-1)[:, 2]),
        ("probability", expected.softmax(-1)[:, 2]),
    ]:
        reward = ClassifierReward(model, tokenizer, output=output, **arguments)
        assert reward(["p"] * 2, ["blue.", "red"]) == pytest.approx(values.tolist(), rel=1e-4)
    by_index = ClassifierReward(model, tokenizer, text="completion", label=2)
    assert by_index(["p"], ["red"]) == pytest.approx([expected[1, 2].item()], rel=1e-4)


def test_a_single_score_has_the_probability_of_the_logistic_function():
    model = llama()
    value = torch.sigmoid(alone(model, "pa"))
    assert ClassifierReward(model, tiny_tokenizer(), output="probability")(["p"], ["a"]) == pytest.approx(
        value.tolist(), rel=1e-4
    )


def test_a_conversation_is_read_in_the_template_once():
    model = llama()
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    reward = ClassifierReward(model, tiny_tokenizer(), text="chat")
    rendered = "<s>systemBe brief.</s><s>userHi</s><s>assistantHo</s>"
    assert reward([turns], ["Ho"]) == pytest.approx([alone(model, rendered).item()], rel=1e-4)
    assert reward(["Hi"], ["Ho"]) == pytest.approx([alone(model, "<s>userHi</s><s>assistantHo</s>").item()], rel=1e-4)
    assert len(turns) == 2
    with pytest.raises(RewardError, match=r"r:1: the prompt is a conversation, which text=joined cannot read"):
        ClassifierReward(model, tiny_tokenizer())([turns], ["Ho"], place=["r:1"])


def test_what_is_too_long_loses_its_beginning(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded, tokenizer = load_classifier(tmp_path, device="cpu")
    assert not loaded.training
    text = "".join(chr(97 + i % 26) for i in range(100))
    assert ClassifierReward(loaded, tokenizer)(["x"], [text]) == pytest.approx(
        [alone(model, text[-64:]).item()], rel=1e-4
    )
    assert ClassifierReward(loaded, tokenizer, max_length=10)(["x"], [text]) == pytest.approx(
        [alone(model, text[-10:]).item()], rel=1e-4
    )


def test_what_has_no_tokens_is_refused():
    with pytest.raises(RewardError, match=r"completion 0: the text is empty"):
        ClassifierReward(llama(), tiny_tokenizer(), text="completion")(["p"], [""])


def test_a_label_must_be_chosen_from_those_there_are_and_chat_needs_a_template():
    with pytest.raises(ConfigError, match=r"it has 3 labels; choose one of \['negative', 'neutral', 'positive'\]"):
        ClassifierReward(bert(), tiny_tokenizer())
    with pytest.raises(ConfigError, match="label='good' is unknown"):
        ClassifierReward(bert(), tiny_tokenizer(), label="good")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="needs a chat template"):
        ClassifierReward(llama(), tokenizer, text="chat")


def test_a_model_without_the_head_or_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"lacks weights of LlamaForSequenceClassification, .*score.weight"):
        load_classifier(save_tiny(tmp_path / "causal"))
    with pytest.raises(ModelError, match="does not exist"):
        load_classifier(tmp_path / "none")


def test_its_identity_is_its_weights_and_what_it_reads():
    def identity(model, **settings):
        return reward_identity(ClassifierReward(model, tiny_tokenizer(), **settings))

    other = llama()
    with torch.no_grad():
        other.score.weight[0, 0] += 1e-3
    found = [identity(llama()), identity(other), identity(llama(), text="pair"), identity(llama(), output="logprob")]
    assert len(set(found)) == 4
    assert identity(llama()) == found[0]
