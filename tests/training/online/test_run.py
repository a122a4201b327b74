"""Whole online runs of a tiny model: prompts, rollouts, rewards and updates through the real trainer."""

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from falign.errors import ConfigError, RewardError, RolloutError, TrainingError
from falign.references import AdapterOff
from falign.runfile import parse_run
from falign.runs.checkpoints import log_marks, seal
from falign.training import train
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

PENALIZED = {"kind": "policy_gradient", "divergence": "reverse_kl", "beta": 0.05, "advantage": "leave_one_out"}


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
        PENALIZED,
        {**PENALIZED, "divergence": "jensen_shannon", "advantage": "group_centred", "level": "token"},
        {**PENALIZED, "divergence": "forward_kl", "level": "vocabulary", "advantage": "group_normalised"},
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
    objective = {**PENALIZED, "clip_low": 0.2, "clip_high": 0.28, "importance": "token"}
    summary = start(objective=objective, rollout={"updates": 2, "minibatches": 2}, training={"max_steps": 16})
    assert summary.after["reward"] > summary.before["reward"]
    # Four updates on each rollout: a new one is sampled at the first of them alone.
    assert sorted({row["step"] for row in completions(summary)}) == [0, 4, 8, 12, 16]


def test_micro_batches_change_nothing_but_rounding(start):
    whole = start("whole", objective=PENALIZED, training={"per_device_train_batch_size": 4})
    cut = start("cut", objective=PENALIZED, training={"per_device_train_batch_size": 1})
    for name, value in adapter(whole).items():
        torch.testing.assert_close(adapter(cut)[name], value, rtol=2e-3, atol=2e-5)


def test_a_policy_that_is_its_reference_yet_has_no_penalty_to_pay_not_even_a_baseline(start):
    summary = start(objective=PENALIZED, rollout={"ignore_stop": True}, training={"max_steps": 1})
    # Advantages of completions of one length sum to 0, and log u is 0 for all of them.
    assert training_logs(summary)[0]["loss"] == pytest.approx(0.0, abs=1e-4)


def test_the_first_update_finds_the_sampler_and_the_trainer_in_agreement(start):
    summary = start(objective=PENALIZED)
    for log in training_logs(summary):
        assert log["sampler/logprob_gap"] < 1e-5
        assert log["sampler/logprob_gap"] < log["sampler/logprob_gap_max"] < 1e-4


def test_a_temperature_is_corrected_for_by_importance_weights(start):
    summary = start(objective=PENALIZED, rollout={"temperature": 1.2, "completions": 8}, training={"max_steps": 12})
    logs = training_logs(summary)
    assert all(log["sampler/logprob_gap"] > 0.01 for log in logs)
    assert summary.after["reward"] > summary.before["reward"]


@pytest.mark.parametrize("stopped_at", [2, 3])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit_also_within_a_rollout(start, stopped_at):
    options = {
        "objective": PENALIZED,
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


@pytest.mark.parametrize("evaluates", [None, 6])
def test_a_run_that_is_killed_after_its_last_step_says_nothing_twice(start, evaluates):
    options = {"training": {"save_steps": 3, "eval_steps": evaluates}}
    whole = start(**options)
    rows, logs = completions(whole), whole.folder.metrics()
    shutil.rmtree(whole.folder.adapter)
    resumed = start(resume=True, **options)
    assert completions(resumed) == rows
    assert [log["step"] for log in resumed.folder.metrics()] == [log["step"] for log in logs]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"order": 1}', '{"order": {}, "rehearsal_order": 0}'])
def test_a_damaged_state_of_rollouts_is_named(start, content):
    options = {"training": {"save_steps": 1, "max_steps": 2}}
    folder = start(**options).folder
    file = folder.path / "checkpoint-2" / "rollout_state.json"
    logs = log_marks(file.parent)
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    # Written so, and not damaged later, which the seal would tell.
    seal(file.parent, run=folder.read_inputs()["run"], step=2, logs=logs)
    with pytest.raises(TrainingError, match="checkpoint-2 is undamaged but cannot be read"):
        start(resume=True, **options)


def test_epochs_are_passes_over_the_prompts_also_after_a_resume(start):
    options = {"rollout": {"updates": 2}, "training": {"save_steps": 2, "save_total_limit": None}}
    whole = start(**options)  # 4 of 8 prompts for every other step
    expected = [0.5, 0.5, 1.0, 1.0, 1.5, 1.5]
    assert [log["epoch"] for log in training_logs(whole)] == expected
    for step in (4, 6):
        shutil.rmtree(whole.folder.path / f"checkpoint-{step}")
    assert [log["epoch"] for log in training_logs(start(resume=True, **options))] == expected


def test_prompts_outside_the_difficulty_range_are_replaced_and_counted(start):
    difficulty = {"low": 0.25, "high": 0.75, "max_rounds": 3}
    summary = start(reward="short", rollout={"difficulty": difficulty, "completions": 4}, objective=PENALIZED)
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


def test_greedy_answers_are_no_samples_that_a_divergence_could_be_estimated_from(start):
    summary = start(rollout={"evaluation": {"temperature": 0.0, "completions": 1}}, training={"max_steps": 1})
    assert summary.after["logratios/policy"] != 0
    assert not [name for name in summary.after if name.startswith("divergence/")]


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


COUNTED = {"kind": "function", "timeout": 5.0, "errors": "count"}


def test_calls_of_rewards_that_fail_are_shown_in_the_run_and_at_its_end(start):
    function, output = "tests.training.prompts:that_fails_on_an_e", io.StringIO()
    console = Console(file=output, width=10_000)
    summary = start(rewards=[{**COUNTED, "function": function}], training={"max_steps": 2}, console=console)
    logs = summary.folder.metrics()
    errors = sum(log.get("reward/errors", 0) + log.get("eval_reward/errors", 0) for log in logs)
    assert errors > 0
    step = next(log for log in training_logs(summary) if log["reward/errors"])
    assert f"reward errors {step['reward/errors']:.3g}" in output.getvalue()
    (last,) = [line for line in output.getvalue().splitlines() if line.startswith("warning: in this run")]
    assert f"in this run {errors:.0f} calls of rewards raised and 0 were stopped" in last
    assert "LookupError: there is an e" in last


def test_a_reward_that_fails_for_every_completion_stops_the_run(start):
    rewards = [
        {"kind": "function", "function": "tests.training.prompts:vowels"},
        {**COUNTED, "function": "tests.training.prompts:that_always_fails"},
    ]
    for eval_size, place in ((0, r"Step 1: .* all 16"), (4, r"Evaluation at step 0: .* all 64")):
        with pytest.raises(RewardError, match=rf"(?s){place} completions.*no such word") as raised:
            start(f"run-{eval_size}", rewards=rewards, prompts={"eval_size": eval_size})
        assert "the reward 'that_always_fails' failed" in str(raised.value)


def test_a_run_that_ends_before_its_first_step_leaves_its_folder_free(start):
    with pytest.raises(RewardError):
        start(reward="not_a_number")
    assert start().after["reward"] >= 0


def test_prompts_are_drawn_until_there_are_completions_to_compare(start):
    # A third of the completions have a vowel, so that two of them are often alike.
    summary = start(
        reward="has_a_vowel",
        objective={"kind": "pairwise"},
        rollout={"prompts": 2, "minibatches": 2, "completions": 2},
        training={"per_device_train_batch_size": 1},
    )
    sampled = [log["rollout/prompts_sampled"] for log in training_logs(summary) if "rollout/prompts_sampled" in log]
    assert max(sampled) > 2


def test_where_all_rewards_are_equal_nothing_can_be_compared(start):
    with pytest.raises(RolloutError, match="of 32 prompts, drawn in 8 rounds, 0 have"):
        start(reward="nothing", objective={"kind": "pairwise"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": []}, "rewards is empty"),
        ({"data": {"train": [{"path": "x.jsonl"}]}}, "data and prompts exclude each other"),
        ({"training": {"gradient_accumulation_steps": 2}}, "apply only to offline runs"),
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


def test_f_dpg_leads_the_policy_to_its_constraint(start):
    objective = {"kind": "distribution_matching", "divergence": "jensen_shannon", "target": {"kind": "binary"}}
    sizes = {"prompts": 1, "completions": 32, "max_new_tokens": 8, "evaluation": {"completions": 64}}
    one = {
        "train": [{"texts": ["question 1: "], "chat": False}],
        "eval": [{"texts": ["question 1: "], "chat": False}],
        "eval_size": 0,
    }
    summary = start(objective=objective, reward="has_a_vowel", rollout=sizes, prompts=one, training={"max_steps": 12})
    assert 0.02 < summary.before["reward"] < 0.5
    assert summary.after["reward"] > summary.before["reward"] + 0.2
    logs = training_logs(summary)
    assert logs[-1]["target/satisfied"] > logs[0]["target/satisfied"]
    # log Z is that of the reference's own rate, whatever the policy has become.
    assert logs[-1]["log_partition"] == pytest.approx(torch.tensor(summary.before["reward"]).log().item(), abs=0.7)


def test_prompts_of_one_place_have_a_log_partition_each(start):
    objective = {"kind": "distribution_matching", "divergence": "jensen_shannon", "target": {"kind": "binary"}}
    sources = [{"texts": ["question 1: "], "chat": False}, {"texts": ["question 2: "], "chat": False}]
    summary = start(
        objective=objective,
        prompts={"train": sources, "eval_size": 0},
        rollout={"prompts": 2},
        training={"max_steps": 1, "save_steps": 1},
    )
    state = json.loads((summary.folder.path / "checkpoint-1" / "rollout_state.json").read_text(encoding="utf-8"))
    assert state["partition"]["counts"] == [4, 4]


def test_moments_are_fitted_on_samples_of_the_reference_and_approached(start):
    target = {"kind": "moments", "moments": [0.8]}
    objective = {"kind": "distribution_matching", "divergence": "reverse_kl", "target": target}
    sizes = {
        "prompts": 1,
        "completions": 32,
        "max_new_tokens": 8,
        "fit_samples": 256,
        "evaluation": {"completions": 64},
    }
    one = {
        "train": [{"texts": ["question 1: "], "chat": False}],
        "eval": [{"texts": ["question 1: "], "chat": False}],
        "eval_size": 0,
    }
    summary = start(objective=objective, reward="has_a_vowel", rollout=sizes, prompts=one, training={"max_steps": 20})
    assert summary.before["reward"] < 0.4
    assert summary.before["reward"] + 0.15 < summary.after["reward"] < 0.95


def test_a_target_of_zeros_and_an_infinite_slope_are_refused_before_anything_is_loaded(start):
    target = {"kind": "binary"}
    with pytest.raises(ConfigError, match="cannot be used with a target that has zeros"):
        start(objective={"kind": "distribution_matching", "divergence": "reverse_kl", "target": target})


def test_a_target_that_nothing_satisfies_is_counted_and_moves_nothing(start, tiny):
    objective = {"kind": "distribution_matching", "divergence": "jensen_shannon", "target": {"kind": "binary"}}
    summary = start(objective=objective, reward="nothing", training={"max_steps": 2})
    assert [log["partition_missing"] for log in training_logs(summary)] == [1.0, 1.0]
    assert all(not value.any() for name, value in adapter(summary).items() if "lora_B" in name)


def test_ppo_learns_values_and_a_resumed_run_has_them_too(start):
    objective = {**PENALIZED, "advantage": "gae", "importance": "token", "clip_low": 0.2, "clip_high": 0.2}
    options = {
        "objective": objective,
        "rollout": {"updates": 2},
        "training": {"save_steps": 1, "save_total_limit": None, "max_steps": 6, "learning_rate": 0.01},
    }
    whole, broken = start("whole", **options), start("broken", **options)
    for checkpoint in broken.folder.path.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > 3:
            shutil.rmtree(checkpoint)
    shutil.rmtree(broken.folder.adapter)
    resumed = start("broken", resume=True, **options)
    assert all(torch.equal(value, adapter(resumed)[name]) for name, value in adapter(whole).items())
    losses = [log["loss"] for log in training_logs(whole)]
    assert [log["loss"] for log in training_logs(resumed)] == losses
    first, last = (
        load_file(resumed.folder.path / f"checkpoint-{step}" / "value_head.safetensors")["linear.weight"]
        for step in (1, 6)
    )
    assert first.any()
    assert (first - last).norm() > first.norm()


def test_dph_rl_explores_some_prompts_and_rehearses_others(start, tmp_path, monkeypatch):
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return logprobs(*args, **kwargs)

    logprobs = AdapterOff.logprobs
    monkeypatch.setattr(AdapterOff, "logprobs", counted)
    file = tmp_path / "rehearsal.jsonl"
    rows = [
        {"prompt_ids": [40 + i, 41, 42], "completion_ids": [70 + i, 80, 1], "logprobs": [-5.0, -4.5, -6.0]}
        for i in range(6)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    summary = start(
        objective={"kind": "hybrid", "divergence": "forward_kl", "coefficient": 0.1},
        rehearsal={"path": str(file), "completions": 3},
        prompts={"eval_size": 0},  # evaluation asks the reference how far the policy has come; training never does
        training={"per_device_train_batch_size": 2, "max_steps": 4},
    )
    logs = training_logs(summary)
    assert all("reward" in log for log in logs)
    rehearsed = [name for name in logs[0] if name.startswith("rehearsal/")]
    assert rehearsed
    assert calls == 1  # at the start, to see that policy and reference are one model
    with pytest.raises(ConfigError, match="give both or neither"):
        start("other", objective={"kind": "hybrid"})


def test_supervised_tuning_is_an_offline_run_and_its_adapter_starts_another(start, tiny, tmp_path):
    data = tmp_path / "demonstrations.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"q{i}: ", "completion": "aeiou"}) + "\n" for i in range(8)), encoding="utf-8"
    )
    plain = {
        "output_dir": str(tmp_path / "sft"),
        "model": {"path": str(tiny)},
        "adapter": {"r": 4, "alpha": 8},
        "data": {"train": [{"path": str(data), "chat": False}], "eval_size": 2, "max_length": 32},
        "objective": {"kind": "supervised"},
        "training": {"learning_rate": 0.02, "max_steps": 6, "logging_steps": 1},
    }
    tuned = train(parse_run(plain), console=Console(quiet=True))
    assert tuned.after["loss"] < tuned.before["loss"] - 0.5
    config = online_data(tiny, write_prompts(tmp_path / "p.jsonl"), tmp_path / "online", objective=PENALIZED)
    config["adapter"] = {"init": str(tuned.folder.path)}
    summary = train(parse_run(config), console=Console(quiet=True))
    assert summary.before["reward"] > 0.2
    assert summary.before["divergence/reverse_kl"] == pytest.approx(0.0, abs=1e-4)
    assert summary.folder.read_json("manifest.json")["reference"]["kind"] == "adapter"


def test_what_passes_is_decided_by_the_outcome_and_not_by_what_shapes_it(start):
    rewards = [{"function": f"tests.training.prompts:{name}"} for name in ("has_a_vowel", "short")]
    rewards[1] |= {"weight": 5.0}  # passes by itself in the sum
    for outcome, decides in ((None, "has_a_vowel"), ("short", "short")):
        rollout = {"outcome": outcome, "difficulty": {"low": 0.0, "high": 1.0} if outcome else None}
        summary = start(f"run-{outcome}", rewards=rewards, rollout=rollout, training={"max_steps": 1})
        log = training_logs(summary)[0]
        assert log["pass@1"] == pytest.approx(log[f"reward/{decides}"])
        assert summary.before["pass@1"] == pytest.approx(summary.before[f"reward/{decides}"])
    assert log["reward/short"] != pytest.approx(log["reward/has_a_vowel"])


def test_an_unfinished_rollout_of_an_earlier_release_is_refused_by_name(start):
    options = {"rollout": {"updates": 2}, "training": {"save_steps": 1, "max_steps": 2, "save_total_limit": None}}
    folder = start(**options).folder
    shutil.rmtree(folder.path / "checkpoint-2")
    file = folder.path / "checkpoint-1" / "rollout_state.json"
    marks = log_marks(file.parent)
    assert (file.parent / "rollout.safetensors").exists()
    state = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**state, "buffer": [{"tree": {}, "columns": {"rewards": [1.0]}}]}), encoding="utf-8")
    seal(file.parent, run=folder.read_inputs()["run"], step=1, logs=marks)
    with pytest.raises(TrainingError, match="checkpoint-1 holds an unfinished rollout of an earlier release"):
        start(resume=True, **options)
