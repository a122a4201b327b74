"""``falign data check`` and ``falign train`` agree on every row, and a mutated chat template is refused or harmless.

The full counts: ``python scripts/fuzz_inputs.py --family rendered_rows --inputs 2000`` and
``python scripts/fuzz_inputs.py --family chat_templates --inputs 300``.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random

import pytest
import yaml

from falign.cli.options import options_named
from falign.data import chat_template
from falign.errors import FalignError
from tests.models.tiny import save_tiny
from tests.training.pairs import run_data

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from fuzzing import chat_templates

ROWS, TEMPLATES, COMMANDS = 40, 40, 8
OPTIONS = ("chat", "columns", "ignore", "long_completion", "long_prompt", "max_length")
"""Arguments that messages write as options where a file is checked, and as fields of a run file where a run is."""


def test_check_and_train_agree_on_every_row_under_every_template(tmp_path):
    attempt = chat_templates.rendered_rows(tmp_path)
    for number in range(ROWS):
        attempt(Random(f"rows {number}"))


def test_mutated_templates_are_refused_with_a_message_or_leave_nothing_out(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    attempt, refused = chat_templates.chat_templates(tmp_path), 0
    for number in range(TEMPLATES):
        _, message = chat_templates.outcome(lambda number=number: attempt(Random(f"templates {number}")))
        refused += bool(message)
        assert not message or any(name in message for name in ("chat template", "chat_template", "rows.jsonl:1"))
    assert 0 < refused < TEMPLATES


@pytest.mark.parametrize(
    ("template", "line", "message"),
    [
        ("x\n{{ messages[0]['content'] + 3 }}", 2, "TypeError"),
        ("x\n\n{{ messages[7].content }}", 3, "has no element 7"),
        ("x\n{% for i in range(10**9) %}{% endfor %}", 2, "Range too big"),
        ("x\n{% if %}", 2, "is not valid Jinja"),
        ("x\n{% for i in range(99999) %}\n{% for j in range(99999) %}{% endfor %}{% endfor %}", 3, "has not finished"),
        ("{{ 'x' * 10**7 }}", None, "10,000,000 characters"),
        ("{{ 10 ** (10 ** 9) }}", None, "is not done after 1 s"),
        ("{{ '%999999999d' % 1 }}", None, "more than 2 GB of memory|is not done after 1 s"),
        ("{{ 'x' * 10**10 }}", None, "more than 2 GB of memory"),
    ],
)
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_template_that_fails_or_hangs_is_named_with_its_line(
    tmp_path, monkeypatch, template, line, message, in_thread
):
    from falign.data import DataSource, Window, load_preferences
    from falign.models import load_tokenizer

    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    save_tiny(tmp_path / "model")
    (tmp_path / "mine.jinja").write_text(template)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}))
    tokenizer = load_tokenizer(tmp_path / "model", chat_template=tmp_path / "mine.jinja")
    source, start = DataSource(str(tmp_path / "rows.jsonl"), chat=True), time.monotonic()
    read = partial(load_preferences, [source], tokenizer, stop_token_ids={1}, window=Window(99))
    with ThreadPoolExecutor(1) as pool, pytest.raises(FalignError, match=message) as caught:
        (pool.submit(read).result if in_thread else read)()
    assert time.monotonic() - start < 10
    assert "mine.jinja" in str(caught.value)
    assert line is None or f"line {line}" in str(caught.value)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": [{"role": "user", "content": "q", "name": "Ann"}], "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a</s>b", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b", "history": "What we said."},
    ],
)
def test_the_two_commands_say_the_same_of_a_bad_row(falign, tiny_run, tmp_path, bad):
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in (*rows, bad)))
    run = run_data(
        tiny_run, data, tmp_path / "run", data={"train": [{"path": str(data), "chat": True}], "eval_size": 1}
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    said = []
    for arguments in (["data", "check", data, "--chat", "--model", tiny_run], ["train", tmp_path / "run.yaml"]):
        status, out, err = falign(*arguments, columns=1000)
        assert status == 2
        said.append(" ".join((out + err).split()))
    place = f"{data}:4: "
    message = said[0][said[0].index(place) :].split(f" {data}: 1 bad row")[0]
    assert message[:60] in said[1]


def test_the_commands_say_the_same_of_mutated_rows_under_real_templates(falign_printed, tiny_run, tmp_path):
    data, template, run_file = (tmp_path / name for name in ("pairs.jsonl", "mine.jinja", "run.yaml"))
    templates, refused = chat_templates.templates(), 0
    for number in range(COMMANDS):
        random = Random(f"commands {number}")
        rows = [chat_templates.row(random) for _ in range(3)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        template.write_text(templates[random.choice(sorted(templates))])
        run = run_data(
            tiny_run,
            data,
            tmp_path / f"run-{number}",
            data={"train": [{"path": str(data), "chat": True}], "eval_size": 0, "max_length": 2000},
            model={"chat_template": str(template)},
            training={"max_steps": 1},
            sampling={"prompts": []},
        )
        run_file.write_text(yaml.safe_dump(run))
        options = ("--chat", "--model", tiny_run, "--chat-template", template, "--max-length", 2000)
        of_file, of_run = (falign_printed("data", "check", *each) for each in ((data, *options), (run_file,)))
        trained = falign_printed("train", run_file)
        assert of_file.status == of_run.status == trained.status, (rows, of_file, of_run, trained)
        typed, told = (
            [line for line in each.out.splitlines() if line.startswith(f"{data}:")] for each in (of_file, of_run)
        )
        assert typed == [options_named(line, OPTIONS) for line in told]
        refused += trained.status == 2
        if trained.status == 2:
            first = told[0] if told else of_run.err.removeprefix("error: ").strip()
            assert first in trained.err, (first, trained.err)
    assert 0 < refused < COMMANDS
