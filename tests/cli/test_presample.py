"""``falign sample --verifier`` as a user types it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import falign as falign_package
from falign.durable import claimed, write_whole
from falign.errors import DataError
from falign.models import load_model, load_tokenizer, model_identity
from falign.models.tokenizers import tokenizer_fingerprint
from falign.rollouts import TransformersEngine
from falign.rollouts.presampling_journal import PresamplingJournal
from falign.scoring import PromptTree, completion_scores, pack
from falign.training.online.rehearsal_file import other_origin, read_rehearsal

VERIFIER = """
def even(prompts, completions, label, **columns):
    assert all(text for text in label)
    return [float(i % 4 < 3 and ids[0] % 3 > 0) for i, ids in zip(columns["number"], columns["completion_ids"])]
"""


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_verifier.py").write_text(VERIFIER)
    return write_prompts(tmp_path / "prompts.jsonl", 70)


def write_prompts(path, count):
    rows = [{"prompt": f"question {i}", "label": f"é{i}", "number": i} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def presample(falign, tiny, prompts, tmp_path):
    def run(*arguments, file=prompts, out=tmp_path / "out", verifier="my_verifier:even"):
        options = ("--num-completions", 4, "--threshold", 3, "--max-new-tokens", 4)
        return falign("sample", tiny, "--file", file, "--out", out, "--verifier", verifier, *options, *arguments)

    yield run
    sys.modules.pop("my_verifier", None)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_are_split_and_what_rehearses_has_its_logprobs(presample, prompts, tiny, tmp_path):
    status, table, err = presample()
    assert status == 0, err
    explored, rehearsed = (rows_of(tmp_path / "out" / f"{name}.jsonl") for name in ("exploration", "rehearsal"))
    rows = rows_of(prompts)
    assert all(row in rows for row in explored)
    assert sorted([*explored, *({k: row[k] for k in rows[0]} for row in rehearsed)], key=rows.index) == rows
    assert rehearsed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["prompts"], summary["rehearsal"], summary["exploration"]) == (70, len(rehearsed), len(explored))
    assert f"{len(rehearsed):,}" in table
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "exploration.jsonl",
        "rehearsal.jsonl",
        "summary.json",
    }

    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    for row in rehearsed:
        assert row["number"] % 4 < 3
        assert row["completion_ids"][0] % 3 > 0
        turns = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert row["prompt_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        batch = pack([PromptTree(tuple(row["prompt_ids"]), (tuple(row["completion_ids"]),))], pad_token_id=1)
        with torch.no_grad():
            assert completion_scores(model, batch).logprobs[0].tolist() == pytest.approx(row["logprobs"], abs=1e-5)


def test_a_template_makes_plain_prompts(presample, tiny, tmp_path):
    status, _, err = presample("--template", "Q: {label}? A:", "--plain")
    assert status == 0, err
    row = rows_of(tmp_path / "out" / "rehearsal.jsonl")[0]
    assert row["prompt_ids"] == load_tokenizer(tiny)(f"Q: {row['label']}? A:", add_special_tokens=False)["input_ids"]
    assert row["prompt"] == f"question {row['number']}"


def test_how_plain_prompts_are_read_is_told_where_it_was_not_said(presample, prompts, tmp_path):
    write_prompts(prompts, 2)
    for options, told in ((), True), (("--chat",), False), (("--plain",), False):
        status, _, err = presample(*options, "--overwrite")
        assert (status, "read as a user's turns, because the model has a chat template; --plain" in err) == (0, told)


def test_the_sample_in_the_package_is_a_file_as_any_other(presample, tiny, tmp_path):
    presample("--template", "{question}", file="demo:one-digit-arithmetic", verifier="number")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["prompts"] == 276


def test_a_killed_call_goes_on_to_the_same_files(presample, tiny, prompts, tmp_path):
    write_prompts(prompts, 600)
    assert presample(out=tmp_path / "whole")[0] == 0
    out = tmp_path / "out"
    journal = out / ".presampling.jsonl"
    options = ["--out", out, "--verifier", "my_verifier:even", "--num-completions", 4, "--threshold", 3]
    command = [sys.executable, "-c", "from falign.cli import main; main()", "sample", tiny, "--file", prompts, *options]
    process = subprocess.Popen(
        list(map(str, [*command, "--max-new-tokens", 4])),
        env=os.environ | {"PYTHONPATH": str(Path(falign_package.__file__).parents[1])},  # the working folder is another
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.stat().st_size > 2000) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert {file.name for file in out.iterdir()} == {".presampling.jsonl", ".presampling.lock"}
    status, _, err = presample("--seed", 1)
    assert status == 2
    assert "seed (0 there, 1 now)" in err
    status, table, err = presample()
    assert status == 0, err
    assert "prompts sampled by an earlier call" in table
    for name in ("exploration.jsonl", "rehearsal.jsonl", "summary.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_outputs_are_replaced_only_when_asked_for_and_when_the_new_ones_are_whole(presample, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert presample()[0] == 0
    whole = contents(out)
    status, _, err = presample()
    assert status == 2
    assert "--overwrite" in err
    for wrong in ({"verifier": "my_verifier:odd"}, {"file": tmp_path / "missing.jsonl"}):
        assert presample("--overwrite", **wrong)[0] == 2
        assert contents(out) == whole
    assert presample("--overwrite", "--threshold", 9)[0] == 2
    assert contents(out) == whole
    with monkeypatch.context() as patch:
        patch.setattr(PresamplingJournal, "append", stopping(PresamplingJournal.append, after=1))
        assert presample("--overwrite", "--seed", 3)[0] != 0
    assert {name: content for name, content in contents(out).items() if name in whole} == whole
    # The journal is dropped where it is of other settings, and taken up where it is of the same.
    assert presample("--overwrite", "--seed", 3)[0] == 0
    other = contents(out)
    assert other["exploration.jsonl"] != whole["exploration.jsonl"]
    assert presample("--overwrite")[0] == 0
    assert contents(out) == whole


def stopping(method, *, after):
    """The method, in a process that ends at the call after so many."""
    calls = []

    def stops(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        return method(self, *arguments, **options)

    return stops


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_call_that_is_stopped_between_its_files_goes_on(presample, tmp_path, monkeypatch, written):
    assert presample(out=tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("falign.evaluation.presampling_run.write_whole", stopping_at_call(write_whole, after=written))
        assert presample()[0] != 0
    out = tmp_path / "out"
    assert len(list(out.glob("[a-z]*.json*"))) == written
    assert (out / ".presampling.jsonl").exists()
    monkeypatch.setattr(
        TransformersEngine, "sample", stopping(TransformersEngine.sample, after=0)
    )  # nothing is sampled
    status, _, err = presample()
    assert status == 0, err
    assert contents(out) == contents(tmp_path / "whole")


def stopping_at_call(function, *, after):
    calls = []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        return function(*arguments)

    return stops


def test_what_changed_since_a_journal_was_begun_is_refused(presample, tmp_path, monkeypatch):
    def begin(folder):
        with monkeypatch.context() as patch:
            patch.setattr(PresamplingJournal, "append", stopping(PresamplingJournal.append, after=1))
            assert presample(out=folder)[0] != 0
        return folder / ".presampling.jsonl"

    journal = begin(tmp_path / "digit")
    damaged = re.sub(rb"-(\d)\.(\d)", lambda m: b"-%s.%d" % (m[1], 9 - int(m[2])), journal.read_bytes(), count=1)
    journal.write_bytes(damaged)
    status, _, err = presample(out=tmp_path / "digit")
    assert (status, "is damaged (its checksum differs)" in err) == (2, True)
    assert journal.read_bytes() == damaged

    journal = begin(tmp_path / "locked")
    with claimed(journal.with_name(".presampling.lock")):
        for options in ((), ("--overwrite",)):
            status, _, err = presample(*options, out=tmp_path / "locked")
            assert (status, "is being written by another process" in err) == (2, True)

    journal, before = begin(tmp_path / "code"), (tmp_path / "code" / ".presampling.jsonl").read_bytes()
    (tmp_path / "my_verifier.py").write_text(VERIFIER.replace("< 3", "< 2"))
    sys.modules.pop("my_verifier", None)
    status, _, err = presample(out=tmp_path / "code")
    assert (status, "identity of the verifier" in err) == (2, True)
    assert journal.read_bytes() == before


def test_prompts_without_room_are_left_out_and_counted(presample, prompts, tmp_path):
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": "x" * 2044, "label": "y", "number": 1}) + "\n")
    assert presample()[0] == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["prompts"], summary["too long"]) == (70, 1)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("--threshold", 9), {}, "--threshold 9 must be from 1 to --num-completions"),
        (("--temperature", 0.5), {}, "leave out --prompt, --json, --rewards and --temperature"),
        (("--max-new-tokens", 2048), {}, "leaves no room for a prompt in the 2048 positions"),
        ((), {"verifier": "nothing"}, "reward 'nothing' is unknown"),
        ((), {"verifier": "my_verifier:odd"}, "my_verifier:odd"),
        ((), {"file": "missing.jsonl"}, "missing.jsonl"),
        ((), {"out": "prompts.jsonl"}, "--out prompts.jsonl is a file: give a folder"),
        (("--template", "{nothing}"), {}, "prompts.jsonl:1"),
        (("--bad-rows", "ignore"), {}, "'skip'"),
    ],
)
def test_a_mistake_ends_with_status_2_and_a_remedy(presample, tmp_path, arguments, options, message):
    before = {file.name for file in tmp_path.iterdir()}
    status, _, err = presample(*arguments, **options)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert {file.name for file in tmp_path.iterdir()} - before <= {"__pycache__"}


def test_options_of_the_pre_sampling_need_a_verifier_and_those_of_files_an_output(falign, tiny):
    status, _, err = falign("sample", tiny, "--prompt", "hi", "--threshold", 2)
    assert status == 2
    assert "--threshold: this has no effect without --verifier" in err
    status, _, err = falign("sample", tiny, "--prompt", "hi", "--num-completions", 2, "--overwrite")
    assert status == 2
    assert "--overwrite: this has no effect without --out" in err


def test_rows_that_the_verifier_cannot_judge_are_found_before_sampling(presample, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "one", "label": "1"}, {"prompt": "two", "label": None}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, err = presample(file=file, verifier="number(answer='label')")
    assert status == 2
    assert "rows.jsonl:2: reward verifier: the answer is missing" in err
    status, _, err = presample(file=file, verifier="number(answer='value')")
    assert status == 2
    assert "reads the column 'value', and the data has ['label']" in err


def test_a_column_with_the_name_of_an_argument_is_refused_as_in_online_runs(presample, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "one", "completion_ids": [1]}) + "\n")
    status, _, err = presample(file=file, verifier="regex('a')")
    assert status == 2
    assert "the column 'completion_ids' has the name of an argument of rewards" in err


def test_what_is_rehearsed_is_tied_to_its_file_and_to_the_model_that_sampled_it(presample, prompts, tiny, tmp_path):
    assert presample().status == 0
    file, summary = tmp_path / "out" / "rehearsal.jsonl", tmp_path / "out" / "summary.json"
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    own = {**model_identity(model), "tokenizer": tokenizer_fingerprint(tokenizer)}
    read_rehearsal(str(file), num_tokens=len(tokenizer))
    assert other_origin(str(file), **own) is None
    for name, what in (
        ("weights", "weights are"),
        ("config", "configuration .* is"),
        ("tokenizer", "tokenizer or .* is"),
    ):
        assert re.search(f"sampled from {tiny}, whose {what} not", other_origin(str(file), **{**own, name: "other"}))

    written = json.loads(summary.read_text())
    adapter = {**written, "sampled_by": {**written["sampled_by"], "adapter": "an adapter"}}
    summary.write_text(json.dumps(adapter))
    assert "weights are not those" in other_origin(str(file), **own)

    for damaged in ("[]", "{", json.dumps({**written, "sampled_by": {}})):
        summary.write_text(damaged)
        with pytest.raises(DataError, match=r"summary\.json is damaged"):
            read_rehearsal(str(file), num_tokens=len(tokenizer))
    summary.write_text(json.dumps(written))
    file.write_text(file.read_text().replace('"logprobs": [-', '"logprobs": [-1', 1))
    with pytest.raises(DataError, match=r"rehearsal\.jsonl was changed after sampling .* give it another name"):
        read_rehearsal(str(file), num_tokens=len(tokenizer))
    assert presample("--overwrite").status == 0  # as the message says
    read_rehearsal(str(file), num_tokens=len(tokenizer))
    file.rename(file.with_name("mine.jsonl"))
    read_rehearsal(str(file.with_name("mine.jsonl")), num_tokens=len(tokenizer))
