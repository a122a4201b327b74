import re

import pytest

from falign.errors import ConfigError, RewardError
from falign.rewards import ChildPool, TimedFunction

ONE = "tests.rewards.plain:one_at_a_time"


@pytest.fixture(scope="module")
def pool():
    pool = ChildPool(num_workers=2, memory_bytes=None)
    yield pool
    pool.close()


def test_it_is_called_for_one_completion_at_a_time_with_the_columns_it_names(pool):
    reward = TimedFunction(ONE, pool=pool)
    assert reward(["p", "q"], ["a", "b"], answer=[2.0, 3.0], other=[0, 0]) == [2.0, 3.0]


def test_a_hang_costs_its_own_completion_and_is_counted(pool):
    reward = TimedFunction(ONE, timeout=0.5, failed=None, pool=pool)
    scores = reward.score(["p"] * 3, ["a", "hang", "b"], answer=[1.0, 1.0, 1.0], place=["r:1", "r:2", "r:3"])
    assert scores == ([1.0, None, 1.0], 1, 0, f"reward {ONE}, r:2: killed after 0.5 s", {})


def test_an_exception_stops_unless_it_is_to_be_counted(pool):
    arguments = (["p"] * 2, ["raise", "b"])
    with pytest.raises(RewardError, match=r"one_at_a_time, completion 0: ValueError: told to\n") as caught:
        TimedFunction(ONE, pool=pool).score(*arguments, answer=[1.0, 1.0])
    assert re.search(r'plain.py", line \d+, in by_content\n    raise ValueError\("told to"\)', str(caught.value))
    assert "completion: 'raise'\nFix the function." in str(caught.value)
    counted = TimedFunction(ONE, errors="count", failed=-2.0, pool=pool).score(*arguments, answer=[1.0, 1.0])
    assert counted[:3] == ([-2.0, 1.0], 0, 1)


def test_what_is_no_reward_is_refused(pool):
    with pytest.raises(
        RewardError, match=r"reward tests.rewards.plain:returns_no_list returned a dict; it must return"
    ):
        TimedFunction("tests.rewards.plain:returns_no_list", pool=pool)(["p"], ["x"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("tests.rewards.plain:nothing", "has no attribute 'nothing'"),
        ("tests.rewards.plain", "give an importable module:function"),
        ("math:pi", "is a float; it must be callable"),
    ],
)
def test_a_function_that_is_not_there_is_refused_at_once(name, message):
    with pytest.raises(ConfigError, match=message):
        TimedFunction(name)
