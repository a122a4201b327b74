import json

import pytest

from falign.errors import ConfigError
from falign.report import read_runs
from falign.report.runs import MOST_COMPLETIONS, answers_of


def rows_of(run):
    return [json.loads(line) for line in (run / "completions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_an_online_run_shows_the_same_held_out_prompts_before_and_after(runs):
    run = runs("online")
    first, *_ = answers = answers_of(*read_runs([run]))
    held_out = [row for row in rows_of(run) if row["held_out"] and row["prompt"] == first.prompt]
    assert len(answers) == 4
    assert [answer.text for answer in first.before] == [row["completion"] for row in held_out if row["step"] == 0][
        :MOST_COMPLETIONS
    ]
    assert [answer.reward for answer in first.after] == [row["reward"] for row in held_out if row["step"] == 6][
        :MOST_COMPLETIONS
    ]
    assert first.when == ("before", "after 6 steps")


def test_half_a_last_line_of_a_run_that_goes_on_is_none(runs):
    run = runs("online")
    before = answers_of(*read_runs([run]))
    with (run / "completions.jsonl").open("a") as file:
        file.write('{"step": 6, "held_')
    assert answers_of(*read_runs([run])) == before


def test_another_damaged_line_is_named(runs):
    run = runs("online")
    path = run / "completions.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0][:-4], *lines[1:]]))
    with pytest.raises(ConfigError, match=r"completions.jsonl:1 is damaged"):
        answers_of(*read_runs([run]))


def test_a_run_without_held_out_prompts_shows_its_first_and_last_rollout(runs):
    run = runs("online")
    rows = [row for row in rows_of(run) if not row["held_out"]]
    (run / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = answers_of(*read_runs([run]))
    shown = {answer.text for each in answers for answer in (*each.before, *each.after)}
    assert shown <= {row["completion"] for row in rows if row["step"] in (0, 5)}
    assert shown
