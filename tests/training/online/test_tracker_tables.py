"""Completions as tables in real trackers, read back from their files; scripts/test_trackers.sh installs them all."""

import json
from importlib.util import find_spec

import pytest
from rich.console import Console

from falign.errors import ConfigError
from falign.runfile import parse_run
from falign.training import train
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts
from tests.training.test_trackers import events

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(wandb|trackio|mlflow).*"),
]


def read_tensorboard(folder):
    texts = {}
    for file in (folder / "run" / "tensorboard").glob("events.*"):
        for event in events(file):
            for value in event.summary.value:
                name = value.tag.removesuffix("/text_summary")
                if name in ("completions", "eval/completions"):
                    texts[name, event.step] = value.tensor.string_val[0].decode()
    found = {}
    for place, text in texts.items():
        header, _, *rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in text.split("\n")]
        found[place] = [dict(zip(header, row, strict=True)) for row in rows]
    return found


def read_wandb(folder):
    found = {}
    for file in folder.glob("wandb/offline-run-*/files/media/table/**/*.table.json"):
        table = json.loads(file.read_text(encoding="utf-8"))
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        name = "eval/completions" if "eval" in file.parts else "completions"
        found[name, rows[0]["step"] + (name == "completions")] = rows  # sampled before the step
    return found


def read_trackio(folder):
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("tables")
    found = {}
    for log in SQLiteStorage.get_logs("tables", run):
        for name in ("completions", "eval/completions"):
            if name in log:
                found[name, log["train/global_step"]] = log[name]["_value"]
    return found


def read_mlflow(folder):
    found = {}
    for file in (folder / "mlruns").glob("**/artifacts/**/step-*.json"):
        table = json.loads(file.read_text(encoding="utf-8"))
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        name = "eval/completions" if "eval" in file.parts else "completions"
        found[name, int(file.stem.removeprefix("step-"))] = rows
    return found


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio, "mlflow": read_mlflow}


@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_has_the_completions_of_each_log(tracker, tiny, tmp_path, monkeypatch):
    package = {"tensorboard": "tensorboardX"}.get(tracker, tracker)
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed; scripts/test_trackers.sh installs it")
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "MLFLOW_TRACKING_URI": f"file:{tmp_path / 'mlruns'}",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }.items():
        monkeypatch.setenv(name, value)
    training = {
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": tracker,
        "log_completions": True,
        "extra": {"project": "tables"} if tracker == "trackio" else {},
    }
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    run = online_data(tiny, prompts, tmp_path / "run", "vowels", training=training)
    summary = train(parse_run(run), console=Console(quiet=True))
    written = [json.loads(line) for line in summary.folder.completions_file.read_text(encoding="utf-8").splitlines()]
    tables = READERS[tracker](tmp_path)
    assert {step for name, step in tables if name == "completions"} >= {1}
    for (name, step), table in tables.items():
        assert {int(row["step"]) for row in table} == {step if name == "eval/completions" else step - 1}
        expected = [row for row in written if row["held_out"] == (name != "completions")]
        expected = [row for row in expected if row["step"] == int(table[0]["step"])]
        for found, row in zip(table, expected, strict=True):
            text = found["completion"].replace("<br>", "\n").replace("\\|", "|")
            assert text.splitlines() == row["completion"].splitlines()
            assert float(found["reward"]) == row["reward"]
            assert {key.removeprefix("reward/") for key in found if key.startswith("reward/")} == set(row["parts"])


@pytest.mark.parametrize(
    ("trackers", "part"), [([], "report_to=\\[\\] has none of them"), (["none"], "has none of them")]
)
def test_a_run_without_a_tracker_for_tables_is_refused(trackers, part, tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    run = online_data(
        tiny, prompts, tmp_path / "run", "vowels", training={"log_completions": True, "report_to": trackers}
    )
    with pytest.raises(ConfigError, match=f"training.log_completions .*{part}"):
        train(parse_run(run), console=Console(quiet=True))


def test_a_run_on_given_completions_is_refused(tiny, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    training = {"max_steps": 1, "log_completions": True, "report_to": "tensorboard"}
    with pytest.raises(ConfigError, match=r"training\.log_completions is for online runs"):
        train(parse_run(run_data(tiny, pairs, tmp_path / "run", training=training)), console=Console(quiet=True))
