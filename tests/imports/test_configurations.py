"""Configurations of other libraries train a step here, or are refused by the names that falign cannot carry."""

import json
import re

import pytest
import yaml
from rich.console import Console

from falign.cli.main import app
from falign.errors import ConfigError
from falign.imports import import_run
from falign.runfile import load_run_file
from falign.training import train
from tests.imports.configurations import REFUSED, TRAINED
from tests.models.tiny import save_tiny
from tests.training.pairs import write_pairs

# transformers moves batches to pinned memory when asked to, and warns on a machine without an accelerator.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

DATASETS = {
    "alpaca_pairs": {"file_name": "alpaca.json", "ranking": True, "columns": {"prompt": "instruction"}},
    "alpaca_answers": {"file_name": "alpaca_answers.json"},
    "alpaca_labels": {"file_name": "alpaca_labels.json", "columns": {"kto_tag": "kto_tag"}},
    "turns": {
        "file_name": "turns.json",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Local data in the layouts of the three libraries."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [json.loads(line) for line in write_pairs(folder / "pairs.jsonl", 16).read_text().splitlines()]
    files = {
        "labels": [
            {"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(pairs)
        ],
        "answers": [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs],
        "prompts": [{"prompt": p["prompt"]} for p in pairs],
        "questions": [{"question": p["prompt"], "chosen": p["chosen"], "rejected": p["rejected"]} for p in pairs],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alpaca = [{"instruction": p["prompt"].strip(), "input": ""} for p in pairs]
    turns = [{"conversations": [{"from": "human", "value": p["prompt"]}]} for p in pairs]
    described = {
        "alpaca": [{**a, "chosen": p["chosen"], "rejected": p["rejected"]} for a, p in zip(alpaca, pairs, strict=True)],
        "alpaca_answers": [{**a, "output": p["chosen"]} for a, p in zip(alpaca, pairs, strict=True)],
        "alpaca_labels": [
            {"instruction": a["instruction"], "output": p["chosen"], "kto_tag": i % 2 == 0}
            for i, (a, p) in enumerate(zip(alpaca, pairs, strict=True))
        ],
        "turns": [
            {**t, **{side: {"from": "gpt", "value": p[side]} for side in ("chosen", "rejected")}}
            for t, p in zip(turns, pairs, strict=True)
        ],
    }
    (folder / "data").mkdir()
    for name, rows in described.items():
        (folder / "data" / f"{name}.json").write_text(json.dumps(rows))
    (folder / "data" / "dataset_info.json").write_text(json.dumps(DATASETS))
    return folder


def written(source, folder, tiny, out):
    for name in ("pairs", "labels", "answers", "prompts", "questions"):
        source = source.replace(f" {name}.jsonl", f" {folder / name}.jsonl")
    path = folder / "theirs.yaml"
    path.write_text(source.replace("MODEL", str(tiny)).replace("OUT", str(out)), encoding="utf-8")
    return path


def at(config, path):
    value = config
    for part in path.split("."):
        value = value[int(part)] if part.isdigit() else value[part]
    return value


@pytest.mark.parametrize("name", TRAINED)
def test_a_configuration_trains_a_step(name, folder, tiny, tmp_path):
    case = TRAINED[name]
    source = written(case.source, folder, tiny, tmp_path / "run")
    run = import_run(case.library, source, method=case.method, out=tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text(run.text, encoding="utf-8")
    config = load_run_file(tmp_path / "run.yaml")
    assert config == run.config
    values = config.model_dump(mode="json")
    for path, value in case.expected.items():
        found = at(values, path)
        chosen = {key: found[key] for key in value} if isinstance(value, dict) else found
        assert chosen == value, path
    assert run.command.endswith(f"run.yaml{case.launch}")
    for sentence in case.differs:
        assert any(sentence in each for each in run.differences), run.differences
    given = yaml.safe_load(source.read_text(encoding="utf-8"))
    assert set(case.unused) <= set(run.unused)
    for setting in given.keys() - {"trl"}:
        assert re.search(rf"\b{setting}\b", run.text), f"{setting} is dropped in silence"
    summary = train(config, console=Console(quiet=True))
    assert any("train_loss" in line for line in summary.folder.metrics())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_is_refused_by_name(name, folder, tiny, tmp_path):
    case = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        import_run(case.library, written(case.source, folder, tiny, tmp_path / "run"), method=case.method)
    for words in case.told:
        assert words in str(caught.value), str(caught.value)


def test_the_command_line_writes_the_file_and_says_how_to_train(folder, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["import", "trl", "dpo", "--model_name_or_path", str(tiny), "--dataset_name", str(folder / "pairs.jsonl")]
    words += ["--learning-rate", "1e-5", "--loss_type", "sigmoid", "sft", "--no_gradient_checkpointing"]
    words += ["--accelerate_config", "zero3", "--num_processes", "4", "--out", "run.yaml"]
    assert app(words, standalone_mode=False) is None
    told = capsys.readouterr().err
    assert "differs: on a GPU TRL computes in bfloat16" in told
    assert "Train with: falign train run.yaml --launch fsdp2 --processes 4" in told
    config = load_run_file("run.yaml")
    assert (config.training.learning_rate, config.training.gradient_checkpointing) == (1e-5, False)
    assert list(config.model_dump()["objective"]["terms"]) == ["sigmoid", "sft"]
    with pytest.raises(ConfigError, match=r"--out run\.yaml exists"):
        app(words, standalone_mode=False)


def test_a_script_with_accelerate_launch_is_read(folder, tmp_path):
    (tmp_path / "fsdp.yaml").write_text("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2}\n")
    (tmp_path / "kto.yaml").write_text("model_name_or_path: m\ndataset_name: d\nbeta: 0.3\n")
    (tmp_path / "run.sh").write_text(
        f"#!/bin/bash\nWANDB_PROJECT=x accelerate launch --config_file {tmp_path}/fsdp.yaml \\\n"
        f"  trl/scripts/kto.py --config {tmp_path}/kto.yaml --beta 0.2  # over the file\n"
    )
    run = import_run("trl", tmp_path / "run.sh")
    assert run.command == "falign train run.yaml --launch fsdp2 --processes 2"
    assert (run.config.objective.kind, run.config.objective.beta) == ("unpaired", 0.2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["dpo"], "objective.kind: pairwise, as configs/quickstart.yaml does. Type: falign train RUN.yaml"),
        (["kto", "run.yaml"], "Type: falign train run.yaml"),
        (
            ["grpo", "--model_name_or_path", "m", "--dataset_name", "d", "--reward_funcs", "a.b"],
            "falign import trl grpo --model_name_or_path m --dataset_name d --reward_funcs a.b --out run.yaml\n"
            "  falign train run.yaml",
        ),
        (["sft", "--model_name_or_path", "m", "--packing", "True"], "packing: True has no counterpart"),
    ],
)
def test_a_method_as_a_command_answers_with_the_line_to_type(words, told):
    with pytest.raises(ConfigError) as caught:
        app(words, standalone_mode=False)
    assert told in str(caught.value)
