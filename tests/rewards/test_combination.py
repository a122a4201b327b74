import pytest

from falign.errors import ConfigError, RewardError
from falign.rewards import Rewards, RewardSum, Scores, WeightedReward, Words
from tests.rewards import plain


class Half:
    """Applies to completions of one letter; one call was late, one raised."""

    def __call__(self, prompts, completions, **columns):
        return self.score(prompts, completions, **columns).values

    def score(self, prompts, completions, **columns):
        return Scores([0.5 if len(text) == 1 else None for text in completions], 2, 1, "late")


def test_the_weighted_sum_keeps_its_parts_and_leaves_out_what_does_not_apply():
    rewards = RewardSum((WeightedReward("length", plain.length, 2.0), WeightedReward("half", Half(), -4.0)))
    result = rewards(["p", "p"], ["a", "bbb"], answer=["x", "y"])
    assert result == Rewards(
        [0.0, 6.0], {"length": [1.0, 3.0], "half": [0.5, None]}, 2, 1, "late", {"length": 0, "half": 3}
    )
    assert result.metrics() == {
        "reward": 3.0,
        "reward/length": 2.0,
        "reward/half": 0.5,
        "reward/timeouts": 2.0,
        "reward/errors": 1.0,
    }


def test_a_part_of_weight_zero_is_only_logged():
    rewards = RewardSum((WeightedReward("length", plain.length), WeightedReward("half", Half(), 0.0)))
    assert rewards(["p"], ["a"]).total == [1.0]
    assert rewards(["p"], ["a"]).metrics()["reward/half"] == 0.5


def test_a_completion_to_which_no_reward_applies_stops_with_its_place():
    rewards = RewardSum((WeightedReward("half", Half()),))
    with pytest.raises(RewardError, match=r"rows.jsonl:9: no reward applies to a completion \(None from half\); add"):
        rewards(["p", "p"], ["a", "bbb"], place=["rows.jsonl:8", "rows.jsonl:9"])


def test_a_part_that_never_applies_has_no_mean():
    rewards = RewardSum((WeightedReward("length", plain.length), WeightedReward("half", Half())))
    assert "reward/half" not in rewards(["p"], ["bb"]).metrics()


def test_columns_may_be_tuples_and_each_reward_is_given_its_own():
    rewards = RewardSum((WeightedReward("match", plain.matches), WeightedReward("length", plain.length)))
    assert rewards(("p", "p"), ("a", "b"), answer=("a", "a")).parts["match"] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "the list is empty"),
        ((WeightedReward("a", plain.length), WeightedReward("a", plain.length)), "the name 'a' comes twice"),
        ((WeightedReward("errors", plain.length),), "the name 'errors' is that of a count"),
        ((WeightedReward("a", plain.length, float("nan")),), "the weight of a is nan"),
    ],
)
def test_what_makes_no_sum_is_refused(parts, message):
    with pytest.raises(ConfigError, match=message):
        RewardSum(parts)


def test_the_outcome_is_the_named_reward_or_the_first_of_several_that_count():
    def passing(*weights, outcome=None):
        parts = (WeightedReward(f"r{i}", Words(["a"]), weight) for i, weight in enumerate(weights))
        return RewardSum(tuple(parts), outcome).passing

    assert passing(1.0) is None
    assert passing(0.0, 2.0) is None
    assert passing(0.0, 2.0, 1.0) == "r1"
    assert passing(1.0, 2.0, outcome="r1") == "r1"
    assert passing(1.0, 0.0, outcome="r1") == "r1"
    with pytest.raises(ConfigError, match=r"rollout.outcome='x' is not the name of a reward; choose one of \['r0'\]"):
        passing(1.0, outcome="x")
