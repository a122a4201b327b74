"""Whole online runs of a tiny model: prompts, rollouts, rewards and updates through the real trainer."""

import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from falign.errors import ConfigError, RewardError, RolloutError
from falign.training import parse_run, train
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

PENALISED = {"kind": "policy_gradient", "divergence": "reverse_kl", "beta": 0.05, "advantage": "leave_one_out"}


@pytest.fixture
def start(tiny, tmp_path):
    data = write_prompts(tmp_path / "prompts.jsonl")

    def run(name="run", resume=False, reward="vowels", console=None, **changes):
        config = parse_run(online_data(tiny, data, tmp_path / name, reward, **changes))
        return train(config, console=console or Console(quiet=True), resume=resume)

    return run


def adapter(summary):
    return load_file(summary.folder.adapter / "adapter_model.safetensors")


def completions(summary):
    return [json.loads(line) for line in summary.folder.completions_file.read_text(encoding="utf-8").splitlines()]


def training_logs(summary):
    return [log for log in summary.folder.metrics() if "loss" in log]


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "policy_gradient", "advantage": "leave_one_out"},
        PENALISED,
        {**PENALISED, "divergence": "jensen_shannon", "advantage": "group_centred", "level": "token"},
        {**PENALISED, "divergence": "forward_kl", "level": "vocabulary", "advantage": "group_normalised"},
        {"kind": "pairwise", "divergence": "reverse_kl", "beta": 0.1},
        {"kind": "token_pairwise", "divergence": "jensen_shannon", "beta": 0.1},
    ],
    ids=lambda objective: "-".join(str(value) for value in objective.values()),
)
def test_every_objective_learns_from_its_own_samples(start, objective):
    summary = start(objective=objective, training={"max_steps": 12})
    assert summary.after["reward"] > summary.before["reward"] + 0.3
    assert summary.before["divergence/reverse_kl"] == pytest.approx(0.0, abs=1e-4)
    assert summary.after["divergence/reverse_kl"] > 0.01


def test_several_updates_on_each_rollout_are_weighted_by_their_importance(start):
    objective = {**PENALISED, "clip_low": 0.2, "clip_high": 0.28, "importance": "token"}
    summary = start(objective=objective, rollout={"updates": 2, "minibatches": 2}, training={"max_steps": 16})
    assert summary.after["reward"] > summary.before["reward"]
    # Four updates on each rollout: a new one is sampled at the first of them alone.
    assert sorted({row["step"] for row in completions(summary)}) == [0, 4, 8, 12, 16]


def test_micro_batches_change_nothing_but_rounding(start):
    whole = start("whole", objective=PENALISED, training={"per_device_train_batch_size": 4})
    cut = start("cut", objective=PENALISED, training={"per_device_train_batch_size": 1})
    for name, value in adapter(whole).items():
        torch.testing.assert_close(adapter(cut)[name], value, rtol=2e-3, atol=2e-5)


def test_the_first_update_finds_the_sampler_and_the_trainer_in_agreement(start):
    summary = start(objective=PENALISED)
    gaps = [log["sampler/logprob_gap"] for log in training_logs(summary)]
    assert max(gaps) < 1e-5


def test_a_temperature_is_corrected_for_by_importance_weights(start):
    summary = start(objective=PENALISED, rollout={"temperature": 1.2, "completions": 8}, training={"max_steps": 12})
    logs = training_logs(summary)
    assert all(log["sampler/logprob_gap"] > 0.01 for log in logs)
    assert summary.after["reward"] > summary.before["reward"]


@pytest.mark.parametrize("stopped_at", [2, 3])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit_also_within_a_rollout(start, stopped_at):
    options = {
        "objective": PENALISED,
        "rollout": {"updates": 2},
        "training": {"save_steps": 1, "save_total_limit": None},
    }
    whole = start("whole", **options)
    broken = start("broken", **options)
    for checkpoint in broken.folder.path.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > stopped_at:
            shutil.rmtree(checkpoint)
    shutil.rmtree(broken.folder.adapter)
    resumed = start("broken", resume=True, **options)
    assert all(torch.equal(value, adapter(resumed)[name]) for name, value in adapter(whole).items())
    assert resumed.after == whole.after
    samples = [summary.folder.completions_file.read_text(encoding="utf-8") for summary in (whole, resumed)]
    assert samples[0].splitlines()[: len(samples[1].splitlines())] == samples[1].splitlines()


def test_prompts_outside_the_difficulty_range_are_replaced_and_counted(start):
    difficulty = {"low": 0.25, "high": 0.75, "max_rounds": 3}
    summary = start(reward="short", rollout={"difficulty": difficulty, "completions": 4}, objective=PENALISED)
    logs = training_logs(summary)
    assert any(log["rollout/prompts_sampled"] > 4 for log in logs)
    for log in logs:
        if log["rollout/prompts_unfit"] == 0:
            assert log["groups/all_pass"] == log["groups/all_fail"] == 0


def test_completions_are_written_down_with_what_they_were_worth(start):
    summary = start()
    rows = completions(summary)
    training = [row for row in rows if not row["held_out"]]
    assert len(training) == 6 * 4 * 4
    assert {row["finish_reason"] for row in training} <= {"stop", "length"}
    held_out = [row for row in rows if row["held_out"] and row["step"] == 6]
    mean = sum(row["reward"] for row in held_out) / len(held_out)
    assert mean == pytest.approx(summary.after["reward"])


def test_evaluation_estimates_passes_and_the_best_of_some(start):
    summary = start(reward="short")
    after = summary.after
    assert 0 < after["pass@1"] < after["pass@2"] < after["pass@16"] <= 1
    assert after["reward/best_of_16"] > after["reward/best_of_2"] > after["reward/best_of_1"]
    assert after["reward/best_of_1"] == pytest.approx(after["reward"]) == pytest.approx(after["pass@1"])


def test_completions_that_hit_the_limit_are_counted_with_advice(start, capsys):
    summary = start(
        console=Console(force_terminal=False, width=200), rollout={"ignore_stop": False, "max_new_tokens": 1}
    )
    assert all(log["completions/clipped"] > 0.9 for log in training_logs(summary))
    assert "rollout.max_new_tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reward", "message"),
    [("not_a_number", "the value is nan"), ("one_too_few", "returned 63 values for 64 completions")],
)
def test_a_reward_that_is_none_stops_the_run_and_is_named(start, reward, message):
    with pytest.raises(RewardError, match=message):
        start(reward=reward)


def test_where_all_rewards_are_equal_nothing_can_be_compared(start):
    with pytest.raises(RolloutError, match="all completions of the others have one reward"):
        start(reward="nothing", objective={"kind": "pairwise"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": []}, "rewards is empty"),
        ({"data": {"train": [{"path": "x.jsonl"}]}}, "data and prompts exclude each other"),
        ({"training": {"gradient_accumulation_steps": 2}}, "are of offline runs"),
        ({"rollout": {"minibatches": 5}}, "rollout.minibatches=5 is more than rollout.prompts=4"),
        ({"reference": {"cache": "somewhere"}}, "every completion of an online run is new"),
        ({"prompts": {"eval_size": 0}, "training": {"eval_steps": 2}}, "training.eval_steps needs prompts.eval"),
        ({"prompts": {"max_length": 4000}}, "is more than the"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sampled(start, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        start(**changes)
    assert not (tmp_path / "run").exists()
