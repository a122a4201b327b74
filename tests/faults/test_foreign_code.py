"""A run folder may be someone else's: the code that it names runs only with --trust-code."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from falign.runfile import parse_run
from falign.runs import RunFolder
from falign.runs.named_code import named_code, own_code, read_run
from falign.training import train
from tests.models.tiny import save_tiny
from tests.report.summaries import add_summary, samples_summary
from tests.test_safety import calls
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

MODULE = "not_mine"
CODE = """
from pathlib import Path

from falign import divergences

Path(__file__).with_name("it-ran").touch()
divergence = divergences.get("reverse_kl")


def reward(prompts, completions, **columns):
    return [float(len(text)) for text in completions]
"""
BESIDE = ("matplotlib", "datasets", "pyarrow", "safetensors", "scipy")
"""What a run folder may hold to be imported in place of a library, where it is the working folder."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    model = save_tiny(folder / "tiny")
    pairs, prompts = write_pairs(folder / "pairs.jsonl"), write_prompts(folder / "prompts.jsonl")
    short = {"max_steps": 1, "save_steps": 1}
    runs = (
        run_data(model, pairs, folder / "offline", training=short),
        online_data(model, prompts, folder / "online", training=short, rollout={"evaluation": {"completions": 2}}),
    )
    for run in runs:
        train(parse_run(run), console=Console(quiet=True))
    return folder


@pytest.fixture
def foreign(folder, tmp_path, monkeypatch):
    """Return a function that copies a run, changes its record, and enters it, where modules of its own lie."""

    def copy(name, change):
        run = shutil.copytree(folder / name, tmp_path / name)
        record = yaml.safe_load((run / "run.yaml").read_text())
        change(record)
        record["output_dir"] = str(run)
        (run / "run.yaml").write_text(yaml.safe_dump(record))
        manifest = json.loads((run / "manifest.json").read_text())
        (run / f"{MODULE}.py").write_text(CODE)
        monkeypatch.chdir(run)
        monkeypatch.syspath_prepend(run)
        forged = parse_run(record)  # whoever forges one forges both
        manifest["inputs"]["settings"] = RunFolder.settings(forged)
        manifest["inputs"]["hashes"]["objective_code"] = own_code(forged)
        (run / "manifest.json").write_text(json.dumps(manifest))
        for module in BESIDE:
            (run / f"{module}.py").write_text('raise SystemExit("the code ran")')
        return run

    yield copy
    sys.modules.pop(MODULE, None)


def name_a_divergence(record):
    record["objective"]["divergence"] = f"{MODULE}:divergence"


def name_a_reward(record):
    record["rewards"] = [{"kind": "function", "function": f"{MODULE}:reward"}]


def ask_for_code_of_the_model(record):
    record["model"]["trust_remote_code"] = True


def name_kernels(record):
    record["model"]["attn_implementation"] = "someone/kernels"


OFFLINE = [
    ("score", ".", "../../pairs.jsonl", "--out", "scores.jsonl"),
    ("evaluate", "rewards", ".", "preferences", "../../pairs.jsonl"),
    ("evaluate", "samples", ".", "--rewards", "."),
    ("train", "run.yaml", "--resume"),
    ("train", "run.yaml", "output_dir=../again"),
]
ONLINE = [
    ("evaluate", "samples", "."),
    ("evaluate", "samples", ".", "--rewards", "."),
    ("evaluate", "samples", ".", "--rewards", "run.yaml"),
    ("train", "run.yaml", "--resume"),
]
OF_MODEL = [
    ("sample", ".", "--prompt", "x"),
    ("export", ".", "--format", "adapter", "--out", "../export"),
    ("score", ".", "../../pairs.jsonl", "--out", "scores.jsonl"),
]
REFUSED = [
    *(("offline", name_a_divergence, command) for command in OFFLINE),
    *(("online", name_a_reward, command) for command in ONLINE),
    *(("offline", ask_for_code_of_the_model, command) for command in [*OF_MODEL, *OFFLINE]),
    *(("offline", name_kernels, command) for command in OF_MODEL[:2]),
]


def commanded(command, folder):
    return [str(folder / Path(word).name) if word.startswith("../../") else word for word in command]


@pytest.mark.parametrize(("name", "change", "command"), REFUSED)
def test_code_that_a_run_folder_names_does_not_run(folder, foreign, falign, name, change, command):
    run = foreign(name, change)
    status, _, err = falign(*commanded(command, folder))
    assert status == 2
    assert "names code" in err
    assert "--trust-code" in err
    assert MODULE not in sys.modules
    assert not (run / "it-ran").exists()
    assert not list((run / "evaluation").glob("*/*.jsonl"))


@pytest.mark.parametrize(
    ("name", "change", "command"),
    [
        ("online", name_a_reward, ("sample", ".", "--prompt", "x", "--max-new-tokens", 2)),
        ("online", name_a_reward, ("export", ".", "--format", "adapter", "--out", "../export")),
        ("online", name_a_reward, ("report", ".")),
        ("offline", name_a_divergence, ("report", ".")),
        ("offline", name_a_divergence, ("sample", ".", "--prompt", "x", "--max-new-tokens", 2)),
    ],
)
def test_a_command_that_does_not_need_it_leaves_it_alone(foreign, falign, name, change, command):
    run = foreign(name, change)
    status, _, err = falign(*command)
    assert status == 0, err
    assert MODULE not in sys.modules
    assert not (run / "it-ran").exists()


def test_the_frontier_of_a_run_folder_imports_nothing(foreign, falign):
    run = foreign("offline", lambda record: None)
    summary = samples_summary(divergence=f"{MODULE}:divergence", reference="x", checkpoint=None)
    path = add_summary(run, {**summary, "record": {"temperature": 1}})
    (path.parent / "samples.jsonl").write_text(json.dumps({}) + "\n")
    status, _, err = falign("evaluate", "frontier", ".", "--out", "frontier.json")
    assert (status, "names code: summary.divergence=not_mine:divergence" in err) == (2, True)
    assert not (run / "it-ran").exists()


@pytest.mark.parametrize(
    ("name", "change", "command"),
    [("offline", name_a_divergence, OFFLINE[0]), ("online", name_a_reward, (*ONLINE[0], "--max-new-tokens", 2))],
)
def test_it_runs_where_it_is_asked_for(folder, foreign, falign, name, change, command):
    run = foreign(name, change)
    for module in BESIDE:
        (run / f"{module}.py").unlink()
    status, _, err = falign(*commanded(map(str, command), folder), "--trust-code")
    assert status == 0, err
    assert (run / "it-ran").exists()


def test_a_run_file_of_ones_own_needs_no_flag(folder, falign, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{MODULE}.py").write_text(CODE)
    run = run_data(folder / "tiny", folder / "pairs.jsonl", tmp_path / "run", training={"max_steps": 1})
    name_a_divergence(run)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(run))
    status, _, err = falign("train", "mine.yaml")
    assert status == 0, err
    assert (tmp_path / "it-ran").exists()
    sys.modules.pop(MODULE)


def test_every_section_that_names_code_is_seen(folder):
    config = read_run(RunFolder(folder / "online"), uses=[], trust_code=False)
    assert named_code(config) == {"rewards.0.function": "tests.training.prompts:vowels"}
    assert named_code(config, ["model", "objective"]) == {}


def test_modules_are_imported_by_name_in_two_places_only():
    # Another one needs a check of its own, or a run folder could reach it.
    imports = {file for file, _ in calls("importlib.import_module")}
    assert imports == {"registry.py", "worker.py"}
