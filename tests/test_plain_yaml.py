"""YAML that has no end, is too large by its aliases, or has values that are none is refused with its place."""

import pytest

from falign.errors import ConfigError
from falign.plain_yaml import plain_yaml

LAUGHS = "\n".join(["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)])


def test_plain_values_and_their_aliases_are_read():
    assert plain_yaml("a: &a {b: 1}\nc: *a", place="x") == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "x has more than 1,000,000 values by its aliases"),
        ("a: &a [*a]", "x is nested too deeply, or contains itself"),
        ("[" * 5000, "x is nested too deeply"),
        ("a: " + "9" * 5000, "x is not YAML: a value of it cannot be read"),
        ("a: 2001-99-99", "x is not YAML: a value of it cannot be read"),
        ("a: 1\nb: [", "x:2 is not YAML"),
        ("a: !!python/object:os.system x", "x is not YAML: could not determine a constructor"),
    ],
)
def test_what_is_no_plain_value_is_refused(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plain_yaml(text, place="x")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {max_steps: 3}\nseed: 1\ntraining:\n  save_steps: 2\n", r"'training' twice .*\(lines 1 and 3\)"),
        (
            "data:\n  train:\n  - path: a\n    columns:\n      prompt: q\n      prompt: r\n",
            r"'prompt' .*\(lines 5 and 6\)",
        ),
        ("a: [{b: 1,\n b: 1}]", r"'b' twice in one section \(lines 1 and 2\)"),
        ("'a': 1\na: 2", r"'a' twice in one section \(lines 1 and 2\)"),
        ("{r: 8, r: 16}", "'r' twice in one section: merge"),
    ],
)
def test_a_key_that_comes_twice_in_a_section_is_refused_with_both_lines(text, message):
    with pytest.raises(ConfigError, match=f"x has {message}"):
        plain_yaml(text, place="x")


def test_a_section_that_takes_another_in_may_change_its_keys():
    text = "a: &a {b: 1, c: 2}\nd: &d {<<: *a, b: 3}\ne: {<<: [*a, *d], b: 4}\n"
    assert plain_yaml(text, place="x") == {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}, "e": {"b": 4, "c": 2}}
