"""Every optimizer, schedule and tracker that transformers offers works here, or is refused by name and reason."""

import json

import pytest
import torch
from rich.console import Console
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from falign.errors import ConfigError
from falign.runfile import parse_run
from falign.runfile.optimization import REFUSED_OPTIMIZERS, REFUSED_SCHEDULES
from falign.runfile.training_config import TrainingConfig, check_trackers
from falign.training import train
from tests.models.tiny import save_tiny
from tests.training.pairs import run_data, write_pairs

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

NEEDED = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
}
"""Options without which a schedule cannot be made."""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Train a few steps of a tiny run, and return its metrics."""
    folder = tmp_path_factory.mktemp("menus")
    model, data = save_tiny(folder / "tiny"), write_pairs(folder / "pairs.jsonl")

    def start(name, **training):
        run = run_data(model, data, folder / name, training={"max_steps": 2, **training})
        file = train(parse_run(run), console=Console(quiet=True)).folder.metrics_file
        return [json.loads(line) for line in file.read_text().splitlines()]

    return start


def refusal(**training):
    try:
        TrainingConfig(**training).check()
    except ConfigError as error:
        return str(error)
    return None


def test_every_optimizer_trains_or_is_refused_by_name(start):
    works = []
    for name in [each.value for each in OptimizerNames]:
        message = refusal(optim=name)
        if message is None:
            works.append(name)
            continue
        assert message.startswith(f"training.optim='{name}' ")
        if "is not supported" in message:
            assert name.startswith(tuple(REFUSED_OPTIMIZERS))
        else:  # the library's own words, whole
            assert "does not work here: " in message
    assert {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"} <= set(works)
    unusual = [name for name in works if "adamw" not in name and "bnb" not in name and "paged" not in name]
    for name in unusual:
        losses = [log["loss"] for log in start(name, optim=name) if "loss" in log]
        assert len(losses) == 2, name
        assert losses[1] != losses[0], name


@pytest.mark.parametrize("name", ["linear", "constant_with_warmup", "cosine"])
def test_a_warm_up_that_takes_all_steps_is_named_as_the_cause(name):
    message = refusal(lr_scheduler_type=name, warmup_steps=0.1, max_steps=1)
    assert message.startswith("training.warmup_steps=0.1 is a warm-up of 1 steps, which begins at a learning rate of 0")
    assert message.endswith("Set training.warmup_steps=0, or raise training.max_steps.")
    assert refusal(lr_scheduler_type=name, warmup_steps=0.1, max_steps=2) is None


def test_every_schedule_works_with_its_options_or_is_refused_by_name():
    for name in [each.value for each in SchedulerType]:
        message = refusal(lr_scheduler_type=name, lr_scheduler_kwargs=NEEDED.get(name, {}), max_steps=10)
        if name in REFUSED_SCHEDULES:
            assert message == f"training.lr_scheduler_type='{name}' is not supported: {REFUSED_SCHEDULES[name]}."
        else:
            assert message is None, message
    for name in NEEDED:
        assert refusal(lr_scheduler_type=name).startswith(f"training.lr_scheduler_type='{name}' with ")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosine", {"num_cicles": 1}, "does not work: TypeError: .*num_cicles"),
        ("constant", {"num_cycles": 1}, "constant has no options; leave it out"),
        ("constant_with_warmup", {"num_cycles": 1}, "constant_with_warmup has no options; leave it out"),
        ("polynomial", {"lr_end": 1.0}, "does not work: ValueError: .*lr_end"),
        ("polynomial", {"power": float("nan")}, "negative, NaN, infinite or always 0"),
        ("cosine_with_min_lr", {"min_lr_rate": float("nan")}, "negative, NaN, infinite or always 0"),
    ],
)
def test_an_option_without_effect_or_sense_is_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(lr_scheduler_type=name, lr_scheduler_kwargs=options).check()


def test_the_options_of_a_schedule_reach_it(start):
    logs = start(
        "schedule", max_steps=4, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.5}
    )
    rates = [log["learning_rate"] for log in logs if "learning_rate" in log]
    assert len(rates) == 4
    assert max(rates) > 0.008
    assert min(rates) >= 0.005


@pytest.mark.parametrize("steps", [0, -2, -100])
def test_a_run_takes_a_step(steps):
    data = {"output_dir": "r", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}}
    with pytest.raises(ConfigError, match=rf"run: training.max_steps={steps}: a run takes at least one optimizer step"):
        parse_run({**data, "training": {"max_steps": steps}})
    assert parse_run({**data, "training": {"max_steps": -1}}).training.max_steps == -1


@pytest.mark.parametrize("name", INTEGRATION_TO_CALLBACK)
def test_a_tracker_is_there_or_is_refused_with_what_it_needs(name):
    try:
        check_trackers([name])
    except ConfigError as error:
        message = str(error)
        assert message.startswith(f"training.report_to='{name}': ")
        assert "pip install" in message or "KUBEFLOW_TRAINER_SERVER_URL" in message
        assert "_" not in message.partition("pip install")[2]


def test_a_trial_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    TrainingConfig().check()
    assert torch.equal(torch.rand(3), expected)
