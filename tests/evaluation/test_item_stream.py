import json
from dataclasses import replace

import pytest

from falign.data import BadRows, DataSource, Window
from falign.errors import DataError
from falign.evaluation import ItemStream, TreeStream, benchmarks, read_items
from falign.evaluation.benchmarks import BenchmarkItem
from tests.models.tiny import tiny_tokenizer
from tests.training.pairs import write_pairs

ITEM = BenchmarkItem("rows.jsonl:1", "1", "code", "Add 2 and 3.", ("5", "The sum is 5.", "6"), (1.0, 1.0, 0.0))
LONG = replace(ITEM, place="rows.jsonl:2", id="2", completions=("5" * 40, "6"), preference=(1.0, 0.0))


def stream(*items, **options):
    given = {"stop_token_ids": {1}, "window": Window(48, long_prompt="cut"), **options}
    return ItemStream(items, tiny_tokenizer(), **given)


def decoded(tree):
    return [tiny_tokenizer().decode([*tree.prompt_ids, *ids]) for ids in tree.completion_ids]


def test_a_plain_prompt_is_a_users_turn_and_completions_are_answers():
    ((item, tree),) = stream(ITEM)
    assert item is ITEM
    assert decoded(tree) == [f"<s>userAdd 2 and 3.</s><s>assistant{text}</s>" for text in ITEM.completions]
    assert {ids[-1] for ids in tree.completion_ids} == {1}


def test_without_a_template_and_in_plain_items_texts_are_joined_as_they_are():
    bare = tiny_tokenizer()
    bare.chat_template = None
    ((_, tree),) = ItemStream([ITEM], bare, stop_token_ids={1}, window=Window(64))
    ((_, plain),) = stream(replace(ITEM, plain=True))
    assert tree == plain
    assert decoded(tree) == [f"Add 2 and 3.{text}</s>" for text in ITEM.completions]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("max_length", [64, 24])
def test_a_file_of_pairs_has_the_tokens_that_training_has(tmp_path, chat, max_length):
    file = write_pairs(tmp_path / "pairs.jsonl", n=8)
    window = Window(max_length, long_prompt="cut")
    items = read_items(benchmarks.Preferences(chat=chat), str(file))
    scored = ItemStream(items, tiny_tokenizer(), stop_token_ids={1, 3}, window=window, long_items="cut")
    trained = TreeStream(DataSource(str(file), chat=chat), tiny_tokenizer(), stop_token_ids={1, 3}, window=window)
    found = [replace(tree, preference=item.preference) for item, tree in scored]
    assert found == [replace(tree, text_sha256=()) for tree in trained]  # which names texts for `falign score`


def test_long_items_are_counted_cut_or_an_error():
    skipping = stream(ITEM, LONG, ITEM)
    assert [item.id for item, _ in skipping] == ["1", "1"]
    assert skipping.skipped() == {"longer than the window": 1}
    cutting = stream(LONG, long_items="cut")
    ((_, tree),) = cutting
    assert max(len(tree.prompt_ids) + len(ids) for ids in tree.completion_ids) == 48
    assert cutting.skipped() == {}
    with pytest.raises(
        DataError, match=r"rows.jsonl:2: prompt and longest completion have 69 tokens, more than max_length=48"
    ):
        list(stream(LONG, long_items="error"))


@pytest.mark.parametrize(
    ("completions", "message"), [(("5", " \n"), "completion 2 is empty"), (("5</s>6", "6"), "has the stop token")]
)
def test_what_cannot_be_scored_goes_to_the_bad_rows(completions, message):
    bad = replace(ITEM, completions=completions, preference=(1.0, 0.0))
    with pytest.raises(DataError, match=message):
        list(stream(bad))
    skipping = stream(bad, ITEM, bad_rows=BadRows("skip"))
    assert [item for item, _ in skipping] == [ITEM]
    assert skipping.skipped() == {"bad row": 1}


def test_a_limit_counts_items_that_can_be_scored():
    assert [item.id for item, _ in stream(LONG, ITEM, replace(ITEM, id="3"), ITEM, limit=2)] == ["1", "3"]


def test_subsets_that_are_asked_for_must_be_there(tmp_path):
    file = tmp_path / "llmbar.jsonl"
    row = {"input": "Add.", "output_1": "5", "output_2": "6", "label": 1}
    file.write_text("".join(json.dumps({**row, "subset": name}) + "\n" for name in ("Natural", "Manual", "Natural")))
    llmbar = benchmarks.get("llmbar")
    assert len(read_items(llmbar, str(file))) == 3
    assert [item.subset for item in read_items(llmbar, str(file), subsets=["Manual"])] == ["Manual"]
    with pytest.raises(
        DataError, match=r"no row belongs to the subset 'natural'; did you mean 'Natural'\? There are Manual, Natural"
    ):
        read_items(llmbar, str(file), subsets=["natural"])


def test_a_source_without_a_good_row_is_an_error_even_where_bad_rows_are_skipped(tmp_path):
    file = tmp_path / "llmbar.jsonl"
    file.write_text(json.dumps({"input": "Add.", "output_1": " ", "output_2": "6", "label": 1}) + "\n")
    with pytest.raises(DataError, match=r"none of its rows .*: .*'output_1' is empty"):
        read_items(benchmarks.get("llmbar"), str(file), bad_rows=BadRows("skip"))
