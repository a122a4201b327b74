"""Coefficients that change during training: offline and online runs, from run files and from Python."""

import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import falign
from falign import divergences
from falign.errors import ConfigError, TrainingError
from falign.evaluation.loading import run_objective
from falign.objectives import Pairwise, Scheduled, Selected, Steps, Sum, Supervised, TargetDivergence
from falign.runfile import parse_run
from falign.training import train
from falign.training.controls import Controls
from falign.training.trainer import AlignmentTrainer
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

PENALIZED = {"kind": "policy_gradient", "divergence": "reverse_kl", "beta": 0.05}
EVERY_STEP = {"save_steps": 1, "save_total_limit": None}


@pytest.fixture
def start(tiny, tmp_path):
    pairs, prompts = write_pairs(tmp_path / "pairs.jsonl"), write_prompts(tmp_path / "prompts.jsonl")

    def run(name, online=False, resume=False, console=None, **changes):
        data = (
            online_data(tiny, prompts, tmp_path / name, **changes)
            if online
            else run_data(tiny, pairs, tmp_path / name, **changes)
        )
        return train(parse_run(data), console=console or Console(quiet=True), resume=resume)

    return run


def logs(summary):
    return [log for log in summary.folder.metrics() if "loss" in log]


def weights(summary):
    return load_file(summary.folder.adapter / "adapter_model.safetensors")


def same(first, second):
    return all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


def remove_after(summary, step):
    for checkpoint in summary.folder.path.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(summary.folder.adapter)


@pytest.mark.parametrize("online", [False, True])
def test_a_constant_schedule_is_the_run_without_one_bit_for_bit(start, online):
    objective = PENALIZED if online else {"divergence": "jensen_shannon", "beta": 0.5}
    constant = {**objective, "beta": {"from": objective["beta"], "to": objective["beta"], "steps": 3}}
    options = {"online": online, "training": {"max_steps": 4}}
    plain, scheduled = start("plain", objective=objective, **options), start("scheduled", objective=constant, **options)
    assert same(plain, scheduled)
    assert plain.after == scheduled.after
    values = [log.pop("coefficients/beta") for log in logs(scheduled)]
    assert values == [objective["beta"]] * 4


def test_each_step_has_the_loss_of_the_objective_with_its_coefficient(start, monkeypatch):
    found = []
    original = AlignmentTrainer.evaluate_objective

    def recorded(self, scored, inputs):
        output = original(self, scored, inputs)
        if torch.is_grad_enabled():
            found.append((self.state.global_step, scored.completions, output.terms[0].losses.detach()))
        return output

    monkeypatch.setattr(AlignmentTrainer, "evaluate_objective", recorded)
    summary = start(
        "run",
        objective={"divergence": {0: "forward_kl", 2: "reverse_kl"}, "beta": {"from": 0.5, "to": 0.1, "steps": 4}},
        training={"max_steps": 6},
    )
    assert [log["coefficients/beta"] for log in logs(summary)] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    for step, batch, losses in found:
        f = divergences.get("forward_kl" if step < 2 else "reverse_kl")
        expected = Pairwise(f, beta=logs(summary)[step]["coefficients/beta"])(batch).terms[0].losses
        assert torch.equal(losses, expected.detach())
    # The record has the schedules, and evaluation the coefficients of the trained model.
    recorded_objective = summary.folder.read_run_file()["objective"]
    assert recorded_objective["divergence"] == {"0": "forward_kl", "2": "reverse_kl"}
    assert run_objective(str(summary.folder.path)) == Pairwise(divergences.get("reverse_kl"), beta=0.1)


@pytest.mark.parametrize(("online", "stopped_at"), [(False, 3), (True, 3)])
def test_a_resumed_run_with_a_schedule_equals_the_uninterrupted_one_bit_for_bit(start, online, stopped_at):
    beta = {"from": 0.0, "to": 0.4, "steps": 3, "begin": 1} if online else {"from": 0.5, "to": 0.1, "steps": 5}
    options = {
        "online": online,
        "objective": {**(PENALIZED if online else {}), "beta": beta},
        "training": {**EVERY_STEP, "max_steps": 6},
        **({"rollout": {"updates": 2}} if online else {}),
    }
    whole, broken = start("whole", **options), start("broken", **options)
    remove_after(broken, stopped_at)
    resumed = start("broken", resume=True, **options)
    assert same(whole, resumed)
    assert logs(resumed) == logs(whole)
    assert len({log["coefficients/beta"] for log in logs(whole)}) > 2


def test_all_updates_on_a_rollout_have_the_coefficients_it_was_scored_with(start):
    # The reference is needed only from the second rollout on, and no update of the first one lacks it.
    beta = {"from": 0.0, "to": 0.3, "steps": 3}
    summary = start("run", online=True, objective={**PENALIZED, "beta": beta}, rollout={"updates": 2})
    found = [log["coefficients/beta"] for log in logs(summary)]
    assert found == pytest.approx([0.0, 0.0, 0.2, 0.2, 0.3, 0.3])
    assert ["divergence/reverse_kl" in log for log in logs(summary)] == [False, False, True, True, True, True]


def test_a_live_objective_has_schedules_too(tiny, tmp_path):
    objective = Scheduled(Pairwise(divergences.get("reverse_kl")), {"beta": Steps({0: 0.5, 2: 0.1})})
    settings = run_data(tiny, write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run", training={"max_steps": 3})
    run = falign.train(**{**settings, "model": str(tiny), "objective": objective}, console=Console(quiet=True))
    assert [log["coefficients/beta"] for log in logs(run.summary)] == [0.5, 0.5, 0.1]


def test_a_schedule_beyond_the_last_step_is_reported(start, capsys):
    objective = {"beta": {"from": 0.5, "to": 0.1, "steps": 50}}
    start("run", objective=objective, training={"max_steps": 1}, console=Console(stderr=True))
    assert "a schedule of the objective changes until step 50, and the run has 1 steps" in " ".join(
        capsys.readouterr().err.split()
    )


HELD = {"controller": "target_divergence", "target": 0.02, "start": 0.05, "gain": 1.0, "smoothing": 0.5}


@pytest.mark.parametrize(("online", "stopped_at"), [(False, 3), (True, 2), (True, 3)])
def test_a_resumed_run_with_a_controller_equals_the_uninterrupted_one_bit_for_bit(start, online, stopped_at):
    if online:
        objective = {**PENALIZED, "beta": HELD}
    else:  # a metric of pairs, by the name of a user's own class
        objective = {
            "beta": {"controller": "tests.runfile.own_members:Follow", "start": 0.5, "metric": "rewards/margins"}
        }
    options = {
        "online": online,
        "objective": objective,
        "training": {**EVERY_STEP, "max_steps": 6},
        **({"rollout": {"updates": 2}} if online else {}),
    }
    whole, broken = start("whole", **options), start("broken", **options)
    remove_after(broken, stopped_at)
    resumed = start("broken", resume=True, **options)
    assert same(whole, resumed)
    assert logs(resumed) == logs(whole)
    found = [log["coefficients/beta"] for log in logs(whole)]
    if online:
        # Two updates on each rollout: the first value is the start, the next follows the mean of both updates.
        assert found[::2] == found[1::2]
        measured = (logs(whole)[0]["divergence/reverse_kl"] + logs(whole)[1]["divergence/reverse_kl"]) / 2
        assert found[2] == pytest.approx(0.05 * (1 + min(max(measured / 0.02 - 1, -0.2), 0.2)), rel=1e-12)
    else:
        margins = [log["rewards/margins"] for log in logs(whole)]
        assert found == pytest.approx([0.5, *(0.5 + margin for margin in margins[:-1])], rel=1e-12)
        assert run_objective(str(whole.folder.path), trust_code=True).beta == found[-1]


def test_a_controller_that_measures_nothing_known_stops_the_run_with_the_names(start):
    objective = {"kind": "token_pairwise", "beta": HELD}
    with pytest.raises(
        TrainingError, match=r"Step 1: objective: .*reports divergence/chosen, divergence/rej.*give metric"
    ):
        start("run", objective=objective, training={"max_steps": 2})


def test_a_controller_of_a_metric_that_is_not_reported_stops_the_run_before_the_weights_move(start):
    objective = {**PENALIZED, "beta": {**HELD, "metric": "divergence/reverse"}}
    with pytest.raises(
        TrainingError,
        match=r"Step 1: objective: beta: .*metric='divergence/reverse', which .* did you mean 'divergence/reverse_kl'",
    ):
        start("run", online=True, objective=objective, training={"max_steps": 3})
    both = Sum({"a": Pairwise(divergences.get("reverse_kl")), "b": (Selected(Supervised(), "chosen"), 0.2)})
    controls = Controls(Scheduled(both, {"terms.b.1": TargetDivergence(1.0, start=0.2)}))
    controls.check(step=1)  # a step without a finite loss reports nothing
    controls.add({"a/divergence/reverse_kl": torch.ones(2)})
    with pytest.raises(TrainingError, match=r"Step 2: .*terms.b.1: .*a metric divergence/\.\.\., .*one of a/div"):
        controls.check(step=2)


@pytest.mark.parametrize(("value", "message"), [("nan", "finite number"), ("-1.0", "greater than 0")])
def test_a_controller_whose_value_the_objective_refuses_stops_the_run_with_its_reason(
    start, tmp_path, monkeypatch, value, message
):
    code = [
        "from falign.objectives import Controller",
        "class Leaps(Controller):",
        "    def __init__(self, start, metric='rewards/margins'): self.start, self.metric = start, metric",
        "    def start_state(self): return {'value': self.start}",
        "    def value(self, state): return state['value']",
        f"    def after(self, state, measured): return {{'value': float('{value}')}}",
    ]
    name = f"leaping_{message.partition(' ')[0]}"
    (tmp_path / f"{name}.py").write_text("\n".join(code))
    monkeypatch.syspath_prepend(tmp_path)
    beta = {"controller": f"{name}:Leaps", "start": 0.1}
    with pytest.raises(TrainingError, match=f"Before step 2: objective: .*beta={value}: Input should be .*{message}"):
        start("run", objective={"kind": "pairwise", "beta": beta}, training={"max_steps": 3})


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            {"beta": {**HELD, "target": -1.0}},
            "objective.beta.controller='target_divergence': target=-1.0 must be positive",
        ),
        (
            {"beta": {"controller": "root_divergence", "strength": 0.1, "start": 0.1}},
            r"run: unknown key 'objective.beta.start'; did you mean strength\?|^unknown key 'objective.beta.start'",
        ),
        (
            {"beta": {"controller": "target_divergenc"}},
            "objective.beta.controller='target_divergenc' is unknown; did you",
        ),
        ({"beta": {"controller": "a.b:C"}}, "objective.beta.start=None: a controller of your own needs the value"),
        (
            {"beta": {"from": 0.5, "to": 0.1, "steps": 0}},
            r"objective.beta=.*'steps': 0.*end before it begins.*at least 1",
        ),
        (
            {"beta": {"from": 0.5, "to": -0.1, "steps": 9}},
            r"objective.beta=-0.1: Input should be greater than 0 \(its schedule has this value at step 9\)\.",
        ),
        (
            {"divergence": {"from": 1e-4, "to": 1e-2, "steps": 9}},
            r"objective.divergence=0.0001: Input should be a valid string \(its schedule has this value at step 0\); "
            r"names change in steps, as in \{0: forward_kl, 500: reverse_kl\}\.$",
        ),
        (
            {"divergence": {"from": "forward_kl", "to": "reverse_kl", "steps": 9}},
            r"objective.divergence.from='forward_kl': Input should be a valid number.*; names change in steps, as in",
        ),
        (
            {"beta": {"start": 0.5, "end": 0.1, "steps": 2}},
            r"objective.beta=.*; write from, to in place of start, end: a schedule is one of "
            r"\{from: 5e-3, to: 1e-3, steps: 200\}, \{from: 16, to: 256, by: 16, every: 10\}, \{0: ",
        ),
        ({"beta": {"to": 0.1, "steps": 2}}, r"objective.beta=.*; a schedule is one of \{from: 5e-3"),
        ({"beta": [0.5, 0.1]}, r"objective.beta=\[0.5, 0.1\]: .*; a schedule is one of \{from: 5e-3"),
        ({"beta": {"from": 0.5, "steps": 9}}, r"objective.beta.to is required; a schedule has from, to, steps"),
        ({"beta": {"from": 0.5, "to": 0.1, "stesp": 9}}, r"objective.beta.stesp is unknown \(did you mean steps\?"),
        ({"beta": {"from": 0.5, "to": "x", "steps": 9}}, r"objective.beta.to='x': Input should be a valid number"),
        ({"beta": {5: 0.5}}, r"objective.beta=\{5: 0.5\}: steps \[5\]: none is 0"),
        ({"beta": {0: 0.5, 9: 0.1, 5: 0.2}}, r"objective.beta=.*must ascend"),
        ({"divergence": {0: "forward_kl", 5: "revers_kl"}}, r"at step 5 .*objective.divergence='revers_kl' is unknown"),
        ({"kind": {0: "pairwise", 5: "listwise"}}, r"objective.kind: it cannot change during training"),
        ({"beta": {"from": 1, "to": 4, "by": -1, "every": 2}}, r"by=-1 does not lead from 1 to 4"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_before_anything_is_loaded(objective, message):
    with pytest.raises(ConfigError, match=message):
        parse_run(run_data("nowhere", "nothing.jsonl", "run", objective=objective)).check()


def test_a_ramp_through_fractions_is_refused_by_a_field_of_whole_numbers_before_anything_is_loaded():
    data = run_data("nowhere", "nothing.jsonl", "run")
    tokens = {"from": 1, "to": 7, "steps": 4}  # 4 and 7, but 2.5 and 5.5 as well
    data["objective"] = {"kind": "distillation", "weights": [{"kind": "first_tokens", "tokens": tokens}]}
    with pytest.raises(ConfigError, match=r"objective.weights.0.tokens=2.5: Input should be a valid integer"):
        parse_run(data)


def test_a_reference_reset_on_stall_resumes_bit_for_bit_and_moves_between_rollouts_only(start):
    options = {
        "online": True,
        "objective": {**PENALIZED, "beta": 2.0},
        "reference": {"kind": "reset_on_stall", "patience": 1, "metric": "reward", "min_improvement": 0.2},
        "rollout": {"updates": 2},
        "training": {**EVERY_STEP, "max_steps": 6, "eval_steps": 1},
    }
    whole, broken = start("whole", **options), start("broken", **options)
    moves = [log["reference/moves"] for log in logs(whole)]
    assert moves[-1] >= 1
    assert moves[::2] == moves[1::2]
    # After a move, the first update on a rollout finds the policy at its reference.
    for step in range(2, 6, 2):
        moved = moves[step] > moves[step - 1]
        assert (abs(logs(whole)[step]["logratios/policy"]) < 1e-4) == moved
    remove_after(broken, 3)
    resumed = start("broken", resume=True, **options)
    assert same(whole, resumed)
    assert logs(resumed) == logs(whole)


def test_a_reset_on_stall_needs_evaluations_with_its_metric(start):
    reference = {"kind": "reset_on_stall", "patience": 2}
    with pytest.raises(
        ConfigError, match=r"reference.kind=reset_on_stall waits for evaluations, and training.eval_steps"
    ):
        start("run", reference=reference)
    with pytest.raises(ConfigError, match=r"when 'reward' stalls, and the held-out metrics are .*loss"):
        start("run", reference=reference, training={"eval_steps": 2})


PPO = {**PENALIZED, "advantage": "gae", "importance": "token", "clip_low": 0.2, "clip_high": 0.2}


def test_a_double_critic_resumes_bit_for_bit_and_its_warm_up_leaves_the_policy_as_it_is(start):
    options = {
        "online": True,
        "objective": PPO,
        "critic": {"heads": 2, "soft_min": 0.5, "polyak": 0.1, "warm_up": 1},
        "rollout": {"updates": 2},
        "training": {**EVERY_STEP, "max_steps": 6, "weight_decay": 0.1},
    }
    whole, broken = start("whole", **options), start("broken", **options)

    def saved(step, file):
        return load_file(whole.folder.path / f"checkpoint-{step}" / file)

    policies = [saved(step, "adapter_model.safetensors") for step in (1, 2, 3)]
    assert all(torch.equal(value, policies[1][name]) for name, value in policies[0].items())
    assert all(not value.any() for name, value in policies[1].items() if "lora_B" in name)
    assert any(value.any() for name, value in policies[2].items() if "lora_B" in name)
    heads = [saved(step, "value_head.safetensors") for step in (1, 2)]
    assert not torch.equal(heads[0]["linear.weight"], heads[1]["linear.weight"])
    slow = heads[0]["slow.linear.weight"].lerp(heads[0]["linear.weight"], 0.1)
    torch.testing.assert_close(heads[1]["slow.linear.weight"], slow)
    assert all(log["value_gap"] > 0 for log in logs(whole))
    remove_after(broken, 3)
    resumed = start("broken", resume=True, **options)
    assert same(whole, resumed)
    assert logs(resumed) == logs(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"critic": {"heads": 1, "polyak": 0.1}}, "critic.*polyak=0.1 is only for heads=2"),
        ({"critic": {"warm_up": 2}, "objective": PENALIZED}, "critic is the value head of advantage=gae"),
    ],
)
def test_settings_of_a_critic_without_effect_are_refused(start, changes, message):
    with pytest.raises(ConfigError, match=message):
        start("run", online=True, **{"objective": PPO, **changes})


def test_a_growing_horizon_limits_the_tokens_of_training_and_not_those_of_evaluation(start):
    options = {
        "online": True,
        "objective": PENALIZED,
        "rollout": {"horizon": {"start": 2, "by": 3, "every": 2}, "ignore_stop": True},
        "training": {**EVERY_STEP, "max_steps": 6},
    }
    whole = start("whole", **options)
    assert [log["rollout/horizon"] for log in logs(whole)] == [2, 2, 5, 5, 8, 8]
    assert [log["completions/length"] for log in logs(whole)] == [2, 2, 5, 5, 8, 8]
    assert whole.after["completions/length"] == 8


def test_a_horizon_that_does_not_grow_is_refused(start):
    with pytest.raises(ConfigError, match=r"rollout.*horizon.start=8 is not below max_new_tokens=8"):
        start("run", online=True, rollout={"horizon": {"start": 8, "by": 1, "every": 1}})
