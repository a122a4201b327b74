"""Online runs against references other than the start: SALSA, and references that move."""

import pytest
from rich.console import Console
from safetensors.torch import load_file

from falign.errors import ConfigError
from falign.models import add_lora, export_adapter, load_model, load_tokenizer
from falign.runfile import parse_run
from falign.training import train
from falign.training.online.trainer import OnlineTrainer
from tests.models.tiny import fill_adapter
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

PENALIZED = {"kind": "policy_gradient", "divergence": "reverse_kl", "beta": 0.05, "advantage": "leave_one_out"}
AVERAGE = {"kind": "moving_average", "alpha": 0.4, "every": 2}
RESET = {"kind": "periodic_reset", "every": 2, "reset_optimizer": True}


@pytest.fixture
def sft(tiny, tmp_path):
    folders = []
    for i, rank in enumerate((2, 3)):
        adapted = fill_adapter(add_lora(load_model(tiny), r=rank, alpha=2 * rank, seed=i), seed=i, scale=0.05)
        folders.append(str(export_adapter(adapted, load_tokenizer(tiny), tmp_path / f"sft{i}")))
    return folders


@pytest.fixture
def start(tiny, tmp_path):
    data = write_prompts(tmp_path / "prompts.jsonl")

    def run(name="run", resume=False, init=None, **changes):
        run = online_data(tiny, data, tmp_path / name, objective=PENALIZED, **changes)
        if init is not None:
            run["adapter"] = {"init": init}
        return train(parse_run(run), console=Console(quiet=True), resume=resume)

    return run


def adapter(summary):
    return load_file(summary.folder.adapter / "adapter_model.safetensors")


def test_salsa_learns_and_starts_away_from_its_reference(start, sft):
    summary = start(init=sft[0], reference={"kind": "soup", "paths": sft}, training={"max_steps": 12})
    assert summary.after["reward"] > summary.before["reward"]
    assert summary.before["divergence/reverse_kl"] > 0.01
    assert not [name for name in adapter(summary) if ".ref." in name]


def test_salsa_with_all_weight_on_the_start_is_the_plain_run_bit_for_bit(start, sft):
    soup = start("soup", init=sft[0], reference={"kind": "soup", "paths": sft, "weights": [1.0, 0.0]})
    plain = start("plain", init=sft[0])
    assert all((adapter(soup)[name] == adapter(plain)[name]).all() for name in adapter(plain))
    assert soup.after == plain.after


def test_the_rollout_after_a_reset_is_scored_under_the_new_reference(start):
    summary = start(reference=RESET, training={"eval_steps": 2})
    logs = {log["step"]: log for log in summary.folder.metrics() if "loss" in log}
    evaluations = {log["step"]: log for log in summary.folder.metrics() if "eval_reward" in log}
    assert [logs[step]["reference/moves"] for step in range(1, 7)] == [0, 0, 1, 1, 2, 2]
    for step in (2, 4, 6):
        assert evaluations[step]["eval_divergence/reverse_kl"] > 1e-4  # of the reference before the reset
    for step in (1, 3, 5):  # sampled when policy and reference were one
        assert abs(logs[step]["divergence/reverse_kl"]) < 1e-6
    for step in (2, 4, 6):
        assert abs(logs[step]["divergence/reverse_kl"]) > 1e-6


@pytest.mark.parametrize("reference", [AVERAGE, RESET], ids=lambda reference: reference["kind"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(start, monkeypatch, reference):
    settings = {"reference": reference, "training": {"save_steps": 2}}
    whole = start("whole", **settings)
    original = OnlineTrainer.compute_loss

    def dies(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(OnlineTrainer, "compute_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            start("broken", **settings)
    resumed = start("broken", resume=True, **settings)
    assert all((adapter(resumed)[name] == adapter(whole)[name]).all() for name in adapter(whole))
    assert resumed.after == whole.after
    identity = resumed.folder.read_json("manifest.json")["reference"]
    assert identity == whole.folder.read_json("manifest.json")["reference"]
    assert identity["moves"] == 2


def test_a_reference_that_would_move_within_a_rollout_is_refused(start):
    with pytest.raises(ConfigError, match=r"reference.every=2 is not a multiple of the 4 optimizer steps per rollout"):
        start(reference=AVERAGE, rollout={"updates": 2, "minibatches": 2})
    start(reference={**AVERAGE, "every": 4}, rollout={"updates": 2, "minibatches": 2}, training={"max_steps": 5})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 3}, r"reference.every=3 is not a multiple of the 2 optimizer steps per rollout"),
        ({}, r"reference moves during training at an unknown interval.*set its attribute `every`"),
    ],
    ids=["between two updates", "unknown"],
)
def test_a_reference_of_ones_own_that_may_move_within_a_rollout_is_refused(start, settings, message):
    with pytest.raises(ConfigError, match=message):
        start(reference={"kind": "tests.references.own:Following", **settings}, rollout={"updates": 2})


def test_a_reference_of_ones_own_moves_between_rollouts(start):
    own = {"kind": "tests.references.own:Following", "every": 2}
    summary = start(reference=own, rollout={"updates": 2}, training={"max_steps": 4})
    assert [log["reference/shift"] for log in summary.folder.metrics() if "loss" in log] == [0.0, 0.0, 0.25, 0.25]
