"""What a run has held out is what its folder records, whatever has become of its data since."""

import json

import pytest
from rich.console import Console

from falign.errors import ConfigError
from falign.evaluation.sample_inputs import held_out_prompts
from falign.runfile import parse_run
from falign.runs import RunFolder
from falign.training import train
from tests.models.tiny import save_tiny
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An offline and an online run of one step, with the files that they learned from."""
    folder = tmp_path_factory.mktemp("runs")
    model, short = save_tiny(folder / "tiny"), {"max_steps": 1}
    files = {"offline": write_pairs(folder / "pairs.jsonl"), "online": write_prompts(folder / "prompts.jsonl")}
    rollout = {"evaluation": {"completions": 2}}
    configs = {
        "offline": run_data(model, files["offline"], folder / "offline", training=short),
        "online": online_data(model, files["online"], folder / "online", training=short, rollout=rollout),
    }
    for config in configs.values():
        train(parse_run(config), console=Console(quiet=True))
    return folder, files, configs


@pytest.fixture(params=["offline", "online"])
def run(request, runs):
    """The run, its prompts in the file's order, and a function that replaces the file's rows until the test ends."""
    folder, files, configs = runs
    file, config = files[request.param], parse_run(configs[request.param])
    original = file.read_text()
    rows = [json.loads(line) for line in original.splitlines()]

    def replace(rows):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def held_out():
        told = []
        return [
            row.prompt for row in held_out_prompts(RunFolder(folder / request.param), config, notify=told.append)
        ], told

    yield held_out, rows, replace
    file.write_text(original)


def test_rows_that_were_lost_move_no_prompt_from_training_to_held_out(run):
    held_out, rows, replace = run
    before, _ = held_out()
    assert len(before) == {24: 6, 12: 4}[len(rows)]
    kept = [row for i, row in enumerate(rows) if row["prompt"] in before or i % 2]
    assert len(kept) < len(rows)
    replace(kept)
    after, told = held_out()
    assert set(after) == set(before)
    assert not told
    replace([*reversed(rows), {**rows[0], "prompt": "a new question: "}])
    assert set(held_out()[0]) == set(before)


def test_held_out_prompts_that_are_gone_are_named(run):
    held_out, rows, replace = run
    before, _ = held_out()
    replace([row for row in rows if row["prompt"] != before[0]])
    with pytest.raises(ConfigError, match=rf"1 of the {len(before)} prompts that it held out are not in its data"):
        held_out()


def test_a_prompt_that_was_trained_on_too_is_left_out(runs, tmp_path):
    _, files, configs = runs
    rows = [json.loads(line) for line in files["offline"].read_text().splitlines()]
    (tmp_path / "eval.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [rows[0], {**rows[1], "prompt": "x: "}])
    )
    data = {
        **configs["offline"]["data"],
        "eval_size": 0,
        "eval": [{"path": str(tmp_path / "eval.jsonl"), "chat": False}],
    }
    config = parse_run({**configs["offline"], "data": data, "output_dir": str(tmp_path / "run")})
    train(config, console=Console(quiet=True))
    told = []
    (row,) = held_out_prompts(RunFolder(tmp_path / "run"), config, notify=told.append)
    assert row.prompt == "x: "
    assert told == ["1 of 2 held-out prompts were trained on too: left out"]
