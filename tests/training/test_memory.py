"""Out of memory: the error names fields that save memory, and only those that the run does not have yet."""

import pytest
import torch
from rich.console import Console

from falign.errors import TrainingError
from falign.runfile import parse_run
from falign.training import train
from falign.training.memory import advising_on_memory, memory_advice
from falign.training.trainer import AlignmentTrainer
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


def test_an_allocation_that_fails_is_told_with_the_fields_that_save_memory(tiny, tmp_path, monkeypatch):
    config = parse_run(run_data(tiny, write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run"))
    monkeypatch.setattr(AlignmentTrainer, "compute_loss", lambda *args, **kwargs: torch.empty(2**52))
    with pytest.raises(TrainingError) as caught:
        train(config, console=Console(quiet=True))
    message = str(caught.value)
    assert message.startswith("Out of memory (")
    assert "Set training.gradient_checkpointing=true" in message
    assert "training.per_device_train_batch_size=2 with training.gradient_accumulation_steps=2" in message
    assert "model.quantization=nf4 or int8" in message


def test_other_errors_stay_and_what_a_run_has_is_not_advised(tmp_path):
    training = {"gradient_checkpointing": True, "tokens_per_batch": 64, "chunk_tokens": 64}
    offline = parse_run(run_data("m", "d", tmp_path, training=training, model={"quantization": "nf4"}))
    assert [each.split("=")[0].split(",")[0] for each in memory_advice(offline)] == [
        "lower training.tokens_per_batch",
        "shorten rows by data.max_length",
    ]
    online = [*memory_advice(parse_run(online_data("m", "d", tmp_path, adapter=None)))]
    assert "training.per_device_train_batch_size=2 (the same results)" in online[1]
    assert any("rollout.max_batch_tokens" in each for each in online)
    assert any(each.startswith("train an adapter") for each in online)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), advising_on_memory(offline):
        raise RuntimeError("shapes differ")
