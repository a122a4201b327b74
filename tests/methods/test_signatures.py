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


STRENGTHS = {
    "DCKD": ["alpha"],
    "KDRL": ["beta", "last_beta"],
    "LSKD": ["weight"],
    "OPADPO": ["anchor"],
    "OREAL": ["beta", "failed_weight"],
    "SAFE": ["entropy"],
    "SinKD": ["kl_weight", "sinkhorn_weight"],
    "SuperHF": ["beta"],
    "TSDKD": ["entropy", "ranking"],
}


@pytest.mark.parametrize(("name", "strength"), [(name, each) for name, found in STRENGTHS.items() for each in found])
def test_a_term_of_a_method_cannot_be_turned_around(name, strength):
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{strength}={value!r} must be positive and finite"):
            getattr(methods, name)(**{strength: value})
