"""Runs in which a reference reads another prompt than the policy."""

import json

import pytest
from rich.console import Console

from falign.errors import ConfigError, DataError
from falign.runfile import parse_run
from falign.training import train
from tests.training.pairs import run_data
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

HINTED = "Hint {hint}. {prompt}"


def write(path, hints="abcdefgh"):
    rows = [
        {"prompt": f"question {i}: ", "chosen": "gladly", "rejected": "never", "hint": hint}
        for i, hint in enumerate(hints)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run_file(tiny, tmp_path):
    data = write(tmp_path / "pairs.jsonl")
    return lambda name, **changes: run_data(tiny, data, tmp_path / name, **{"training": {"max_steps": 2}, **changes})


def start(data, *, resume=False):
    return train(parse_run(data), console=Console(quiet=True), resume=resume)


def losses(summary):
    return [log["loss"] for log in summary.folder.metrics() if "loss" in log]


@pytest.mark.parametrize("kind", ["adapter_off", "frozen", "moving_average"])
def test_any_kind_reads_the_rows_columns_in_its_prompt_and_the_record_names_it(run_file, kind):
    moving = {"alpha": 0.5, "every": 1} if kind == "moving_average" else {}
    plain = start(run_file("plain", reference={"kind": kind, **moving}))
    hinted = start(run_file("hinted", reference={"kind": kind, **moving, "prompt": HINTED}))
    assert losses(hinted)[0] != losses(plain)[0]
    record = hinted.folder.read_json("manifest.json")["reference"]
    assert record["prompt"] == HINTED
    assert "prompts" not in plain.folder.read_json("manifest.json")["reference"]


def test_a_cached_reference_behind_a_prompt_is_the_live_one(run_file, tmp_path):
    live = start(run_file("live", reference={"kind": "adapter_off", "prompt": HINTED}))
    settings = {"kind": "adapter_off", "prompt": HINTED, "cache": str(tmp_path / "cache")}
    assert losses(start(run_file("first", reference=settings))) == pytest.approx(losses(live), abs=1e-6)
    plain = {"kind": "adapter_off", "cache": str(tmp_path / "cache")}
    assert losses(start(run_file("plain", reference=plain))) != pytest.approx(losses(live), abs=1e-6)


def test_a_resumed_run_with_other_hints_is_refused(run_file, tmp_path):
    given = {"reference": {"kind": "adapter_off", "prompt": HINTED}, "training": {"max_steps": 2, "save_steps": 1}}
    start(run_file("run", **given))
    write(tmp_path / "pairs.jsonl", hints="abcdefgx")
    with pytest.raises(ConfigError, match="the reference"):
        start(run_file("run", **given), resume=True)


def test_missing_columns_and_prompts_without_room_are_refused_with_their_row(run_file):
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: the template '\{solution\}' asks for 'solution'"):
        start(run_file("missing", reference={"kind": "adapter_off", "prompt": "{solution}"}))
    long = "x" * 3000 + "{prompt}"
    with pytest.raises(ConfigError, match=r"reference\.prompt: .*pairs\.jsonl:\d has 30\d\d tokens behind this prompt"):
        start(run_file("long", reference={"kind": "frozen", "prompt": long}))


def test_rollouts_are_scored_behind_the_prompt_of_their_row(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", n=6)
    runs = {}
    for name, prompt in (("plain", None), ("same", "{prompt}"), ("hinted", "Hint {answer}. {prompt}")):
        reference = {"kind": "adapter_off", "prompt": prompt}
        run = online_data(tiny, prompts, tmp_path / name, references={"reference": {}, "teacher": reference})
        run["measures"] = {"away": "divergence_to(reverse_kl, teacher)"}
        run["training"] |= {"max_steps": 2}
        runs[name] = [log["measures/away"] for log in start(run).folder.metrics() if "measures/away" in log]
    assert runs["same"] == pytest.approx(runs["plain"], abs=1e-6)
    assert runs["hinted"][0] > runs["plain"][0] + 0.01
