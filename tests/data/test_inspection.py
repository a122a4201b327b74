import pytest

from falign.data import DataSource, Lengths, Window, check
from falign.errors import DataError

GOOD = {"prompt": "one two", "chosen": "a b c", "rejected": "d"}


def test_lengths_are_in_words_without_a_tokenizer(write_rows):
    report = check(write_rows(GOOD, {**GOOD, "prompt": "three"}))
    assert report.ok
    assert report.unit == "words"
    assert report.length_rows() == [
        ("prompt", 2, 1, 2, 2, 2),
        ("chosen", 2, 3, 3, 3, 3),
        ("rejected", 2, 1, 1, 1, 1),
    ]


def test_lengths_are_in_tokens_with_one_and_boundaries_are_looked_at(write_rows, merging):
    report = check(write_rows({"prompt": "xa", "chosen": "bc", "rejected": "cc"}), tokenizer=merging())
    assert report.unit == "tokens"
    # x | ab c </s> and x | a c c </s>
    assert [row[-1] for row in report.length_rows()] == [1, 3, 4]
    assert dict(report.counts())["prompts that merge with an answer"] == 1
    assert report.source.drift_share == 1.0


def test_all_bad_rows_are_counted_and_the_first_messages_kept(write_rows):
    report = check(write_rows(GOOD, *[{**GOOD, "chosen": ""}] * 7, "{", GOOD), keep=3)
    assert not report.ok
    assert (report.source.read, report.source.bad, report.source.kept, report.source.duplicates) == (10, 8, 2, 1)
    assert len(report.source.messages) == 3
    assert "rows.jsonl:2: 'chosen' is empty" in report.source.messages[0]


def test_window_is_applied_as_a_run_would(write_rows, merging):
    rows = [{"prompt": "c" * n, "chosen": "d" * 5, "rejected": "e"} for n in (2, 4, 9)]
    counts = {}
    for policy in ("error", "cut", "drop"):
        report = check(
            write_rows(*rows), tokenizer=merging(), window=Window(10, long_prompt=policy, max_completion_length=4)
        )
        counts[policy] = {label: count for label, count in report.counts() if count}
        assert report.length_rows()[0][-1] == 9  # also of the row that the window refuses
    assert counts == {
        "error": {"rows read": 3, "bad rows": 1, "rows kept": 2, "completions cut": 2, "distinct prompts": 2},
        "cut": {"rows read": 3, "rows kept": 3, "prompts cut": 1, "completions cut": 3, "distinct prompts": 3},
        "drop": {
            "rows read": 3,
            "dropped: long prompt": 1,
            "rows kept": 2,
            "completions cut": 2,
            "distinct prompts": 3,
        },
    }


def test_best_of_a_list_and_desirable_labels_count_as_chosen(write_rows):
    ranked = check(write_rows({"prompt": "q", "completions": ["a", "b b", "c"], "scores": [1, 3, 2]}))
    assert [(each.name, each.count, each.longest) for each in ranked.lengths] == [
        ("prompt", 1, 1),
        ("chosen", 1, 2),
        ("rejected", 2, 1),
    ]
    unpaired = check(
        write_rows(*({"prompt": "q", "completion": "a", "label": label} for label in (True, False, False)))
    )
    assert [(each.name, each.count) for each in unpaired.lengths] == [("prompt", 3), ("chosen", 1), ("rejected", 2)]
    single = check(write_rows({"prompt": "q", "completion": "a"}))
    assert [(each.name, each.count) for each in single.lengths] == [("prompt", 1), ("chosen", 1)]


def test_percentiles_are_nearest_rank():
    assert Lengths.of("prompt", [5]) == Lengths("prompt", 1, 5, 5, 5, 5)
    assert Lengths.of("prompt", list(range(10, 0, -1))) == Lengths("prompt", 10, 5, 9, 10, 10)


def test_options_of_a_source_are_followed(write_rows):
    path = write_rows({"frage": "q", "chosen": "a", "rejected": "b"}, {"frage": "r", "chosen": "a", "rejected": "b"})
    report = check(DataSource(path, columns={"prompt": "frage"}, limit=1))
    assert (report.source.kept, report.source.format) == (1, "preference")


def test_source_that_is_not_there_is_an_error_not_a_report(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        check(str(tmp_path / "none.jsonl"))


def test_empty_file_is_not_ok(write_rows):
    report = check(write_rows())
    assert (report.ok, report.source.read, report.lengths) == (False, 0, ())
