"""A judge over real HTTP: verdicts, both orders, retries, cache, cost, and what is refused."""

import time

import pytest

from falign.data import DataSource, read_examples
from falign.errors import ConfigError, JudgeError
from falign.judges import (
    COMPARE,
    COMPARE_FIVE,
    FIVE,
    PAIR,
    RATE,
    Endpoint,
    Judge,
    ScoreForm,
    compare,
    position_counts,
)
from tests.judges.server import POLITE, JudgeServer, longer, polite

TEXTS = [("short", "a much longer answer"), ("exactly", "as long"), ("the longer of both", "brief")]
SECRET = "a-key-that-nobody-may-see"


def endpoint(server, **fields):
    return Endpoint(url=server.url, model="judge", **{"backoff": 0.0, **fields})


def pair_judge(server, **fields):
    return Judge(endpoint(server, **fields), COMPARE, PAIR)


def fields(prompt, first, second):
    return {"prompt": prompt, "first": first, "second": second, "reference": ""}


def both_orders(texts, prompt="Say something."):
    return [(fields(prompt, a, b), fields(prompt, b, a)) for a, b in texts]


def scores(*texts):
    return [{"prompt": "p", "completion": text, "reference": ""} for text in texts]


def test_both_orders_are_asked_and_ties_are_counted():
    with JudgeServer(longer) as server:
        found = compare(pair_judge(server), both_orders(TEXTS))
    assert [each.outcome for each in found] == [0.0, 0.5, 1.0]
    assert len(server.log) == 6
    counts = position_counts(found)
    assert counts == (3, 0, 0, 0, 0)
    assert counts.bias == 0.0


def first_if_tied(message):
    verdict = longer(message)["verdict"]
    return {"verdict": "A" if verdict == "tie" else verdict}


def never_second(message):
    verdict = longer(message)["verdict"]
    return {"verdict": "tie" if verdict == "B" else verdict}


@pytest.mark.parametrize(
    ("rule", "outcomes", "counts", "bias"),
    [
        (lambda message: {"verdict": "A"}, [0.5] * 3, (0, 3, 0, 0, 0), 1.0),
        (lambda message: {"verdict": "B"}, [0.5] * 3, (0, 0, 3, 0, 0), 1.0),
        (first_if_tied, [0.0, 0.5, 1.0], (2, 1, 0, 0, 0), 1 / 3),
        (never_second, [0.5] * 3, (1, 0, 0, 2, 0), 0.0),
        (lambda message: "I cannot decide.", [None] * 3, (0, 0, 0, 0, 3), None),
    ],
)  # fmt: skip
def test_orders_that_disagree_are_ties_and_the_bias_is_counted(rule, outcomes, counts, bias):
    with JudgeServer(rule) as server:
        found = compare(pair_judge(server, reasks=0), both_orders(TEXTS))
    assert [each.outcome for each in found] == outcomes
    assert position_counts(found) == counts
    assert position_counts(found).bias == (None if bias is None else pytest.approx(bias))


def test_five_verdicts_are_read_with_their_strength():
    texts = [("x" * 200, "y"), ("xx", "y"), ("x", "y"), ("x", "yy"), ("x", "y" * 200)]
    with JudgeServer(longer) as server:
        found = compare(Judge(endpoint(server), COMPARE_FIVE, FIVE), both_orders(texts))
    assert [each.forward.value for each in found] == ["A>>B", "A>B", "A=B", "B>A", "B>>A"]
    assert [each.outcome for each in found] == [1, 1, 0.5, 0, 0]


def test_the_judge_agrees_with_its_rule_on_real_pairs():
    examples = [each for each, _ in zip(read_examples(DataSource("demo:polite-preference")), range(60), strict=False)]
    texts = [tuple(map(text_of, each.completions[:: (-1) ** i])) for i, each in enumerate(examples)]
    with JudgeServer(polite) as server:
        judge = pair_judge(server)
        found = compare(
            judge,
            [(fields(p, a, b), fields(p, b, a)) for p, (a, b) in zip(map(prompt_of, examples), texts, strict=True)],
        )
    counted = [[len(POLITE.findall(text)) for text in pair] for pair in texts]
    rule = [0.5 if a == b else float(a > b) for a, b in counted]
    assert {*rule} == {0.0, 0.5, 1.0}
    agreement = sum(each.outcome == right for each, right in zip(found, rule, strict=True)) / len(rule)
    assert agreement >= 0.95


def text_of(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


def prompt_of(example):
    return example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"]


def test_busy_and_broken_replies_are_repeated():
    with JudgeServer(longer, statuses=[429, 503, "hang up", "late", 200], retry_after="0") as server:
        judge = pair_judge(server, concurrency=1, timeout=0.5)
        assert judge.ask([fields("p", "aa", "b")])[0].value == "A"
        assert len(server.log) == 5
        assert judge.usage[:2] == (1, 0)


def test_the_wait_is_doubled_and_the_one_of_the_service_counts():
    with JudgeServer(longer, statuses=[500, 500]) as server:
        begin = time.monotonic()
        pair_judge(server, backoff=0.1).ask([fields("p", "aa", "b")])
        assert 0.3 <= time.monotonic() - begin < 2
    with JudgeServer(longer, statuses=[429], retry_after="0.2") as server:
        begin = time.monotonic()
        pair_judge(server, backoff=30.0).ask([fields("p", "aa", "b")])
        assert 0.2 <= time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("statuses", "message"),
    [
        ([500] * 3, "3 attempts failed, the last one by: status 500: try later"),
        (["late"] * 3, "no answer within timeout=0.3 seconds"),
        (["hang up"] * 3, "no connection, or a broken one"),
        ([401], "status 401: try later.*api_key_env"),
        ([404], "status 404.*Does the url end in /v1"),
        ([(429, "insufficient_quota")], "insufficient_quota Raise the quota"),
        ([302], "redirects are not followed"),
    ],
)
def test_a_judge_that_does_not_answer_ends_the_call(statuses, message):
    with JudgeServer(longer, statuses=list(statuses)) as server:
        with pytest.raises(JudgeError, match=message):
            pair_judge(server, retries=2, timeout=0.3, concurrency=1).ask([fields("p", "aa", "b")])
        assert len(server.log) == len(statuses)


def test_replies_of_another_protocol_are_refused():
    with JudgeServer(longer, bodies=["<html>"] * 2) as server, pytest.raises(JudgeError, match="not JSON: <html>"):
        pair_judge(server, retries=1).ask([fields("p", "a", "b")])
    with (
        JudgeServer(longer, bodies=[{"text": "A"}]) as server,
        pytest.raises(JudgeError, match="not a chat completion"),
    ):
        pair_judge(server).ask([fields("p", "a", "b")])


def test_a_malformed_answer_is_asked_again_and_then_a_failure_without_a_value():
    answers = iter(["Both are nice.", '{"score": 9}', '{"score": 0}', '{"score": "ten"}'])
    with JudgeServer(lambda message: next(answers)) as server:
        judge = Judge(endpoint(server, concurrency=1, answer="text"), RATE, ScoreForm(1, 10))
        first, second = judge.ask(scores("one", "two"))
        assert (first.value, first.problem) == (9.0, "")
        assert second.value is None
        assert "'ten', which is not a number from 1 to 10" in second.problem
        roles = [each["role"] for each in server.log[1]["messages"]]
        assert roles == ["system", "user", "assistant", "user"]
        assert "cannot be read: it has no JSON object" in server.log[1]["messages"][-1]["content"]
        assert judge.usage.requests == 4


def test_a_question_that_is_refused_is_a_failure_of_its_own():
    with JudgeServer(longer, statuses=[200, (400, "too long"), (400, "too long")]) as server:
        judge = Judge(endpoint(server, concurrency=1), RATE, ScoreForm(1, 10))
        first, second, third = judge.ask(scores("a", "b", "c"))
    assert (first.value, third.value) == (1.0, None)
    assert "refuses the question" in second.problem
    assert "too long" in second.problem


def test_a_schema_is_sent_and_a_service_without_it_gets_the_form_in_the_prompt():
    with JudgeServer(longer) as server:
        Judge(endpoint(server), RATE, ScoreForm(1, 5)).ask(scores("a"))
        schema = server.log[0]["response_format"]["json_schema"]["schema"]
        assert schema["properties"]["score"] == {"type": "integer", "enum": [1, 2, 3, 4, 5]}
    with JudgeServer(longer, knows_schema=False) as server:
        judge = Judge(endpoint(server, concurrency=1), RATE, ScoreForm(1, 10))
        assert [each.value for each in judge.ask(scores("a", "b" * 40))] == [1.0, 3.0]
        assert ["response_format" in body for body in server.log] == [True, False, False]
        strict = Judge(endpoint(server, answer="schema"), RATE, ScoreForm(1, 10))
        assert "unknown field response_format" in strict.ask(scores("a"))[0].problem


def test_equal_questions_are_asked_once_and_no_answer_is_paid_for_twice(tmp_path):
    file = tmp_path / "cache" / "judge.sqlite"
    with JudgeServer(longer) as server:
        judge = pair_judge(server, cache=file)
        once = judge.ask([fields("a private prompt", "aa", "b")] * 3 + [fields("q", "a", "b")])
        assert [each.value for each in once] == ["A", "A", "A", "tie"]
        assert len(server.log) == 2
        assert sum(each.completion_tokens for each in once) == 14
        again = pair_judge(server, cache=file, timeout=9.0, retries=1)
        assert [each.value for each in again.ask([fields("a private prompt", "aa", "b")])] == ["A"]
        assert again.usage[:3] == (0, 1, 0)
        pair_judge(server, cache=file, temperature=0.5).ask([fields("q", "a", "b")])  # another question
        assert len(server.log) == 3
    assert b"a private prompt" not in file.read_bytes()


def test_a_damaged_cache_is_refused(tmp_path):
    (tmp_path / "cache").write_text("not a database, and longer than the header of one" * 9)
    with JudgeServer(longer) as server, pytest.raises(ConfigError, match="cannot be used"):
        pair_judge(server, cache=tmp_path / "cache").ask([fields("p", "a", "b")])


def test_the_cost_is_counted_and_a_spent_budget_stops_until_it_is_raised(tmp_path):
    prices = {"price_prompt": 1000.0, "price_completion": 1_000_000.0, "cache": tmp_path / "cache", "concurrency": 1}
    questions = [fields("p", "a" * i, "b") for i in range(5)]
    with JudgeServer(longer) as server:
        judge = pair_judge(server, **prices)
        judge.ask(questions[:1])
        words = sum(len(each["content"].split()) for each in server.log[0]["messages"])
        cost = words * 0.001 + 7
        assert judge.usage == (1, 0, words, 7, 0, pytest.approx(cost))
        with pytest.raises(JudgeError, match=r"budget of the judge 'judge' is spent: .* raise budget"):
            pair_judge(server, **prices, budget=2.5 * cost).ask(questions)  # what is in the cache counts
        assert len(server.log) == 3
        resumed = pair_judge(server, **prices, budget=5.5 * cost)
        assert len(resumed.ask(questions)) == 5
        assert resumed.usage[:2] == (2, 3)
        assert len(server.log) == 5


def test_a_budget_needs_a_service_that_counts():
    with JudgeServer(longer, usage=False) as server:
        judge = pair_judge(server, price_prompt=1.0, price_completion=1.0, budget=1.0)
        with pytest.raises(JudgeError, match="a budget cannot be kept"):
            judge.ask([fields("p", "a", "b")])
        free = pair_judge(server)
        free.ask([fields("p", "a", "b")])
        assert free.usage.uncounted == 1


def test_no_more_than_the_limit_are_asked_at_once():
    with JudgeServer(longer, delay=0.05) as server:
        pair_judge(server, concurrency=3).ask([fields("p", "a" * i, "b") for i in range(9)])
    assert server.most_at_once == 3


def test_after_an_error_no_further_question_is_sent():
    with JudgeServer(longer, statuses=[200, 401]) as server:
        with pytest.raises(JudgeError, match="401"):
            pair_judge(server, concurrency=1).ask([fields("p", "a" * i, "b") for i in range(9)])
        assert len(server.log) == 2


def test_the_key_comes_from_the_environment_and_is_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_JUDGE", SECRET)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with JudgeServer(longer, statuses=[200, (401, f"bad key {SECRET}")]) as server:
        judge = pair_judge(server, api_key_env="MY_JUDGE", cache=tmp_path / "cache")
        judge.ask([fields("p", "a", "b")])
        assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
        with pytest.raises(JudgeError) as raised:
            judge.ask([fields("q", "a", "b")])
    assert SECRET not in str(raised.value)
    assert SECRET not in repr(judge.identity())
    assert SECRET not in repr(judge.endpoint)
    assert SECRET.encode() not in (tmp_path / "cache").read_bytes()
    monkeypatch.delenv("MY_JUDGE")
    with pytest.raises(ConfigError, match="api_key_env='MY_JUDGE': this environment variable is not set"):
        pair_judge(server, api_key_env="MY_JUDGE")


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with JudgeServer(longer) as server:
        assert pair_judge(server, retries=0).ask([fields("p", "aa", "b")])[0].value == "A"


def test_two_versions_of_a_judge_are_not_mixed():
    with JudgeServer(longer) as server:
        judge = pair_judge(server)
        judge.ask([fields("p", "a", "b")])
        assert judge.answers_as == "judge-1"
        server.model = "judge-2"
        with pytest.raises(JudgeError, match="from 'judge-1', and now from 'judge-2'"):
            judge.ask([fields("q", "a", "b")])


def test_what_is_served_is_asked_first():
    with JudgeServer(longer) as server:
        assert pair_judge(server).served() == {"root": "/models/judge"}
        with pytest.raises(JudgeError, match="there is no model 'other'; it has judge"):
            Judge(Endpoint(url=server.url, model="other"), COMPARE, PAIR).served()
    with pytest.raises(JudgeError, match="no connection"):
        pair_judge(server, retries=0).served()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"url": "localhost:8000"}, "url"),
        ({"url": "http://me:pass@host/v1"}, "api_key_env"),
        ({"url": "http://host/v1?api-version=1"}, "an address with a query"),
        ({"options": {"messages": []}}, "options.messages is set by falign"),
        ({"options": {"max_tokens": 3}}, "set max_tokens"),
        ({"budget": 1.0}, "set price_prompt"),
        ({"price_prompt": 1.0}, "give both"),
        ({"api_key": "sk-1"}, "api_key"),
    ],
)
def test_endpoints_that_cannot_work_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Endpoint(**{"url": "http://x/v1", "model": "m", **given})
