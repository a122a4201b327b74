"""Preference oracles: win rates against enumerated ones, asymmetry, and what is refused."""

import json
import math

import pytest

from falign.errors import ConfigError, DataError, RewardError
from falign.rewards import OracleReward, RewardSum, WeightedReward, reward_identity
from falign.rewards.built_in import oracle as built_in
from tests.rewards import judges

STRENGTH = {"a": 0.0, "b": 0.5, "c": 1.5}


def bradley_terry(first, second):
    return [1 / (1 + math.exp(STRENGTH[b] - STRENGTH[a])) for a, b in zip(first, second, strict=True)]


def test_the_reward_is_the_mean_probability_over_the_other_completions():
    reward = OracleReward(bradley_terry)
    texts = ["a", "b", "c", "b", "a"]
    found = reward.score(["p", "p", "p", "q", "q"], texts, place=["f:1"] * 3 + ["f:2"] * 2)
    (ab,), (ac,), (bc,) = (bradley_terry(x, y) for x, y in (("a", "b"), ("a", "c"), ("b", "c")))
    expected = [(ab + ac) / 2, (1 - ab + bc) / 2, (2 - ac - bc) / 2, 1 - ab, ab]
    assert found.values == pytest.approx(expected, abs=1e-15)
    assert found.measured["asymmetry"] == pytest.approx([0.0] * 4, abs=1e-15)
    assert OracleReward(bradley_terry, both_orders=False)(["p"] * 3, texts[:3]) == pytest.approx(
        expected[:3], abs=1e-15
    )


def test_a_preference_for_the_first_place_cancels_and_is_measured():
    def biased(first, second):
        return [min(1.0, p + 0.2) for p in bradley_terry(first, second)]

    fair = OracleReward(bradley_terry)(["p"] * 2, ["a", "b"])
    found = OracleReward(biased).score(["p"] * 2, ["a", "b"])
    assert found.values == pytest.approx(fair, abs=1e-15)
    assert found.measured["asymmetry"] == pytest.approx([0.4], abs=1e-15)
    assert OracleReward(biased, both_orders=False)(["p"] * 2, ["a", "b"])[0] == pytest.approx(fair[0] + 0.2)
    total = RewardSum((WeightedReward("judge", OracleReward(biased)),))(["p"] * 2, ["a", "b"])
    assert total.metrics()["reward/judge/asymmetry"] == pytest.approx(0.4)


def test_equal_texts_are_a_tie_without_a_question():
    asked = []

    def noted(first, second):
        asked.extend(zip(first, second, strict=True))
        return bradley_terry(first, second)

    assert OracleReward(noted)(["p"] * 2, ["a", "a"]) == [0.5, 0.5]
    assert asked == []


def test_columns_are_those_of_the_pair(tmp_path):
    seen = {}

    def judge(prompts, first, second, answer, **columns):
        seen.update(columns, answer=answer, prompts=prompts)
        return [1.0 if a == right else 0.0 for a, right in zip(first, answer, strict=True)]

    reward = OracleReward(judge, both_orders=False)
    values = reward(
        ["p", "p", "q", "q"], ["x", "y", "z", "x"], answer=["x", "x", "x", "x"], completion_ids=[0, 1, 2, 3]
    )
    assert values == [1.0, 0.0, 0.0, 1.0]
    assert seen == {"answer": ["x", "x"], "prompts": ["p", "q"]}


def test_fixed_opponents_take_the_place_of_the_others(tmp_path):
    file = tmp_path / "reference.jsonl"
    rows = [{"prompt": "p", "completion": text} for text in ("a", "c")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = built_in("tests.rewards.judges:longer", samples=file)
    assert reward(["p"], ["bb"]) == [1.0]
    assert not reward.compares
    assert reward.row_errors(["p", "q"], place=["x", "y"])[1].startswith(
        "the oracle's file of samples has no completion"
    )
    with pytest.raises(RewardError, match=r"f:9: the oracle .* has nothing to compare a completion with"):
        reward(["q"], ["bb"], place=["f:9"])
    with pytest.raises(DataError, match=r"nothing.jsonl"):
        built_in("tests.rewards.judges:longer", samples=tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([0.5], r"returned 1 values for 2 pairs"),
        (0.5, r"returned a float for 2 pairs"),
        ([0.5, float("nan")], r"f:1: the value is nan for 'b' against 'a'; return the probability"),
        ([0.5, 1.5], r"the value is 1.5"),
        ([0.5, None], r"the value is None"),
        ([0.5, "yes"], r"the value is 'yes'"),
    ],
)
def test_wrong_answers_stop_with_the_pair(answer, message):
    def wrong(first, second):
        return answer

    with pytest.raises(RewardError, match=message):
        OracleReward(wrong)(["p"] * 2, ["a", "b"], place=["f:1"] * 2)


def test_what_is_no_oracle_is_refused():
    with pytest.raises(ConfigError, match=r"it must be a function oracle\(prompts, first, second"):
        OracleReward(lambda completions: [0.5])
    with pytest.raises(ConfigError, match=r"oracle 'tests.rewards.judges:nothing'"):
        built_in("tests.rewards.judges:nothing")
    with pytest.raises(
        RewardError, match=r"its parameter 'answer' is neither a column of the data, which has \['gold'\]"
    ):
        OracleReward(judges.with_answer).row_errors(["p"], gold=["x"])
    with pytest.raises(RewardError, match=r"f:1: LookupError: no such judge"):
        OracleReward(judges.that_fails)(["p"] * 2, ["a", "b"], place=["f:1"] * 2)
    alone = RewardSum((WeightedReward("judge", OracleReward(bradley_terry)),))
    with pytest.raises(ConfigError, match=r"rollout.completions=1: the reward 'judge' compares completions"):
        alone.require_group(1, field="rollout.completions")


def test_an_oracle_may_be_async_and_its_identity_is_its_code():
    assert OracleReward(judges.later)(["p"] * 2, ["aa", "b"]) == [1.0, 0.0]
    assert reward_identity(OracleReward(judges.later)) == reward_identity(OracleReward(judges.later))
    assert reward_identity(OracleReward(judges.later)) != reward_identity(OracleReward(judges.longer))
    assert reward_identity(OracleReward(judges.longer)) != reward_identity(
        OracleReward(judges.longer, both_orders=False)
    )
