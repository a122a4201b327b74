"""Prompts of the same rows under another template."""

import json

import pytest

from falign.data import DataSource, PromptSource, Window, load_preferences, load_prompts
from falign.data.other_prompts import OtherPrompts
from falign.errors import DataError
from tests.models.tiny import tiny_tokenizer

TEMPLATE = "{prompt} Hint: {solution}. "


def write(folder, *rows):
    (path := folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loaded(source, template=TEMPLATE, **options):
    tokenizer = tiny_tokenizer()
    others = OtherPrompts(template, tokenizer)
    data = load_preferences(
        [source], tokenizer, stop_token_ids={1}, window=Window(200), other_prompts=[others], **options
    )
    return data, others


def text(ids):
    return tiny_tokenizer().decode(list(ids))


def test_columns_of_rows_with_completions_fill_the_template(tmp_path):
    row = {"prompt": "2+3? ", "completion": "5", "solution": 5}
    path = write(tmp_path, row, {**row, "prompt": "4+4? ", "solution": "8"})
    data, others = loaded(DataSource(path, chat=False))
    found = [others.ids[tree.place, tree.prompt_ids] for tree in data.train]
    assert [text(ids) for ids in found] == ["2+3?  Hint: 5. ", "4+4?  Hint: 8. "]
    assert others.longest == len(found[0]) + len(data.train[0].completion_ids[0])
    assert others.place == data.train[0].place


def test_in_a_conversation_it_takes_the_place_of_the_last_turn(tmp_path):
    row = {"system": "Be kind.", "prompt": "2+3?", "completion": "5", "solution": "5"}
    data, others = loaded(DataSource(write(tmp_path, row), chat=True))
    (tree,) = data.train
    assert text(tree.prompt_ids) == "<s>systemBe kind.</s><s>user2+3?</s>"
    assert text(others.ids[tree.place, tree.prompt_ids]) == ("<s>systemBe kind.</s><s>user2+3? Hint: 5. </s>")


def test_tokens_that_the_template_writes_only_in_a_prompt_are_left_out_of_both_prompts(tmp_path):
    tokenizer = tiny_tokenizer()
    opened = "{% for m in messages %}{{ '<s>' + m['role'] + m['content'] + '</s>' }}{% endfor %}"
    tokenizer.chat_template = opened + "{% if add_generation_prompt %}{{ '<s>assistant<x>' }}{% endif %}"
    others = OtherPrompts(TEMPLATE, tokenizer)
    path = write(tmp_path, {"prompt": "2+3?", "completion": "5", "solution": "5"})
    options = {"stop_token_ids": {1}, "window": Window(200), "other_prompts": [others]}
    (tree,) = load_preferences([DataSource(path, chat=True)], tokenizer, **options).train
    assert text(tree.prompt_ids) == "<s>user2+3?</s><s>assistant"
    assert text(tree.completion_ids[0]) == "5</s>"
    assert text(others.ids[tree.place, tree.prompt_ids]) == "<s>user2+3? Hint: 5. </s><s>assistant"


def test_a_column_under_another_name_or_ignored_as_prompt_can_be_read(tmp_path):
    row = {"question": "2+3?", "prompt": "Q", "completion": "5"}
    data, others = loaded(DataSource(write(tmp_path, row), chat=False, ignore=("question",)), "{question}")
    assert [text(ids) for ids in others.ids.values()] == ["2+3?"]
    assert len(data.train) == 1


def test_a_missing_column_is_refused_with_the_place_or_counts_as_a_bad_row(tmp_path):
    row = {"prompt": "2+3? ", "completion": "5"}
    path = write(tmp_path, {**row, "solution": "5"}, row)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the template .* asks for 'solution'; the row has"):
        loaded(DataSource(path, chat=False))
    data, _ = loaded(DataSource(path, chat=False), bad_rows="skip")
    assert len(data.train) == 1
    assert data.report.sources[0].bad == 1


def test_rows_of_one_place_and_prompt_with_different_other_prompts_are_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    others = OtherPrompts(TEMPLATE, tokenizer)
    for solution in ("5", "6"):
        path = write(tmp_path, {"prompt": "2+3? ", "solution": solution})
        (row,) = load_prompts([PromptSource(path, chat=False)], tokenizer, max_length=50).train
        if solution == "5":
            others.add_prompt(row, max_new_tokens=7)
            assert others.longest == len("2+3?  Hint: 5. ") + 7
        else:
            with pytest.raises(DataError, match=r"rows\.jsonl:1: two rows have this place and the same prompt"):
                others.add_prompt(row, max_new_tokens=7)
