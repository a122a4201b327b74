import pytest

from falign.data.examples import build_example, prompt_key
from falign.errors import DataError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def build(prompt, *completions, preference=None, system=None):
    fields = [f"c{i}" for i in range(len(completions))]
    return build_example(
        "x:1", prompt=prompt, completions=completions, preference=preference, fields=fields, system=system
    )


def test_plain_stays_plain_and_one_conversation_makes_all_of_them_one():
    assert not build("q", "a").conversational
    assert build("q", "a", [ANSWER]).completions == ([ANSWER], [ANSWER])


def test_system_column_equal_to_the_system_turn_is_not_doubled():
    assert build([SYSTEM, USER], "a", system="s").prompt == [SYSTEM, USER]
    assert build([USER], "a", system="s").prompt == [SYSTEM, USER]
    assert build([USER], "a", system="  ").prompt == [USER]


def test_completion_that_repeats_the_prompt_loses_it_once():
    assert build([USER], [USER, ANSWER]).completions == ([ANSWER],)
    with pytest.raises(DataError, match="x:1: 'c0' has 2 turns after the common prompt"):
        build([USER], [USER, USER, ANSWER])


def test_equal_completions_of_equal_preference_are_allowed():
    assert build("q", "a", "a", "b", preference=[1.0, 1.0, 0.0]).preference == (1.0, 1.0, 0.0)


def test_prompt_key_tells_text_from_text_but_not_spacing_and_case():
    assert prompt_key("A  b\n") == prompt_key("a b")
    assert prompt_key("ab") != prompt_key("a b")
    assert prompt_key([USER]) != prompt_key([SYSTEM | {"content": "q"}])
    assert prompt_key([USER]) != prompt_key("q")
