"""Runs that learn from a teacher, and from sums: online without rewards, and on given completions."""

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import falign
from falign.errors import ConfigError
from falign.models import add_lora, export_adapter, load_model, load_tokenizer
from falign.runfile import parse_run
from falign.training import train
from falign.training.online.trainer import OnlineTrainer
from tests.models.tiny import fill_adapter
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, vowels, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

TAUGHT = {"kind": "distillation", "divergence": "jensen_shannon"}


@pytest.fixture
def teacher(tiny, tmp_path):
    adapted = fill_adapter(add_lora(load_model(tiny), r=2, alpha=4, seed=0), seed=0, scale=0.15)
    folder = export_adapter(adapted, load_tokenizer(tiny), tmp_path / "teacher")
    return {"references": {"teacher": {"kind": "adapter", "path": str(folder)}}}


@pytest.fixture
def online(tiny, tmp_path, teacher):
    data = write_prompts(tmp_path / "prompts.jsonl")

    def run(name="run", resume=False, **changes):
        plain = online_data(tiny, data, tmp_path / name, **{"rewards": [], **teacher, **changes})
        return train(parse_run(plain), console=Console(quiet=True), resume=resume)

    return run


def logs(summary):
    return [log for log in summary.folder.metrics() if "loss" in log]


@pytest.mark.parametrize(
    "objective",
    [
        TAUGHT,
        {**TAUGHT, "divergence": "reverse_kl", "credit": "returns"},
        {**TAUGHT, "divergence": "reverse_kl", "level": "token"},
        {**TAUGHT, "divergence": "reverse_kl", "level": "sequence"},
        {"kind": "distillation", "measure": "divergence_to(forward_kl, teacher)"},
    ],
    ids=["vocabulary", "returns", "token", "sequence", "measure"],
)
def test_a_policy_nears_its_teacher_on_its_own_samples_without_any_reward(online, objective):
    # Sampled tokens say less of a gradient than whole distributions.
    share, learning_rate = (0.95, 0.007) if "level" in objective or "credit" in objective else (0.6, 0.02)
    training = {"max_steps": 15, "learning_rate": learning_rate}
    summary = online(objective=objective, rollout={"completions": 8}, training=training)
    assert summary.after["teacher/divergence/reverse_kl"] < share * summary.before["teacher/divergence/reverse_kl"]
    assert not [name for name in summary.after if name.startswith(("reward", "pass@", "groups/"))]
    assert summary.after["completions/length"] > 0
    lines = summary.folder.completions_file.read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["reward"] for line in lines} == {None}
    assert not [name for name in logs(summary)[0] if name.startswith(("reward", "pass@"))]


def test_a_run_without_rewards_resumes_between_two_updates_on_a_rollout(online, monkeypatch):
    settings = {
        "objective": {**TAUGHT, "level": "sequence"},
        "rollout": {"updates": 2, "minibatches": 2},
        "training": {"max_steps": 8, "save_steps": 3},
    }
    whole = online("whole", **settings)
    original = OnlineTrainer.compute_loss

    def dies(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(OnlineTrainer, "compute_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            online("broken", **settings)
    resumed = online("broken", resume=True, **settings)
    assert [log["loss"] for log in logs(resumed)] == [log["loss"] for log in logs(whole)]
    for name, value in load_file(whole.folder.adapter / "adapter_model.safetensors").items():
        assert torch.equal(load_file(resumed.folder.adapter / "adapter_model.safetensors")[name], value)


def test_a_sum_of_reward_and_teacher_prepares_each_term_apart_over_several_updates(online):
    """KDRL: the advantages of one term, and the baseline of the other, are computed once from the whole rollout."""
    policy_gradient = {"kind": "policy_gradient", "advantage": "group_normalised", "importance": "token"}
    both = {
        "kind": "sum",
        "terms": {"grpo": policy_gradient, "teacher": {**TAUGHT, "level": "sequence"}},
        "weights": {"teacher": {"from": 0.2, "to": 0.1, "steps": 4}},
    }
    rewards = [{"kind": "function", "function": "tests.training.prompts:vowels"}]
    summary = online(objective=both, rewards=rewards, rollout={"updates": 2}, training={"max_steps": 6})
    first = logs(summary)[0]
    assert {"grpo/advantage", "grpo/importance_weight", "teacher/divergence/jensen_shannon", "reward"} <= first.keys()
    assert [log["coefficients/weights.teacher"] for log in logs(summary)][::2] == pytest.approx([0.2, 0.15, 0.1])
    assert (summary.folder.path / "curves.png").is_file()
    assert (summary.folder.path / "report.html").is_file() or falign.load(summary.folder.path).report()


ALONE = {"references": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"kind": "policy_gradient"}, **ALONE}, "objective.kind=policy_gradient reads rewards"),
        (
            {"objective": {"kind": "pairwise"}, **ALONE},
            "objective.kind=pairwise reads preference",
        ),
        ({"objective": {"kind": "supervised"}, **ALONE}, r"learn from the policy's own samples"),
        (
            {"objective": {"kind": "sum", "terms": {"kd": TAUGHT, "sft": {"kind": "supervised"}}}},
            r"learn from the policy's own samples",
        ),
        (
            {"objective": TAUGHT, "rollout": {"difficulty": {"low": 0.1, "high": 0.9}}},
            "difficulty=.* without rewards",
        ),
        ({"objective": TAUGHT, "references": {"tutor": {"kind": "frozen"}}}, "reads the reference 'teacher'.*add it"),
    ],
)
def test_what_needs_a_reward_or_a_teacher_is_refused_without_one(online, changes, message):
    with pytest.raises(ConfigError, match=message):
        online(**changes)


@pytest.fixture
def offline(tiny, tmp_path, teacher):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    plain = tmp_path / "plain.jsonl"
    answers = [json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}) for row in rows]
    plain.write_text("\n".join(answers), encoding="utf-8")

    def run(objective, name="run", data=pairs, **changes):
        written = run_data(tiny, data, tmp_path / name, **{**teacher, **changes})
        return train(parse_run({**written, "objective": objective}), console=Console(quiet=True))

    run.plain = plain
    return run


def test_offline_distillation_reads_plain_completions_and_the_chosen_or_all_sides_of_pairs(offline):
    plain = offline(TAUGHT, "plain", data=offline.plain)
    assert plain.after["divergence/jensen_shannon"] < plain.before["divergence/jensen_shannon"]
    chosen = offline(TAUGHT, "chosen")
    # The rejected sides of pairs are left out, so the runs are the same to the bit.
    assert [log["loss"] for log in logs(chosen)] == [log["loss"] for log in logs(plain)]
    both = offline({**TAUGHT, "completions": "all"}, "both")
    assert [log["loss"] for log in logs(both)] != [log["loss"] for log in logs(plain)]
    assert both.after["divergence/jensen_shannon"] < both.before["divergence/jensen_shannon"]


def test_dckd_is_cloning_of_the_chosen_side_and_distillation_on_both(offline):
    dckd = {
        "kind": "sum",
        "terms": {
            "sft": {"kind": "supervised", "completions": "chosen"},
            "kd": {"kind": "distillation", "divergence": "forward_kl", "completions": "all"},
        },
        "weights": {"sft": 0.05},
    }
    summary = offline(dckd)
    assert summary.after["kd/divergence/forward_kl"] < summary.before["kd/divergence/forward_kl"]
    assert summary.after["sft/nll"] != summary.after["kd/nll"]  # of one side, and of both


def test_a_sum_is_scored_by_the_implicit_reward_of_its_one_term(offline, tmp_path, teacher):
    both = {
        "kind": "sum",
        "terms": {"dpo": {"kind": "pairwise"}, "sft": {"kind": "supervised", "completions": "chosen"}, "kd": TAUGHT},
        "weights": {"sft": 0.2},
    }
    references = {"references": {"reference": {"kind": "adapter_off"}, **teacher["references"]}}
    summary = offline(both, **references)
    assert summary.after["dpo/rewards/accuracies"] > 0.5
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}]
    falign.load(summary.folder.path).score(rows, tmp_path / "scores.jsonl")
    assert len((tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()) >= 2


def test_the_python_door_takes_prompts_and_a_teacher_without_rewards(tiny, tmp_path, teacher):
    objective = falign.objectives.Distillation(falign.divergences.get("forward_kl"))
    common = dict(objective=objective, training=dict(max_steps=2, logging_steps=1), **teacher)
    rollout = dict(prompts=2, completions=2, max_new_tokens=4)
    run = falign.train(
        str(tiny),
        output_dir=tmp_path / "run",
        prompts=dict(train=[{"rows": [{"prompt": f"{n} "} for n in range(3)], "chat": False}]),
        rollout=rollout,
        console=Console(quiet=True),
        **common,
    )
    assert len(logs(run.summary)) == 2
    with pytest.raises(ConfigError, match="was trained without rewards"):
        falign.evaluate_samples(run, prompts=[{"prompt": "one "}], out=tmp_path / "out")
    given = falign.evaluate_samples(
        run, prompts=[{"prompt": "one "}], out=tmp_path / "given", rewards=[vowels], num_completions=2, max_new_tokens=4
    )
    assert given is not None


@pytest.mark.parametrize("kind", ["frozen", "adapter_off", "auto", "moving_average"])
def test_a_teacher_that_is_the_policy_itself_is_refused(tiny, tmp_path, kind):
    teacher = {"kind": kind, **({"alpha": 0.5, "every": 1} if kind == "moving_average" else {})}
    data = run_data(tiny, write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run")
    data["references"] = {"teacher": teacher}
    for objective in (TAUGHT, {**TAUGHT, "completions": "all"}, {**TAUGHT, "temperature": {0: 2.0, 1: 1.0}}):
        with pytest.raises(ConfigError, match=r"references.teacher.kind=.* nothing would be learned: give the path"):
            parse_run({**data, "objective": objective}).check()
    summed = {"kind": "sum", "terms": {"kd": TAUGHT, "sft": {"kind": "supervised"}}}
    parse_run({**data, "objective": summed}).check()
    prompted = {"teacher": {**teacher, "prompt": "Hi. {prompt}"}}
    parse_run({**data, "objective": TAUGHT, "references": prompted}).check()
