import json
from dataclasses import replace

import pytest

from falign.errors import ConfigError, DataError
from falign.evaluation import ScoreOutput, check_output, score_trees
from tests.evaluation.scoring import TREES, tiny_scorer

RECORD = {"policy.weights": "abc", "objective.beta": 0.3, "window": [1, 2]}
BUDGET = 18  # three batches: two trees, two trees, one


def scored(path, trees=TREES, *, record=RECORD, **options):
    with ScoreOutput(path, record=record, **options) as output:
        return score_trees(trees, tiny_scorer(), output, tokens_per_batch=BUDGET)


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def stop_after(monkeypatch, batches):
    """Let the process die when it is about to write the batch after these."""
    original, calls = ScoreOutput.append, 0

    def dies(self, rows):
        nonlocal calls
        calls += 1
        if calls > batches:
            raise KeyboardInterrupt
        original(self, rows)

    monkeypatch.setattr(ScoreOutput, "append", dies)


@pytest.fixture
def whole(tmp_path):
    (tmp_path / "whole").mkdir()
    path = tmp_path / "whole" / "scores.jsonl"
    totals = scored(path)
    assert [file.name for file in path.parent.iterdir()] == ["scores.jsonl"]
    return path, totals


def test_a_file_has_a_row_for_each_completion_in_order(whole):
    path, totals = whole
    rows = read(path)
    assert [(row["place"], row["completion"]) for row in rows] == [
        (tree.place, i) for tree in TREES for i in range(len(tree.completion_ids))
    ]
    assert totals.completions == len(rows) == 9
    assert totals.tokens == sum(row["num_tokens"] for row in rows)
    assert totals.mean_log_ratio == pytest.approx(sum(row["log_ratio"] for row in rows) / 9)
    assert totals.mean_implicit_reward == pytest.approx(sum(row["implicit_reward"] for row in rows) / 9)


def test_accuracy_is_over_every_two_completions_of_a_row_that_differ_in_preference(whole):
    path, totals = whole
    rows = read(path)
    pairs = [
        (a["implicit_reward"] > b["implicit_reward"])
        for a in rows
        for b in rows
        if a["place"] == b["place"] and None not in (a["preference"], b["preference"])
        if a["preference"] > b["preference"]
    ]
    assert totals.pairs == len(pairs) == 5
    assert totals.reward_accuracy == sum(pairs) / 5


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_stopped_call_goes_on_and_ends_as_if_it_had_not_been_stopped(tmp_path, whole, monkeypatch, batches, suffix):
    path = tmp_path / f"scores{suffix}"
    with monkeypatch.context() as patch:
        stop_after(patch, batches)
        with pytest.raises(KeyboardInterrupt):
            scored(path)
    assert not path.exists()
    totals = scored(path)
    assert totals.resumed == [0, 5, 8][batches]
    assert_same(read(path), read(whole[0]))
    assert totals.reward_accuracy == whole[1].reward_accuracy
    assert totals.mean_log_ratio == whole[1].mean_log_ratio
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "whole"}


def assert_same(rows, expected):
    """JSONL rows are equal; Parquet has the same numbers with 32 bits."""
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            assert row[name] == value or row[name] == pytest.approx(value, rel=1e-8, abs=0), name


@pytest.mark.parametrize("keep", [1, 0.1, 0.5, 0.65, 0.9, 0.999])
def test_what_a_killed_process_left_half_written_is_written_again_byte_for_byte(tmp_path, whole, monkeypatch, keep):
    path = tmp_path / "scores.jsonl"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            scored(path)
    partial = tmp_path / ".scores.jsonl.partial.jsonl"
    content = partial.read_bytes()
    partial.write_bytes(content[: int(keep * len(content))])
    totals = scored(path)
    assert path.read_bytes() == whole[0].read_bytes()
    assert totals.resumed < 9


@pytest.mark.parametrize("damaged", ["7", "[]", "\x00", '{"place":'])
def test_a_line_that_is_no_row_is_written_again_with_all_behind_it(tmp_path, whole, monkeypatch, damaged):
    path = tmp_path / "scores.jsonl"
    stopped(path, monkeypatch)
    partial = tmp_path / ".scores.jsonl.partial.jsonl"
    lines = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join([*lines[:2], damaged + "\n", *lines[3:]]))
    assert scored(path).resumed == 2
    assert path.read_bytes() == whole[0].read_bytes()


def test_a_tree_without_all_its_completions_is_scored_again(tmp_path, whole, monkeypatch):
    path = tmp_path / "scores.jsonl"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            scored(path)
    partial = tmp_path / ".scores.jsonl.partial.jsonl"
    partial.write_bytes(b"".join(partial.read_bytes().splitlines(keepends=True)[:4]))  # two of the second tree's three
    totals = scored(path)
    assert totals.resumed == 2
    assert path.read_bytes() == whole[0].read_bytes()


def test_what_is_there_is_not_computed_again(tmp_path, monkeypatch):
    path = tmp_path / "scores.jsonl"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            scored(path)
    from falign.evaluation import CompletionScorer

    original, batches = CompletionScorer.score, []

    def spy(self, trees):
        batches.append([tree.place for tree in trees])
        return original(self, trees)

    monkeypatch.setattr(CompletionScorer, "score", spy)
    scored(path)
    assert batches == [["rows.jsonl:6"]]


def test_parquet_has_the_rows_of_jsonl_and_no_column_that_is_not_there(tmp_path, whole, monkeypatch):
    monkeypatch.setattr("falign.evaluation.score_output._ROWS_PER_GROUP", 4)
    path = tmp_path / "scores.parquet"
    scored(path)
    rows = read(path)
    assert_same(rows, read(whole[0]))
    assert "token_divergence" not in rows[0]
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        assert file.num_row_groups == 3


def stopped(path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            scored(path)


def test_other_settings_are_refused_by_name_and_overwrite_starts_anew(tmp_path, whole, monkeypatch):
    path = tmp_path / "scores.jsonl"
    stopped(path, monkeypatch)
    partial = (tmp_path / ".scores.jsonl.partial.jsonl").read_bytes()
    other = {**RECORD, "objective.beta": 0.5, "layout": "tree"}
    message = r"objective.beta \(0.3 there, 0.5 now\), layout \(None there, 'tree' now\).*overwrite=True"
    with pytest.raises(ConfigError, match=message):
        scored(path, record=other)
    assert (tmp_path / ".scores.jsonl.partial.jsonl").read_bytes() == partial
    assert scored(path, record=other, overwrite=True).resumed == 0
    assert path.read_bytes() == whole[0].read_bytes()


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        ([TREES[1], *TREES], "its next row is rows.jsonl:1, and the source has rows.jsonl:2 there"),
        ([TREES[0]], "rows after the last one"),
    ],
)
def test_a_source_that_has_changed_is_refused(tmp_path, monkeypatch, trees, message):
    path = tmp_path / "scores.jsonl"
    stopped(path, monkeypatch)
    with pytest.raises(ConfigError, match=rf"{message}.*overwrite=True"):
        scored(path, trees)
    assert not path.exists()


@pytest.mark.parametrize("change", [{"log_ratio": None}, {"log_ratio": 0.25}, {"logprobs": [[]]}, {"place": 3}])
def test_a_damaged_row_is_scored_again_with_all_behind_it(tmp_path, whole, monkeypatch, change):
    path = tmp_path / "scores.jsonl"
    stopped(path, monkeypatch)
    rows = path.with_name(".scores.jsonl.partial.jsonl")
    first, *others = rows.read_text().splitlines(keepends=True)
    rows.write_text(json.dumps(json.loads(first) | change) + "\n" + "".join(others))
    assert scored(path).resumed == 0
    assert path.read_bytes() == whole[0].read_bytes()


def test_an_existing_output_stays_until_the_new_one_is_whole(tmp_path, whole, monkeypatch):
    path = tmp_path / "scores.jsonl"
    path.write_text("earlier scores")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            scored(path, overwrite=True)
    assert path.read_text() == "earlier scores"
    assert scored(path, overwrite=True).resumed == 5  # of the same settings
    assert path.read_bytes() == whole[0].read_bytes()


def test_two_processes_do_not_write_one_output(tmp_path, whole):
    path = tmp_path / "scores.jsonl"
    with ScoreOutput(path, record=RECORD) as output:
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match="is being written by another process"):
                ScoreOutput(path, record=RECORD, overwrite=overwrite)
        score_trees(TREES, tiny_scorer(), output, tokens_per_batch=BUDGET)
    assert path.read_bytes() == whole[0].read_bytes()


@pytest.mark.parametrize(
    "name", ["scores.jsonl", *(f".scores.jsonl.partial.{end}" for end in ("jsonl", "json", "sha256"))]
)
def test_a_link_is_refused_and_what_it_leads_to_is_left_alone(tmp_path, name):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is a link"):
        ScoreOutput(tmp_path / "scores.jsonl", record=RECORD, overwrite=True)
    assert (tmp_path / "elsewhere").read_text() == "mine"


@pytest.mark.parametrize("content", ["[]", "3", "{", "\x00"])
def test_a_damaged_record_is_refused(tmp_path, monkeypatch, content):
    path = tmp_path / "scores.jsonl"
    stopped(path, monkeypatch)
    path.with_name(".scores.jsonl.partial.json").write_text(content)
    with pytest.raises(ConfigError, match=r"partial.json.*overwrite=True"):
        scored(path)


def test_rows_whose_record_is_lost_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "scores.jsonl"
    stopped(path, monkeypatch)
    (tmp_path / ".scores.jsonl.partial.json").unlink()
    with pytest.raises(ConfigError, match=r"partial.json, the record of.*overwrite=True"):
        scored(path)


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    existing = tmp_path / "there.jsonl"
    existing.write_text("mine")
    for path, message in {
        existing: "overwrite=True",
        tmp_path / "scores.csv": r"'.csv' is unknown",
        tmp_path / "no" / "scores.jsonl": "does not exist",
    }.items():
        with pytest.raises(ConfigError, match=message):
            check_output(path)
    check_output(existing, overwrite=True)
    assert existing.read_text() == "mine"


def test_no_trees_leave_nothing_behind(tmp_path):
    with pytest.raises(DataError, match="No completion"):
        scored(tmp_path / "scores.jsonl", [])
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_fails_keeps_the_rows(tmp_path, monkeypatch):
    path = tmp_path / "scores.parquet"
    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.parquet.ParquetWriter.write_batch", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            scored(path)
    assert not path.exists()
    assert scored(path).resumed == 9
    assert [file.name for file in tmp_path.iterdir()] == ["scores.parquet"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_hashes_of_texts_are_a_column_and_show_a_change_of_the_prompt(tmp_path, monkeypatch, suffix):
    trees = [replace(tree, text_sha256=tuple(f"{n}{i}" for i in range(len(tree.completion_ids))))
             for n, tree in enumerate(TREES)]  # fmt: skip
    path = tmp_path / f"scores{suffix}"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            scored(path, trees)
    other = [replace(trees[0], text_sha256=tuple("xyz"[: len(trees[0].completion_ids)])), *trees[1:]]
    with pytest.raises(ConfigError, match="belongs to a source that has changed"):
        scored(path, other)
    scored(path, trees)
    assert [row["text_sha256"] for row in read(path)] == [each for tree in trees for each in tree.text_sha256]
