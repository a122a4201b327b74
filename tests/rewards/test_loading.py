import pytest

from falign.errors import ConfigError
from falign.rewards import OwnFunction, Verifier, Words, choice, load_reward, mathematics, number, regex


def test_names_functions_and_arguments():
    assert load_reward("math") == mathematics()
    assert load_reward(" number(answer='label', tolerance=0.01)") == number(answer="label", tolerance=0.01)
    assert load_reward("choice(letters='ABCD')") == choice(letters="ABCD")
    assert load_reward(r"regex('(?m)^\\d+: a', whole=True)") == regex(r"(?m)^\d+: a", whole=True)
    assert load_reward("words(['a', 'b'], mode='any')") == Words(words=["a", "b"], mode="any")
    assert isinstance(load_reward("sections(['think', 'answer'])"), Verifier)
    assert load_reward("tests.rewards.plain:length") == OwnFunction("tests.rewards.plain:length")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", r"reward 'maths' is unknown; did you mean 'math'\? Choose one of math, number"),
        ("math(precision=3)", r"unexpected keyword argument 'precision'"),
        ("regex", r"argument: 'pattern'"),
        ("number(tolerance=x)", "its arguments must be literals"),
        ("tests.rewards.plain:nothing", "has no attribute 'nothing'"),
        ("a b c", "is unknown"),
    ],
)
def test_what_is_no_reward_is_refused_with_the_remedy(name, message):
    with pytest.raises(ConfigError, match=message):
        load_reward(name)
