"""A run goes on only where all that decides its next step is as it was; what decides no step may change."""

import json
import shutil

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from falign.errors import ConfigError
from falign.training import RunFolder, parse_run, train
from tests.models.tiny import save_tiny, tiny_tokenizer
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

TRAINING = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant", "logging_steps": 1}


def stopped(run, **changes):
    """Begin a run and stop it before its third step begins."""

    def move(*args, step, **kwargs):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("falign.training.trainer.move_when_due", move)
        with pytest.raises(KeyboardInterrupt):
            train(parse_run(run), console=Console(quiet=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a frozen reference, data, and a stopped run of each kind."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "model")
    save_tiny(folder / "reference", seed=3)
    run = run_data(
        folder / "model",
        write_pairs(folder / "pairs.jsonl"),
        folder / "offline",
        reference={"kind": "frozen", "path": str(folder / "reference")},
        training=TRAINING,
    )
    stopped(run)
    online = online_data(folder / "model", write_prompts(folder / "prompts.jsonl"), folder / "online", "short")
    online["training"] |= TRAINING
    stopped(online)
    return {"folder": folder, "offline": run, "online": online}


def resume(run, **changes):
    return train(parse_run({**run, **changes}), console=Console(quiet=True), resume=True)


def lines(file):
    return file.read_text().splitlines(keepends=True)


def one_row_more(folder):
    rows = lines(folder / "pairs.jsonl")
    (folder / "pairs.jsonl").write_text("".join([*rows, rows[0].replace("question 0", "question 99")]))


def another_order(folder):
    rows = lines(folder / "pairs.jsonl")
    (folder / "pairs.jsonl").write_text("".join([*rows[:-2], rows[-1], rows[-2]]))


def another_answer(folder):
    (folder / "pairs.jsonl").write_text((folder / "pairs.jsonl").read_text().replace("gladly!", "gladly?", 1))


def swapped_ids(folder):
    file = folder / "model" / "tokenizer.json"
    stored = json.loads(file.read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary["Z"], vocabulary["Y"] = vocabulary["Y"], vocabulary["Z"]  # which no row has
    file.write_text(json.dumps(stored))


def another_template(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template + "\n"
    tokenizer.save_pretrained(folder / "model")


def another_stop(folder):
    file = folder / "model" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [1]}))


def another_rope(folder):
    file = folder / "model" / "config.json"
    stored = json.loads(file.read_text())
    stored["rope_parameters"] = {**stored["rope_parameters"], "rope_theta": 500.0}
    file.write_text(json.dumps(stored))


def other_weights(folder, model="model"):
    file = folder / model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, file, {"format": "pt"})


def other_reference(folder):
    other_weights(folder, "reference")


def another_reference_config(folder):
    file = folder / "reference" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 0.1}))


OFFLINE = {
    one_row_more: r"data\.train.* had 18 rows when the run began, and has 19 now",
    another_order: r"row \d+ of data\.train",
    another_answer: r"row \d+ of data\.(train|eval)",
    swapped_ids: "tokenizer",
    another_template: "chat template",
    another_stop: "stop tokens",
    another_rope: r"config\.json",
    other_weights: "weights of model.path",
    other_reference: "reference",
    another_reference_config: "reference",
}


def an_answer_column(folder):
    rows = lines(folder / "prompts.jsonl")
    (folder / "prompts.jsonl").write_text("".join(row.replace('"answer": 3', '"answer": 4') for row in rows))


ONLINE = {an_answer_column: r"row \d+ of prompts\.(train|eval)", other_weights: "weights of model.path"}


def refused(place, kind, change, message):
    folder = place["folder"]
    kept = folder.with_name(f"{folder.name}-kept")
    names = ("model", "reference", "pairs.jsonl", "prompts.jsonl")
    kept.mkdir()
    for name in names:
        source = folder / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, kept / name)
    before = {file: file.read_bytes() for file in sorted((folder / kind).rglob("*")) if file.is_file()}
    try:
        change(folder)
        with pytest.raises(ConfigError, match=message) as raised:
            resume(place[kind])
    finally:
        for name in names:
            source = kept / name
            if source.is_dir():
                shutil.copytree(source, folder / name, dirs_exist_ok=True)
            else:
                shutil.copy(source, folder / name)
        shutil.rmtree(kept)
    after = {file: file.read_bytes() for file in sorted((folder / kind).rglob("*")) if file.is_file()}
    assert after == before
    return str(raised.value)


@pytest.mark.parametrize("change", OFFLINE, ids=lambda change: change.__name__)
def test_an_offline_run_is_not_resumed_with_another(place, change):
    refused(place, "offline", change, OFFLINE[change])


@pytest.mark.parametrize("change", ONLINE, ids=lambda change: change.__name__)
def test_an_online_run_is_not_resumed_with_another(place, change):
    refused(place, "online", change, ONLINE[change])


def test_an_edited_run_file_in_the_run_folder_is_compared_with_what_the_run_began_with(place):
    folder = RunFolder(place["folder"] / "offline")
    kept = folder.run_file.read_text()
    try:
        folder.run_file.write_text(kept.replace("beta: 0.5", "beta: 0.25"))
        with pytest.raises(ConfigError, match=r"objective\.beta \(0\.5 when it began, 0\.25 now\)"):
            train(parse_run(folder.read_run_file()), console=Console(quiet=True), resume=True)
    finally:
        folder.run_file.write_text(kept)
