"""Losses whose audit is known: those of TRL, of papers and their code, and of falign, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from falign import divergences
from falign.audit import published, trl_losses
from falign.audit.functions import Credit, LossLevel, Use
from falign.audit.samples import Samples
from falign.audit.truth import registry
from falign.objectives import (
    BinaryConstraint,
    Distillation,
    DistributionMatching,
    Hybrid,
    Listwise,
    Pairwise,
    PolicyGradient,
    Rehearsal,
    Sum,
    Supervised,
    TokenPairwise,
    TrustRegion,
)
from falign.objectives.penalty import Credit as PenaltyCredit
from falign.objectives.penalty import Level

__all__ = ["CASES", "Case"]

MIXTURES = "falign.audit.published"  # KL(π_ref‖M) and KL(π‖M), which are no members of the registry


@dataclass(frozen=True)
class Case:
    """A known loss.

    Attributes:
        build: Makes the function or objective.
        about: A noun phrase for the list.
        claimed: The divergence that its source names; None if it names none.
        samples: See :func:`falign.audit`.
        level: Likewise.
        use: Likewise.
        credit: Likewise.
        reference: Likewise.
    """

    build: Callable[[], Any]
    about: str
    claimed: str | None = None
    samples: Samples | None = None
    level: LossLevel | None = None
    use: Use | None = None
    credit: Credit | None = None
    reference: str | None = None


def _is(loss: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: loss


def _trl() -> Iterator[tuple[str, Case]]:
    kl = "the KL term of GRPOTrainer"
    yield "trl:grpo_kl", Case(trl_losses.grpo_kl, f"{kl}, its default", "reverse_kl", "policy")
    yield (
        "trl:grpo_kl_sequence_mean",
        Case(
            lambda: trl_losses.grpo_kl("grpo"),
            f"{kl} with loss_type='grpo', a mean per completion",
            "reverse_kl",
            "policy",
        ),
    )
    yield "trl:grpo_kl_old", Case(trl_losses.grpo_kl, f"{kl} on samples of an older policy", "reverse_kl", "old")
    on_both: tuple[tuple[str, Samples], ...] = (("", "policy"), ("_old", "old"))
    for suffix, samples in on_both:
        yield (
            f"trl:grpo_kl_bias_correction{suffix}",
            Case(
                lambda: trl_losses.grpo_kl(bias_correction=True),
                f"{kl} with use_bias_correction_kl",
                "reverse_kl",
                samples,
            ),
        )
    yield (
        "trl:rloo_kl",
        Case(
            _is(trl_losses.rloo_kl),
            "the KL penalty of RLOOTrainer, in its reward",
            "reverse_kl",
            "policy",
            use="reward",
        ),
    )
    for name, claimed in (
        ("reverse_kl", "reverse_kl"),
        ("forward_kl", "forward_kl"),
        ("js_divergence", "jensen_shannon"),
        ("alpha_divergence", "alpha(0.7)"),
    ):
        yield (
            f"trl:fdpo_{name}",
            Case(
                lambda name=name: trl_losses.dpo(f_divergence=name, coefficient=0.3),
                f"DPOTrainer with f_divergence_type='{name}'" + (", coefficient 0.3" if "alpha" in name else ""),
                claimed,
                "pairs",
                "token",
            ),
        )
    for loss in ("hinge", "ipo", "sigmoid_norm"):
        yield (
            f"trl:dpo_{loss}",
            Case(
                lambda loss=loss: trl_losses.dpo(loss),
                f"DPOTrainer with loss_type='{loss}'",
                "reverse_kl",
                "pairs",
                "token",
            ),
        )
    for beta, claimed in (
        (0.0, "forward_kl"),
        (0.5, "jensen_shannon"),
        (0.9, "generalized_js(0.1)"),
        (1.0, "reverse_kl"),
    ):
        yield (
            f"trl:gkd_{beta:g}",
            Case(lambda beta=beta: trl_losses.gkd_jsd(beta), f"GKDTrainer with beta={beta:g}", claimed, "policy"),
        )


def _kl() -> Iterator[tuple[str, Case]]:
    for name, formula in (("k1", published.k1), ("k2", published.k2), ("k3", published.k3)):
        yield f"kl:{name}_loss", Case(_is(formula), f"{name} as a loss", "reverse_kl", "policy")
        yield (
            f"kl:{name}_reward",
            Case(_is(formula), f"{name} in the reward, with returns", "reverse_kl", "policy", use="reward"),
        )
    yield (
        "kl:k1_reward_own",
        Case(
            _is(published.k1),
            "k1 in the reward of its own token only",
            "reverse_kl",
            "policy",
            use="reward",
            credit="fixed_prefix",
        ),
    )
    for name, formula in (("k1", published.k1), ("k2", published.k2), ("k3", published.k3)):
        yield (
            f"kl:{name}_loss_sequence",
            Case(_is(formula), f"{name} of whole completions as a loss", "reverse_kl", "policy", "sequence"),
        )
    for name, formula in (("k1", published.k1_weighted), ("k2", published.k2_weighted), ("k3", published.k3_weighted)):
        for level in ("token", "sequence"):
            yield (
                f"kl:{name}_weighted_{level}",
                Case(_is(formula), f"{name} times π/π_old, by {level}", "reverse_kl", "old", level),
            )
    yield (
        "kl:k3_reference_samples",
        Case(
            _is(published.k3_of_reference_samples),
            "k3 with its arguments swapped",
            "forward_kl",
            "reference",
            "sequence",
        ),
    )


def _values() -> Iterator[tuple[str, Case]]:
    for each in registry():
        about = f"f(u)/u of {each.name}"
        yield (
            f"value:{each.name}_reward",
            Case(
                lambda name=each.name: published.value_estimate(name),
                f"{about} in the reward",
                each.name,
                "policy",
                "sequence",
                "reward",
            ),
        )
        yield (
            f"value:{each.name}_loss",
            Case(
                lambda name=each.name: published.value_with_control_variate(name),
                f"{about} as a loss",
                each.name,
                "policy",
                "sequence",
            ),
        )


def _papers() -> Iterator[tuple[str, Case]]:
    stored = "on stored samples"
    yield "dphrl:forward", Case(_is(published.dph_rl_forward), f"DPH-F {stored}", "forward_kl", "reference")
    yield "dphrl:js_low_var", Case(_is(published.dph_rl_js), f"DPH-JS {stored}", "jensen_shannon", "reference")
    yield "dphrl:alpha", Case(published.dph_rl_alpha, f"its α-divergence {stored}", "alpha(0.2)", "reference")
    yield (
        "dphrl:js_stored",
        Case(
            _is(published.dph_rl_definition),
            f"mode js {stored}: k3 of KL(π_ref‖M)",
            f"{MIXTURES}:reference_to_mixture",
            "reference",
        ),
    )
    yield (
        "dphrl:js_sampled",
        Case(
            _is(published.dph_rl_mixture),
            "mode js on samples of the policy: k3 of KL(π‖M)",
            f"{MIXTURES}:policy_to_mixture",
            "policy",
        ),
    )
    yield "dphrl:reverse_kl", Case(_is(published.dph_rl_reverse), "mode reverse_kl: verl's k3", "reverse_kl", "policy")
    yield (
        "correlated_proxies:rlhf",
        Case(_is(published.k3_style_chi_squared), "u + 1/u - 2 as a loss", "pearson_chi2", "policy", "sequence"),
    )
    yield (
        "correlated_proxies:rl",
        Case(_is(published.chi_squared_penalty), "u - 1 in the reward", "pearson_chi2", "policy", "sequence", "reward"),
    )
    own: dict[str, Any] = {"use": "reward", "credit": "fixed_prefix"}
    yield (
        "tcod:jsd",
        Case(published.tcod_jsd, "jsd_advantage", "jensen_shannon", "policy", reference="teacher", **own),
    )
    yield (
        "gopd:opd",
        Case(
            published.on_policy_distillation,
            "its advantage at λ = 1: on-policy distillation",
            "reverse_kl",
            "policy",
            reference="teacher",
            **own,
        ),
    )
    yield (
        "gopd:exopd",
        Case(
            lambda: published.on_policy_distillation(1.25),
            "its advantage at λ = 1.25",
            None,
            "policy",
            reference="teacher",
            **own,
        ),
    )
    yield (
        "kdrl:k2",
        Case(_is(published.kdrl), "k2 to the teacher as a loss", "reverse_kl", "policy", reference="teacher"),
    )
    yield "oreal:kl", Case(_is(published.oreal_kl), "its option kl, as a loss", "reverse_kl", "policy")
    yield "oreal:unbias", Case(_is(published.k3), "its option unbias: k3 as a loss", "reverse_kl", "policy")
    yield "safe:penalty", Case(_is(published.safe), "its KL penalty, a plain number", "reverse_kl", "policy")
    yield (
        "superhf:kl",
        Case(_is(published.forward_kl_over_vocabulary), "its KL over the vocabulary", "forward_kl", "policy"),
    )
    for order in ("prefix", "suffix"):
        yield (
            f"tsdkd:ranking_{order}",
            Case(
                lambda order=order: published.reranking(order),
                f"its re-ranking loss, log-sum-exp over the {order}"
                + (" (as in its code)" if order == "prefix" else ""),
                None,
                "policy",
            ),
        )
    yield (
        "sft:reference",
        Case(_is(published.negative_log_likelihood), "-log π on the reference", "forward_kl", "reference"),
    )
    yield "sft:data", Case(_is(published.negative_log_likelihood), "-log π on given data", "forward_kl", "old")
    yield "chipo:loss", Case(_is(published.chi_po), "χPO", "chi2_kl", "pairs")
    yield "hdpo:loss", Case(_is(published.h_dpo), "H-DPO with a = 0.95", "reverse_kl", "pairs")
    yield "simpo:loss", Case(_is(published.simpo), "SimPO, which has no reference", None, "pairs", "token")


def _falign() -> Iterator[tuple[str, Case]]:
    name = "jensen_shannon"
    js, kl = divergences.get(name), divergences.get("reverse_kl")
    yield "falign:fdpo", Case(lambda: Pairwise(js, beta=0.3), "f-DPO", name, "pairs")
    yield "falign:ipo", Case(lambda: Pairwise(kl, "ipo", 0.3), "IPO", "reverse_kl", "pairs")
    yield "falign:listwise", Case(lambda: Listwise(js, 0.3), "Plackett–Luce f-DPO", name, "pairs")
    yield (
        "falign:tdpo1",
        Case(lambda: TokenPairwise(divergences.get("forward_kl"), 0.3, variant=1), "TDPO1", "reverse_kl", "pairs"),
    )
    yield (
        "falign:tdpo2",
        Case(lambda: TokenPairwise(divergences.get("forward_kl"), 0.3), "TDPO2", "reverse_kl", "pairs"),
    )
    for level in ("sequence", "token", "vocabulary"):
        for credit in ("fixed_prefix", "returns") if level != "sequence" else ("fixed_prefix",):
            for samples in ("policy", "old"):
                end = ("_returns" if credit == "returns" else "") + ("_old" if samples == "old" else "")
                yield (
                    f"falign:penalty_{level}{end}",
                    Case(
                        lambda level=level, credit=credit: PolicyGradient(js, 0.2, level=level, credit=credit),
                        f"PolicyGradient with level='{level}', credit='{credit}'",
                        name,
                        samples,
                    ),
                )
    distilled: tuple[tuple[Level, PenaltyCredit], ...] = (
        ("vocabulary", "fixed_prefix"),
        ("token", "returns"),
        ("sequence", "fixed_prefix"),
    )
    for level, credit in distilled:
        for samples in ("policy", "old"):
            yield (
                f"falign:distillation_{level}{'_old' if samples == 'old' else ''}",
                Case(
                    lambda level=level, credit=credit: Distillation(
                        js, level=level, credit=credit, reduction="sequence_sum"
                    ),
                    f"Distillation with level='{level}', credit='{credit}'",
                    name,
                    samples,
                ),
            )
    yield (
        "falign:sum",
        Case(
            lambda: Sum(
                {"penalty": PolicyGradient(js, 0.2), "stored": (DistributionMatching(js, BinaryConstraint()), 0.5)}
            ),
            "a sum of a penalty and f-DPG",
            name,
            "policy",
        ),
    )
    yield (
        "falign:trust_region",
        Case(
            lambda: TrustRegion(kl, beta=3.0, delta=0.01, level="sequence", reduction="sequence_sum"),
            "the squared hinge of KL(π_old‖π), as in DisCO",
            "forward_kl",
            "old",
            reference="old",
        ),
    )
    yield (
        "falign:grpo",
        Case(
            lambda: PolicyGradient(kl, 0.2, "group_normalised", 0.2, 0.2, "token", "token", reduction="sequence_mean"),
            "GRPO, a mean per completion",
            "reverse_kl",
            "policy",
        ),
    )
    yield (
        "falign:dapo",
        Case(
            lambda: PolicyGradient(kl, 0.2, "group_normalised", 0.2, 0.28, "token", "token", reduction="token_mean"),
            "GRPO, a mean per token",
            "reverse_kl",
            "policy",
        ),
    )
    yield (
        "falign:ppo",
        Case(lambda: PolicyGradient(js, 0.2, "gae", 0.2, 0.2, "token"), "PPO with a value head", name, "policy"),
    )
    for samples in ("policy", "old"):
        yield (
            f"falign:fdpg{'_old' if samples == 'old' else ''}",
            Case(lambda: DistributionMatching(js, BinaryConstraint()), "f-DPG to the reference", name, samples),
        )
    yield "falign:rehearsal", Case(lambda: Rehearsal(js), "rehearsal by token", name, "reference")
    yield (
        "falign:rehearsal_sequence",
        Case(lambda: Rehearsal(js, "sequence"), "rehearsal by completion", name, "reference"),
    )
    yield (
        "falign:dphrl",
        Case(lambda: Hybrid(PolicyGradient(), Rehearsal(js), 0.25), "DPH-RL", name, "policy"),
    )
    yield "falign:sft", Case(Supervised, "SFT on the reference", "forward_kl", "reference")
    yield (
        "falign:fsft",
        Case(lambda: Supervised(kl, 0.5), "f-SFT under the reverse KL, β = 0.5", "alpha(1.5)", "reference"),
    )


CASES: dict[str, Case] = dict([*_trl(), *_kl(), *_values(), *_papers(), *_falign()])
"""Known losses by name: the library or paper, a colon, and which of its losses."""
