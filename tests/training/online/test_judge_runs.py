"""Runs whose reward is an LLM judge, over real HTTP: scores, pairs, a budget, and a resumed run that pays nothing."""

import json

import pytest

import falign
from falign.divergences import ReverseKL
from falign.errors import ConfigError, JudgeError
from falign.judges import RATE, Endpoint, Judge, ScoreForm
from falign.objectives import PolicyGradient
from falign.rewards import JudgeReward
from falign.runfile import load_run_file, parse_run
from falign.training import train
from tests.judges.server import JudgeServer, by, longer
from tests.models.tiny import save_tiny
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

SECRET = "a-key-that-nobody-may-see"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    write_prompts(folder / "prompts.jsonl")
    save_tiny(folder / "tiny")
    return folder


def run_file(folder, name, rewards, **changes):
    training = {"max_steps": 2, "save_steps": 1, **changes.pop("training", {})}
    return online_data(
        folder / "tiny", folder / "prompts.jsonl", folder / name, rewards=rewards, training=training, **changes
    )


def letters(message):
    return by(lambda text: sum(map(str.isalpha, text)), message, lambda count: 1 + min(count, 9))


def logs(run):
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_a_run_learns_from_scores_and_a_resumed_one_asks_nothing_twice(folder, monkeypatch):
    monkeypatch.setenv("THE_KEY", SECRET)
    with JudgeServer(letters) as server:
        endpoint = {"url": server.url, "model": "judge", "api_key_env": "THE_KEY", "price_prompt": 0}
        endpoint |= {"price_completion": 1e6 / 7, "cache": str(folder / "cache.sqlite"), "budget": 30, "concurrency": 2}
        rewards = [{"kind": "judge", "endpoint": endpoint}]
        small = {"rollout": {"evaluation": {"completions": 2}}}
        # Eight answers before training and sixteen at each step, each of which costs 1.
        with pytest.raises(JudgeError, match=r"budget of the judge 'judge' is spent: 3[01]\.0000 of 30"):
            train(parse_run(run_file(folder, "scores", rewards, **small)))
        spent = len(server.log)
        endpoint["budget"] = 100.0
        train(parse_run(run_file(folder, "scores", rewards, **small)), resume=True)
        asked = [json.dumps(body["messages"]) for body in server.log]
        assert len(asked) > spent >= 30
        assert len(set(asked)) == len(asked)  # no question of the interrupted run was asked again
        for file in folder.rglob("*"):
            assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
        changed = [{"kind": "judge", "endpoint": {**endpoint, "model": "other"}}]
        with pytest.raises(ConfigError, match=r"rewards.0.endpoint.model \('judge' when it began"):
            train(parse_run(run_file(folder, "scores", changed, training={"max_steps": 3}, **small)), resume=True)
    run = falign.load(folder / "scores")
    assert [log["step"] for log in logs(run)] == [1, 2]
    assert all(1 < log["reward"] <= 10 for log in logs(run))
    assert len(run.folder.read_inputs()["hashes"]["rewards"]["judge"]) == 64


def test_a_judge_of_a_program_may_get_another_budget(folder):
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    with JudgeServer(letters) as server:
        limits = {"price_prompt": 0, "price_completion": 1e6 / 7, "cache": folder / "own.sqlite", "concurrency": 1}

        def start(budget, resume=False, **fields):
            endpoint = Endpoint(url=server.url, model="judge", budget=budget, **limits, **fields)
            return falign.train(
                str(folder / "tiny"),
                output_dir=folder / "program",
                prompts={"train": {"rows": rows, "chat": False}, "max_length": 64},
                rewards=[JudgeReward(Judge(endpoint, RATE, ScoreForm()))],
                objective=PolicyGradient(ReverseKL(), beta=0.1),
                adapter=falign.Lora(r=4, alpha=8),
                rollout={"prompts": 2, "completions": 4, "max_new_tokens": 8},
                training={"max_steps": 2, "save_steps": 1, "learning_rate": 0.02, "per_device_train_batch_size": 4},
                resume=resume,
            )

        with pytest.raises(JudgeError, match="budget"):
            start(10)
        with pytest.raises(ConfigError, match="holds a run with other settings"):
            start(100, resume=True, temperature=0.5)
        assert (start(100, resume=True).path / "summary.json").is_file()


def test_online_f_dpo_learns_from_pairs_of_a_judge(folder):
    with JudgeServer(longer) as server:
        rewards = [{"kind": "judge_oracle", "endpoint": {"url": server.url, "model": "judge"}}]
        objective = {"kind": "pairwise", "divergence": "jensen_shannon", "beta": 0.1}
        two = {"completions": 2, "evaluation": {"completions": 2}}
        train(parse_run(run_file(folder, "pairs", rewards, objective=objective, rollout=two)))
    for log in logs(falign.load(folder / "pairs")):
        assert log["reward"] == pytest.approx(0.5)
        assert log["reward/judge_oracle/position_bias"] == 0.0


def test_the_run_file_of_a_judge_runs_against_a_server(folder, tmp_path):
    with JudgeServer(longer) as server:
        config = load_run_file(
            "configs/judge-polite.yaml",
            [
                f"output_dir={tmp_path / 'run'}",
                f"model.path={folder / 'tiny'}",
                "prompts.train.0.chat=false",
                "training.max_steps=1",
                f"rewards.0.endpoint.url={server.url}",
                "rewards.0.endpoint.model=judge",
                f"rewards.0.endpoint.cache={tmp_path / 'cache'}",
            ],
        )
        train(config)
    assert "reward/judge_oracle/tie" in logs(falign.load(tmp_path / "run"))[0]


def test_a_mistake_in_the_endpoint_is_named_with_its_place(folder):
    rewards = [{"kind": "judge", "endpoint": {"url": "http://127.0.0.1:9/v1", "modle": "judge"}}]
    with pytest.raises(
        ConfigError, match=r"unknown key 'rewards.0.endpoint.modle': did you mean rewards.0.endpoint.model"
    ):
        parse_run(run_file(folder, "mistake", rewards))
    rewards = [{"kind": "judge", "endpoint": {"url": "http://127.0.0.1:9/v1", "model": "m", "api_key": "sk-1"}}]
    with pytest.raises(ConfigError, match=r"rewards.0.endpoint.api_key is a secret by its name"):
        parse_run(run_file(folder, "mistake", rewards))
