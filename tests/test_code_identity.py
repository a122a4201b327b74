"""Identities of code: what it does counts, what is written about it does not."""

import functools
import importlib
import linecache
import sys

import pytest
import torch

from falign.code_identity import code_identity, plain_code
from falign.divergences import from_generator
from falign.rewards import reward_identity

CODE = '''"""Rewards of a project."""

from dataclasses import dataclass

LIMIT = 2


def near(a, b):
    """Whether two lengths are near."""
    return abs(a - b) < LIMIT


def score(completions, length=3):
    """Score lengths."""

    def one(text):
        """Score one text."""
        return 1.0 if near(len(text), length) else 0.0

    return [one(text) for text in completions]  # in their order


@dataclass(frozen=True)
class Judge:
    """Judge texts."""

    share: float = 0.5
    """Value of a near length."""

    def __call__(self, completions):
        """Return the values."""
        return [self.share * value for value in score(completions)]


short = lambda completions: [float(near(len(text), 1)) for text in completions]  # short ones
'''
WRITTEN = {
    "module": ("Rewards of a project.", "Our rewards."),
    "helper": ("Whether two lengths are near.", "Nearness."),
    "function": ('"""Score lengths."""', '"""Return 1 for lengths near to 3.\n\n    Else 0.\n    """'),
    "no docstring": ('    """Score lengths."""\n\n', ""),
    "nested": ("Score one text.", "One text."),
    "class": ("Judge texts.", "A judge."),
    "attribute": ("Value of a near length.", "Value."),
    "method": ("Return the values.", "Values."),
    "comments": ("# in their order", "# as they came\n"),
    "comment of the lambda": ("# short ones", "# those of one character"),
}
DONE = {
    "constant": ("LIMIT = 2", "LIMIT = 3"),
    "helper": ("< LIMIT", "<= LIMIT"),
    "default": ("length=3", "length=4"),
    "argument": ("completions, length=3", "answers, length=3"),
    "nested": ("1.0 if near", "2.0 if near"),
}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that imports a project with parts of its code replaced."""
    monkeypatch.syspath_prepend(tmp_path)

    def module(*changes):
        code = CODE
        for old, new in changes:
            assert old in code
            code = code.replace(old, new, 1)
        (tmp_path / "code_of_project.py").write_text(code)
        sys.modules.pop("code_of_project", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        return importlib.import_module("code_of_project")

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield module
    sys.modules.pop("code_of_project", None)


def identities(project):
    return [
        reward_identity(project.score),
        code_identity(project.score),
        code_identity(project.Judge()),
        code_identity(project.short),
    ]


@pytest.mark.parametrize("change", WRITTEN.values(), ids=WRITTEN)
def test_docstrings_and_comments_do_not_count(load, change):
    assert identities(load()) == identities(load(change))


@pytest.mark.parametrize("change", DONE.values(), ids=DONE)
def test_constants_defaults_names_of_arguments_and_helpers_count(load, change):
    before, after = identities(load()), identities(load(change))
    assert [a != b for a, b in zip(before, after, strict=True)][:3] == [True] * 3


def test_the_values_of_an_object_and_the_code_of_its_methods_count(load):
    project = load()
    assert code_identity(project.Judge()) != code_identity(project.Judge(0.25))
    assert code_identity(project.Judge()) != code_identity(load(("self.share * value", "self.share + value")).Judge())


def test_lambdas_of_one_line_differ_and_helpers_that_are_lambdas_count():
    first, second = [lambda texts: [1.0 for _ in texts], lambda texts: [2.0 for _ in texts]]
    assert code_identity(first) != code_identity(second)
    assert code_identity(lambda texts: texts) != code_identity(lambda answers: answers)
    assert code_identity(lambda texts: (first(texts), first(texts))) != code_identity(
        lambda texts: (first(texts), second(texts))
    )


def test_functions_without_source_are_their_bytecode_without_docstring():
    def typed(code):
        names = {"__name__": "typed"}
        exec(compile(code, "<typed>", "exec"), names)
        return names["f"]

    before = code_identity(typed("def f(texts):\n 'Old.'\n def g(): 'Old.'; return 1.0\n return [g() for _ in texts]"))
    assert before == code_identity(
        typed("def f(texts):\n 'New.'\n def g(): 'New.'; return 1.0\n return [g() for _ in texts]")
    )
    assert before != code_identity(
        typed("def f(texts):\n 'Old.'\n def g(): 'Old.'; return 2.0\n return [g() for _ in texts]")
    )


@pytest.mark.parametrize(
    "code",
    [
        "@prompt\ndef judge(text):\n    '''Is it polite?'''",
        "class Judge(library.Signature):\n    '''Is it polite?'''",
    ],
)
def test_a_docstring_that_a_library_may_read_counts(code):
    assert plain_code(code) != plain_code(code.replace("polite", "right"))
    assert plain_code(code, docstrings="none") == plain_code(code.replace("polite", "right"), docstrings="none")


def test_docstrings_count_where_the_code_reads_them(load):
    reading = ("return abs(a - b) < LIMIT", "return len(score.__doc__) < LIMIT")
    before, after = identities(load(reading)), identities(load(reading, ("Score lengths.", "Score.")))
    assert all(a != b for a, b in zip(before, after, strict=True))


USED = """
import functools
from dataclasses import dataclass
from typing import Any

import torch

FACTOR, KNOWN, WEIGHTS = 2.0, {"a", "b"}, torch.tensor([1.0, 2.0])


def twice(function):
    @functools.wraps(function)
    def called(texts):
        return [2 * value for value in function(texts)]

    return called


def scaled(text):
    return FACTOR * len(text)


@functools.lru_cache
def looked_up(text):
    return 3 * len(text)


class Base:
    def __call__(self, texts):
        return [1.0 for _ in texts]


class Judge(Base):
    def __init__(self, least=2):
        self.least = least

    @staticmethod
    def one(text):
        return scaled(text)

    @property
    def most(self):
        return looked_up("most")


JUDGE = Judge()


@twice
def decorated(texts):
    return [1.0 for _ in texts]


def of_objects(texts):
    return [float(text in KNOWN) + WEIGHTS.sum().item() + JUDGE.least for text in texts]


@dataclass(frozen=True)
class Holds:
    inner: Any


class Plain:
    def __init__(self, inner):
        self.inner = inner


def closure(inner, default=None):
    def called(texts, default=default):
        return inner

    return called
"""


def test_all_that_code_uses_counts(load, monkeypatch):
    monkeypatch.setitem(globals(), "CODE", USED)

    def counts(take, *change):
        return code_identity(take(load())) != code_identity(take(load(change)))

    judge = lambda project: project.Judge()  # noqa: E731
    assert counts(judge, "return [1.0 for", "return [3.0 for")  # of a base class
    assert counts(judge, "FACTOR * len", "FACTOR + len")  # through a static method
    assert counts(judge, "FACTOR, KNOWN, WEIGHTS = 2.0", "FACTOR, KNOWN, WEIGHTS = 3.0")
    assert counts(judge, "3 * len", "4 * len")  # through a property, and behind a cache
    assert counts(lambda project: project.decorated, "2 * value", "3 * value")
    for change in (('"b"}', '"c"}'), ("[1.0, 2.0]", "[1.0, 2.00001]"), ("JUDGE = Judge()", "JUDGE = Judge(3)")):
        assert counts(lambda project: project.of_objects, *change)
    assert code_identity(load().of_objects) == code_identity(load().of_objects)


def test_functions_tensors_and_arrays_among_the_values_of_an_object_count(load, monkeypatch):
    monkeypatch.setitem(globals(), "CODE", USED)
    project = load()
    many = torch.zeros(5000)
    other = many.index_fill(0, torch.tensor(2500), 1.0)
    layer = torch.nn.Linear(2, 2)
    pairs = [
        (lambda x: x, lambda x: 2 * x),
        (many, other),  # of which repr leaves out the middle
        (many.numpy(), other.numpy()),
        (torch.tensor(1.00001), torch.tensor(1.00002)),
        (layer, torch.nn.Linear(2, 2)),
        (project.Judge(1), project.Judge(2)),
        (from_generator(lambda u: u * torch.log(u), name="own"), from_generator(lambda u: (u - 1) ** 2, name="own")),
    ]
    wraps = [
        project.Holds,
        project.Plain,
        project.closure,
        lambda value: project.Holds([value, {"inner": value}]),
        lambda value: project.closure(None, default=value),
        lambda value: functools.partial(project.closure, value),
    ]
    for wrap in wraps:
        for first, second in pairs:
            assert code_identity(wrap(first)) != code_identity(wrap(second)), (wrap, first)
            assert code_identity(wrap(first)) == code_identity(wrap(first))
    closures = [project.closure(2), project.closure(3)], [project.closure(2), project.closure(4)]
    assert code_identity(project.Holds(closures[0])) != code_identity(project.Holds(closures[1]))


def test_an_object_that_holds_itself_has_an_identity(load, monkeypatch):
    monkeypatch.setitem(globals(), "CODE", USED)
    project = load()
    first, second = project.Plain(1), project.Plain(1)
    first.inner, second.inner = first, [second]
    assert code_identity(first) != code_identity(second)
