"""The audit is right where the answer is known: each row's answer is derived, not taken from the audit.

With ``l = log u``, ``u = π/π_ref`` and ``∇ = ∇log π``, the gradient of ``D_f(π‖π_ref)`` is ``E_π[f'(u) ∇]`` and
``E_ref[u f'(u) ∇]``, and ``E_π[∇] = 0``. The comment of a row is its derivation.
"""

import math
import time

import pytest

import falign
from falign.audit import CASES

WHOLE, TOKEN, RETURNS, REFERENCE, OLD, MEAN = LEVELS = (
    "sequence",
    "token",
    "token_returns",
    "token_reference",
    "token_old",
    "token_mean",
)
# name -> (finding, divergence, level, ratio); of pairs there is no ratio
KNOWN = {
    # E_π[∇l] = 0
    "kl:k1_loss": ("zero", None, None, None),
    "kl:k1_loss_sequence": ("zero", None, None, None),
    # l is f' of the reverse KL; with the returns of later tokens it is that of whole completions (chain rule)
    "kl:k1_reward": ("exact", "reverse_kl", WHOLE, 1.0),
    "kl:k1_reward_own": ("exact", "reverse_kl", TOKEN, 1.0),
    # ∇(l²/2) = l ∇
    "kl:k2_loss": ("exact", "reverse_kl", TOKEN, 1.0),
    "kl:k2_loss_sequence": ("exact", "reverse_kl", WHOLE, 1.0),
    # ∇(1/u - 1 + l) = (1 - 1/u) ∇, and 1 - 1/u is f' of the forward KL
    "kl:k3_loss": ("exact", "forward_kl", TOKEN, 1.0),
    "kl:k3_loss_sequence": ("exact", "forward_kl", WHOLE, 1.0),
    "oreal:unbias": ("exact", "forward_kl", TOKEN, 1.0),
    "dphrl:reverse_kl": ("exact", "forward_kl", TOKEN, 1.0),
    "trl:grpo_kl": ("exact", "forward_kl", TOKEN, 1.0),
    # (1 - 1/u)/length is f' of no divergence; neither is E_old[(1 - 1/u) ∇]
    "trl:grpo_kl_sequence_mean": ("none", None, None, None),
    "trl:grpo_kl_old": ("none", None, None, None),
    # π/π_old k3: E_old[w (k3 + 1 - 1/u) ∇] = E_π[(l + const) ∇], on the prefixes that π_old draws
    "trl:grpo_kl_bias_correction": ("exact", "reverse_kl", TOKEN, 1.0),
    "trl:grpo_kl_bias_correction_old": ("exact", "reverse_kl", OLD, 1.0),
    "kl:k1_weighted_token": ("exact", "reverse_kl", OLD, 1.0),
    "kl:k2_weighted_token": ("exact", "reverse_kl", OLD, 1.0),
    "kl:k3_weighted_sequence": ("exact", "reverse_kl", WHOLE, 1.0),
    "trl:rloo_kl": ("exact", "reverse_kl", WHOLE, 1.0),
    # E_ref[(u - 1) ∇], and u f' = u - 1 is that of the forward KL, which decomposes over the reference's prefixes
    "kl:k3_reference_samples": ("exact", "forward_kl", WHOLE, 1.0),
    "dphrl:forward": ("exact", "forward_kl", WHOLE, 1.0),
    "sft:reference": ("exact", "forward_kl", WHOLE, 1.0),
    # f(u) on samples of the reference
    "dphrl:js_low_var": ("exact", "jensen_shannon", REFERENCE, 1.0),
    "dphrl:alpha": ("exact", "alpha(0.2)", REFERENCE, 1.0),
    # k3 as a loss, M for π_ref: not the half of JS that it estimates
    "dphrl:js_sampled": ("none", None, None, None),
    # k3 with swapped arguments on samples of π_ref is right, M for π
    "dphrl:js_stored": ("exact", "kl_of_reference_to_mixture", REFERENCE, 1.0),
    # u - 1 is half of f' of χ²
    "correlated_proxies:rl": ("exact", "pearson_chi2", WHOLE, 0.5),
    # ∇(u + 1/u - 2) = (u - 1/u) ∇ = [(u - 1) + (1 - 1/u)] ∇: half χ² plus the forward KL
    "correlated_proxies:rlhf": ("none", None, None, None),
    "tcod:jsd": ("none", None, None, None),
    "gopd:opd": ("exact", "reverse_kl", TOKEN, 1.0),
    "kdrl:k2": ("exact", "reverse_kl", TOKEN, 1.0),
    "oreal:kl": ("zero", None, None, None),
    "safe:penalty": ("zero", None, None, None),
    "superhf:kl": ("exact", "forward_kl", TOKEN, 1.0),
    # TRL's β = 0 is the forward and β = 1 the reverse KL; its JSD is half of falign's
    "trl:gkd_0": ("exact", "forward_kl", TOKEN, 1.0),
    "trl:gkd_0.5": ("exact", "jensen_shannon", TOKEN, 0.5),
    "trl:gkd_0.9": ("exact", "generalized_js(0.1)", TOKEN, 1.0),
    "trl:gkd_1": ("exact", "reverse_kl", TOKEN, 1.0),
    # -log σ of a difference of f'(u)
    "trl:fdpo_reverse_kl": ("exact", "reverse_kl", WHOLE, None),
    "trl:fdpo_forward_kl": ("exact", "forward_kl", WHOLE, None),
    "trl:fdpo_js_divergence": ("exact", "jensen_shannon", WHOLE, None),
    "trl:fdpo_alpha_divergence": ("exact", "alpha(0.7)", WHOLE, None),  # TRL's coefficient is 1 - α
    "trl:dpo_hinge": ("exact", "reverse_kl", WHOLE, None),
    "trl:dpo_ipo": ("exact", "reverse_kl", MEAN, None),
    "trl:dpo_sigmoid_norm": ("exact", "reverse_kl", MEAN, None),
    "chipo:loss": ("exact", "chi2_kl", WHOLE, None),  # f' = u - 1 + log u
    # log π_w - log π_l enters with weights 1 and -1, as in DPO; the rest is not a function of π/π_ref
    "hdpo:loss": ("direction", "reverse_kl", WHOLE, None),
    "simpo:loss": ("direction", "reverse_kl", MEAN, None),
    # w = u^{-β} on the reference's samples: u f' = -u^{-β} + c, the α-divergence of α = 1 + β times (1 + β)
    "falign:fsft": ("exact", "alpha(1.5)", REFERENCE, None),
    "falign:grpo": ("none", None, None, None),  # a mean per completion divides by its length
    "falign:dapo": ("direction", "reverse_kl", TOKEN, None),  # a mean per token divides by the mean length
    # the slope of the hinge, 2β[KL(π_old‖π) - δ]₊, is another one at every policy
    "falign:trust_region": ("direction", "forward_kl", WHOLE, None),
    "falign:ipo": ("exact", "reverse_kl", MEAN, None),
    "falign:tdpo1": ("none", None, None, None),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_audit_finds_what_was_derived(name):
    finding, divergence, level, ratio = KNOWN[name]
    began = time.monotonic()
    result = falign.audit(name)
    assert time.monotonic() - began < 60
    assert result.finding == finding, result.verdict
    assert result.name == name
    if divergence is None:
        return
    row = result.row(divergence, level)
    assert row.same_direction
    assert all(abs(cosine - 1) < 1e-9 for cosine in row.cosines)
    assert result.best.divergence == divergence
    if finding == "exact":
        assert result.is_gradient_of(divergence, level)
    if ratio is not None:
        assert row.ratio == pytest.approx(ratio, rel=1e-9)


# f(u)/u in the reward has the gradient of its own divergence for none of them by the whole completion: the coefficient
# would have to be f'(u) + const.
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("value:") and name.endswith("_reward")])
def test_a_value_estimate_in_the_reward_is_the_gradient_of_no_divergence(name):
    result = falign.audit(name)
    assert result.finding == "none"
    assert result.passed is False


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        # f/u = 1/u - 1 + l = -(1 - 1/u) + l
        ("value:reverse_kl_reward", "1 ∇reverse_kl", "− 1 ∇forward_kl"),
        ("kl:k3_loss", None, None),
        # ∇(u + 1/u - 2)
        ("correlated_proxies:rlhf", "1 ∇forward_kl", "+ 0.5 ∇pearson_chi2"),
        ("value:pearson_chi2_loss", "1 ∇forward_kl", "+ 0.5 ∇pearson_chi2"),
        # log M - (log T + log π)/2 = (log π - log T)/2 - log(2u/(1+u))
        ("tcod:jsd", "0.5 ∇reverse_kl", "− 1 ∇jensen_shannon"),
        # (u - 1)²/u = u - 1 - (1 - 1/u)
        ("value:pearson_chi2_reward", "−1 ∇forward_kl", "+ 0.5 ∇pearson_chi2"),
    ],
)
def test_a_gradient_that_is_the_sum_of_two_is_told_apart(name, first, second):
    notes = " ".join(falign.audit(name).notes)
    if first is None:
        assert "∇" not in notes
    else:
        assert f"It is {first} {second}" in notes


def test_a_reversed_ranking_pulls_away_from_the_reference_on_every_prefix():
    """A log-sum-exp over the tokens ranked before gives the likelihood of the reversed order."""
    wrong, right = (falign.audit(f"tsdkd:ranking_{order}") for order in ("prefix", "suffix"))
    assert all(row.cosine < 0 for row in wrong.table if row.level == TOKEN)
    assert all(row.cosine > 0.6 for row in right.table if row.level == TOKEN)


FALIGN = {
    "falign:penalty_sequence": WHOLE,
    "falign:penalty_token": TOKEN,
    "falign:penalty_token_returns": RETURNS,
    "falign:penalty_vocabulary": TOKEN,
    "falign:penalty_vocabulary_returns": RETURNS,
    "falign:distillation_vocabulary": TOKEN,
    "falign:distillation_token": RETURNS,
    "falign:distillation_sequence": WHOLE,
    "falign:sum": WHOLE,
    "falign:ppo": WHOLE,
    "falign:fdpg": WHOLE,
    "falign:rehearsal": REFERENCE,
    "falign:rehearsal_sequence": WHOLE,
    "falign:dphrl": REFERENCE,
    "falign:fdpo": WHOLE,
    "falign:listwise": WHOLE,
}
OLD_TOO = [name for name in FALIGN if f"{name}_old" in CASES]


@pytest.mark.parametrize("name", [*FALIGN, *(f"{name}_old" for name in OLD_TOO)])
def test_the_objectives_of_falign_have_the_gradient_of_the_divergence_that_they_name(name):
    result = falign.audit(name)
    assert result.passed
    # With whole distributions nothing weights the prefixes, which are then those of the old policy.
    level = OLD if name == "falign:distillation_vocabulary_old" else FALIGN[name.removesuffix("_old")]
    row = result.row("jensen_shannon", level)
    assert row.exact
    if "penalty" in name:
        assert row.ratio == pytest.approx(0.2, rel=1e-9)
    if row.ratios:
        assert not math.isnan(row.ratio)


def test_every_known_case_runs_and_has_a_finding_that_is_tested():
    tested = {*KNOWN, *FALIGN, *(f"{name}_old" for name in OLD_TOO)}
    rest = [name for name in CASES if name not in tested and not name.startswith("value:")]
    for name in rest:
        assert falign.audit(name).verdict.startswith("On ")
    assert len(tested) >= 60
