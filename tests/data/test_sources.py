import json

import pytest

from falign.data import DataSource, PromptSource, Row, load_prompts, read_examples, read_rows
from falign.errors import ConfigError, DataError
from tests.models.tiny import tiny_tokenizer

ROWS = [{"prompt": "p", "chosen": "a"}, {"prompt": "q", "chosen": "b"}]


def test_file_is_read_by_path_and_by_text(write_rows):
    path = write_rows(*ROWS)
    assert list(read_rows(path)) == [Row(f"{path}:1", ROWS[0]), Row(f"{path}:2", ROWS[1])]


def test_missing_file_suggests_the_near_miss(write_rows, tmp_path):
    path = write_rows(*ROWS, name="train_pairs.jsonl")
    wrong = path.replace("train_pairs", "train-pair")
    with pytest.raises(DataError, match=r"no such file or folder; did you mean .*train_pairs.jsonl\?"):
        list(read_rows(wrong))
    with pytest.raises(DataError, match="no such file or folder, nor a Hub dataset"):
        list(read_rows(tmp_path / "nothing-like-it.jsonl"))
    with pytest.raises(DataError, match=r"nowhere does not exist either\. Check the path"):
        list(read_rows(tmp_path / "nowhere" / "x.jsonl"))


def test_saved_dataset_and_saved_splits_are_read(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "two")
    assert list(read_rows(tmp_path / "one")) == [
        Row(f"{tmp_path}/one row 1", ROWS[0]),
        Row(f"{tmp_path}/one row 2", ROWS[1]),
    ]
    assert list(read_rows(tmp_path / "two", split="test")) == [Row(f"{tmp_path}/two[test] row 1", ROWS[1])]
    with pytest.raises(DataError, match=r"no split 'dev'; set split to one of \['test', 'train'\]"):
        list(read_rows(tmp_path / "two", split="dev"))


def test_folder_of_files_is_read_by_split_in_order(tmp_path):
    for name, row in (
        ("train-00001.jsonl", ROWS[1]),
        ("train-00000.jsonl", ROWS[0]),
        ("training.jsonl", {}),
        ("test.json", {}),
    ):
        (tmp_path / name).write_text(json.dumps(row))
    assert [row.fields for row in read_rows(tmp_path)] == ROWS
    with pytest.raises(
        DataError, match=r"no data file is named after the split 'dev'; found test\.json, train-00000\.jsonl"
    ):
        list(read_rows(tmp_path, split="dev"))


def test_files_of_several_names_are_not_joined_into_one_split(tmp_path):
    for name in ("train_sft-00000-of-00002.jsonl", "train_sft-00001-of-00002.jsonl", "train_prefs.jsonl", "train.json"):
        (tmp_path / name).write_text(json.dumps({"prompt": name}) + "\n")
    with pytest.raises(DataError, match=r"the split 'train' may be any of train, train_prefs, train_sft: .*path of a"):
        list(read_rows(tmp_path))
    assert [row.fields["prompt"] for row in read_rows(tmp_path, split="train_sft")] == [
        "train_sft-00000-of-00002.jsonl",
        "train_sft-00001-of-00002.jsonl",
    ]
    (tmp_path / "test.jsonl").write_text("{}\n")
    (tmp_path / "test.csv").write_text("prompt\nq\n")
    with pytest.raises(DataError, match=r"the split 'test' may be any of test\.csv, test\.jsonl"):
        list(read_rows(tmp_path, split="test"))


def test_a_split_of_a_file_that_has_none_is_refused(write_rows):
    path = write_rows(*ROWS, name="pairs.jsonl")
    for source in (path, "demo:polite-preference"):
        with pytest.raises(DataError, match=r": split='test' cannot be chosen: this is one file, .*leave it out"):
            list(read_examples(DataSource(source, split="test")))
        with pytest.raises(DataError, match="split='test' cannot be chosen"):
            load_prompts([PromptSource(source, split="test")], tiny_tokenizer(), max_length=99)
    test = write_rows(*ROWS, name="my_test.jsonl")
    pairs = DataSource(test, split="test", format="completion", columns={"completion": "chosen"})
    assert len(list(read_examples(pairs))) == 2


def test_hub_name_without_network_says_so(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"some-org/some-data: there is no such local path, and the Hub cannot be reached"
    ):
        list(read_rows("some-org/some-data"))


def test_demo_is_inside_the_package():
    rows = list(read_rows("demo:polite-preference"))
    assert len(rows) == 400
    assert rows[0].place == "demo:polite-preference:1"
    with pytest.raises(DataError, match="demo:rude: no such sample in the package; there is demo:one-digit"):
        list(read_rows("demo:rude"))


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"weight": float("nan")}, {"weight": float("inf")}, {"limit": 0}])
def test_impossible_source_options_are_refused(options):
    with pytest.raises(ConfigError, match=f"x: {next(iter(options))}="):
        DataSource("x", **options)
