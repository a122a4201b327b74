"""Distillation from a teacher, and sums with it: OPD, KD, ExOPD, KDRL, DCKD, ADPA, PS-KD."""

from __future__ import annotations

import math
from typing import Literal

from falign.divergences import Divergence, resolve
from falign.methods.core import grpo, require_positive
from falign.numeric_fields import numeric_arguments
from falign.objectives.base import BaseObjective
from falign.objectives.distillation import TEACHER, Distillation
from falign.objectives.expected import Expected
from falign.objectives.groups import CompletionMean
from falign.objectives.penalty import Credit, Level
from falign.objectives.schedules import Linear, Scheduled
from falign.objectives.sum import Selected, Sum
from falign.objectives.supervised import Supervised

__all__ = ["ADPA", "DCKD", "KD", "KDRL", "OPD", "PSKD", "ExOPD"]


@numeric_arguments
def OPD(  # noqa: N802 - as papers abbreviate it
    divergence: Divergence | str = "reverse_kl",
    *,
    level: Level = "vocabulary",
    credit: Credit = "fixed_prefix",
    reference: str = TEACHER,
    temperature: float = 1.0,
    reduction: CompletionMean | None = None,
) -> Distillation:
    """Return on-policy distillation: a divergence to the teacher on the student's own samples, under any f.

    Args:
        divergence: f, or its name; the reverse KL is ``KL(π‖T)``.
        level: ``"vocabulary"`` reads whole distributions, ``"token"`` and ``"sequence"`` only sampled tokens.
        credit: See :class:`Distillation`.
        reference: Name of the teacher.
        temperature: See :class:`Distillation`.
        reduction: See :class:`Distillation`.

    Returns:
        The objective.

    Raises:
        ValueError: The divergence is unknown, or the arguments contradict each other.

    Source:
        Agarwal et al., GKD (arXiv:2306.13649): level ``"vocabulary"``; its ``JSD(β)`` is ``generalized_js(1 - β)``, or
        with TRL's roles of the two models ``generalized_js(β)``. Level ``"token"`` with the reverse KL is the published
        policy gradient with advantage ``log T - log π``, without its clip.

    Example:
        >>> OPD("jensen_shannon").measures["divergence"].references
        frozenset({'teacher'})
    """
    return Distillation(resolve(divergence), reference, level, credit, temperature=temperature, reduction=reduction)


@numeric_arguments
def KD(  # noqa: N802 - as papers abbreviate it
    divergence: Divergence | str = "forward_kl",
    *,
    temperature: float = 1.0,
    supervised: float | None = None,
    reference: str = TEACHER,
    reduction: CompletionMean = "token_mean",
) -> Distillation | Sum:
    """Return distillation on given completions: a divergence to the teacher over the vocabulary at each token.

    Args:
        divergence: f, or its name; the forward KL is ``KL(T‖π)``.
        temperature: T of both distributions.
        supervised: Weight of a further term, fine-tuning on the same completions (the chosen ones of pairs); None for
            none.
        reference: Name of the teacher.
        reduction: See :class:`Distillation`.

    Returns:
        The objective; with ``supervised`` a sum of the terms ``distillation`` and ``sft``.

    Raises:
        ValueError: The divergence is unknown, or a number is out of range.

    Source:
        Hinton et al. (arXiv:1503.02531), Section 2, whose T² is left to the weights.

    Example:
        >>> KD("forward_kl", supervised=0.5).weights
        {'distillation': 1.0, 'sft': 0.5}
    """
    distillation = Distillation(resolve(divergence), reference, temperature=temperature, reduction=reduction)
    if supervised is None:
        return distillation
    if not 0 < supervised < math.inf:
        raise ValueError(f"supervised={supervised!r} must be positive and finite: leave it out for no fine-tuning.")
    return Sum({"distillation": distillation, "sft": (Supervised(), supervised)})


@numeric_arguments
def ExOPD(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "reverse_kl",
    *,
    level: Literal["token", "vocabulary", "sequence"] = "token",
    reference: str = "target",
    reduction: CompletionMean | None = None,
) -> Distillation:
    """Return G-OPD and ExOPD: on-policy distillation to ``base^{1-λ} T^λ``, the reference named ``target``.

    λ is a property of that reference: a geometric combination with weights λ and 1 - λ. λ = 1 is on-policy
    distillation, λ > 1 extrapolates beyond the teacher, away from the base.

    Args:
        divergence: f, or its name; the paper's is the reverse KL.
        level: ``"token"`` is the published, dense form, from sampled tokens; ``"vocabulary"`` has the same mean with
            less variance; ``"sequence"`` is the target of whole completions, under the reverse KL.
        reference: Name of the geometric combination; its ``level`` must be ``"sequence"`` at sequence level.
        reduction: See :class:`Distillation`.

    Returns:
        The objective. Below sequence level its importance weights are those of single tokens, as published.

    Raises:
        ValueError: The divergence is unknown, or the arguments contradict each other.

    Source:
        Yang et al., G-OPD (arXiv:2602.12125), with λ = 1.25 in ExOPD. There the advantage of a token,
        ``-(log π - log base - λ (log T - log base))``, lacks the normalizer of the combination, a function of the
        prefix without effect on the mean; here it is subtracted, so that every f is exact. The published cap of 5 on
        importance weights is ``rollout.correction``; its PPO clip has no effect with one update per rollout.

    Example:
        >>> sorted(ExOPD().needs)
        ['old_logprobs', 'references.target']
    """
    importance = "sequence" if level == "sequence" else "token"
    return Distillation(resolve(divergence), reference, level, importance=importance, reduction=reduction)


@numeric_arguments
def KDRL(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "reverse_kl",
    beta: float = 5e-3,
    *,
    last_beta: float | None = 1e-3,
    steps: int = 200,
    level: Level = "token",
    reference: str = TEACHER,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    reduction: CompletionMean = "token_mean",
) -> BaseObjective:
    """Return KDRL: GRPO on rewards plus β times a divergence to the teacher on the same samples.

    Args:
        divergence: f to the teacher, or its name.
        beta: β of the first step.
        last_beta: β from step ``steps`` on, linear until then; None for a constant β.
        steps: Length of the schedule in optimizer steps.
        level: Level of the divergence.
        reference: Name of the teacher.
        clip_low: See :class:`PolicyGradient`.
        clip_high: See :class:`PolicyGradient`.
        reduction: See :class:`PolicyGradient`; of both terms, except at sequence level.

    Returns:
        The objective, a sum of the terms ``grpo`` and ``teacher``.

    Raises:
        ValueError: The divergence is unknown, or a number is out of range.

    Source:
        Xu et al., KDRL (arXiv:2506.02208): β from 5e-3 to 1e-3, and k2 as a loss, which has the gradient of the reverse
        KL per token, as here.

    Example:
        >>> KDRL().at(100).weights
        {'grpo': 1.0, 'teacher': 0.003}
    """
    require_positive(beta=beta, last_beta=beta if last_beta is None else last_beta)
    whole = level == "sequence"
    taught = Distillation(
        resolve(divergence),
        reference,
        level,
        importance="sequence" if whole else "token",
        reduction=None if whole else reduction,
    )
    both = Sum(
        {
            "grpo": grpo(None, 0.0, clip_low=clip_low, clip_high=clip_high, level="sequence", reduction=reduction),
            "teacher": (taught, beta),
        }
    )
    return both if last_beta is None else Scheduled(both, {"terms.teacher.1": Linear(beta, last_beta, steps)})


@numeric_arguments
def DCKD(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "forward_kl",
    *,
    alpha: float = 0.2,
    reference: str = TEACHER,
) -> Sum:
    """Return DCKD: fine-tuning on chosen answers, plus α times a divergence to the teacher on each side of the pairs.

    Args:
        divergence: f, or its name; the forward KL is ``KL(T‖π)``.
        alpha: α.
        reference: Name of the teacher, a model tuned by preferences.

    Returns:
        The objective, a sum of the terms ``sft``, ``chosen`` and ``rejected``.

    Raises:
        ValueError: The divergence is unknown, or α is 0 or not finite.

    Source:
        Gao et al., ADPA (arXiv:2502.17927). Each term is a mean over tokens; the paper's code was not seen.

    Example:
        >>> DCKD().weights
        {'sft': 1.0, 'chosen': 0.2, 'rejected': 0.2}
    """
    distillation = Distillation(resolve(divergence), reference)
    require_positive(alpha=alpha)
    return Sum(
        {
            "sft": Selected(Supervised(), "chosen"),
            "chosen": (Selected(distillation, "chosen"), alpha),
            "rejected": (Selected(distillation, "rejected"), alpha),
        }
    )


@numeric_arguments
def ADPA(  # noqa: N802 - the paper's name
    gamma: float = 1.5,
    *,
    reference: str = TEACHER,
    base: str = "base",
    smallest: float = 1e-7,
    k: int | None = None,
) -> Sum:
    """Return ADPA: fine-tuning on chosen answers, minus γ times the expected advantage on the student's own answers.

    The advantage of a token is ``A(v) = log T(v) - log T_base(v)``, with T a teacher tuned by preferences and T_base
    what it was tuned from; its mean ``Σ_v π(v) A(v)`` is over the vocabulary. The rows are pairs whose rejected answer
    is the student's own, sampled once before training.

    Args:
        gamma: γ, positive: a negative one would teach what the teacher has unlearned.
        reference: Name of T.
        base: Name of T_base.
        smallest: Least probability in A; see :class:`falign.objectives.Expected`.
        k: Read only the k most likely tokens of each teacher.

    Returns:
        The objective, a sum of the terms ``sft`` and ``advantage``, whose weight is -γ.

    Raises:
        ValueError: A number is out of range, or both names are the same.

    Source:
        Gao et al., ADPA (arXiv:2502.17927): γ = 1.5, and a clamp of 1e-7 in the code, which has no β. ADPA+ begins from
        a student of :func:`DCKD`.

    Example:
        >>> ADPA().weights
        {'sft': 1.0, 'advantage': -1.5}
    """
    require_positive(gamma=gamma)
    advantage = Distillation(Expected(reference, base, smallest, k))
    return Sum(
        {
            "sft": Selected(Supervised(), "chosen"),
            "advantage": (Selected(advantage, "rejected"), -gamma),
        }
    )


@numeric_arguments
def PSKD(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "forward_kl",
    *,
    steps: int,
    alpha: float = 0.8,
    reference: str = TEACHER,
) -> Scheduled:
    """Return PS-KD: fine-tuning, and distillation from one's own past, whose weight α_t grows linearly.

    The teacher is a reference that follows the policy at a distance, such as ``periodic_reset``.

    Args:
        divergence: f, or its name; with the forward KL the sum is the paper's cross-entropy to softened targets.
        steps: Optimizer steps of the run, at least 2.
        alpha: α of the last step, in (0, 1); the first step has ``alpha / steps``.
        reference: Name of the past policy.

    Returns:
        The objective, a sum of the terms ``sft``, of weight 1 - α_t, and ``past``, of weight α_t.

    Raises:
        ValueError: The divergence is unknown, or a number is out of range.

    Source:
        Kim et al., PS-KD (arXiv:2006.12000): α = 0.8, for classifiers, from the weights of the epoch before.

    Example:
        >>> PSKD(steps=100).at(100).weights["past"]
        0.8
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha!r} must be in (0, 1).")
    first = alpha / steps
    past = Distillation(resolve(divergence), reference)
    both = Sum({"sft": (Supervised(), 1 - first), "past": (past, first)})
    weights = {"terms.sft.1": Linear(1 - first, 1 - alpha, steps), "terms.past.1": Linear(first, alpha, steps)}
    return Scheduled(both, weights)
