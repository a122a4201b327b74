"""One order of arguments in all methods: the divergence, then its strength; all others by name."""

import inspect

import pytest

import falign
from falign import methods

POSITIONAL = {
    "SALSA": ("beta", "divergence"),  # older than the rule
    "SALSARLOO": ("beta", "divergence"),
    "TDPO": ("divergence", "beta", "alpha", "variant", "weighting"),
    "FDPG": ("divergence", "target"),
    "DPHRL": ("divergence", "coefficient"),
}


def positional(function):
    parameters = inspect.signature(function).parameters.values()
    return tuple(each.name for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY)


@pytest.mark.parametrize("name", methods.__all__)
def test_the_divergence_comes_first_and_its_strength_next(name):
    function = getattr(falign.methods, name)
    if "divergence" in inspect.signature(function).parameters:
        assert positional(function) in {POSITIONAL.get(name), ("divergence",), ("divergence", "beta")}
