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
        ("a: &a [*a]", "x is nested too deeply, or holds itself"),
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
