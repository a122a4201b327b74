"""An LLM judge as a reward and as a preference oracle, over real HTTP."""

import pytest

from falign.errors import ConfigError, JudgeError, RewardError
from falign.judges import PAIR, Endpoint, Judge, JudgeTemplate, ScoreForm
from falign.rewards import JudgeOracle, JudgeReward, OracleReward, RewardSum, WeightedReward, reward_identity
from falign.rewards.built_in import judge, judge_oracle
from tests.judges.server import JudgeServer, longer, part

TEXTS = ["a" * 10, "b" * 45, "c" * 100]


def at(server, **fields):
    return Endpoint(url=server.url, model="judge", **{"backoff": 0.0, **fields})


def test_scores_are_the_reward():
    with JudgeServer(longer) as server:
        reward = judge(at(server, price_prompt=1e6, price_completion=0.0))
        total = RewardSum((WeightedReward("judge", reward, 0.5),))(["p"] * 3, TEXTS, place=["f:1"] * 3)
        words = [sum(len(each["content"].split()) for each in body["messages"]) for body in server.log]
    assert total.parts == {"judge": [1.0, 3.0, 6.0]}
    assert total.total == [0.5, 1.5, 3.0]
    metrics = total.metrics()
    assert metrics["reward/judge/cost"] == pytest.approx(sum(words) / 3)
    assert metrics["reward/judge/tokens"] == pytest.approx(sum(words) / 3 + 7)
    assert metrics["reward/errors"] == 0


def no_b(message):
    return "no score for this" if part("answer", message)[0] == "b" else longer(message)


def test_a_completion_without_a_score_is_an_error_and_never_a_zero():
    places = ["f:1", "f:2", "f:3"]
    with JudgeServer(no_b) as server:
        left_out = judge(at(server)).score(["p"] * 3, TEXTS, place=places)
        given = judge(at(server), failed=-1.0).score(["p"] * 3, TEXTS, place=places)
        only = RewardSum((WeightedReward("judge", judge(at(server))),))
        with pytest.raises(RewardError, match=r"f:2: no reward applies .* set failed to give"):
            only(["p"] * 3, TEXTS, place=places)
    assert left_out.values == [1.0, None, 6.0]
    assert given.values == [1.0, -1.0, 6.0]
    for each in (left_out, given):
        assert each.errors == 1
        assert each.message.startswith(
            "f:2: the judge gives no verdict: the answer is malformed: it has no JSON object"
        )


def test_conversations_columns_and_reference_answers_are_shown(tmp_path):
    file = tmp_path / "strict.yaml"
    file.write_text("user: '{prompt}|{topic}|{reference}|{completion}|{form}'\n")
    with JudgeServer(lambda message: {"score": 4}) as server:
        reward = judge(at(server), template=file, reference="gold", scale=(0, 5))
        prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        columns = {"topic": ["greeting"], "gold": ["Hello!"], "place": ["f:1"], "prompt_ids": [[1]]}
        assert reward.row_errors([prompt], **columns) == [None]
        assert reward([prompt], ["Hey"], **columns) == [4.0]
        shown = server.log[0]["messages"][0]["content"]
        assert reward.row_errors([prompt], **{**columns, "topic": [None]}) == [
            "the column 'topic', which the judge reads, is missing"
        ]
        with pytest.raises(ConfigError, match=r"the placeholder \{topic\} is unknown"):
            reward.row_errors([prompt], gold=["x"])
        with pytest.raises(RewardError, match="reads the column 'gold'"):
            reward.row_errors([prompt], topic=["x"])
    assert shown.startswith("System: Be kind.\n\nUser: Hi|greeting|[Beginning of a reference answer]\nHello!\n")
    assert "|Hey|Answer with one JSON object" in shown


def test_the_service_is_asked_before_the_run_begins():
    with JudgeServer(longer) as server, pytest.raises(JudgeError, match="there is no model 'jugde'; it has judge"):
        judge(Endpoint(url=server.url, model="jugde")).row_errors(["p"])
    with pytest.raises(JudgeError, match="no connection"):
        judge_oracle(at(server, retries=0)).row_errors(["p"])


def test_the_oracle_gives_the_win_rate_in_groups_and_its_position_bias():
    with JudgeServer(longer) as server:
        found = judge_oracle(at(server)).score(["p"] * 3 + ["q"] * 2, [*TEXTS, "dd", "ee"])
    assert len(server.log) == 8
    assert found.values == [0.0, 0.5, 1.0, 0.5, 0.5]
    assert found.measured["position_bias"] == [0.0] * 4
    assert found.measured["tie"] == [0.0, 0.0, 0.0, 1.0]
    assert len(found.measured["tokens"]) == 8
    with JudgeServer(lambda message: {"verdict": "A"}) as server:
        biased = judge_oracle(at(server)).score(["p"] * 3, TEXTS)
        once = judge_oracle(at(server), both_orders=False).score(["p"] * 3, TEXTS)
    assert biased.values == [0.5] * 3
    assert biased.measured["position_bias"] == [1.0] * 3
    assert once.values == [1.0, 0.5, 0.0]
    assert len(server.log) == 9
    assert "position_bias" not in once.measured


def none_about_b(message):
    return "?" if "b" in (part("answer of A", message)[0], part("answer of B", message)[0]) else longer(message)


def test_pairs_without_a_verdict_are_left_out_and_counted():
    with JudgeServer(none_about_b) as server:
        found = judge_oracle(at(server, reasks=0)).score(["p"] * 3, TEXTS, place=["f:1"] * 3)
        tied = judge_oracle(at(server, reasks=0), failed=0.5).score(["p"] * 3, TEXTS, place=["f:1"] * 3)
    assert found.values == [0.0, None, 1.0]
    assert tied.values == [0.25, 0.5, 0.75]
    for each in (found, tied):
        assert each.errors == 1  # the completion of which nothing is known
        assert each.measured["failure"] == [1.0, 0.0, 1.0]
        assert each.message.startswith("f:1: the judge gives no verdict")


def test_samples_of_another_model_are_opponents(tmp_path):
    file = tmp_path / "reference.jsonl"
    file.write_text('{"prompt": "p", "completion": "bbbbbbbbbbbbbbbbbbbbbbb"}\n')
    with JudgeServer(longer) as server:
        reward = judge_oracle(at(server), samples=file)
        assert reward(["p"] * 3, TEXTS) == [0.0, 1.0, 1.0]
        assert reward.row_errors(["p", "q"]) == [
            None,
            "the oracle's file of samples has no completion of this prompt: sample all prompts of the run",
        ]


def test_the_identity_has_the_questions_and_not_the_limits(monkeypatch):
    monkeypatch.setenv("KEY_OF_JUDGE", "a-secret-of-mine")
    base = {"url": "http://127.0.0.1:9/v1", "model": "judge"}

    def identity(template=None, **fields):
        return reward_identity(JudgeReward(Judge(Endpoint(**{**base, **fields}), template or SCORED, ScoreForm())))

    same = {identity(), identity(api_key_env="KEY_OF_JUDGE", timeout=3.0, retries=1, concurrency=2, cache="c")}
    same |= {identity(price_prompt=1.0, price_completion=1.0, budget=3.0, backoff=0.0)}
    assert len(same) == 1
    others = [identity(JudgeTemplate("{completion}")), identity(model="judge-2"), identity(temperature=1.0)]
    others += [identity(options={"top_p": 0.9}), identity(seed=1), identity(answer="text")]
    assert len({*others, *same}) == 7
    oracles = [
        OracleReward(JudgeOracle(Judge(Endpoint(**base), PAIRED, PAIR), both_orders), both_orders=False)
        for both_orders in (True, False, True)
    ]
    first, second, third = map(reward_identity, oracles)
    assert first == third != second


SCORED = JudgeTemplate("{prompt} {completion} {form}")
PAIRED = JudgeTemplate("{prompt} {first} {second} {form}")


def test_judges_of_the_wrong_form_and_scales_are_refused():
    endpoint = Endpoint(url="http://127.0.0.1:9/v1", model="judge")
    with pytest.raises(RewardError, match="gives no scores"):
        JudgeReward(Judge(endpoint, SCORED, PAIR))
    with pytest.raises(RewardError, match="does not choose"):
        JudgeOracle(Judge(endpoint, PAIRED, ScoreForm()))
    with pytest.raises(ConfigError, match=r"scale=\[3, 3\]"):
        judge(endpoint, scale=(3, 3))
