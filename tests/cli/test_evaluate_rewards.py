"""``falign evaluate rewards`` as a user types it."""

import gzip
import hashlib
import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from falign.evaluation import benchmarks
from tests.models.tiny import VOCABULARY, save_tiny, tiny_tokenizer
from tests.training.pairs import run_data, write_pairs

# transformers moves batches to pinned memory when asked to, and warns on a machine without an accelerator.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

CHECK = Path(__file__).parents[2] / "scripts" / "check_benchmark.py"
FEW = ("--resamples", 20)
ALL = ["implicit_reward", "length_normalised", "log_ratio", "logprob", "mean_logprob", "length", "random"]


@pytest.fixture
def base(tmp_path):
    """A model so near to the tiny one that no reward saturates."""
    save_tiny(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.005)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl")


@pytest.fixture
def rm_bench(tmp_path):
    """Six made items in RM-Bench's schema, one of them too long for a small window."""
    rows = [
        {
            "id": i,
            "prompt": f"Add {i} and {i + 1}." + (" Take your time." * 20 if i == 4 else ""),
            "chosen": [
                f"{2 * i + 1}",
                f"The sum is {2 * i + 1}, as {i} and {i + 1} are added.",
                f"**{2 * i + 1}**\n- sum",
            ],
            "rejected": [f"{i * i}", f"It is {i * i}, since both are multiplied.", f"# Answer\n{i * i}, *surely*"],
        }
        for i in range(6)
    ]
    file = tmp_path / "code_filtered.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def evaluate(falign, tiny, base, rm_bench, tmp_path):
    """Evaluate the tiny model against one near it; ``*arguments`` come on top."""

    def run(
        *arguments, model=tiny, benchmark="rm_bench", file=rm_bench, out=tmp_path / "out", reference=base, **options
    ):
        against = [] if reference is None else ["--reference", reference]
        place = [] if out is None else ["--out", out]
        return falign("evaluate", "rewards", model, benchmark, file, *place, *against, *FEW, *arguments, **options)

    return run


@pytest.fixture
def train(falign, tiny, pairs, tmp_path):
    """Train a tiny run that evaluates on the rows it has trained on, and return its folder."""

    def run(name="run", adapter=None, **changes):
        data = {"eval": [{"path": str(pairs), "chat": False}], "eval_size": 0, "max_length": 64}
        content = run_data(tiny, pairs, tmp_path / name, data=data, **changes)
        content["adapter"] = adapter or content["adapter"]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        status, _, err = falign("train", tmp_path / f"{name}.yaml")
        assert status == 0, err
        return tmp_path / name

    return run


def test_the_help_names_every_benchmark(falign):
    _, out, _ = falign("evaluate", "rewards", "--help")
    assert not [name for name in benchmarks.names() if name not in out]


def rows_of(folder):
    return [json.loads(line, parse_constant=pytest.fail) for line in (folder / "items.jsonl").read_text().splitlines()]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)


def mean(rows, scorer, side):
    return sum(row["scores"][scorer][row["preference"].index(side)] for row in rows) / len(rows)


def assert_logged(folder, logged):
    rows, scorers = rows_of(folder), summary_of(folder)["scorers"]
    for side, preference in (("chosen", 1.0), ("rejected", 0.0)):
        assert mean(rows, "implicit_reward", preference) == pytest.approx(logged[f"rewards/{side}"], abs=1e-4)
        assert mean(rows, "log_ratio", preference) == pytest.approx(logged[f"logratios/{side}"], abs=1e-4)
        assert mean(rows, "logprob", preference) == pytest.approx(logged[f"logps/{side}"], abs=1e-3)
    margin = mean(rows, "implicit_reward", 1.0) - mean(rows, "implicit_reward", 0.0)
    assert margin == pytest.approx(logged["rewards/margins"], abs=1e-4)
    accuracy = scorers["implicit_reward"]["scores"]["score"]["value"]
    assert accuracy == pytest.approx(logged["rewards/accuracies"], abs=1e-4)


@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"divergence": "alpha(0.3)", "length_norm": "token"},
        {"kind": "listwise"},
        {"kind": "token_pairwise", "divergence": "total_variation", "alpha": 0.2},
    ],
    ids=["pairwise", "normalised", "listwise", "tdpo2"],
)
def test_a_run_on_its_training_rows_has_the_rewards_of_its_last_evaluation(falign, train, pairs, objective):
    run = train(objective=objective)
    status, table, err = falign("evaluate", "rewards", run, "preferences", pairs, *FEW, "--tokens-per-batch", 300)
    assert status == 0, err
    folder = run / "evaluation" / "preferences"
    logged = json.loads((run / "summary.json").read_text())["after"]
    assert abs(logged["rewards/margins"]) > 0.01
    assert_logged(folder, logged)
    assert str(folder) in table
    summary = summary_of(folder)
    assert [*summary["scorers"]] == ALL
    assert summary["divergence"] == objective.get("divergence", "jensen_shannon")
    assert (summary["beta"], summary["reference"], summary["num_items"]) == (0.5, "adapter_off", 24)


def test_a_run_on_its_training_rows_has_the_rewards_that_it_logged_last(falign, train, pairs):
    """The last step's log is of the state before it; here that step changes nothing, and its batch is all rows."""
    tuned = train("tuned", training={"learning_rate": 0.02})
    still = {"learning_rate": 1e-12, "max_steps": 1, "per_device_train_batch_size": 24}
    run = train(adapter={"init": str(tuned)}, reference={"kind": "adapter_off"}, training=still)
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [log for log in logs if "rewards/chosen" in log][-1]
    assert abs(logged["rewards/margins"]) > 0.01
    status, _, err = falign("evaluate", "rewards", run, "preferences", pairs, *FEW)
    assert status == 0, err
    assert_logged(run / "evaluation" / "preferences", logged)


def test_a_run_without_implicit_reward_has_log_ratios(falign, train, pairs):
    run = train(objective={"kind": "supervised", "divergence": "reverse_kl", "beta": 0.1})
    status, _, err = falign("evaluate", "rewards", run, "preferences", pairs, *FEW, "--name", "mine")
    assert status == 0, err
    summary = summary_of(run / "evaluation" / "mine")
    assert [*summary["scorers"]] == ALL[2:]
    assert (summary["name"], summary["divergence"], summary["beta"]) == ("mine", None, None)
    status, _, err = falign("evaluate", "rewards", run, "preferences", pairs, *FEW, "--scorers", "implicit_reward")
    assert status == 2
    assert "an objective with an implicit reward" in err


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_scores_are_those_of_transformers_alone(evaluate, rm_bench, tmp_path, monkeypatch, layout):
    options = ("--divergence", "jensen_shannon", "--beta", "0.3", "--layout", layout, "--tokens-per-batch", "500")
    status, _, err = evaluate(*options)
    assert status == 0, err
    assert_checked(tmp_path / "out", rm_bench, monkeypatch)


def assert_checked(out, file, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(CHECK), str(out), str(file)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(CHECK), run_name="__main__")
    assert stopped.value.code == 0


def test_llmbar_rows_have_the_scores_of_transformers_alone(evaluate, shared_data, tmp_path, monkeypatch):
    source, file = shared_data("llmbar/llmbar.jsonl.gz"), tmp_path / "llmbar.jsonl"
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        file.write_text("".join([line for line in lines if len(line) < 500][::12]))
    status, table, err = evaluate(benchmark="llmbar", file=file, columns=80)
    assert status == 0, err
    assert "…" not in table
    assert table.split().count("normalised") == 1
    assert {"random", "ECE"} <= set(table.split())
    assert summary_of(tmp_path / "out")["num_items"] >= 6
    assert_checked(tmp_path / "out", file, monkeypatch)


def test_rows_and_summary_have_what_the_page_says(evaluate, tmp_path, rm_bench):
    status, table, err = evaluate("--max-length", 128)
    assert status == 0, err
    rows, summary = rows_of(tmp_path / "out"), summary_of(tmp_path / "out")
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "5"]
    assert summary["skipped"] == {"longer than the window": 1}
    assert "longer than the window: 1" in err
    row = rows[0]
    assert [*row] == ["place", "id", "subset", "group", "preference", "num_tokens", "scores", "outcome"]
    assert row["place"].endswith("code_filtered.jsonl:1")
    assert row["preference"] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert row["scores"]["length"] == row["num_tokens"]
    assert row["scores"]["mean_logprob"] == pytest.approx(
        [a / n for a, n in zip(row["scores"]["logprob"], row["num_tokens"], strict=True)]
    )
    assert [*row["scores"]] == [*row["outcome"]] == [*summary["scorers"]] == ALL
    for name, scorer in summary["scorers"].items():
        accuracy = scorer["scores"]["accuracy"]
        assert accuracy["value"] == pytest.approx(sum(row["outcome"][name]["correct"] for row in rows) / len(rows))
        assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
        assert (scorer["calibration"] is None) == (name not in ("implicit_reward", "length_normalised"))
    bins = summary["scorers"]["implicit_reward"]["calibration"]["bins"]
    assert sum(each["count"] for each in bins) == 9 * len(rows)
    assert {key: summary[key] for key in ("kind", "name", "benchmark", "divergence", "beta", "num_items")} == {
        "kind": "rewards",
        "name": "out",
        "benchmark": "rm_bench",
        "divergence": "reverse_kl",
        "beta": 0.1,
        "num_items": 5,
    }
    assert summary["missing_subsets"] == ["chat", "math", "safety-refuse", "safety-response"]
    assert "the score needs all subsets (chat, math, " in table
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"items.jsonl", "summary.json"}


def test_long_items_are_cut_or_an_error_when_asked_for(evaluate, tmp_path):
    status, _, err = evaluate("--max-length", 128, "--long-items", "error")
    assert status == 2
    assert "code_filtered.jsonl:5: prompt and longest completion have" in err
    status, _, err = evaluate("--max-length", 128, "--long-items", "cut")
    assert status == 0, err
    assert summary_of(tmp_path / "out")["num_items"] == 6
    status, _, err = evaluate("--max-length", 8, out=tmp_path / "other")
    assert status == 2
    assert "no item can be scored: longer than the window: 6" in err
    assert not (tmp_path / "other").exists()


def test_an_empty_completion_is_counted_or_an_error_when_asked_for(evaluate, rm_bench, tmp_path):
    lines = rm_bench.read_text().splitlines()
    row = json.loads(lines[2])
    row["chosen"][1] = "  "
    rm_bench.write_text("\n".join([*lines[:2], json.dumps(row), *lines[3:]]) + "\n")
    status, _, err = evaluate()
    assert status == 0, err
    assert summary_of(tmp_path / "out")["skipped"] == {"bad row": 1}
    assert "code_filtered.jsonl:3" in err
    status, _, err = evaluate("--bad-rows", "error", "--overwrite")
    assert status == 2
    assert "code_filtered.jsonl:3: 'chosen[1]' is empty" in err


def test_a_model_alone_is_scored_by_its_log_probabilities(evaluate, tmp_path):
    assert evaluate(out=tmp_path / "compared")[0] == 0
    status, table, err = evaluate("--reference-free", reference=None)
    assert status == 0, err
    assert "implicit_reward" not in table
    summary = summary_of(tmp_path / "out")
    assert (summary["reference"], summary["divergence"], summary["beta"]) == (None, None, None)
    for row, other in zip(rows_of(tmp_path / "out"), rows_of(tmp_path / "compared"), strict=True):
        assert [*row["scores"]] == ["logprob", "mean_logprob", "length", "random"]
        assert row["scores"]["random"] == other["scores"]["random"]
        assert row["scores"]["logprob"] == pytest.approx(other["scores"]["logprob"], rel=1e-6)


def test_a_classifier_scores_beside_the_policy(evaluate, rm_bench, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, **sizes, num_labels=1, pad_token_id=2, initializer_range=0.5)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    tiny_tokenizer().save_pretrained(tmp_path / "classifier")
    status, table, err = evaluate("--classifier", tmp_path / "classifier", "--scorers", "random,classifier")
    assert status == 0, err
    assert "classifier" in table
    from falign.rewards.classifier import ClassifierReward, load_classifier

    reward = ClassifierReward(*load_classifier(tmp_path / "classifier"), text="chat")
    first = json.loads(rm_bench.read_text().splitlines()[0])
    expected = reward([first["prompt"]] * 6, [*first["chosen"], *first["rejected"]])
    row = rows_of(tmp_path / "out")[0]
    assert [*row["scores"]] == ["classifier", "random"]
    assert row["scores"]["classifier"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert summary_of(tmp_path / "out")["scorers"]["classifier"]["calibration"]["ece"] > 0


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {"benchmark": "rewardbenc"}, "did you mean 'rewardbench'"),
        ((), {"file": "missing.jsonl"}, "missing.jsonl: no such file"),
        ((), {"file": "pairs.jsonl"}, "It looks like preferences"),
        (("--subset", "cod"), {}, "did you mean 'code'"),
        (("--scorers", "lenght"), {}, "did you mean 'length'"),
        (("--scorers", "classifier"), {}, "give --classifier MODEL"),
        (("--scorers", " , "), {}, "--scorers is empty: give some of implicit_reward"),
        (("--beta", "inf"), {"model": "tiny"}, "--beta inf must be positive and finite"),
        ((), {"reference": None}, "give --reference MODEL"),
        (("--classifier-label", "good"), {}, "--classifier-text and --classifier-label need --classifier"),
        (("--seed", -1), {}, "greater than or equal to 0"),
        (("--reference-free",), {}, "--reference-free excludes what needs a reference, --reference: leave one out"),
        ((), {"out": None}, "give --out DIR"),
        (("--name", "a/b"), {"out": None}, "--name a/b must be the name of a folder"),
        (("--long-items", "keep"), {}, "'skip'"),
        (("--layout", "trees"), {}, "did you mean 'tree'"),
        (("--chat",), {}, "--chat applies only to preferences"),
    ],
)
def test_a_mistake_is_told_before_a_model_is_loaded(
    evaluate, pairs, tmp_path, monkeypatch, arguments, options, message
):
    monkeypatch.chdir(tmp_path)
    before = {file.name for file in tmp_path.iterdir()}
    status, _, err = evaluate(*arguments, **{"model": "nowhere/at-all/here", **options})
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert {file.name for file in tmp_path.iterdir()} == before


def test_a_run_is_scored_as_it_was_trained(falign, train, pairs):
    run = train(training={"max_steps": 1})
    options = ("--divergence", "js", "--reference", "base", "--reference-free")
    status, _, err = falign("evaluate", "rewards", run, "preferences", pairs, *FEW, *options)
    assert status == 2
    assert "--reference, --divergence, --reference-free would change its" in err


def test_results_are_replaced_only_when_asked_for_and_other_settings_do_not_go_on(evaluate, tmp_path, monkeypatch):
    from falign.evaluation import ScoreOutput

    out, append, calls = tmp_path / "out", ScoreOutput.append, []

    def dies(self, rows):
        calls.append(rows)
        if len(calls) > 2:
            raise KeyboardInterrupt
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ScoreOutput, "append", dies)
        assert evaluate("--tokens-per-batch", 2)[0] != 0
    assert {file.name for file in out.iterdir()} == {
        f".items.jsonl.partial.{end}" for end in ("json", "jsonl", "sha256")
    }
    status, _, err = evaluate("--beta", "0.7", "--seed", 3)
    assert status == 2
    assert "objective.beta (0.1 there, 0.7 now)" in err
    assert "seed (0 there, 3 now)" in err
    status, _, err = evaluate("--tokens-per-batch", 2)
    assert status == 0, err
    assert "continuing after 2 items of an earlier call" in err
    whole = (out / "items.jsonl").read_bytes()
    status, _, err = evaluate()
    assert status == 2
    assert f"{out} holds results" in err
    assert evaluate("--tokens-per-batch", 2, "--overwrite")[0] == 0
    assert (out / "items.jsonl").read_bytes() == whole
    with monkeypatch.context() as patch:
        patch.setattr(ScoreOutput, "append", dies)
        assert evaluate("--tokens-per-batch", 2, "--overwrite")[0] != 0
    assert (out / "items.jsonl").read_bytes() == whole, "what was there stays until the new is whole"
    assert summary_of(out)["files"] == {"items.jsonl": hashlib.sha256(whole).hexdigest()}


def test_a_killed_call_goes_on_and_ends_with_the_same_numbers(evaluate, tiny, base, pairs, tmp_path):
    write_pairs(pairs, n=600)
    out, partial = tmp_path / "out", tmp_path / "out" / ".items.jsonl.partial.jsonl"
    options = ["--out", out, "--reference", base, "--plain", "--tokens-per-batch", 100, *FEW]
    code = "from falign.cli import main; main()"
    command = [sys.executable, "-c", code, "evaluate", "rewards", tiny, "preferences", pairs, *options]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size > 10_000) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "items.jsonl").exists()
    again = {"benchmark": "preferences", "file": pairs}
    status, _, err = evaluate("--plain", "--tokens-per-batch", 100, **again)
    assert status == 0, err
    assert "of an earlier call" in err
    assert evaluate("--plain", "--tokens-per-batch", 100, **again, out=tmp_path / "whole")[0] == 0
    assert (out / "items.jsonl").read_bytes() == (tmp_path / "whole" / "items.jsonl").read_bytes()
    summary, whole = summary_of(out), summary_of(tmp_path / "whole")
    assert {**summary, "name": None} == {**whole, "name": None}
