"""Runs whose rewards are preference oracles or calibrated: online f-DPO, Nash mirror prox, InfAlign."""

import json

import pytest

import falign
from falign.errors import ConfigError, DataError
from falign.methods import InfAlign, NashMirrorProx
from falign.rewards import OracleReward
from falign.runfile import parse_run
from falign.training import train
from tests.models.tiny import save_tiny
from tests.rewards import judges
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracles")
    write_prompts(folder / "prompts.jsonl")
    save_tiny(folder / "tiny")
    return folder


def logs(run):
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def arguments(folder, **changes):
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    return {
        "prompts": {"train": {"rows": rows, "chat": False}, "eval_size": 4, "max_length": 64},
        "adapter": falign.Lora(r=4, alpha=8),
        "rollout": {"prompts": 4, "completions": 4, "max_new_tokens": 8, "evaluation": {"completions": 4}},
        "training": {"learning_rate": 0.02, "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1},
        **changes,
    }


def test_online_f_dpo_learns_from_an_oracle_without_other_rewards(folder):
    content = online_data(
        folder / "tiny",
        folder / "prompts.jsonl",
        folder / "fdpo",
        rewards=[{"kind": "oracle", "function": "tests.rewards.judges:more_vowels"}],
        rollout={"completions": 2},
        objective={"kind": "pairwise", "divergence": "jensen_shannon", "beta": 0.1},
        training={"max_steps": 2},
    )
    train(parse_run(content))
    run = falign.load(folder / "fdpo")
    first = logs(run)[0]
    assert first["reward"] == pytest.approx(0.5)
    assert first["reward/oracle/asymmetry"] == pytest.approx(0.0, abs=1e-12)
    assert {"rewards/margins", "loss"} <= first.keys()


def test_nash_mirror_prox_resets_its_center_after_two_half_steps(folder):
    run = falign.train(
        str(folder / "tiny"),
        output_dir=folder / "nash",
        objective=NashMirrorProx(beta=0.1, eta=2.0),
        references={
            "reference": {"kind": "adapter_off"},
            "previous": {"kind": "periodic_reset", "every": 4},
        },
        rewards=[OracleReward(judges.more_vowels)],
        **arguments(
            folder,
            rollout={"prompts": 4, "completions": 4, "max_new_tokens": 8, "updates": 2},
            training={"learning_rate": 0.002, "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 1},
        ),
    )
    # Two half steps of two updates: the distance to the center is zero where an iteration begins.
    distances = [log["proximal/divergence/reverse_kl"] for log in logs(run)]
    assert [distance < 1e-9 for distance in distances] == [True, False, False, False, True, False]
    assert all(log["reward"] == pytest.approx(0.5) for log in logs(run) if "reward" in log)


def test_a_calibrated_run_needs_samples_of_every_prompt(folder):
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    falign.write_samples(
        str(folder / "tiny"),
        rows,
        folder / "reference.jsonl",
        chat=False,
        num_completions=4,
        max_new_tokens=8,
        rewards=[judges.vowels],
    )
    lines = (folder / "reference.jsonl").read_text().splitlines()
    (folder / "fewer.jsonl").write_text("\n".join(lines[:-4]) + "\n")

    def rewards(name):
        transform = {"kind": "exponential", "samples": str(folder / name), "t": 2.0}
        return [{"function": judges.vowels, "transform": transform}]

    with pytest.raises(DataError, match=r"row 12: reward vowels: .*fewer.jsonl has no sample of the reference"):
        falign.train(
            str(folder / "tiny"),
            output_dir=folder / "refused",
            objective=InfAlign(beta=0.1),
            rewards=rewards("fewer.jsonl"),
            **arguments(folder),
        )
    training = {**arguments(folder)["training"], "save_steps": 1, "lr_scheduler_type": "constant"}
    run = falign.train(
        str(folder / "tiny"),
        output_dir=folder / "infalign",
        objective=InfAlign(beta=0.1),
        rewards=rewards("reference.jsonl"),
        **arguments(folder, training=training),
    )
    first = logs(run)[0]
    assert 1 <= first["reward"] <= 7.4  # e^{2C}
    assert run.config.rewards[0].transform.t == 2.0

    def resumed(name):
        return falign.train(
            str(folder / "tiny"),
            output_dir=folder / "infalign",
            objective=InfAlign(beta=0.1),
            rewards=rewards(name),
            resume=True,
            **arguments(folder, training={**training, "max_steps": 3}),
        )

    (folder / "changed.jsonl").write_text((folder / "reference.jsonl").read_text().replace('"reward": ', '"reward": 1'))
    with pytest.raises(ConfigError, match=r"reward vowels differs from when the run began"):
        resumed("changed.jsonl")
    (folder / "moved.jsonl").write_text((folder / "reference.jsonl").read_text())
    assert resumed("moved.jsonl").summary.after
