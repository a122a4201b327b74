"""``falign evaluate samples`` and ``falign evaluate frontier`` as a user types them."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from rich.console import Console

from falign.cli import main
from falign.evaluation import ScoreOutput
from falign.evaluation.loading import load_run
from falign.models import load_model
from falign.runfile import parse_run
from falign.scoring import PromptTree, completion_scores, pad
from falign.training import train
from tests.models.tiny import save_tiny
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

FILES = ("samples.jsonl", "reference_samples.jsonl", "summary.json")
CHI2 = {"kind": "policy_gradient", "divergence": "pearson_chi2", "beta": 0.02, "advantage": "leave_one_out"}

SOMETIMES = """
import pathlib

STOP = pathlib.Path(__file__).with_name("stop")


def vowels(prompts, completions, answer, **columns):
    assert len(answer) == len(completions)
    if STOP.exists() and 3 in answer:
        raise RuntimeError("the power went")
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, an online run with a checkpoint and an offline run."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_tiny(folder / "tiny")
    prompts, pairs = write_prompts(folder / "prompts.jsonl"), write_pairs(folder / "pairs.jsonl")
    training = {"max_steps": 4, "save_steps": 2, "save_total_limit": None}
    rollout = {"evaluation": {"completions": 4}}
    online = online_data(model, prompts, folder / "online", objective=CHI2, rollout=rollout, training=training)
    offline = run_data(model, pairs, folder / "offline")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for run in (online, offline):
            train(parse_run(run), console=Console(quiet=True))
    return folder


@pytest.fixture(autouse=True)
def _working_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("sometimes", None)


def rows_of(folder, name="samples.jsonl"):
    return [json.loads(line, parse_constant=pytest.fail) for line in (folder / name).read_text().splitlines()]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)


def write_rewards(tmp_path, function="sometimes:vowels"):
    (tmp_path / "sometimes.py").write_text(SOMETIMES)
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": [{"function": function}]}))
    return tmp_path / "rewards.yaml"


@pytest.fixture(scope="module")
def evaluated(folder):
    """The online run's evaluation, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(
            sys, "argv", ["falign", "evaluate", "samples", str(folder / "online"), "--limit", "3", "--trust-code"]
        )
        with pytest.raises(SystemExit) as stopped:
            main()
    assert not stopped.value.code
    return folder / "online" / "evaluation" / "samples"


def test_an_online_run_is_evaluated_as_it_evaluates_itself(evaluated, folder):
    summary, rows = summary_of(evaluated), rows_of(evaluated)
    assert (summary["kind"], summary["num_prompts"], summary["num_completions"]) == ("samples", 3, 4)
    assert (summary["divergence"], summary["beta"], summary["pass_reward"]) == ("pearson_chi2", 0.02, 1.0)
    assert summary["sampling"]["max_new_tokens"] == 8
    assert len(rows) == len(rows_of(evaluated, "reference_samples.jsonl")) == 12
    rewards = [sum(letter in "aeiou" for letter in row["completion"]) for row in rows]
    assert [row["reward"] for row in rows] == rewards
    metric = summary["metrics"]["reward"]
    assert metric["value"] == pytest.approx(sum(rewards) / 12)
    assert metric["low"] <= metric["value"] <= metric["high"]
    wanted = {"pass@4", "reward/best_of_4", "self_bleu", "distinct-2", "entropy", "reference/reward"}
    wanted |= {f"divergence/{name}" for name in ("reverse_kl", "forward_kl", "pearson_chi2", "total_variation")}
    wanted |= {"divergence/reverse_kl/vocabulary", "divergence/forward_kl/vocabulary", "reward/vowels"}
    assert wanted <= summary["metrics"].keys()
    assert "reference/entropy" not in summary["metrics"]
    frontier = summary["frontier"]
    assert frontier["points"][0]["divergence"] == summary["metrics"]["divergence/reverse_kl/vocabulary"]["value"]
    assert list(frontier["ideal"]) == ["reverse_kl", "forward_kl", "jensen_shannon", "pearson_chi2"]


def test_logprobs_are_those_of_policy_and_reference_and_the_divergence_is_over_the_vocabulary(evaluated, folder):
    scored, base = load_run(str(folder / "online"), max_length=None, any_objective=True), load_model(folder / "tiny")
    policy, base = scored.policy.eval(), base.eval()
    for name, reverse in (("samples.jsonl", True), ("reference_samples.jsonl", False)):
        for row in rows_of(evaluated, name)[:2]:
            prompt = scored.tokenizer(row["prompt"])["input_ids"]
            ids = torch.tensor([[*prompt, *row["token_ids"]]])
            with torch.no_grad():
                ours, theirs = (m(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for m in (policy, base))
            tree = pad([PromptTree(tuple(prompt), (tuple(row["token_ids"]),))], pad_token_id=1)
            assert row["logprob"] == pytest.approx(completion_scores(policy, tree).logprobs.sum().item(), abs=1e-4)
            chosen = torch.tensor(row["token_ids"])[:, None]
            assert row["reference_logprob"] == pytest.approx(theirs.gather(1, chosen).sum().item(), abs=1e-4)
            first, second = (ours, theirs) if reverse else (theirs, ours)
            assert row["token_divergence"] == pytest.approx((first.exp() * (first - second)).sum().item(), abs=1e-4)
            assert row["entropy"] == pytest.approx(-(ours.exp() * ours).sum(-1).mean().item(), abs=1e-5)


def test_a_prompt_has_the_same_samples_whatever_stands_beside_it(falign, folder, tmp_path):
    prompts = [{"prompt": f"question {i}: "} for i in (5, 1, 5)]
    rewards = tmp_path / "rewards.yaml"
    rewards.write_text("- {kind: words, words: [e]}\n")
    found = []
    for name, chosen in (("three", prompts), ("one", prompts[1:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        status, _, err = falign(
            "evaluate", "samples", folder / "tiny", "--prompts", tmp_path / f"{name}.jsonl", "--rewards", rewards,
            "--num-completions", 3, "--max-new-tokens", 6, "--out", tmp_path / name, "--plain",
        )  # fmt: skip
        assert status == 0, err
        found.append([row["token_ids"] for row in rows_of(tmp_path / name)])
    three, one = found
    assert three[3:6] == one
    assert three[:3] != three[6:]  # a prompt that comes again is answered anew
    summary = summary_of(tmp_path / "one")
    assert (summary["reference"], summary["frontier"]) == (None, None)
    assert not any(name.startswith(("divergence", "pass@")) for name in summary["metrics"])


def stopping_at(path, finish):
    def dies(output):
        if output.path == path:
            raise KeyboardInterrupt
        finish(output)

    return dies


def test_an_evaluation_that_was_stopped_goes_on_and_ends_with_the_same_bytes(falign, folder, tmp_path, monkeypatch):
    rewards = write_rewards(tmp_path)

    def evaluate(name, *arguments):
        return falign(
            "evaluate", "samples", folder / "tiny", "--reference", folder / "tiny", "--prompts",
            folder / "prompts.jsonl", "--limit", 6, "--rewards", rewards, "--num-completions", 2, "--max-new-tokens", 4,
            "--prompts-per-batch", 2, "--out", tmp_path / name, "--plain", *arguments,
        )  # fmt: skip

    assert evaluate("whole")[0] == 0
    (tmp_path / "stop").touch()
    status, _, err = evaluate("broken")
    assert (status, "the power went" in err) == (2, True)
    partial = tmp_path / "broken" / ".samples.jsonl.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 4
    with partial.open("a") as file:  # half a row, as of a process that was killed while it wrote
        file.write('{"place": "')
    (tmp_path / "stop").unlink()
    status, _, err = evaluate("broken", "--seed", 5)
    assert (status, "seed (0 there, 5 now)" in err) == (2, True)
    status, _, err = evaluate("broken")
    assert status == 0, err
    for name in FILES[:2]:
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    broken, whole = summary_of(tmp_path / "broken"), summary_of(tmp_path / "whole")
    assert {**broken, "name": "whole"} == whole
    # A model is no distance from itself.
    assert whole["metrics"]["divergence/reverse_kl/vocabulary"]["value"] == pytest.approx(0, abs=1e-6)
    status, _, err = evaluate("broken")
    assert (status, "holds results" in err) == (2, True)
    with monkeypatch.context() as patch:  # between the names of the two
        patch.setattr(ScoreOutput, "finish", stopping_at(tmp_path / "between" / FILES[0], ScoreOutput.finish))
        assert evaluate("between")[0] != 0
    assert (tmp_path / "between" / FILES[1]).exists()
    status, _, err = evaluate("between")
    assert status == 0, err
    for name in FILES[:2]:
        assert (tmp_path / "between" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    content = {file.name: file.read_bytes() for file in (tmp_path / "broken").iterdir()}
    (tmp_path / "stop").touch()
    assert evaluate("broken", "--overwrite")[0] == 2
    there = {name: (tmp_path / "broken" / name).read_bytes() for name in content}
    assert there == content, "what was there stays until the new is whole"
    (tmp_path / "stop").unlink()
    assert evaluate("broken", "--overwrite", "--no-anchors")[0] == 0
    assert not (tmp_path / "broken" / "reference_samples.jsonl").exists()
    assert summary_of(tmp_path / "broken")["frontier"] is None


def test_an_offline_run_answers_its_held_out_prompts_under_its_own_implicit_reward(falign, folder):
    run = folder / "offline"
    status, _, err = falign("evaluate", "samples", run)
    assert (status, "was trained on preferences and has no rewards: give --rewards" in err) == (2, True)
    status, _, err = falign(
        "evaluate", "samples", run, "--rewards", run, "--num-completions", 2, "--max-new-tokens", 5, "--name", "own"
    )
    assert status == 0, err
    rows, summary = rows_of(run / "evaluation" / "own"), summary_of(run / "evaluation" / "own")
    assert summary["num_prompts"] == 6
    scored = load_run(str(run), max_length=None)
    for row in rows:
        log_ratio = torch.tensor(row["logprob"] - row["reference_logprob"], dtype=torch.float64)
        expected = 0.5 * scored.objective.divergence.f_prime(log_ratio).item()
        assert row["reward"] == row["parts"]["implicit"] == pytest.approx(expected, abs=1e-4)
    assert "pass@1" not in summary["metrics"]


def test_a_checkpoint_is_measured_and_drawn_with_the_run(falign, folder, evaluated, tmp_path):
    status, _, err = falign("evaluate", "samples", folder / "online", "--trust-code", "--limit", 3, "--checkpoint", 2)
    assert status == 0, err
    half = folder / "online" / "evaluation" / "samples-2"
    assert rows_of(half)[0]["logprob"] != rows_of(evaluated)[0]["logprob"]
    # The reference is the same, and so is what it writes.
    references = [rows_of(each, "reference_samples.jsonl") for each in (half, evaluated)]
    assert [row["token_ids"] for row in references[0]] == [row["token_ids"] for row in references[1]]
    status, table, err = falign("evaluate", "frontier", folder / "online", "--out", tmp_path / "frontier.json")
    assert status == 0, err
    data = json.loads((tmp_path / "frontier.json").read_text())
    assert [point["label"] for point in data["points"]] == ["online, step 2", "online"]
    assert data["best_of_n"] == summary_of(evaluated)["frontier"]["best_of_n"]
    assert data["points"][1]["reward"] == summary_of(evaluated)["metrics"]["reward"]["value"]
    assert "best of 4" in table
    command = ("evaluate", "frontier", folder / "online", "--name", "samples", "--divergence", "jensen_shannon")
    status, _, err = falign(*command, "--out", tmp_path / "frontier.png")
    assert status == 0, err
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    status, _, err = falign("evaluate", "samples", folder / "online", "--trust-code", "--checkpoint", 3)
    assert (status, "no checkpoint of step 3; it has [2, 4]" in err) == (2, True)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_evaluation_is_named_with_its_file(falign, evaluated, tmp_path, name):
    shutil.copytree(evaluated, tmp_path / "damaged")
    file = tmp_path / "damaged" / name
    file.write_bytes(file.read_bytes()[: -file.stat().st_size // 3])
    status, _, err = falign("evaluate", "frontier", tmp_path / "damaged", "--out", tmp_path / "f.png")
    assert (status, err.startswith(f"error: {file} is damaged")) == (2, True), err
    file.write_bytes(file.read_bytes() if name == "summary.json" else b"")
    status, _, err = falign("evaluate", "frontier", tmp_path / "damaged", "--out", tmp_path / "f.png")
    assert (status, f"{file} is damaged" in err) == (2, True), err


def test_a_picture_without_a_folder_and_an_unknown_divergence_are_refused(falign, evaluated, tmp_path):
    for out in ("nowhere/f.png", "nowhere/f.json"):
        status, _, err = falign("evaluate", "frontier", evaluated, "--out", out)
        assert (status, f"--out {out}: " in err) == (2, True), err
    status, _, err = falign("evaluate", "frontier", evaluated, "--out", "f.json", "--divergence", "jss")
    assert (status, "--divergence 'jss' is unknown" in err) == (2, True), err


def test_what_is_measured_otherwise_is_not_drawn_together(falign, folder, evaluated, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(evaluated, other)
    summary = summary_of(other)
    summary["record"]["prompts"] = "others"
    (other / "summary.json").write_text(json.dumps(summary))
    status, _, err = falign("evaluate", "frontier", evaluated, other, "--out", tmp_path / "f.png")
    assert (status, "differ in prompts" in err) == (2, True)
    status, _, err = falign("evaluate", "frontier", folder / "tiny", "--out", tmp_path / "f.png")
    assert (status, "has no finished evaluation of samples" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny",), "so it has no place for results: give --out DIR"),
        (("tiny", "--out", "out"), "is not a run folder and has no prompts of its own: give --prompts FILE"),
        (("tiny", "--out", "out", "--prompts", "prompts.jsonl"), "is not a run folder and has no rewards"),
        (("tiny", "--out", "out", "--checkpoint", 3), "--checkpoint applies only to runs"),
        (("online", "--template", "{prompt}"), "--template applies only to --prompts"),
        (("online", "--dtype", "float32"), "is a run, which has its own"),
        (("online", "--no-anchors", "--num-reference-completions", 4), "has no effect with --no-anchors: leave one"),
        (("online", "--name", "a/b"), "must be the name of a folder"),
        (("online", "--name", "x", "--pass-reward", "nan"), "--pass-reward nan"),
        (("online", "--name", ".."), "must be the name of a folder"),
        (("tiny", "--out", "out", "--prompts", "prompts.jsonl", "--divergence", "js"), "give --reference MODEL"),
        (("online", "--name", "x", "--divergence", "kl"), "'kl' does not say which"),
        (("online", "--name", "x", "--divergence", "js", "--temperature", "0.5"), "--divergence needs --temperature 1"),
        (("online", "--name", "x", "--rewards", "nothing.yaml"), "nothing.yaml"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(falign, folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    status, _, err = falign("evaluate", "samples", *arguments, "--trust-code")
    assert (status, message in err) == (2, True), err


def test_a_reward_model_that_reads_other_token_ids_is_refused(falign, folder, tmp_path):
    other = save_tiny(tmp_path / "other", seed=3)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    rewards = [{"kind": "implicit", "path": str(other), "reference": str(folder / "tiny")}]
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": rewards}))
    options = ("--rewards", tmp_path / "rewards.yaml", "--out", tmp_path / "out")
    status, _, err = falign("evaluate", "samples", folder / "online", *options)
    assert status == 2
    assert "other have different tokens: 'a' has the id" in err


def test_rows_that_rewards_cannot_judge_are_found_before_sampling(falign, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("falign.rollouts.TransformersEngine.sample", None)
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"rewards": [{"kind": "choice", "answer": "answer"}]}))
    arguments = ("evaluate", "samples", folder / "online", "--rewards", tmp_path / "rewards.yaml", "--name", "x")
    status, _, err = falign(*arguments)
    assert (status, "reward choice: " in err, "prompts.jsonl:" in err) == (2, True, True), err
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one", "answer": "A"}\n{"prompt": "two", "answer": null}\n')
    status, _, err = falign(*arguments, "--prompts", tmp_path / "rows.jsonl", "--plain")
    assert (status, "rows.jsonl:2: reward choice: the answer is missing" in err) == (2, True), err


def test_a_greedy_answer_has_rewards_and_no_divergence(falign, folder):
    arguments = ("--temperature", 0, "--num-completions", 1, "--limit", 2, "--name", "greedy")
    status, _, err = falign("evaluate", "samples", folder / "online", "--trust-code", *arguments)
    assert status == 0, err
    summary = summary_of(folder / "online" / "evaluation" / "greedy")
    assert summary["frontier"] is None
    assert {"reward", "pass@1", "entropy"} <= summary["metrics"].keys()
    assert not any(name.startswith(("divergence", "self_bleu")) for name in summary["metrics"])
    status, _, err = falign("evaluate", "frontier", folder / "online", "--name", "greedy", "--out", "f.png")
    assert (status, "has no divergences: sample with --reference MODEL and --temperature 1" in err) == (2, True)
