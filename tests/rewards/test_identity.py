import functools
import importlib
import shutil
import sys

import pytest

from falign.rewards import RewardSum, WeightedReward, Words, number, reward_identities, reward_identity
from falign.rewards.identity import source_hashes
from falign.rewards.lexicon import Lexicon
from falign.rewards.own_function import TimedFunction
from tests.rewards import plain

REWARD = """
from helper_of_reward import scale
import json

def score(completions):
    return [scale for _ in completions]
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a reward, a module beside it that it imports, and one that it does not."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reward_of_identity.py").write_text(REWARD)
    (tmp_path / "helper_of_reward.py").write_text("from package_of_reward.deep import scale\n")
    (tmp_path / "package_of_reward").mkdir()
    (tmp_path / "package_of_reward" / "__init__.py").write_text("")
    (tmp_path / "package_of_reward" / "deep.py").write_text("scale = 1.0\n")
    (tmp_path / "unrelated.py").write_text("a = 1\n")
    yield tmp_path
    forget_modules()


def forget_modules():
    for name in ("reward_of_identity", "helper_of_reward", "package_of_reward", "package_of_reward.deep"):
        sys.modules.pop(name, None)


def test_the_source_of_the_module_and_of_those_beside_it_decide(project):
    score = importlib.import_module("reward_of_identity").score
    before = reward_identity(score)
    (project / "unrelated.py").write_text("a = 2\n")
    assert reward_identity(score) == before
    (project / "package_of_reward" / "deep.py").write_text("scale = 2.0\n")
    deep = reward_identity(score)
    assert deep != before
    (project / "package_of_reward" / "deep.py").write_text("scale = 1.0\n")
    assert reward_identity(score) == before
    (project / "reward_of_identity.py").write_text(f'"""Rewards."""\n{REWARD}\n# another\n')
    assert reward_identity(score) == before
    (project / "reward_of_identity.py").write_text(REWARD.replace("[scale for", "[2 * scale for"))
    assert reward_identity(score) not in (before, deep)


def test_the_same_code_elsewhere_is_the_same_reward(project, tmp_path_factory, monkeypatch):
    before = reward_identity(importlib.import_module("reward_of_identity").score)
    other = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(project, other, dirs_exist_ok=True)
    shutil.rmtree(project)
    forget_modules()
    monkeypatch.syspath_prepend(other)
    score = importlib.import_module("reward_of_identity").score
    assert score.__code__.co_filename.startswith(str(other))
    assert reward_identity(score) == before


def test_a_built_in_verifier_is_its_own_source_and_its_settings():
    assert reward_identity(number()) == reward_identity(number())
    changed = [number(tolerance=0.1), number(answer="label"), number(failed=None), number(timeout=1.0)]
    assert len({reward_identity(reward) for reward in [number(), *changed]}) == 5
    names = {f"falign.rewards.verifiers{name}" for name in ("", ".numbers", ".answers")}
    assert set(source_hashes("falign.rewards.verifiers.numbers")) == names


def test_settings_of_every_kind_of_reward_count():
    rewards = [
        Words(["a"]),
        Words(["b"]),
        Words(["a"], mode="any"),
        Lexicon({"a": 1.0}),
        Lexicon({"a": 2.0}),
        TimedFunction("tests.rewards.plain:length"),
        TimedFunction("tests.rewards.plain:length", errors="count"),
        plain.length,
        plain.matches,
        functools.partial(plain.length, mode=1),
        functools.partial(plain.length, mode=2),
    ]
    assert len({reward_identity(reward) for reward in rewards}) == len(rewards)


def test_a_sum_gives_the_identity_of_each_of_its_rewards():
    rewards = RewardSum((WeightedReward("a", Words(["w"])), WeightedReward("b", number(), 2.0)))
    assert reward_identities(rewards) == {"a": reward_identity(Words(["w"])), "b": reward_identity(number())}


def test_callable_objects_and_classes_without_a_file_have_an_identity():
    class Judge:
        def __call__(self, completions):
            return [0.0 for _ in completions]

    assert reward_identity(Judge()) == reward_identity(Judge())
    assert reward_identity(len) != reward_identity(sum)
