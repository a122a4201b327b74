"""Every argument of transformers' trainer is a field, an accepted extra with an effect, or refused by name."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from falign.errors import ConfigError
from falign.foreign.names import FOREIGN_NAMES
from falign.runfile import parse_run
from falign.runfile.config import RunConfig
from falign.runfile.training_arguments import EXTRA, OBSERVE
from falign.runfile.training_config import TrainingConfig
from falign.training import train
from tests.models.tiny import save_tiny
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
VALUES = {
    "adam_beta1": 0.8,
    "adam_epsilon": 1e-6,
    "dataloader_pin_memory": False,
    "ddp_bucket_cap_mb": 50,
    "eval_delay": 3.0,
    "full_determinism": True,
    "log_level": "info",
    "logging_first_step": True,
    "optim_args": "momentum=0.9",
    "project": "mine",
    "run_name": "first",
    "tf32": True,
    "torch_empty_cache_steps": 2,
    "train_sampling_strategy": "sequential",
    "trackio_bucket_id": "me/b",
    "trackio_space_id": "me/s",
    "trackio_static_space_id": "me/t",
}
BESIDE = {"optim_args": {"optim": "sgd"}, "eval_delay": {"eval_steps": 2}, "run_name": {"report_to": "tensorboard"}}
NOT_HERE = {"ddp_bucket_cap_mb": "single one", "tf32": "needs a GPU", "project": "trackio"}
NOT_HERE |= {name: "trackio" for name in VALUES if name.startswith("trackio")}
"""Extras that have no effect on this machine or beside default settings, with a word of the reason."""


def refusal(**training):
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(**training).check()
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_each_argument_is_a_field_or_accepted_or_refused_with_its_place_or_reason(name, tmp_path):
    if name in TrainingConfig.model_fields or name in RunConfig.model_fields:
        path = name if name in RunConfig.model_fields else f"training.{name}"
        message = f"training.extra.{name}: it is a field of the run file, {path}: set it there."
        assert refusal(extra={name: 1}) == message
    elif name in EXTRA:
        config = TrainingConfig(**BESIDE.get(name, {}), extra={name: VALUES[name]})
        if name != "tf32":  # transformers refuses it without a GPU
            args = config.build(tmp_path, seed=0)
            assert getattr(args, name) == VALUES[name] != getattr(TrainingConfig().build(tmp_path, seed=0), name)
        if name in NOT_HERE and not (name == "tf32" and torch.cuda.is_available()):
            assert re.search(f"training.*{NOT_HERE[name]}|tf32", refusal(extra={name: VALUES[name]}))
        else:
            config.check()
    else:
        assert FOREIGN_NAMES[name].message() in refusal(extra={name: 1})


def test_the_lists_name_arguments_only():
    assert set(EXTRA) == VALUES.keys() <= FIELDS
    assert set(EXTRA) > OBSERVE


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"extra": {"adam_epsilo": 0.8}},
            r"adam_epsilo is unknown: did you mean training.extra.adam_epsilon\? It takes",
        ),
        ({"extra": {"learning_rat": 0.8}}, r"did you mean training.learning_rate\?"),
        ({"extra": {"zzz": 0.8}}, r"zzz is unknown: it takes adam_beta1, "),
        ({"extra": {"loss_type": "ipo"}}, r"training.extra.loss_type: here it is objective.margin_loss"),
        ({"extra": {"adam_beta1": "much"}}, r"training.extra.adam_beta1='much': Input should be a valid number"),
        (
            {"extra": {"run_name": 3}, "report_to": "tensorboard"},
            r"training.extra.run_name=3: Input should be a valid str",
        ),
        (
            {"extra": {"adam_epsilon": 1e-6}, "optim": "sgd"},
            r"adam_epsilon=1e-06 has no effect: training.optim=sgd does",
        ),
        ({"extra": {"optim_args": "momentun=0.9"}, "optim": "sgd"}, r"sgd does not read 'momentun'"),
        ({"extra": {"optim_args": "momentum"}, "optim": "sgd"}, r"write it as name=value"),
        ({"extra": {"optim_args": "momentum=0.9"}}, r"training.optim=adamw_torch does not read 'momentum'"),
        ({"extra": {"run_name": "a"}}, r"run_name='a' has no effect: .*report_to is empty"),
        ({"extra": {"eval_delay": 2}}, r"eval_delay=2 has no effect: .*training.eval_steps"),
        ({"extra": {"log_level": "loud"}}, r"log_level='loud' is unknown; choose one of"),
        ({"extra": {"train_sampling_strategy": "group_by_length"}}, r"is unknown; choose one of \['random', 'seq"),
        ({"extra": {"train_sampling_strategy": "sequential"}, "tokens_per_batch": 9}, r"tokens_per_batch decides the"),
    ],
)
def test_what_is_wrong_or_without_effect_is_refused_with_place_value_and_reason(training, message):
    assert re.search(message, refusal(**training))


@pytest.fixture
def losses(tmp_path):
    model = save_tiny(tmp_path / "tiny")
    pairs, prompts = write_pairs(tmp_path / "pairs.jsonl"), write_prompts(tmp_path / "prompts.jsonl")

    def run(name, *, online=False, **training):
        make, data = (online_data, prompts) if online else (run_data, pairs)
        config = parse_run(make(model, data, tmp_path / name, training={"max_steps": 4, **training}))
        folder = train(config, console=Console(quiet=True)).folder
        return {log["step"]: log["loss"] for log in folder.metrics() if "loss" in log}

    return run


@pytest.mark.parametrize("online", [False, True])
def test_the_moments_of_adam_are_those_of_the_run_file(losses, online):
    plain = losses("plain", online=online)
    other = losses("other", online=online, extra={"adam_beta1": 0.5})
    assert other[1] == plain[1]
    assert other[4] != plain[4]


def test_rows_in_the_order_of_the_file(losses):
    sequential = {"train_sampling_strategy": "sequential"}
    assert losses("one", extra=sequential) != losses("two")
    assert losses("three", extra=sequential) == losses("four", extra={**sequential, "full_determinism": True})
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)


def test_the_first_step_is_logged_and_evaluation_waits(losses, tmp_path):
    assert set(losses("late", logging_steps=4, extra={"logging_first_step": True})) == {1, 4}
    losses("eval", eval_steps=1, extra={"eval_delay": 3, "log_level": "error"})
    assert logging.get_verbosity() == logging.ERROR
    metrics = parse_lines(tmp_path / "eval" / "metrics.jsonl")
    assert [log["step"] for log in metrics if "eval_loss" in log] == [0, 3, 4]


def parse_lines(file: Path):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_online_run_has_its_own_order(losses):
    with pytest.raises(ConfigError, match="prompts are always shuffled"):
        losses("online", online=True, extra={"train_sampling_strategy": "sequential"})


def test_options_reach_the_optimizer(tmp_path):
    args = TrainingConfig(optim="sgd", extra={"optim_args": "momentum=0.9"}).build(tmp_path, seed=0)
    assert Trainer.get_optimizer_cls_and_kwargs(args)[1]["momentum"] == 0.9
