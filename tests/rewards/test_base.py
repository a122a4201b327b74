import numpy
import pytest

from falign.errors import RewardError
from falign.rewards.base import Reward, Scores, ScoringReward, call_reward, check_rewards, select_columns
from tests.rewards import plain


def call(reward, completions=("a", "bb"), **columns):
    return call_reward(reward, ["p"] * len(completions), list(completions), columns, name="mine").values


def test_a_reward_is_given_the_columns_that_it_names_or_all_of_them():
    columns = {"answer": ["bb", "bb"], "level": [1, 2]}
    assert select_columns(plain.length, columns) == columns
    assert list(select_columns(plain.matches, columns)) == ["answer"]
    assert select_columns(lambda prompts, completions: [], columns) == {}
    assert call(lambda completions: [0.0] * len(completions), **columns) == [0.0, 0.0]
    assert call(plain.length, **columns) == [1.0, 2.0]
    assert call(lambda prompts, completions, level: level, **columns) == [1.0, 2.0]


def test_any_function_of_the_signature_is_a_reward_and_a_counting_one_says_so():
    class Counting:
        def __call__(self, prompts, completions, **columns):
            return self.score(prompts, completions, **columns).values

        def score(self, prompts, completions, **columns):
            return Scores([1.0, None], timeouts=1, message="late")

    assert isinstance(plain.length, Reward)
    assert not isinstance(plain.length, ScoringReward)
    assert isinstance(Counting(), ScoringReward)
    assert call_reward(Counting(), ["p", "p"], ["a", "b"], {}, name="x") == Scores([1.0, None], 1, 0, "late")


def test_numbers_of_all_kinds_become_floats_and_none_stays():
    values = check_rewards([1, True, numpy.float32(0.5), None, numpy.int64(2)], 5, name="mine")
    assert values == [1.0, 1.0, 0.5, None, 2.0]
    assert {type(value) for value in values} == {float, type(None)}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], r"reward mine returned 1 values for 2 completions \(the first of them of rows.jsonl:3\); return one"),
        ([1.0, float("nan")], r"reward mine, rows.jsonl:4: the value is nan; return a finite number, or None"),
        ([float("inf"), 1.0], r"reward mine, rows.jsonl:3: the value is inf"),
        (["1.0", 1.0], r"reward mine, rows.jsonl:3: the value is a str, '1.0'; return a float or None"),
        (numpy.array([1.0, 2.0]), r"reward mine returned a ndarray; .* \(tensors and arrays: .tolist\(\)\)"),
        (None, r"reward mine returned a NoneType"),
    ],
)
def test_what_is_no_reward_is_refused_with_its_place(returned, message):
    with pytest.raises(RewardError, match=message):
        call(lambda prompts, completions: returned, place=["rows.jsonl:3", "rows.jsonl:4"])


def test_an_exception_stops_with_the_reward_the_place_and_the_cause():
    with pytest.raises(RewardError, match=r"reward mine, completions of r:1 to r:2: KeyError: 'x'\n") as caught:
        call(lambda prompts, completions: {}["x"], place=["r:1", "r:2"])
    assert 'test_base.py", line' in str(caught.value)
    assert '{}["x"]' in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_columns_and_prompts_must_be_as_many_as_completions():
    with pytest.raises(RewardError, match=r"column 'answer' has 1 values for 2 completions; repeat"):
        call(plain.length, answer=["x"])
    with pytest.raises(RewardError, match="1 prompts for 2 completions"):
        call_reward(plain.length, ["p"], ["a", "b"], {}, name="mine")
