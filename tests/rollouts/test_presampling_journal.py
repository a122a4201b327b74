import json

import pytest

from falign.errors import ConfigError
from falign.rollouts.presampling_journal import Finding, PresamplingJournal

RECORD = {"policy": "x"}
FOUND = {"num_correct": 1, "rehearsal": {"prompt_ids": [1], "completion_ids": [2], "logprobs": [-1.0]}}
MISSED = {"num_correct": 0, "rehearsal": None}


def journal(folder, *lines):
    path = folder / "journal.jsonl"
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return PresamplingJournal(path, record=RECORD, chunk_size=1)


def test_findings_of_an_earlier_call_are_taken_up(tmp_path):
    assert journal(tmp_path, RECORD, FOUND, MISSED, b'{"num_').findings == [Finding(**FOUND), Finding(**MISSED)]


@pytest.mark.parametrize(
    "lines",
    [
        [b"[]\n"],
        [b"{\n"],
        [b"\xff\xfe\n"],
        [RECORD, {"num_correct": 1}],
        [RECORD, {**MISSED, "num_correct": "many"}],
        [RECORD, {**FOUND, "rehearsal": {"prompt_ids": [1]}}],
        [RECORD, [1, 2]],
    ],
)
def test_a_damaged_journal_is_refused_with_the_way_out(tmp_path, lines):
    with pytest.raises(ConfigError, match=r"journal.jsonl is damaged .*: remove it, and pre-sampling starts anew"):
        journal(tmp_path, *lines)
