"""The rule by which answers are read, and the placeholders of templates."""

import pytest

from falign.errors import ConfigError
from falign.judges import FIVE, PAIR, RATE, JudgeTemplate, MalformedError, ScoreForm, conversation_text, read_template

TEN = ScoreForm(1, 10)


@pytest.mark.parametrize(
    ("form", "answer", "value"),
    [
        (TEN, '{"reason": "x", "score": 7}', 7.0),
        (TEN, '```json\n{"score": 7}\n```', 7.0),
        (TEN, 'At first {"score": 3}, but then {"score": 7} it is.', 7.0),
        (TEN, '{"score": {"score": 2}} {"note": 1} {"score": "6"}', 6.0),
        (TEN, '{"reason": "I said [[2]] {a}", "score": 8.5}', 8.5),
        (TEN, "{broken [[4]] and [[ 5 ]]", 5.0),
        (TEN, '<think>{"score": 1}</think>[[9]]', 9.0),
        (PAIR, "[[tie]]", "tie"),
        (PAIR, 'A is better. {"verdict": "B"}', "B"),
        (FIVE, "My final verdict is tie: [[B=A]]", "A=B"),
        (FIVE, "[[A<<B]]", "B>>A"),
    ],
)
def test_the_last_verdict_counts(form, answer, value):
    assert form.read(answer) == value


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        (TEN, ""),
        (TEN, "8"),
        (TEN, "The score is 8/10."),
        (TEN, "[[8/10]]"),
        (TEN, '{"score": 0}'),
        (TEN, '{"score": 11}'),
        (TEN, '{"score": true}'),
        (TEN, '{"score": null}'),
        (TEN, '{"score": NaN}'),
        (TEN, '{"score": 5} and then {"score": "good"}'),  # the earlier one is not taken in its place
        (TEN, '[[5]] {"score": [5]}'),
        (TEN, '{"reason": "cut off", "score": 1'),
        (TEN, '<think>[[9]]</think> {"verdict": 3}'),
        (PAIR, '{"verdict": "A>>B"}'),
        (PAIR, "A"),
        (FIVE, '{"verdict": ["A>B"]}'),
    ],
)
def test_what_has_no_verdict_is_malformed(form, answer):
    with pytest.raises(MalformedError):
        form.read(answer)


def test_turns_are_shown_with_what_they_have():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    turns = [{"role": "user", "content": "2 + 2?"}, call, {"role": "tool", "content": "4"}]
    assert conversation_text(turns) == (
        'User: 2 + 2?\n\nAssistant: {"tool_calls": [{"function": {"name": "add"}}]}\n\ntool: 4'
    )


def test_scales_have_two_ends():
    with pytest.raises(ValueError, match=r"scale=\[5, 5\]"):
        ScoreForm(5, 5)


def test_placeholders_are_checked(tmp_path):
    known = {"prompt", "completion", "form", "reference"}
    RATE.check(known, required={"completion"})
    with pytest.raises(ConfigError, match=r"\{complection\} is unknown.*Did you mean \{completion\}"):
        JudgeTemplate("{prompt} {complection}").check(known, required={"completion"})
    with pytest.raises(ConfigError, match=r"\{completion\} is missing"):
        JudgeTemplate("{prompt}").check(known, required={"completion"})
    with pytest.raises(ConfigError, match=r"a brace of the text is doubled"):
        JudgeTemplate('{"score": 1} {completion')
    file = tmp_path / "judge.yaml"
    file.write_text("user: 'Rate {completion}. {form}'\nsystem: Be strict.\n")
    messages = read_template(file).messages({"completion": "{prompt}", "form": "F"})
    assert messages == [
        {"role": "system", "content": "Be strict."},
        {"role": "user", "content": "Rate {prompt}. F"},  # what is filled in is not filled again
    ]
    file.write_text("prompt: x\n")
    with pytest.raises(ConfigError, match="has the key user"):
        read_template(file)
    with pytest.raises(ConfigError, match="No template of a judge"):
        read_template(tmp_path / "none.yaml")
