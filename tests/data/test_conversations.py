import pytest

from falign.data.conversations import common_turns, looks_like_hh, read_dialogue, read_messages
from falign.errors import DataError


def test_both_spellings_of_turns_become_one():
    want = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    sharegpt = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert read_messages(want, place="x", field="f") == want
    assert read_messages(sharegpt, place="x", field="f") == want
    assert read_messages({"from": "gpt", "value": "a", "weight": None}, place="x", field="f") == want[2:]
    (kept,) = read_messages({"from": "gpt", "value": "a", "weight": 1}, place="x", field="f")
    assert kept == {**want[2], "weight": 1}  # the template may read it


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "x:1: 'f' is 7; it must be text or a list of turns"),
        (["hello"], r"x:1: 'f\[0\]' is 'hello'; a turn must have role and content"),
        ([{"role": "user"}], r"x:1: 'f\[0\]' is \{'role': 'user'\}; a turn must have"),
        (
            [{"role": "wizard", "content": "a"}],
            r"x:1: 'f\[0\]' has the unknown role 'wizard'; use one of \['assistant', ",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"the content of 'f\[0\]' is .*images are not supported"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [1]}],
            r"'tool_calls\[0\]' of 'f\[0\]' is 1; it must be \{'type': 'function'",
        ),
    ],
)
def test_what_is_no_conversation_is_named(value, message):
    with pytest.raises(DataError, match=message):
        read_messages(value, place="x:1", field="f")


def test_dialogue_keeps_the_words_human_and_assistant_inside_a_turn():
    text = "\n\nHuman: Am I a Human: or not?\nAssistant: no\n\nAssistant: yes\n\nHuman: ok\n\nAssistant: "
    assert looks_like_hh(text)
    turns = read_dialogue(text, place="x", field="f")
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant"]
    assert turns[0]["content"] == "Am I a Human: or not?\nAssistant: no"
    assert turns[3]["content"] == ""


@pytest.mark.parametrize("value", ["no dialogue", "Intro\n\nHuman: hi\n\nAssistant: ho", 3, ""])
def test_what_is_no_dialogue_is_refused(value):
    with pytest.raises(DataError, match=r"x:1: 'f' is .*; format hh needs text that starts with"):
        read_dialogue(value, place="x:1", field="f")


def test_common_turns_stop_at_the_first_difference_and_before_the_last_turn():
    q, a, b, r = ({"role": role, "content": text} for role, text in zip("uaau", "qabr", strict=True))
    assert common_turns([q, a, r, a], [q, a, r, b]) == [q, a, r]
    assert common_turns([q, a, r, a], [q, b, r, a]) == [q]
    assert common_turns([q, a], [q, a]) == [q]
    assert common_turns([q, a], [q, a, r, b]) == [q]
