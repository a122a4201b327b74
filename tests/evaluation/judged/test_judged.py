"""Answers to MT-Bench, Arena-Hard and AlpacaEval files, judged over HTTP by a rule, against numbers computed here."""

import gzip
import json
import re

import numpy as np
import pytest

import falign
from falign.errors import ConfigError, DataError, JudgeError
from falign.evaluation.judged import BENCHMARKS
from falign.report import write_report
from falign.runfile import parse_run
from falign.training import train
from tests.judges.server import JudgeServer, by, longer, part
from tests.models.tiny import save_tiny
from tests.rollouts.loopback import Loopback
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judge(server, **fields):
    return {"url": server.url, "model": "judge", "backoff": 0.0, **fields}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    save_tiny(folder / "tiny")
    content = online_data(
        folder / "tiny",
        write_prompts(folder / "prompts.jsonl"),
        folder / "run",
        rollout={"evaluation": {"completions": 2}},
        training={"max_steps": 1},
    )
    train(parse_run(content))
    return folder / "run"


def score(message):
    """From the first letters of the question and the length of the answer, so that it can be computed here."""
    return by(len, message, lambda length: 1 + (length + len(part("request", message))) % 10)


def test_a_run_answers_both_turns_of_mt_bench_and_is_scored(run, shared_data, tmp_path):
    questions = shared_data("mt-bench/question.jsonl")
    references = shared_data("mt-bench/reference_answer_gpt-4.jsonl")
    few = write(tmp_path / "few.jsonl", [each for i, each in enumerate(lines(questions)) if i in (0, 1, 20, 21, 14)])
    with JudgeServer(score) as server:
        summary = falign.evaluate_judge(
            run, "mt_bench", few, judge=judge(server), references=references, max_new_tokens=12
        )
    folder = run / "evaluation" / "mt_bench-single"
    answers, rows = lines(folder / "answers.jsonl"), lines(folder / "judgments.jsonl")
    assert [each["question_id"] for each in answers] == [each["question_id"] for each in lines(few)]
    assert all(each["model_id"] == "run" and len(each["choices"][0]["turns"]) == 2 for each in answers)
    assert [row["turn"] for row in rows] == [1, 2] * 5
    # What the judge was shown: the first turn with its answer before the second question, and references where known.
    shown = [body["messages"][-1]["content"] for body in server.log]
    (second,) = [text for text in shown if part("request", text).startswith("User: Compose an engaging")]
    turns = answers[0]["choices"][0]["turns"]
    assert part("request", second).endswith(f"Assistant: {turns[0]}\n\nUser: {lines(few)[0]['turns'][1]}")
    assert part("answer", second) == turns[1]
    assert sum("[Beginning of a reference answer]" in text for text in shown) == 6  # 101, 102, and 95 of its own
    values = np.array([row["value"] for row in rows]).reshape(5, 2)
    metrics = summary.metrics
    assert metrics["score"].value == pytest.approx(values.mean())
    assert metrics["score/turn_2"].value == pytest.approx(values[:, 1].mean())
    assert metrics["score/writing"].value == pytest.approx(values[:2].mean())
    assert metrics["score"].low <= metrics["score"].value <= metrics["score"].high
    assert metrics["length"].value == pytest.approx(
        np.mean([len(t) for each in answers for t in each["choices"][0]["turns"]])
    )
    assert (summary.num_questions, summary.num_judgments, summary.failures, summary.judge) == (5, 10, 0, "judge-1")
    assert summary.usage["requests"] == 10
    assert summary.usage["completion_tokens"] == 70
    assert not list(folder.glob(".*"))
    again = BENCHMARKS.get("mt_bench")().read_answers(folder / "answers.jsonl")
    assert again.turns["81"] == tuple(turns)
    with pytest.raises(ConfigError, match="holds results"):
        falign.evaluate_judge(run, "mt_bench", few, judge=judge(server))


def test_pairs_of_two_turns_are_compared_in_both_orders(shared_data, tmp_path):
    questions = shared_data("mt-bench/question.jsonl")
    known = lines(shared_data("mt-bench/reference_answer_gpt-4.jsonl"))[:4]
    cut = [
        {**each, "model_id": "cut", "choices": [{"turns": [t[:90] for t in each["choices"][0]["turns"]]}]}
        for each in known
    ]
    ids = {each["question_id"] for each in known}
    few = write(tmp_path / "few.jsonl", [each for each in lines(questions) if each["question_id"] in ids])
    files = [write(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((cut, known))]
    with JudgeServer(longer) as server:
        summary = falign.evaluate_judge(
            files[0], "mt_bench", few, judge=judge(server), mode="pairwise", baseline=files[1], out=tmp_path / "out"
        )
    rows = lines(tmp_path / "out" / "judgments.jsonl")
    texts = [(a["choices"][0]["turns"], b["choices"][0]["turns"]) for a, b in zip(cut, known, strict=True)]
    # The rule sees the answers to both turns together at the second turn.
    expected = [outcome(sum(map(len, a[: t + 1])), sum(map(len, b[: t + 1]))) for a, b in texts for t in range(2)]
    assert [row["value"] for row in rows] == expected
    assert summary.metrics["win_rate"].value == pytest.approx(np.mean(expected))
    assert summary.metrics["position_bias"].value == 0.0
    # Equal answers make one question of the two orders.
    assert len(server.log) == sum(1 + (a[: t + 1] != b[: t + 1]) for a, b in texts for t in range(2)) > 8


def outcome(own, other):
    return 0.5 if own == other else float(own > other)


def five_with_bias(message):
    """The longer answer wins, much better by 1,000 characters; equal to within 100, the first place wins."""
    a, b = (len(part(f"answer of {name}", message)) for name in "AB")
    if abs(a - b) <= 100:
        return {"verdict": "A>B"}
    return {"verdict": ("A>" if a > b else "B>") + ">" * (abs(a - b) > 1000) + ("B" if a > b else "A")}


def test_arena_hard_counts_each_order_and_strong_verdicts_three_times(shared_data, tmp_path):
    questions = shared_data("arena-hard/question.jsonl.gz")
    own, other = (shared_data(f"arena-hard/answers-{name}.jsonl.gz") for name in ("gpt-3.5-turbo-0125", "gpt-4-0314"))
    with JudgeServer(five_with_bias) as server:
        summary = falign.evaluate_judge(
            own, "arena_hard", questions, judge=judge(server), baseline=other, limit=60, out=tmp_path / "arena"
        )
    lengths = []
    for file in (own, other):
        with gzip.open(file, "rt", encoding="utf-8") as rows:
            lengths.append({row["uid"]: len(row["answer"]) for row in map(json.loads, rows)})
    with gzip.open(questions, "rt", encoding="utf-8") as rows:
        ids = [json.loads(row)["uid"] for row in rows][:60]
    games = []
    for uid in ids:
        a, b = (each[uid] for each in lengths)
        weight = 3 if abs(a - b) > 1000 else 1
        games += [(0.5, 2)] if abs(a - b) <= 100 else [(float(a > b), 2 * weight)]  # biased: one order each
    values, weights = np.array(games).T
    metrics = summary.metrics
    assert metrics["win_rate"].value == pytest.approx((values * weights).sum() / weights.sum())
    assert metrics["win_rate"].low < metrics["win_rate"].value < metrics["win_rate"].high
    close = np.mean([abs(lengths[0][uid] - lengths[1][uid]) <= 100 for uid in ids])
    assert metrics["position_bias"].value == metrics["position/first"].value == metrics["tied"].value == close > 0
    assert metrics["won"].value + metrics["tied"].value + metrics["lost"].value == pytest.approx(1)
    assert (summary.label, summary.baseline) == ("gpt-3.5-turbo-0125", "gpt-4-0314")
    written = lines(tmp_path / "arena" / "answers.jsonl")
    assert {"uid", "ans_id", "model", "messages", "tstamp"} == written[0].keys()
    with gzip.open(own, "rt", encoding="utf-8") as rows:
        first = {row["uid"]: row["answer"] for row in map(json.loads, rows)}[ids[0]]
    assert written[0]["messages"][-1] == {"role": "assistant", "content": {"answer": first}}


ALPACA = [
    {"dataset": "mine", "instruction": f"Name {i} fruits.", "output": "apple " * i, "generator": "baseline"}
    for i in range(1, 7)
]


def outputs(path, generator, texts):
    rows = [
        {"instruction": each["instruction"], "output": t, "generator": generator}
        for each, t in zip(ALPACA, texts, strict=True)
    ]
    path.write_text(json.dumps(rows))
    return path


def test_an_alpaca_eval_file_has_its_own_baseline(tmp_path):
    questions = tmp_path / "reference.json"
    questions.write_text(json.dumps(ALPACA))
    mine = outputs(tmp_path / "mine.json", "mine", ["pear " * 3] * 6)
    with JudgeServer(longer) as server:
        summary = falign.evaluate_judge(mine, "alpaca_eval", questions, judge=judge(server), out=tmp_path / "out")
    expected = [outcome(len("pear " * 3), len("apple " * i)) for i in range(1, 7)]
    assert summary.metrics["win_rate"].value == pytest.approx(np.mean(expected))
    assert summary.baseline == "baseline"
    written = json.loads((tmp_path / "out" / "outputs.json").read_text())
    assert written[0] == {
        "dataset": "mine",
        "instruction": "Name 1 fruits.",
        "output": "pear " * 3,
        "generator": "mine",
    }


def test_a_stopped_evaluation_continues_and_never_under_another_judge(tmp_path, run):
    questions = write(tmp_path / "questions.jsonl", [{"uid": str(i), "prompt": f"Say {i}."} for i in range(20)])
    baseline = write(tmp_path / "base.jsonl", [{"uid": str(i), "model": "base", "answer": "x" * i} for i in range(20)])
    given = {"baseline": baseline, "max_new_tokens": 6, "out": tmp_path / "out", "temperature": 1.0}
    prices = {"price_prompt": 0.0, "price_completion": 1e6 / 7, "concurrency": 1}  # one question costs 1
    with JudgeServer(longer) as server:
        with pytest.raises(JudgeError, match=r"budget .* is spent: 35\.0000 of 35.*raise budget"):
            falign.evaluate_judge(run, "arena_hard", questions, judge=judge(server, **prices, budget=35), **given)
        with pytest.raises(ConfigError, match=r"another judging: judge.temperature \(0.0 there, 0.5 now\)"):
            falign.evaluate_judge(run, "arena_hard", questions, judge=judge(server, temperature=0.5), **given)
        server.model = "judge-2"
        with pytest.raises(JudgeError, match="from 'judge-1', and now from 'judge-2'"):
            falign.evaluate_judge(run, "arena_hard", questions, judge=judge(server, **prices), **given)
        server.model = "judge-1"
        (tmp_path / "out" / "judge-cache.sqlite").unlink()  # it has an answer of the other judge; the journal stays
        asked = len(server.log)
        summary = falign.evaluate_judge(run, "arena_hard", questions, judge=judge(server, **prices), **given)
        assert len(server.log) == asked + 2 * 4
        whole = falign.evaluate_judge(
            run, "arena_hard", questions, judge=judge(server), **{**given, "out": tmp_path / "2"}
        )
    assert summary.metrics == whole.metrics
    assert summary.num_judgments == 20
    texts = [[row["messages"][-1] for row in lines(tmp_path / name / "answers.jsonl")] for name in ("out", "2")]
    assert texts[0] == texts[1]


def test_answers_are_sampled_by_the_engine_of_choice(run, tmp_path):
    questions = write(tmp_path / "q.jsonl", [{"question_id": i, "turns": [f"Say {i}.", "More."]} for i in range(3)])
    sampler = Loopback(run.parent / "tiny", max_length=512).start()
    engine = {"kind": "vllm", "url": sampler.url, "shared_dir": str(tmp_path / "shared")}
    given = {"max_new_tokens": 6, "temperature": 0.0}
    with JudgeServer(score) as server:
        here = falign.evaluate_judge(run, "mt_bench", questions, judge=judge(server), out=tmp_path / "1", **given)
        there = falign.evaluate_judge(
            run, "mt_bench", questions, judge=judge(server), out=tmp_path / "2", engine=engine, **given
        )
        with pytest.raises(ConfigError, match=r"unknown key 'rollout.engine.shared'"):
            falign.evaluate_judge(
                run,
                "mt_bench",
                questions,
                judge=judge(server),
                out=tmp_path / "3",
                engine={"kind": "vllm", "shared": 1},
            )
    assert len(sampler.calls("/v1/completions")) >= 6
    sampler.stop()
    texts = [[row["choices"] for row in lines(tmp_path / name / "answers.jsonl")] for name in "12"]
    assert texts[0] == texts[1]
    assert here.metrics == there.metrics


def test_failures_are_counted_and_left_out(tmp_path):
    questions = tmp_path / "reference.json"
    questions.write_text(json.dumps(ALPACA))
    mine = outputs(tmp_path / "mine.json", "mine", ["pear " * 3] * 6)

    def sometimes(message):
        return "no idea" if "Name 6" in message else longer(message)

    with JudgeServer(sometimes) as server:
        summary = falign.evaluate_judge(mine, "alpaca_eval", questions, judge=judge(server), out=tmp_path / "out")
        assert (summary.failures, summary.num_judgments) == (1, 6)
        assert summary.metrics["win_rate"].value == pytest.approx(np.mean([1, 1, 0, 0, 0]))
        row = lines(tmp_path / "out" / "judgments.jsonl")[-1]
        assert row["value"] is None
        assert "malformed" in row["problem"]
        server.rule = lambda message: "no idea"
        with pytest.raises(JudgeError, match="no verdict on any of 6 answers"):
            falign.evaluate_judge(mine, "alpaca_eval", questions, judge=judge(server, seed=1), out=tmp_path / "none")


def test_what_cannot_work_is_refused_before_the_judge_is_asked(tmp_path):
    questions = write(tmp_path / "q.jsonl", [{"uid": "a", "prompt": "Hi"}, {"uid": "b", "prompt": "Ho"}])
    answers = write(tmp_path / "a.jsonl", [{"uid": "a", "model": "m", "answer": "x"}])
    offline = {"url": "http://127.0.0.1:9/v1", "model": "judge", "retries": 0}

    def evaluate(*given, **options):
        falign.evaluate_judge(answers, *given, **{"judge": offline, "out": tmp_path / "out", **options})

    with pytest.raises(ConfigError, match="unknown; did you mean 'arena_hard'"):
        evaluate("arena-hard", questions)
    with pytest.raises(ConfigError, match="give `baseline`"):
        evaluate("arena_hard", questions)
    with pytest.raises(DataError, match="question 'b' has 1 turns, and 0 answers here"):
        evaluate("arena_hard", questions, baseline=answers)
    with pytest.raises(ConfigError, match="mode='single' is unknown"):
        evaluate("arena_hard", questions, mode="single")
    with pytest.raises(ConfigError, match="unknown key 'modle': did you mean model"):
        evaluate("arena_hard", questions, judge={"url": "http://x/v1", "modle": "m"})
    with pytest.raises(ConfigError, match="api_key is a secret by its name"):
        evaluate("arena_hard", questions, judge={"url": "http://x/v1", "model": "m", "api_key": "sk-1"})
    with pytest.raises(DataError, match="turns is None"):
        evaluate("mt_bench", questions)
    twice = write(tmp_path / "t.jsonl", [{"uid": "a", "prompt": "Hi"}] * 2)
    with pytest.raises(DataError, match=r"t\.jsonl:2: the question 'a' came before"):
        evaluate("arena_hard", twice)
    both = write(tmp_path / "b.jsonl", [{"uid": each, "model": each, "answer": "x"} for each in "ab"])
    with pytest.raises(DataError, match=r"answers of 'a' \(.*b\.jsonl:1\) and 'b'"):
        evaluate("arena_hard", questions, baseline=both)
    with pytest.raises(JudgeError, match="no connection"):
        evaluate("arena_hard", questions, baseline=answers, limit=1)


def test_the_command_writes_into_the_run_and_the_report_keeps_judges_apart(run, tmp_path, request):
    command_line = request.getfixturevalue("falign")
    questions = write(tmp_path / "q.jsonl", [{"question_id": i, "category": "math", "turns": ["Hi"]} for i in range(3)])
    config = tmp_path / "judge.yaml"
    with JudgeServer(longer) as server:
        for number in (1, 2):
            server.model = f"judge-{number}"
            config.write_text(json.dumps(judge(server)))
            name = ["--max-new-tokens", "6", "--name", f"by-{number}"]
            done = command_line("evaluate", "judge", run, "mt_bench", questions, "--judge", config, *name)
            assert done.status == 0, done.err
            assert f"mt_bench: run, 3 questions, by judge-{number}" in done.out
            assert re.search(r"score +│ \d", done.out)
        refused = command_line("evaluate", "judge", run, "mt_bench", questions, "--judge", config, *name)
        assert refused.status == 2
        assert "give another name or folder, or --overwrite to judge again" in refused.err
    page = write_report([run], tmp_path / "report.html").page.read_text()
    titles = re.findall(r"<h3>(mt_bench, single, by [\w-]+)</h3>", page)
    assert {"mt_bench, single, by judge-1", "mt_bench, single, by judge-2"} <= {*titles}
