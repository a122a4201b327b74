import pytest

from falign.data import Window
from falign.data.windows import fit
from falign.errors import ConfigError, DataError
from falign.scoring.batch import PromptTree


def tree(prompt, *completions, preference=(1.0, 0.0)):
    return PromptTree(tuple(prompt), tuple(map(tuple, completions)), preference, "x:7")


LONG = tree(range(100, 120), range(200, 212), range(300, 304))


def test_what_fits_is_returned_as_it_is():
    fitted = fit(LONG, Window(max_length=32), bos_token_id=None)
    assert fitted == (LONG, 0, 0, None)


def test_prompt_over_its_budget_stops_by_default_with_numbers_and_options():
    message = (
        "x:7: the prompt has 20 tokens and the longest completion 12; in max_length=24 the prompt may have 12. "
        "Raise `max_length`; a run can also lower `max_completion_length`, or set `long_prompt` to cut (from the left) "
        "or drop."
    )
    with pytest.raises(DataError) as caught:
        fit(LONG, Window(max_length=24), bos_token_id=None)
    assert str(caught.value) == message


def test_completions_yield_what_the_half_window_does_not_guarantee():
    # Half of 30 is 15, the completions want 12, so 18 tokens of prompt may stay.
    fitted = fit(LONG, Window(max_length=30, long_prompt="cut"), bos_token_id=None)
    assert fitted.tree.prompt_ids == tuple(range(102, 120))
    assert fitted.tree.completion_ids == LONG.completion_ids
    # A short prompt lets completions use more than half.
    short = fit(tree([1, 2], range(200, 212), range(300, 304)), Window(max_length=10), bos_token_id=None)
    assert short.tree.completion_ids == (tuple(range(200, 208)), tuple(range(300, 304)))
    assert short.completions_cut == 1


def test_max_completion_length_caps_completions_and_frees_the_prompt():
    fitted = fit(LONG, Window(max_length=24, max_completion_length=4), bos_token_id=None)
    assert fitted == (tree(range(100, 120), range(200, 204), range(300, 304)), 0, 1, None)


@pytest.mark.parametrize(
    ("bos_token_id", "want"),
    [(100, (100, *range(111, 120))), (7, tuple(range(110, 120))), (None, tuple(range(110, 120)))],
)
def test_prompt_is_cut_from_the_left_and_keeps_a_leading_bos(bos_token_id, want):
    window = Window(max_length=14, max_completion_length=4, long_prompt="cut")
    fitted = fit(LONG, window, bos_token_id=bos_token_id)
    assert fitted.tree.prompt_ids == want
    assert fitted.prompt_tokens_cut == 10


def test_one_token_of_room_keeps_the_last_prompt_token_not_the_bos():
    window = Window(max_length=5, max_completion_length=4, long_prompt="cut")
    assert fit(LONG, window, bos_token_id=100).tree.prompt_ids == (119,)


def test_drop_policies_say_why():
    assert fit(LONG, Window(24, long_prompt="drop"), bos_token_id=None) == (None, 0, 0, "long prompt")
    window = Window(24, 4, long_completion="drop")
    assert fit(LONG, window, bos_token_id=None) == (None, 0, 0, "long completion")


def test_long_completion_can_stop_the_run():
    with pytest.raises(
        DataError, match="x:7: the longest completion has 12 tokens, and after a prompt of 20 there is room for 4"
    ):
        fit(LONG, Window(24, 4, long_completion="error"), bos_token_id=None)


def test_completions_that_the_cut_makes_equal_are_dropped_only_if_one_was_preferred():
    same = ([5, 6, 7, 8], [5, 6, 7, 9])
    window = Window(8, 3)
    assert fit(tree([1], *same), window, bos_token_id=None).dropped == "equal after the cut"
    for preference in (None, (1.0, 1.0)):
        fitted = fit(tree([1], *same, preference=preference), window, bos_token_id=None)
        assert fitted.tree.completion_ids == ((5, 6, 7), (5, 6, 7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length=1 must be at least 2"),
        (
            {"max_length": 8, "max_completion_length": 8},
            "max_completion_length=8 must lie between 1 and max_length - 1 = 7",
        ),
        ({"max_length": 8, "max_completion_length": 0}, "max_completion_length=0 must lie between"),
    ],
)
def test_impossible_windows_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Window(**options)
