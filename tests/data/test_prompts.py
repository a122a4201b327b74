"""Prompts without completions: templates, chat, columns for rewards, lengths, splits."""

import pytest

from falign.data import PromptSource, load_prompts
from falign.errors import ConfigError, DataError

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def load(path, tokenizer, /, *, eval_size=0, max_length=200, long_prompt="error", bad_rows="error", **source):
    return load_prompts(
        [PromptSource(path, **source)],
        tokenizer,
        max_length=max_length,
        long_prompt=long_prompt,
        bad_rows=bad_rows,
        eval_size=eval_size,
    )


def test_a_template_is_filled_from_the_columns_and_all_of_them_go_to_the_rewards(write_rows, byte_bpe):
    tokenizer = byte_bpe()
    path = write_rows({"question": "1 + 2?", "answer": 3})
    (row,) = load(path, tokenizer, template="Q: {question}\nA:").train
    assert row.prompt == "Q: 1 + 2?\nA:"
    assert tokenizer.decode(row.prompt_ids) == "Q: 1 + 2?\nA:"
    assert row.columns == {"question": "1 + 2?", "answer": 3}


def test_a_prompt_as_a_users_turn_is_rendered_up_to_where_the_answer_begins(write_rows, byte_bpe):
    tokenizer = byte_bpe(chat_template=CHAT)
    path = write_rows({"prompt": "hello", "answer": "x"})
    (row,) = load(path, tokenizer, chat=True, system="be brief").train
    assert row.prompt == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert tokenizer.decode(row.prompt_ids) == "<s>system: be brief</s><s>user: hello</s><s>assistant: "
    assert row.columns == {"answer": "x"}


def test_messages_lose_their_answer(write_rows, byte_bpe):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (row,) = load(write_rows({"messages": turns}), byte_bpe(chat_template=CHAT)).train
    assert row.prompt == turns[:1]


def test_plain_text_has_one_bos_where_the_tokenizer_adds_one(write_rows, byte_bpe):
    tokenizer = byte_bpe(adds_bos=True)
    (row,) = load(write_rows({"prompt": "hello world"}), tokenizer).train
    assert row.prompt_ids[0] == tokenizer.bos_token_id
    assert row.prompt_ids.count(tokenizer.bos_token_id) == 1


def test_long_prompts_stop_are_cut_or_dropped_and_counted(write_rows, byte_bpe):
    path, tokenizer = write_rows({"prompt": "a b c d e f g h i j k l"}, {"prompt": "yes no"}), byte_bpe()
    with pytest.raises(DataError, match=r"rows.jsonl:1: the prompt has \d+ tokens, and max_length=6"):
        load(path, tokenizer, max_length=6)
    cut = load(path, tokenizer, max_length=6, long_prompt="cut")
    assert len(cut.train[0].prompt_ids) == 6
    assert cut.report.cut == 1
    assert tokenizer.decode(cut.train[0].prompt_ids).endswith("k l")
    dropped = load(path, tokenizer, max_length=6, long_prompt="drop")
    assert [row.prompt for row in dropped.train] == ["yes no"]
    assert dropped.report.dropped == 1


def test_prompts_can_stand_in_the_run_file_itself(byte_bpe):
    source = PromptSource(texts=("It was a dark night", "Once"))
    rows = load_prompts([source], byte_bpe(), max_length=40).train
    assert [(row.prompt, row.place) for row in rows] == [("It was a dark night", "texts:1"), ("Once", "texts:2")]
    with pytest.raises(ConfigError, match="either a path or texts"):
        load_prompts([PromptSource()], byte_bpe(), max_length=40)


def test_a_split_takes_all_rows_of_a_prompt_to_one_side(write_rows, byte_bpe):
    rows = [{"prompt": f"question {i // 2}", "answer": i} for i in range(12)]
    data = load(write_rows(*rows), byte_bpe(), eval_size=4)
    assert len(data.eval) == 4 == data.report.num_eval
    assert len(data.train) == 8 == data.report.num_train
    assert not {row.prompt for row in data.train} & {row.prompt for row in data.eval}


@pytest.mark.parametrize(
    ("row", "source", "message"),
    [
        ({"question": "x"}, {}, "there is no column 'prompt'; the row has"),
        ({"question": "x"}, {"template": "{query}"}, "the template '{query}' asks for 'query'"),
        ({"prompt": "  "}, {}, "the prompt is empty"),
        ({"prompt": 3}, {}, "'prompt' is 3"),
    ],
)
def test_a_row_without_a_prompt_is_named_or_skipped(write_rows, byte_bpe, row, source, message):
    path = write_rows(row)
    with pytest.raises(DataError, match=message):
        load(path, byte_bpe(), **source)
    with pytest.raises(DataError, match="none of its rows is a usable prompt"):
        load(path, byte_bpe(), bad_rows="skip", **source)


def test_a_conversation_needs_a_chat_template_and_evaluation_is_chosen_one_way(write_rows, byte_bpe):
    path = write_rows({"prompt": "hi"}, {"prompt": "ho"})
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        load(path, byte_bpe(), chat=True)
    source = PromptSource(path)
    with pytest.raises(ConfigError, match=r"eval_sources excludes eval_size"):
        load_prompts([source], byte_bpe(), max_length=9, eval_sources=[source], eval_size=1)


@pytest.mark.parametrize(
    "template", ["{prompt:d}", "{prompt!q}", "{prompt[0]}", "{prompt.__class__}", "{prompt:{prompt.__class__}}"]
)
def test_a_template_that_cannot_be_filled_names_the_row(write_rows, byte_bpe, template):
    path = write_rows({"prompt": [{"role": "user", "content": "hi"}]})
    with pytest.raises(DataError, match=r":1: the template .* asks for"):
        load(path, byte_bpe(), template=template)


@pytest.mark.parametrize("template", ["{", "}", "{0}", "{} {prompt}"])
def test_a_template_that_cannot_be_read_is_no_fault_of_the_rows(write_rows, byte_bpe, template):
    path = write_rows({"prompt": "hi"})
    with pytest.raises(ConfigError, match=r"the template '.*' cannot be read \(.*in \{prompt\}; write \{\{ and \}\}"):
        load(path, byte_bpe(), template=template, chat=False)
