"""Evaluations of runs that have references of several names, or none named ``reference``."""

import json

import pytest
import torch
from rich.console import Console

import falign
from falign.errors import ConfigError
from falign.models import load_model, load_tokenizer
from falign.runfile import parse_run
from falign.training import train
from tests.evaluation.scoring import dense
from tests.models.tiny import save_tiny
from tests.training.pairs import run_data, write_pairs

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

QUIET = Console(quiet=True)


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl")


@pytest.fixture
def run(tiny, pairs, tmp_path):
    """Train a run with a teacher of its own weights on the pairs that it is evaluated on; return its folder."""
    teacher = {"kind": "frozen", "path": str(save_tiny(tmp_path / "teacher", seed=3))}

    def start(objective, *names, **changes):
        data = {"eval": [{"path": str(pairs), "chat": False}], "eval_size": 0, "max_length": 64}
        references = {"teacher": teacher, **{name: {} for name in names}}
        content = run_data(tiny, pairs, tmp_path / "run", data=data, training={"max_steps": 2}, **changes)
        config = parse_run({**content, "objective": objective, "references": references})
        return str(train(config, console=QUIET).folder.path)

    return start


def test_a_reward_that_reads_another_reference_is_that_of_the_training(run, pairs, tiny, tmp_path):
    path = run({"kind": "tests.evaluation.own_objective:NearTeacher", "beta": 0.5}, "reference")
    logged = falign.load(path).summary.after
    totals = falign.score(path, pairs, tmp_path / "scores.jsonl", trust_code=True, console=QUIET)
    assert totals.completions == 48
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    for side, preference in (("chosen", 1.0), ("rejected", 0.0)):
        rewards = [row["implicit_reward"] for row in rows if row["preference"] == preference]
        assert sum(rewards) / len(rewards) == pytest.approx(logged[f"rewards/{side}"], abs=2e-5)
    # Log-ratios are to the main reference, here the model before its training, and not to the teacher.
    prompt_ids, ids = load_tokenizer(tiny)("question 0: ")["input_ids"], rows[0]["token_ids"]
    base = dense(load_model(tiny), prompt_ids, ids).gather(1, torch.tensor(ids)[:, None]).flatten().tolist()
    assert rows[0]["reference_logprobs"] == pytest.approx(base, abs=1e-4)

    options = {"trust_code": True, "console": QUIET}
    summary = falign.evaluate_rewards(path, "preferences", str(pairs), num_resamples=5, **options)
    assert summary.record["references.teacher.kind"] == "frozen_model"
    items = map(json.loads, (tmp_path / "run/evaluation/preferences/items.jsonl").read_text().splitlines())
    scored = [score for item in items for score in item["scores"]["implicit_reward"]]
    assert scored == pytest.approx([row["implicit_reward"] for row in rows], abs=1e-4)

    samples = {"num_completions": 1, "max_new_tokens": 2, "limit": 1, "anchors": False}
    sampled = falign.evaluate_samples(path, prompts=str(pairs), chat=False, rewards=path, **samples, **options)
    assert sampled.metrics["reward"].value < -1
    assert "references.teacher.kind" in sampled.record["rewards"]


def test_a_run_without_a_main_reference_is_compared_with_a_given_model_only(run, pairs, tiny, tmp_path):
    supervised = {"kind": "supervised", "divergence": None, "beta": None}
    path = run(supervised, measures={"away": "divergence_to(forward_kl, teacher)"})
    message = r"no reference named 'reference' to compare the policy with; .*run\.yaml names teacher under references: "
    with pytest.raises(ConfigError, match=message + "export the run as a merged model, and score that with reference="):
        falign.evaluate_rewards(path, "preferences", str(pairs), console=QUIET)
    (tmp_path / "rewards.yaml").write_text("- {kind: words, words: [e]}\n")
    options = {"prompts": str(pairs), "chat": False, "rewards": str(tmp_path / "rewards.yaml"), "limit": 1}
    options |= {"num_completions": 1, "max_new_tokens": 2, "anchors": False, "console": QUIET}
    alone = falign.evaluate_samples(path, name="alone", **options)
    assert (alone.reference, alone.frontier) == (None, None)
    assert not any(name.startswith("divergence") for name in alone.metrics)
    compared = falign.evaluate_samples(path, name="compared", reference=str(tiny), **options)
    assert compared.metrics["divergence/reverse_kl/vocabulary"].value > 0
