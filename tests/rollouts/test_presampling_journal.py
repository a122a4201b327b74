import pytest

from falign.errors import ConfigError
from falign.json_lines import sealed
from falign.rollouts.presampling import Presampled
from falign.rollouts.presampling_journal import Finding, PresamplingJournal

RECORD = {"policy": "x"}
FOUND = {"num_correct": 1, "rehearsal": {"prompt_ids": [1], "completion_ids": [2], "logprobs": [-1.0]}}
MISSED = {"num_correct": 0, "rehearsal": None}


def journal(folder, *lines):
    path = folder / "journal.jsonl"
    path.write_bytes(b"".join(line if isinstance(line, bytes) else sealed(line).encode() for line in lines))
    return PresamplingJournal(path, record=RECORD, chunk_size=1, num_prompts=9)


def test_findings_of_an_earlier_call_are_taken_up(tmp_path):
    assert journal(tmp_path, RECORD, FOUND, MISSED, b'{"num_').findings == [Finding(**FOUND), Finding(**MISSED)]


@pytest.mark.parametrize(
    "lines",
    [
        [b"[]\n"],
        [b'{"policy": "x"}\n'],
        [RECORD, sealed(FOUND).replace("-1.0", "-1.5").encode()],
        [sealed(RECORD).replace('"x"', '"y"').encode()],
        [b"{\n"],
        [b"\xff\xfe\n"],
        [RECORD, {"num_correct": 1}],
        [RECORD, {**MISSED, "num_correct": "many"}],
        [RECORD, {**FOUND, "rehearsal": {"prompt_ids": [1]}}],
        [RECORD, [1, 2]],
    ],
)
def test_a_damaged_journal_is_refused_with_the_way_out(tmp_path, lines):
    with pytest.raises(ConfigError, match=r"journal.jsonl:\d is damaged .*: remove the file, or give overwrite=True"):
        journal(tmp_path, *lines)


def test_nothing_of_a_damaged_journal_is_removed_before_there_is_something_new(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(sealed({"policy": "y"}).encode() + sealed(MISSED).encode())
    before = path.read_bytes()
    restarted = PresamplingJournal(path, record=RECORD, chunk_size=1, num_prompts=9, overwrite=True)
    assert (restarted.findings, path.read_bytes()) == ([], before)
    restarted.append([Presampled(0, None)])
    assert PresamplingJournal(path, record=RECORD, chunk_size=1, num_prompts=9).findings == [Finding(**MISSED)]


def test_a_journal_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "journal.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is a link"):
        PresamplingJournal(tmp_path / "journal.jsonl", record=RECORD, chunk_size=1, num_prompts=9, overwrite=True)


@pytest.mark.parametrize(("lines", "taken"), [(2, 0), (3, 3), (4, 3), (5, 5)])
def test_a_chunk_is_taken_whole_or_not_at_all_and_the_last_one_may_be_shorter(tmp_path, lines, taken):
    path = tmp_path / "journal.jsonl"
    path.write_text(sealed(RECORD) + lines * sealed(MISSED))
    assert len(PresamplingJournal(path, record=RECORD, chunk_size=3, num_prompts=5).findings) == taken


def test_a_folder_in_place_of_the_journal_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read .*: remove it, or choose another folder"):
        PresamplingJournal(tmp_path, record=RECORD, chunk_size=1, num_prompts=9)
