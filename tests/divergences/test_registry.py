import re

import pytest

from falign import divergences
from falign.divergences import Alpha, JensenShannon, PearsonChi2
from tests.conformance.exact import EXACT


def test_every_family_is_in_the_battery():
    of_battery = {re.match(r"\w+", name)[0] for name in EXACT}
    assert of_battery >= set(divergences.names())
    assert len(divergences.names()) >= 12


@pytest.mark.parametrize("name", [n for n in divergences.names() if n not in ("alpha", "generalized_js")])
def test_a_name_gives_the_divergence_of_that_name(name):
    assert divergences.get(name).name == name
    assert divergences.get(divergences.get(name).name) == divergences.get(name)


def test_parameters_by_name_or_in_parentheses():
    assert divergences.get("alpha(0.5)") == divergences.get("alpha", alpha=0.5) == Alpha(0.5)
    assert divergences.get("alpha(alpha=0.5)") == Alpha(0.5)
    assert divergences.get("generalized_js(0.25)") == divergences.get("generalized_js", b=0.25)
    assert divergences.get("alpha(0.5)") != divergences.get("alpha(0.3)")
    assert divergences.get("alpha(0.3)").name == "alpha(0.3)"


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("js", "jensen_shannon"),
        ("JS-divergence", "jensen_shannon"),
        ("chi_square", "pearson_chi2"),
        ("tv", "total_variation"),
    ],
)
def test_aliases(alias, name):
    assert divergences.get(alias) == divergences.get(name)


def test_wrappers():
    assert divergences.get("standardized(js)") == JensenShannon().standardized()
    assert divergences.get("dual(neyman_chi2)") == PearsonChi2()
    for name in ("standardized(pearson_chi2)", "dual(chi2_kl)", "standardized(generalized_js(0.3))"):
        assert divergences.get(name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kl", "'reverse_kl' = .* or 'forward_kl'"),
        ("alpha_divergence", "does not say whose α"),
        ("revers_kl", "did you mean 'reverse_kl'"),
        ("alpha", "needs its parameter alpha"),
        ("alpha(x)", "not a number"),
        ("alpha(nan)", "finite"),
        ("reverse_kl(0.5)", "takes no parameter"),
        ("generalized_js(1.5)", "0 < b < 1"),
        ("", "not of the form"),
    ],
)
def test_a_bad_name_is_refused_with_a_remedy(name, message):
    with pytest.raises(ValueError, match=message):
        divergences.get(name)


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="needs its parameter alpha, got"):
        divergences.get("alpha", a=0.5)


@pytest.mark.parametrize("name", ["alpha(0.5)", "alpha(alpha=0.5)", "dual(alpha(0.5))"])
def test_a_parameter_that_is_given_twice_is_refused(name):
    with pytest.raises(ValueError, match="given twice"):
        divergences.get(name, alpha=0.6)
