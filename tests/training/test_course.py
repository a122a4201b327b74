"""Callbacks, early stopping, the best model and checkpoints by time: in whole runs, offline and online."""

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

import falign
from falign.errors import ConfigError, TrainingError
from falign.models.structure import adapter_weights
from falign.report import write_report
from falign.runfile import parse_run
from falign.training import train
from falign.training.course import SaveByTime
from falign.training.trainer import AlignmentTrainer
from tests.models.tiny import save_tiny
from tests.training.own_callbacks import Count, HasTensor, Plain
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

OWN = "tests.training.own_callbacks:"
WORST = {"metric": "loss", "greater_is_better": True}
"""The loss falls while the run learns, so that its first evaluation is the best by this."""
CONSTANT = {"lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    return save_tiny(folder / "tiny"), write_pairs(folder / "pairs.jsonl"), write_prompts(folder / "prompts.jsonl")


@pytest.fixture
def start(places, tmp_path):
    model, pairs, prompts = places

    def run(name, *, online=False, resume=False, eval_size=6, reference=None, **training):
        changes = {"training": training, "prompts" if online else "data": {"eval_size": eval_size}}
        make, rows = (online_data, prompts) if online else (run_data, pairs)
        config = parse_run(make(model, rows, tmp_path / name, **changes, **({"reference": reference or {}})))
        return train(config, console=Console(quiet=True), resume=resume)

    return run


def killed_at(step, start, *args, **kwargs):
    """Start a run that dies while it computes a step."""
    original = AlignmentTrainer.compute_loss

    def dies(self, *arguments, **named):
        if self.state.global_step + 1 == step:
            raise KeyboardInterrupt
        return original(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlignmentTrainer, "compute_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            start(*args, **kwargs)


def losses(summary):
    return {log["step"]: log["loss"] for log in summary.folder.metrics() if "loss" in log}


def held_out(summary, metric):
    return {log["step"]: log[f"eval_{metric}"] for log in summary.folder.metrics() if f"eval_{metric}" in log}


def same(one, other, file="adapter_model.safetensors"):
    first, second = (load_file(folder / file) for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_same_run(one, other):
    assert losses(one) == losses(other)
    assert (one.before, one.after, one.best) == (other.before, other.after, other.best)
    assert same(one.folder.adapter, other.folder.adapter)


@pytest.mark.parametrize("online", [False, True])
def test_a_callback_with_state_ends_the_resumed_run_where_it_ends_the_uninterrupted_one(start, online):
    own = [{"kind": f"{OWN}Count", "limit": 3.5}, f"{OWN}Halves"]
    setting = {"online": online, "max_steps": 6, "save_steps": 1, "save_total_limit": None, "callbacks": own}
    whole = start("whole", **setting)
    assert list(losses(whole)) == [1, 2, 3, 4]
    state = json.loads((whole.folder.path / "checkpoint-4" / "course.json").read_text())
    assert state[0]["attributes"]["logs"] == 4
    killed_at(4, start, "broken", **setting)
    assert_same_run(start("broken", resume=True, **setting), whole)
    (whole.folder.path / "summary.json").unlink()
    assert_same_run(start("whole", resume=True, **setting), whole)  # it has ended, and takes no further step


def test_a_callback_changes_the_gradient_of_the_step(start):
    plain, other = (
        start("plain", **CONSTANT, optim="sgd"),
        start("other", **CONSTANT, optim="sgd", callbacks=f"{OWN}Halves"),
    )
    assert losses(plain)[1] == losses(other)[1]
    assert losses(plain)[2] != losses(other)[2]
    record = other.folder.read_json("manifest.json")["inputs"]["hashes"]["objective_code"]
    assert list(record) == [f"{OWN}Halves"]


def test_the_code_of_a_callback_is_compared_when_a_run_resumes(start, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "watching.py"
    file.write_text("from transformers import TrainerCallback\n\nclass Watch(TrainerCallback):\n    limit = 1\n")
    setting = {"save_steps": 2, "callbacks": "watching:Watch"}
    killed_at(4, start, "run", **setting)
    file.write_text(file.read_text().replace("limit = 1", "limit = 2"))
    with pytest.raises(ConfigError, match=r"the code of watching:Watch differs from when the run began"):
        start("run", resume=True, **setting)
    with pytest.raises(ConfigError, match=r"training.callbacks.0.kind \('watching:Watch' when it began, None now\)"):
        start("run", resume=True, **{**setting, "callbacks": []})


@pytest.mark.parametrize("online", [False, True])
def test_early_stopping_counts_evaluations_without_improvement_across_a_resume(start, online):
    metric = {"metric": "completions/length", "greater_is_better": True} if online else WORST
    stopping = {**metric, "patience": 2, "min_delta": 1000.0}
    setting = {"online": online, "eval_steps": 1, "save_steps": 2, "max_steps": 6, "early_stopping": stopping}
    if online:
        setting["eval_size"] = 2
    whole = start("whole", **setting)
    assert list(losses(whole)) == [1, 2, 3]  # the first sets the mark, the second and third are not better
    killed_at(3, start, "broken", **setting)
    assert_same_run(start("broken", resume=True, **setting), whole)
    with pytest.raises(ConfigError, match=r"training.eval_steps \(1 when it began, 2 now\)"):
        start("broken", resume=True, **{**setting, "eval_steps": 2})


def test_early_stopping_waits_for_changes_that_count(start):
    assert max(losses(start("run", eval_steps=1, early_stopping={"metric": "eval_loss", "patience": 2}))) == 8
    stopping = {"metric": "loss", "patience": 3, "min_delta": 0.5}
    run = start("other", eval_steps=2, early_stopping=stopping)
    values = held_out(run, "loss")
    assert max(losses(run)) == 8
    assert values[2] - min(values.values()) < 0.5


@pytest.mark.parametrize("reference", [None, {"kind": "moving_average", "alpha": 0.5, "every": 1}])
def test_the_best_model_is_kept_with_its_metrics_and_reference(start, places, reference):
    setting = {**CONSTANT, "reference": reference, "eval_steps": 2, "save_total_limit": 1, "keep_best": WORST}
    setting |= {"max_steps": 5, "save_steps": 3}
    whole = start("whole", **setting)
    values = {step: value for step, value in held_out(whole, "loss").items() if step}
    best = max(values, key=values.__getitem__)
    assert best < 5
    assert (whole.best.step, whole.best.value, whole.best.last_step) == (best, values[best], 5)
    assert whole.after["loss"] == values[best]
    manifest = whole.folder.read_json("manifest.json")
    assert manifest["best"] == whole.best.model_dump() == whole.folder.read_json("summary.json")["best"]
    checkpoints = sorted(path.name for path in whole.folder.path.glob("checkpoint-*"))
    assert checkpoints == [f"checkpoint-{best}", "checkpoint-5"]
    short = start("short", **CONSTANT, reference=reference, max_steps=best)
    assert same(whole.folder.adapter, short.folder.adapter)
    assert short.after == whole.after
    assert [each.after for each in short.samples] == [each.after for each in whole.samples]
    if reference is not None:
        assert same(whole.folder.reference_state(), short.folder.reference_state(), "reference.safetensors")
    killed_at(5, start, "broken", **setting)
    assert_same_run(start("broken", resume=True, **setting), whole)
    page = write_report([whole.folder.path], None)
    assert f"of step {best} of 5, with the best held-out loss" in page.page.read_text(encoding="utf-8")
    exported = adapter_weights(falign.load(whole.folder.path).policy, "default")
    kept = load_file(whole.folder.adapter / "adapter_model.safetensors")
    assert all(torch.equal(exported[name], kept[name]) for name in kept)


def test_the_last_model_is_compared_too(start):
    run = start("run", max_steps=5, eval_steps=2, keep_best="loss")
    values = {step: value for step, value in held_out(run, "loss").items() if step}
    assert set(values) == {2, 4, 5}
    assert run.best.step == min(values, key=values.__getitem__) == 5


def test_a_damaged_best_checkpoint_is_refused_at_the_end(start, tmp_path):
    setting = {"eval_steps": 2, "save_steps": 3, "keep_best": WORST}
    killed_at(8, start, "run", **setting)
    (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(
        TrainingError, match=r"checkpoint-2, the best model so far, is .*damaged .*0 of .* bytes.*restore"
    ):
        start("run", resume=True, **setting)


@pytest.mark.parametrize("name", ["early_stopping", "keep_best"])
def test_a_metric_that_does_not_exist_is_refused_before_the_first_step_with_those_that_do(start, tmp_path, name):
    metric = {"metric": "rewards/margin", "greater_is_better": True}
    with pytest.raises(ConfigError) as caught:
        start("run", eval_steps=2, **{name: metric})
    message = str(caught.value)
    assert message.startswith(
        f"training.{name}.metric='rewards/margin' is not among the held-out metrics of the evaluation before training; "
        "did you mean 'rewards/margins'? They are entropy, "
    )
    assert "rewards/accuracies" in message
    assert not (tmp_path / "run" / "run.yaml").exists()
    start("run", max_steps=1)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"keep_best": "loss"}, r"training.keep_best compares evaluations during training: set training.eval_steps"),
        (
            {"early_stopping": {"metric": "loss"}},
            r"training.early_stopping compares evaluations .* training.eval_steps",
        ),
        ({"keep_best": "entropy", "eval_steps": 1}, r"'entropy' does not tell whether more is better: set greater_is"),
        ({"early_stopping": {"metric": "loss", "patience": 0}}, r"training.early_stopping.patience=0"),
        ({"callbacks": ["logs"]}, r"training.callbacks.0.kind='logs' is unknown"),
        ({"callbacks": ["tests.nowhere:Name"]}, r"training.callbacks.0.kind='tests.nowhere:Name'.*No module named"),
        ({"callbacks": [f"{OWN}Plain"]}, r"training.callbacks.0.kind='.*:Plain' makes a Plain, which is not a transf"),
        (
            {"callbacks": [{"kind": f"{OWN}Count", "limt": 1}]},
            r"unknown key 'training.callbacks.0.limt'; did you mean",
        ),
        ({"callbacks": [{"kind": f"{OWN}Count", "limit": "x"}]}, r"training.callbacks.0.limit='x'"),
        ({"callbacks": [f"{OWN}HasTensor"]}, r"the state of HasTensor is .*: return a dict of plain values"),
        (
            {"callbacks": [f"{OWN}Fails"]},
            r"Step 3: on_step_end of Callbacks: LookupError: no such step\n.*own_callbacks",
        ),
        ({"callbacks": [f"{OWN}Asks"], "eval_size": 0}, r"Step 1: a callback asks for an evaluation .*set data.eval"),
    ],
)
def test_what_cannot_work_is_refused_with_place_value_and_remedy(start, training, message):
    with pytest.raises((ConfigError, TrainingError), match=message):
        start("run", **training)


def test_checkpoints_come_by_time_and_change_nothing(start, tmp_path):
    plain = start("plain", max_steps=4)
    assert not list(plain.folder.path.glob("checkpoint-*"))
    killed_at(4, start, "saved", max_steps=4, save_minutes=1e-6, save_total_limit=None)
    assert len(list((tmp_path / "saved").glob("checkpoint-*"))) == 3
    assert_same_run(start("saved", resume=True, max_steps=4, save_minutes=60.0), plain)


def test_a_checkpoint_by_time_counts_from_the_last_one_and_needs_room_on_the_disk(tmp_path, monkeypatch):
    now, told, args = [0.0], [], TrainingArguments(output_dir=str(tmp_path))
    model = torch.nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(10)).sum().backward()
    optimizer.step()
    saver = SaveByTime(60.0, told.append, clock=lambda: now[0])

    def saves_at(minutes, **control):
        now[0], control = 60.0 * minutes, TrainerControl(**control)
        saver.on_step_end(args, TrainerState(), control, model=model, optimizer=optimizer)
        return control.should_save

    assert not saves_at(59)
    assert saves_at(60)
    saver.on_save(args, TrainerState(), TrainerControl())
    assert not saves_at(119)
    assert saves_at(120)
    size = 3 * 10 * 10 * 4 + 4  # weights, two moments, a step counter
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 2 * size - 1}))
    assert not saves_at(121)
    assert not saves_at(180)
    assert not saves_at(181)
    assert len(told) == 1
    assert told[0].startswith("no checkpoint after 60 minutes (training.save_minutes): it would take 1.2e-06 GB")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 2 * size}))
    assert saves_at(242)


def test_objects_of_a_program_are_callbacks_whose_class_and_arguments_a_resumed_run_must_have(places, tmp_path):
    model, pairs, _ = places

    def go(*callbacks, resume=False, **training):
        training = {
            "learning_rate": 0.01,
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "callbacks": list(callbacks),
            **training,
        }
        data = {"train": [{"path": str(pairs), "chat": False}], "max_length": 64}
        return falign.train(str(model), output_dir=tmp_path / "run", data=data, training=training, resume=resume)

    seen = Count(5.0)
    killed_at(4, go, seen, Count)
    assert seen.logs == 3
    with pytest.raises(ConfigError, match=r"training.callbacks.0.code"):
        go(Count(6.0), Count, resume=True)
    again = Count(5.0)
    run = go(again, Count, resume=True)
    assert again.logs == 4
    assert run.config.objects == ["training.callbacks.0", "training.callbacks.1"]
    with pytest.raises(ConfigError, match=r"is not a transformers.TrainerCallback: give one, or module:Class"):
        go(Plain())
    with pytest.raises(ConfigError, match=r"the state of HasTensor"):
        falign.train(
            str(model),
            output_dir=tmp_path / "other",
            data={"train": [{"path": str(pairs), "chat": False}]},
            training={"callbacks": HasTensor()},
        )
