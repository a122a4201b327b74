from pathlib import Path

import pytest

import falign
from falign import DPHRL, FDPG, SALSA, SALSARLOO, divergences
from falign.objectives import (
    BinaryConstraint,
    DistributionMatching,
    DivergenceTo,
    Hybrid,
    PolicyGradient,
    Rehearsal,
    dph_rl_coefficient,
)
from falign.runfile import load_run_file, parse_run


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
    assert SALSA(0.3) == PolicyGradient(
        kl, 0.3, "gae", clip_low=0.2, clip_high=0.2, importance="token", reduction="token_mean"
    )
    assert SALSARLOO(0.3) == PolicyGradient(kl, 0.3, "leave_one_out")


@pytest.mark.parametrize(
    ("divergence", "least", "most"),
    [
        ("jensen_shannon", 0.05 / 8, 0.2 / 8),
        ("forward_kl", 0.01 / 8, 0.05 / 8),
        ("alpha(0.2)", 0.01 / 8, 0.05 / 8),
        ("alpha(0.8)", 0.01 / 8, 0.05 / 8),
    ],
)
def test_the_default_coefficient_of_dph_rl_is_within_the_published_range(divergence, least, most):
    coefficient = DPHRL(divergence).coefficient
    assert least <= coefficient <= most
    assert coefficient == dph_rl_coefficient(divergences.get(divergence))
    section = parse_run(
        {
            "output_dir": "run",
            "model": {"path": "m"},
            "prompts": {"train": [{"texts": ["a"]}]},
            "objective": {"kind": "hybrid", "divergence": divergence},
        }
    ).objective
    assert section.build() == DPHRL(divergence)
    assert f"{coefficient:g} × {divergence}" in section.title


@pytest.mark.parametrize("divergence", ["reverse_kl", "total_variation", "standardized(jensen_shannon)"])
def test_a_divergence_without_a_published_coefficient_needs_one(divergence):
    with pytest.raises(ValueError, match="no coefficient is published for DPH-RL under"):
        DPHRL(divergence)
    assert DPHRL(divergence, 0.01).coefficient == 0.01


def test_the_configs_of_dph_rl_have_the_published_coefficients():
    files = sorted((Path(__file__).parents[2] / "configs").glob("dphrl-*.yaml"))
    assert len(files) == 3
    for file in files:
        objective = load_run_file(file).check()
        assert objective.coefficient == dph_rl_coefficient(objective.rehearsal.divergence)


def test_a_method_passes_on_what_it_is_given():
    assert DPHRL(clip_high=0.5, reduction="sequence_sum").policy_gradient.clip_high == 0.5
    to_reference = SALSA(divergence="alpha(0.3)", level="vocabulary").measures["divergence"]
    assert to_reference == DivergenceTo(divergences.get("alpha(0.3)"))
    with pytest.raises(ValueError, match="did you mean"):
        FDPG("jensen_shanon", BinaryConstraint())


def test_all_methods_are_at_the_top():
    assert set(falign.__all__) >= {"FDPO", "TDPO", "FDPG", "DPHRL", "SALSA", "SALSARLOO"}
