"""Notes of the default learning rate, of missing checkpoints, and of those that are further apart than an hour."""

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from falign.runfile import parse_run
from falign.training import train
from falign.training.start_notes import CheckpointAdvice, start_notes
from tests.models.tiny import save_tiny
from tests.training.pairs import run_data, write_pairs

# transformers moves batches to pinned memory when asked to, and warns on a machine without an accelerator.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

LEAST = {"output_dir": "run", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}}


@pytest.mark.parametrize(
    ("sections", "rate", "note"),
    [
        ({}, 1e-4, "learning rate 0.0001, the default for an adapter (training.learning_rate)"),
        ({"adapter": {"r": 2}}, 1e-4, "learning rate 0.0001, the default for an adapter (training.learning_rate)"),
        ({"adapter": None}, 1e-6, "learning rate 1e-06, the default for all weights (training.learning_rate)"),
        ({"adapter": None, "training": {"max_steps": 9}}, 1e-6, "learning rate 1e-06, the default for all weights"),
        ({"adapter": None, "training": {"learning_rate": 1e-4}}, 1e-4, None),
        ({"training": {"learning_rate": 1e-6}}, 1e-6, None),
    ],
)
def test_the_default_learning_rate_follows_from_what_is_trained(sections, rate, note):
    config = parse_run({**LEAST, **sections})
    assert config.training.learning_rate == rate
    assert config.training.max_steps == sections.get("training", {}).get("max_steps", -1)
    assert parse_run(config.model_dump(mode="json")) == config  # the written run file has the number
    rates = [each for each in start_notes(config, 9) if each.startswith("learning rate")]
    assert len(rates) == (note is not None)
    assert not rates or rates[0].startswith(note)


@pytest.mark.parametrize(
    ("save_steps", "told"),
    [(None, "training.save_steps is not set"), (9, "training.save_steps=9 of 9 steps"), (8, None)],
)
def test_missing_checkpoints_are_told_with_the_field(save_steps, told):
    for minutes, when in ((None, "no checkpoints before the end"), (5.0, "a checkpoint every 5 minutes only")):
        training = {"learning_rate": 1.0, "save_steps": save_steps, "save_minutes": minutes}
        notes = list(start_notes(parse_run({**LEAST, "training": training}), 9))
        assert len(notes) == (told is not None)
        assert told is None or (told in notes[0] and when in notes[0] and "training.save_steps=N" in notes[0])


def test_a_run_shows_its_notes(tmp_path, capsys):
    run = run_data(save_tiny(tmp_path / "tiny"), write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run")
    run["training"] = {"max_steps": 1}
    summary = train(parse_run(run), console=Console(width=300))
    out = capsys.readouterr().out
    assert "learning rate 0.0001, the default for an adapter" in out
    assert "a checkpoint every 60 minutes only (training.save_steps is not set)" in out
    assert "learning_rate: 0.0001" in summary.folder.run_file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("save_steps", "seconds", "told"),
    [
        (None, 20.0, "a step takes 20 s, so that 1000 steps without a checkpoint take 5.6 hours: "
                     "training.save_steps=180 writes one an hour"),
        (500, 10.0, "a step takes 10 s, so that 500 steps without a checkpoint take 1.4 hours: "
                    "training.save_steps=360 writes one an hour"),
        (500, 7.0, None),
        (None, 3.5, None),
    ],
)  # fmt: skip
def test_checkpoints_further_apart_than_an_hour_are_told_once(tmp_path, save_steps, seconds, told):
    now, messages = [100.0], []
    advice = CheckpointAdvice(save_steps, messages.append, clock=lambda: now[0])
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    for step in range(41, 60):  # of a resumed run
        advice.on_step_end(args, TrainerState(global_step=step, max_steps=1000), TrainerControl())
        now[0] += seconds
    assert len(messages) == (told is not None)
    assert told is None or messages[0].startswith(told)
