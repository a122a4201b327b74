import pytest

from falign.choices import nearest, shown
from falign.data import BadRows
from falign.errors import ConfigError, DataError


def test_error_policy_raises_with_the_way_out_where_there_is_one():
    with pytest.raises(DataError, match=r"^x:1: broken \(--skip leaves such rows out and counts them\.\)$"):
        BadRows(skip_by="--skip").add(DataError("x:1: broken"))
    with pytest.raises(DataError, match=r"^x:1: broken$"):
        BadRows().add(DataError("x:1: broken"))


def test_skip_policy_counts_all_and_keeps_the_first_messages():
    bad_rows = BadRows("skip", keep=2)
    for i in range(5):
        bad_rows.add(DataError(f"x:{i}"))
    assert (bad_rows.count, bad_rows.messages) == (5, ["x:0", "x:1"])


def test_unknown_policy_is_refused_with_a_guess():
    from falign.choices import require_choice
    from falign.data.reports import BadRowPolicy

    with pytest.raises(
        ConfigError, match=r"bad_rows='skp' is unknown; choose one of \['error', 'skip'\]; did you mean 'skip'"
    ):
        require_choice("bad_rows", "skp", BadRowPolicy)


def test_messages_show_values_shortened():
    assert len(shown("x" * 1000)) == 60
    assert shown(["short"]) == "['short']"


def test_nearest_finds_misspellings_and_longer_names():
    assert nearest("chosen", ["chosn", "prompt"]) == "chosn"
    assert nearest("chosen", ["a", "chosen_response"]) == "chosen_response"
    assert nearest("chosen", ["a", "b"]) is None
