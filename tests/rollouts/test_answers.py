import pytest
import torch

from falign.errors import ConfigError, DataError, RolloutError
from falign.models import load_model, load_tokenizer
from falign.rollouts.answers import answer

PROMPTS = ["a", "a much longer prompt than the first", "middling one"]


@pytest.fixture
def loaded(tiny):
    return load_model(tiny), load_tokenizer(tiny)


def test_a_batch_answers_as_each_prompt_alone(loaded):
    model, tokenizer = loaded
    options = {"stop_token_ids": {1}, "max_new_tokens": 12}
    together = answer(model, tokenizer, PROMPTS, **options)
    alone = [answer(model, tokenizer, [prompt], **options)[0] for prompt in PROMPTS]
    assert together == alone
    assert len(set(together)) > 1


def test_greedy_answers_are_those_of_a_plain_loop(loaded):
    model, tokenizer = loaded
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in (1, 3):
                break
    expected = tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert answer(model, tokenizer, PROMPTS[:1], stop_token_ids={1, 3}, max_new_tokens=8) == [expected]


def test_every_stop_token_ends_an_answer(loaded):
    model, tokenizer = loaded
    free = answer(model, tokenizer, PROMPTS[:1], stop_token_ids={1}, max_new_tokens=10)[0]
    everything = range(model.config.vocab_size)
    assert answer(model, tokenizer, PROMPTS[:1], stop_token_ids=everything, max_new_tokens=10)[0] != free


def test_a_seed_repeats_a_sample_and_leaves_the_random_state_alone(loaded):
    model, tokenizer = loaded
    options = {"stop_token_ids": {1}, "max_new_tokens": 12, "temperature": 1.0}
    state = torch.get_rng_state()
    first = answer(model, tokenizer, PROMPTS, seed=4, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert answer(model, tokenizer, PROMPTS, seed=4, **options) == first
    assert answer(model, tokenizer, PROMPTS, seed=5, **options) != first


def test_the_model_is_back_in_its_mode(loaded):
    model, tokenizer = loaded
    model.train()
    answer(model, tokenizer, PROMPTS[:1], stop_token_ids={1}, max_new_tokens=1)
    assert model.training


def test_an_empty_prompt_is_refused(loaded):
    with pytest.raises(ConfigError, match="Prompt 1 is empty"):
        answer(*loaded, ["x", " "], stop_token_ids={1})


def test_no_prompt_no_answer(loaded):
    assert answer(*loaded, [], stop_token_ids={1}) == []


def test_turns_go_through_the_chat_template(loaded):
    model, tokenizer = loaded
    options = {"stop_token_ids": {1}, "max_new_tokens": 8}
    user = {"role": "user", "content": PROMPTS[0]}
    assert answer(model, tokenizer, [[user]], **options) == answer(model, tokenizer, PROMPTS[:1], **options)
    system = {"role": "system", "content": "Answer in Norwegian, at length."}
    assert answer(model, tokenizer, [[system, user]], **options) != answer(model, tokenizer, [[user]], **options)


def test_turns_that_the_template_cannot_take_are_refused(loaded):
    model, tokenizer = loaded
    turns = [{"role": "user", "content": "x"}]
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DataError, match=r"prompt 0: the chat template refuses the turns \(user\): no"):
        answer(model, tokenizer, [turns], stop_token_ids={1})
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        answer(model, tokenizer, [turns], stop_token_ids={1})
    with pytest.raises(ConfigError, match="Prompt 0 is empty"):
        answer(model, tokenizer, [[]], stop_token_ids={1})


def test_a_prompt_that_leaves_no_room_is_refused(loaded):
    with pytest.raises(RolloutError, match=r"Prompt 1 has .* the 2048 positions of the model"):
        answer(*loaded, ["x", "y" * 2040], stop_token_ids={1})
