r"""A line of JSON ends at \n alone: other characters at which Python splits text are part of what it says."""

import gzip
import json

import pytest

from falign.data import BadRows
from falign.data.files import read_file
from falign.durable import checksum
from falign.errors import ConfigError
from falign.evaluation.answering import read_prompts
from falign.evaluation.frontier_run import Evaluated
from falign.evaluation.summaries import SampleSummary
from falign.json_lines import read_journal, split_lines
from falign.report.runs import ReportedRun, answers_of
from falign.runs import RunFolder
from falign.runs.checkpoints import seal, sync_logs

INSIDE = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
"""Where ``str.splitlines`` splits; the last five stand escaped in JSON and unescaped in lines of text."""

TEXT = f"one{INSIDE}two"


def write_completions(path):
    rows = [
        {"step": step, "held_out": False, "prompt": TEXT, "completion": f"{TEXT}{step}", "reward": 1.0}
        for step in range(4)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return rows


def test_split_lines_is_the_inverse_of_joining_them():
    for lines in ([], ["a"], ["", "a"], ["a", "", "b"], [TEXT, "\r", TEXT]):
        assert split_lines("".join(f"{line}\n" for line in lines)) == lines
    assert split_lines("a\nhalf") == ["a", "half"]


def test_resuming_keeps_every_completion(tmp_path):
    folder = RunFolder(tmp_path)
    rows = write_completions(folder.completions_file)
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "weights").touch()
    seal(checkpoint, run="r", step=3, logs=sync_logs(tmp_path))
    with folder.completions_file.open("a") as file:
        file.write(json.dumps({**rows[0], "step": 4}) + '\n{"step": 4, "held_')
    folder.restore_logs(checkpoint, [], pytest.fail)
    assert list(read_journal(folder.completions_file)) == rows


def test_the_report_and_the_logs_read_every_line(tmp_path):
    folder = RunFolder(tmp_path)
    rows = write_completions(folder.completions_file)
    folder.metrics_file.write_text('{"step": 1, "note": "a\u2028b"}\n{"step": 2}\n{"ste', encoding="utf-8")
    logs = folder.metrics()
    assert logs == [{"step": 1, "note": "a\u2028b"}, {"step": 2}]
    run = ReportedRun("", 0, folder, {}, {}, logs, {}, {}, [], ())
    (found,) = answers_of(run)
    assert found.prompt == TEXT
    assert [answer.text for answer in (*found.before, *found.after)] == [rows[0]["completion"], rows[3]["completion"]]


def test_the_samples_of_an_evaluation_are_read_whole(tmp_path):
    rows = [{"completion": TEXT}, {"completion": "b"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    files = {"samples.jsonl": checksum(tmp_path / "samples.jsonl")}
    summary = SampleSummary(kind="samples", name="x", num_prompts=1, num_completions=2, metrics={}, files=files)
    found = Evaluated(tmp_path, summary).rows("samples.jsonl")
    assert found == [rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_data_files_count_their_lines_by_line_feeds(tmp_path, suffix):
    # A carriage return inside a string is invalid JSON: one bad row, not two, and the next row keeps its number.
    text = '{"prompt": "a\u2028b"}\r\n{"prompt": "bad\rrow"}\n{"prompt": "c"}\n'
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    bad_rows = BadRows("skip")
    rows = list(read_file(path, bad_rows=bad_rows, name="rows"))
    assert [(row.place, row.fields["prompt"]) for row in rows] == [("rows:1", "a\u2028b"), ("rows:3", "c")]
    assert bad_rows.count == 1
    assert bad_rows.messages[0].startswith("rows:2: ")


def test_a_text_file_has_one_prompt_for_each_line(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(f"\ufeff{TEXT}\r\n\nsecond\n".encode())
    assert read_prompts(tmp_path / "prompts.txt") == [TEXT, "second"]


def test_a_damaged_line_is_named_and_half_a_last_one_is_skipped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ConfigError, match=r"log\.jsonl:2 is damaged"):
        list(read_journal(path))
    path.write_text('{"a": 1}\n{"a": ')
    assert list(read_journal(path)) == [{"a": 1}]
    assert list(read_journal(tmp_path / "none.jsonl")) == []
