"""Everything public in the mathematics says what it takes, gives, and where it comes from."""

import importlib
import inspect

import pytest

from falign.divergences import Divergence

MODULES = [
    *("falign.divergences", "falign.divergences.estimators", "falign.divergences.powers"),
    *("falign.objectives", "falign.objectives.margins", "falign.methods", "falign.scoring"),
]
FROM_A_PAPER = ("falign.divergences.estimators", "falign.methods", "falign.objectives.margins")


def public(module_name):
    module = importlib.import_module(module_name)
    return [(f"{module_name}.{name}", getattr(module, name)) for name in module.__all__]


EVERYTHING = {name: value for module in MODULES for name, value in public(module)}
FUNCTIONS = {name: value for name, value in EVERYTHING.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in EVERYTHING.items() if inspect.isclass(value)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_name_arguments_and_result(name):
    function = FUNCTIONS[name]
    text = inspect.getdoc(function) or ""
    parameters = [p for p in inspect.signature(function).parameters if p not in ("args", "kwargs")]
    assert text, name
    assert not parameters or "Args:" in text
    for parameter in parameters:
        assert f"{parameter}:" in text, f"{name} does not describe {parameter}"
    returned = str(inspect.signature(function).return_annotation)
    if returned != "None" and not returned.startswith("Iterator"):  # a context manager
        assert "Returns:" in text, name


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n.startswith(FROM_A_PAPER) and "get_" not in n])
def test_formulas_name_their_source_and_show_a_value(name):
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    assert "Source:" in text
    assert "Example:" in text


@pytest.mark.parametrize("name", [n for n, c in CLASSES.items() if issubclass(c, Divergence)])
def test_divergences_name_their_source(name):
    text = inspect.getdoc(CLASSES[name]) or ""
    assert "Source:" in text
    assert "``" in text


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_described(name):
    assert len(inspect.getdoc(CLASSES[name]) or "") > 20
