"""The glossary: the names that it gives exist, and public names use its terms."""

import importlib
import pkgutil
import re
import typing
from functools import cache, reduce
from pathlib import Path

import pytest
from pydantic import BaseModel

import falign
from falign.runfile import RunConfig

PAGE = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text(encoding="utf-8")
SPAN = re.compile(r"`([^`]+)`")
# Public names that may hold a word of the right column, each with its reason.
EXCEPTIONS: dict[str, str] = {}


def tables(*header):
    """Yield the rows of every table of the page with this header, each a list of cells."""
    for block in PAGE.split("\n\n"):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().splitlines()]
        if rows[0] == list(header):
            yield from rows[2:]


ROWS = list(tables("term", "meaning", "names"))
NAMES = sorted({name for row in ROWS for name in SPAN.findall(row[2])})
REPLACED = sorted({word for row in tables("say", "not") for word in SPAN.findall(row[1])})


@cache
def packages():
    found = pkgutil.walk_packages(falign.__path__, "falign.")
    return [falign, *(importlib.import_module(module.name) for module in found if module.ispkg)]


@cache
def public_names():
    return {f"{package.__name__}.{name}" for package in packages() for name in getattr(package, "__all__", ())}


def sections(annotation):
    """Yield the run-file sections that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from sections(argument)


def fields(section, prefix="", above=()):
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in sections(field.annotation):
            if inner not in above:  # a product target holds targets
                yield from fields(inner, f"{prefix}{name}.", (*above, inner))


@cache
def run_file_fields():
    return frozenset(fields(RunConfig))


def member(owner, name):
    """Return a module, an attribute, or a dataclass field that has no default."""
    if hasattr(owner, name):
        return getattr(owner, name)
    if name in getattr(owner, "__annotations__", {}):
        return owner.__annotations__[name]
    return importlib.import_module(f"{owner.__name__}.{name}")


def exists(name):
    if name in run_file_fields():
        return True
    try:
        reduce(member, name.split("."), falign)
    except (ImportError, AttributeError):
        return False
    return True


def words(name):
    """``CompletionBatch.num_tokens`` -> completion, batch, num, tokens."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+|[A-Z]", name)]


def holds(name, replaced):
    """Whether the words of ``replaced`` occur in the name, in order and side by side; ``n_*`` is a beginning."""
    if replaced.endswith("_*"):
        return name.startswith(replaced[:-1])
    has, wanted = words(name), words(replaced)
    return any(has[i : i + len(wanted)] == wanted for i in range(len(has)))


@pytest.mark.parametrize("name", NAMES)
def test_names_exist(name):
    assert exists(name), f"docs/glossary.md names {name}, which is neither in falign nor a field of a run file"


def test_no_term_comes_twice():
    terms = [term for row in ROWS for term in row[0].split(", ")]
    assert len(terms) > 50
    assert len(terms) == len(set(terms))


def test_every_entry_says_something_in_at_most_three_sentences():
    for term, meaning, _ in ROWS:
        text = re.sub(r"\[[^\]]*\]\([^)]*\)", "", meaning)
        assert 10 < len(text) < 220, term


def test_public_names_use_the_terms_of_the_glossary():
    assert len(REPLACED) > 30
    leaves = {field.rpartition(".")[2] for field in run_file_fields()}
    checked = public_names() | {f"run file: {leaf}" for leaf in leaves}
    assert len(checked) > 400
    found = {name: word for name in checked for word in REPLACED if holds(re.split(r"[.\s]", name)[-1], word)}
    assert found.keys() <= EXCEPTIONS.keys(), found


@pytest.mark.parametrize(
    ("name", "replaced", "held"),
    [
        ("query_model", "query", True),
        ("ActorModel", "actor", True),
        ("factor", "actor", False),
        ("mean_log_probs", "log_probs", True),
        ("n_samples", "n_*", True),
        ("min_size", "n_*", False),
        ("KLCoef", "kl_coef", True),
    ],
)
def test_words_are_found_in_either_spelling(name, replaced, held):
    assert holds(name, replaced) is held
