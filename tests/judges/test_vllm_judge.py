"""A judge that is a real vLLM server with SmolLM2-135M, and answers under a JSON schema; a few minutes and 3 GiB."""

import pytest

from falign.judges import COMPARE, PAIR, RATE, Endpoint, Judge, ScoreForm, compare, position_counts
from falign.rewards import RewardSum, WeightedReward
from falign.rewards.built_in import judge
from tests.rollouts.test_vllm_server import WAIT, Server, pytestmark  # noqa: F401

QUESTIONS = ["Name a color.", "How do I boil an egg?", "Thank the nurse for her help."]
ANSWERS = [("Blue.", "I will not say."), ("Seven minutes in boiling water.", "Eggs."), ("Thank you so much!", "Go.")]


@pytest.fixture(scope="module")
def endpoint(served_folder, tmp_path_factory):
    server = Server(served_folder, tmp_path_factory.mktemp("judge") / "server.log", rank=0)
    server.start()
    yield Endpoint(
        url=f"{server.url}/v1", model="base", answer="schema", max_tokens=160, timeout=WAIT, retries=60, backoff=2.0
    )
    server.kill()


def test_a_small_model_judges_under_a_schema(endpoint, tmp_path):
    scorer = Judge(endpoint.model_copy(update={"cache": tmp_path / "cache"}), RATE, ScoreForm(1, 10))
    assert scorer.served()["root"]
    fields = [{"prompt": q, "completion": a, "reference": ""} for q, (a, _) in zip(QUESTIONS, ANSWERS, strict=True)]
    scores = scorer.ask(fields)
    # The schema leaves no other answers, unless max_tokens cuts one.
    assert all(each.value in range(1, 11) or "cut at max_tokens" in each.problem for each in scores)
    assert any(each.value is not None for each in scores)
    assert scorer.usage.requests >= 3
    assert scorer.usage.prompt_tokens > 300
    again = Judge(scorer.endpoint, RATE, ScoreForm(1, 10))
    assert [each.value for each in again.ask(fields)] == [each.value for each in scores]
    assert again.usage.requests == 0

    pairs = [
        tuple({"prompt": q, "first": x, "second": y, "reference": ""} for x, y in ((a, b), (b, a)))
        for q, (a, b) in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    found = compare(Judge(endpoint, COMPARE, PAIR), pairs)
    counts = position_counts(found)
    assert sum(counts) == 3
    assert counts.judged > 0
    for each in found:
        assert {each.forward.value, each.backward.value} <= {"A", "B", "tie", None}


def test_it_is_a_reward(endpoint):
    reward = RewardSum((WeightedReward("judge", judge(endpoint, scale=(0, 3), failed=0.0)),))
    found = reward(QUESTIONS, [first for first, _ in ANSWERS], place=["q:1", "q:2", "q:3"])
    assert all(value in range(4) for value in found.parts["judge"])
    assert found.metrics()["reward/judge/tokens"] > 100


def test_without_a_schema_what_it_says_is_read_or_counted(endpoint):
    free = Judge(endpoint.model_copy(update={"answer": "text", "reasks": 1, "max_tokens": 60}), RATE, ScoreForm(1, 10))
    found = free.ask(
        [{"prompt": q, "completion": a, "reference": ""} for q, (a, _) in zip(QUESTIONS, ANSWERS, strict=True)]
    )
    for each in found:
        assert (each.value is None) == bool(each.problem)
        assert each.value is None or 1 <= each.value <= 10
