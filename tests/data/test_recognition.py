import json
import re
from pathlib import Path

import pytest

from falign.cli.data import column_mapping
from falign.data import BadRows, DataSource, Row, RowReader, read_examples
from falign.data.formats import FORMATS
from falign.data.recognition import recognize
from falign.errors import ConfigError, DataError

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


def test_unknown_format_and_columns_are_refused():
    with pytest.raises(ConfigError, match=r"format='alpacca' is unknown; .*did you mean 'alpaca'"):
        RowReader("alpacca")
    with pytest.raises(
        ConfigError, match=r"'question' is not a column that falign reads\. The left side is falign's name"
    ):
        RowReader("auto", {"question": "prompt"})
    with pytest.raises(
        DataError, match=r"columns=\{prompt: frage\} names a column that is missing; the row has \['chosen', "
    ):
        RowReader("auto", {"prompt": "frage"}).read(Row("x:1", PAIR))


def test_auto_keeps_to_the_layout_of_the_first_row(write_rows):
    path = write_rows({"x": 1}, PAIR, {"chosen": "so a", "rejected": "so b"}, {**PAIR, "conversations": []}, PAIR)
    bad_rows, reader = BadRows("skip"), RowReader()
    examples = list(read_examples(DataSource(path), reader=reader, bad_rows=bad_rows))
    assert reader.format == "preference"
    assert [example.place for example in examples] == [f"{path}:{line}" for line in (2, 4, 5)]
    assert "rows.jsonl:3: the column 'prompt' is missing" in bad_rows.messages[1]


def test_auto_refuses_a_row_that_looks_like_another_layout():
    reader = RowReader()
    reader.read(Row("x:1", {"chosen": "so a", "rejected": "so b"}))
    with pytest.raises(
        DataError, match="x:2: this row looks like format 'preference', those before it like 'implicit'"
    ):
        reader.read(Row("x:2", {"prompt": "q", "chosen": "so a", "rejected": "so b"}))


@pytest.mark.parametrize(
    ("file", "format", "good", "bad"),
    [
        ("hh-rlhf/helpful-base-test.jsonl.gz", "hh", 1760, 7),
        ("hh-rlhf/harmless-base-test.jsonl.gz", "hh", 1803, 4),
        ("dpo-mix-demo/dpo_en_demo.jsonl.gz", "sharegpt", 291, 0),
        ("dpo-mix-demo/kto_en_demo.jsonl.gz", "unpaired", 299, 0),
        ("polite-preference/instruction_preference.jsonl.gz", "alpaca", 1094, 0),
    ],
)
def test_published_files_are_read_as_they_are(shared_data, file, format, good, bad):
    bad_rows, reader = BadRows("skip"), RowReader()
    source = DataSource(str(shared_data(file)))
    assert len(list(read_examples(source, reader=reader, bad_rows=bad_rows))) == good
    assert (reader.format, bad_rows.count) == (format, bad)
    assert all("has two answers one after the other" in message for message in bad_rows.messages)


def test_hh_prompt_and_answers_are_the_dialogue(shared_data):
    source = DataSource(str(shared_data("hh-rlhf/helpful-base-test.jsonl.gz")))
    example = next(read_examples(source))
    assert [turn["role"] for turn in example.prompt] == ["user", "assistant", "user", "assistant", "user"]
    assert example.prompt[2] == {"role": "user", "content": "I am in Oregon."}
    assert example.completions[0][0]["content"].startswith("About 150 species of butterflies live in Oregon")


def test_examples_in_the_documentation_are_read_as_their_headings_say():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    found = []
    sections = [each.removeprefix("### ") for each in re.split(r"\n(?=##)", page) if each.startswith("### ")]
    for section in sections:
        for block in re.findall(r"```json\n(.*?)\n```", section, flags=re.DOTALL):
            row = Row("docs/data.md", json.loads(block))
            found.append(section.split()[0])
            assert recognize(row) == found[-1]
            RowReader().read(row)
    assert set(found) == set(FORMATS)


def test_plain_texts_become_turns_where_the_source_is_a_chat(write_rows):
    path = write_rows({"question": "hi", "good": "ho"})
    source = DataSource(path, columns={"prompt": "question", "completion": "good"}, chat=True)
    (example,) = read_examples(source)
    assert example.prompt == [{"role": "user", "content": "hi"}]
    assert example.completions == ([{"role": "assistant", "content": "ho"}],)


def test_a_column_that_another_would_replace_is_refused_or_ignored():
    row = Row("x:1", {**PAIR, "prompt": "You are brief.", "question": "q"})
    with pytest.raises(DataError, match=r"x:1: columns=\{prompt: question\} would replace the column 'prompt' "):
        RowReader("auto", {"prompt": "question"}).read(row)
    assert RowReader("auto", {"prompt": "question"}, ignore=["prompt"]).read(row).prompt == "q"
    assert RowReader("auto", {"prompt": "question", "system": "prompt"}).read(row).prompt == [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "q"},
    ]
    swapped = RowReader("auto", {"chosen": "rejected", "rejected": "chosen"}).read(Row("x:1", PAIR))
    assert swapped.completions == ("b", "a")
    same = RowReader("auto", {"prompt": "question"}).read(Row("x:1", {**PAIR, "question": "q", "prompt": ""}))
    assert same.prompt == "q"


@pytest.mark.parametrize("name", [" prompt", "user: text", "the, prompt", "#prompt", "prompt}", "prompt?"])
def test_a_column_is_named_as_a_run_file_takes_it(name):
    row = Row("x:1", {name: "a question", "chosen": "so a", "rejected": "so b"})
    with pytest.raises(DataError) as caught:
        RowReader().read(row)
    columns = re.search(r"columns=(\{.*?\}), or format=implicit", str(caught.value))
    assert columns is not None, caught.value
    assert RowReader("auto", column_mapping(columns[1])).read(row).prompt == "a question"


@pytest.mark.parametrize(
    ("row", "format", "content"),
    [
        ({"instruction": "Translate.", "input": "Haus", "output": "house"}, "alpaca", "Translate.\nHaus"),
        ({"question": "Translate Haus.", "answer": "house"}, "completion", "Translate Haus."),
        ({"prompt": "Translate Haus.", "response": "house"}, "completion", "Translate Haus."),
        (
            {"conversations": [{"from": "human", "value": "Haus?"}, {"from": "gpt", "value": "house"}]},
            "completion",
            "Haus?",
        ),
    ],
)
def test_the_remedy_for_demonstrations_makes_them_readable(row, format, content):
    row = Row("x:1", row)
    with pytest.raises(DataError, match=r"a demonstration needs .*set columns=") as caught:
        RowReader(chat=True).read(row)
    assert str(sorted(row.fields)) in str(caught.value)  # and no column that the file does not have
    columns = re.search(r"set columns=(\{.*?\})", str(caught.value))
    assert columns is not None
    reader = RowReader(columns=column_mapping(columns[1]), chat=True)
    example = reader.read(row)
    assert (reader.format, reader.unused) == (format, ())
    assert (example.prompt[-1]["content"], example.completions[0][0]["content"]) == (content, "house")


def test_a_column_that_is_missing_is_told_with_the_columns_of_the_file_alone():
    with pytest.raises(DataError, match=r"'rejected' is missing; the row has \['chosen', 'prompt'\]\."):
        RowReader("preference", chat=True).read(Row("x:1", {"prompt": "q", "chosen": "a"}))
