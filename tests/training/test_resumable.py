"""The private names of transformers that falign overrides are listed, exist upstream, and are bounded by a release."""

import ast
import inspect
from importlib.metadata import requires, version
from pathlib import Path

import transformers
from packaging.requirements import Requirement

import falign
from falign.training.online.trainer import OnlineTrainer
from falign.training.resumable import PRIVATE_NAMES, ResumableTrainer
from falign.training.trainer import AlignmentTrainer

TRAINING = Path(falign.__file__).parent / "training"


def names_upstream():
    """Methods and fields of transformers' trainer, whether of the class or set on ``self``."""
    tree = ast.parse(inspect.getsource(transformers.Trainer))
    fields = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    return fields | set(vars(transformers.Trainer))


def private(names):
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def names_of_self(file):
    """Names that a file defines in its classes, or reads of ``self``, ``super()`` or ``trainer``."""
    tree = ast.parse(file.read_text())
    of = ("self", "super()", "trainer", "self.trainer")
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) in of}
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return used | {node.name for each in classes for node in each.body if isinstance(node, ast.FunctionDef)}


def test_each_listed_name_exists_in_the_installed_release():
    assert set(PRIVATE_NAMES) - names_upstream() == set()


def test_the_list_has_every_private_name_that_is_overridden_or_read():
    upstream, file = names_upstream(), TRAINING / "resumable.py"
    used = names_of_self(file)
    assert private(used) & upstream == private(PRIVATE_NAMES)
    assert set(PRIVATE_NAMES) <= used, "listed and not used any more"
    assert sorted(PRIVATE_NAMES) == list(PRIVATE_NAMES)


def test_no_other_file_overrides_or_reads_one():
    upstream = names_upstream()
    others = {file: private(names_of_self(file)) & upstream for file in TRAINING.rglob("*.py")}
    others.pop(TRAINING / "resumable.py")
    assert {file.name: found for file, found in others.items() if found} == {}
    for kind in (AlignmentTrainer, OnlineTrainer):
        assert private(vars(kind)) & upstream <= {"_abc_impl"}
        assert issubclass(kind, ResumableTrainer)


def test_the_installed_release_is_below_an_upper_bound():
    (bounds,) = (each for each in map(Requirement, requires("falign") or ()) if each.name == "transformers")
    assert bounds.specifier.contains(version("transformers"))
    major, minor = map(int, version("transformers").split(".")[:2])
    assert not bounds.specifier.contains(f"{major}.{minor + 1}.0"), "the next release has not been tested"
