import pytest

import falign
from falign import DPHRL, FDPG, SALSA, divergences
from falign.objectives import BinaryConstraint, DistributionMatching, Hybrid, PolicyGradient, Rehearsal


def test_the_papers_methods_are_compositions():
    js, kl = divergences.get("js"), divergences.get("reverse_kl")
    assert FDPG("js", BinaryConstraint(), baseline="constant") == DistributionMatching(
        js, BinaryConstraint(), "constant"
    )
    assert DPHRL("js", 0.1) == Hybrid(
        PolicyGradient(
            advantage="group_normalised", clip_low=0.2, clip_high=0.28, importance="token", reduction="token_mean"
        ),
        Rehearsal(js, "token", "token_mean"),
        0.1,
    )
    assert SALSA(0.3, advantage="gae") == PolicyGradient(
        kl, 0.3, "gae", clip_low=0.2, clip_high=0.2, importance="token"
    )


def test_a_method_passes_on_what_it_is_given():
    assert DPHRL(clip_high=0.5, reduction="sequence_sum").policy_gradient.clip_high == 0.5
    assert SALSA(divergence="alpha(0.3)", level="vocabulary").token_divergence == divergences.get("alpha(0.3)")
    with pytest.raises(ValueError, match="did you mean"):
        FDPG("jensen_shanon", BinaryConstraint())


def test_all_methods_are_at_the_top():
    assert set(falign.__all__) >= {"FDPO", "TDPO", "FDPG", "DPHRL", "SALSA"}
