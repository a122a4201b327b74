"""The five core methods under the names of their papers, each a composition of objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Literal

from falign.divergences import Divergence, resolve
from falign.numeric_fields import numeric_arguments
from falign.objectives.advantage_list import AdvantageEntry, AdvantageTransform
from falign.objectives.base import TokenWeighting
from falign.objectives.distribution_matching import DistributionMatching
from falign.objectives.groups import CompletionMean
from falign.objectives.hybrid import Hybrid, dph_rl_coefficient
from falign.objectives.margins import MarginLoss, logistic
from falign.objectives.pairwise import Pairwise
from falign.objectives.penalty import Level
from falign.objectives.policy_gradient import PolicyGradient
from falign.objectives.rehearsal import Rehearsal
from falign.objectives.targets import Target
from falign.objectives.token_pairwise import TokenPairwise

__all__ = ["DPHRL", "FDPG", "FDPO", "SALSA", "SALSARLOO", "TDPO"]


def require_positive(**values: float) -> None:
    """Refuse strengths that are not positive: a negative one would undo what the paper's term is for.

    Args:
        **values: Numbers by the name of their argument.

    Raises:
        ValueError: One is not a positive, finite number.

    Example:
        >>> require_positive(beta=0.1)
    """
    for name, value in values.items():
        if not isinstance(value, Real) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} must be positive and finite.")


def grpo(
    divergence: Divergence | str | None,
    beta: float,
    *transforms: AdvantageTransform,
    clip_low: float | None,
    clip_high: float | None,
    level: Level,
    reduction: CompletionMean,
) -> PolicyGradient:
    """Return GRPO: rewards normalized within groups, and clipped importance weights of single tokens.

    Args:
        divergence: f of the penalty, or its name; None for none.
        beta: Strength of the penalty.
        *transforms: Applied to the advantages in order.
        clip_low: See :class:`PolicyGradient`.
        clip_high: See :class:`PolicyGradient`.
        level: Level of the penalty.
        reduction: See :class:`PolicyGradient`.

    Returns:
        The objective.

    Raises:
        ValueError: The divergence is unknown, or a number is out of range.

    Example:
        >>> grpo(None, 0.0, clip_low=0.2, clip_high=0.3, level="sequence", reduction="token_mean").importance
        'token'
    """
    return PolicyGradient(
        None if divergence is None else resolve(divergence),
        beta,
        ["group_normalised", *transforms] if transforms else "group_normalised",
        clip_low=clip_low,
        clip_high=clip_high,
        importance="token",
        level=level,
        reduction=reduction,
    )


@numeric_arguments
def FDPO(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "reverse_kl",
    beta: float = 0.1,
    *,
    margin_loss: MarginLoss | str = logistic,
    length_norm: Literal["none", "token"] | None = None,
) -> Pairwise:
    """Return f-DPO: ``-log σ(β f'(u_w) - β f'(u_l))``; with the reverse KL it is DPO.

    Args:
        divergence: f, or its name.
        beta: β, strength of the divergence.
        margin_loss: Another loss on the same margin, or its name; ``"ipo"`` with the reverse KL is IPO.
        length_norm: See :class:`Pairwise`.

    Returns:
        The objective.

    Raises:
        ValueError: A name is unknown, the divergence has no barrier, or the other arguments contradict each other.

    Source:
        Wang et al., f-DPO (arXiv:2309.16240).

    Example:
        >>> FDPO("jensen_shannon", beta=0.3).divergence.name
        'jensen_shannon'
    """
    return Pairwise(resolve(divergence), margin_loss, beta, length_norm)


@numeric_arguments
def TDPO(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "forward_kl",
    beta: float = 0.1,
    alpha: float | None = None,
    variant: Literal[1, 2] = 2,
    weighting: TokenWeighting = "none",
) -> TokenPairwise:
    """Return TDPO2, ``-log σ(β [(m_w - m_l) - α (δ_l - sg(δ_w))])``, or TDPO1; any f in place of the forward KL.

    Args:
        divergence: f of the divergences per token, or its name.
        beta: β, strength of the regularization.
        alpha: α, in variant 2 only; None is 0.5 there.
        variant: 1 or 2.
        weighting: ``"mapo"`` weights tokens by SparsePO's MaPO mask, ``"activations"`` by falign's own weights; see
            :class:`TokenPairwise`.

    Returns:
        The objective.

    Raises:
        ValueError: The divergence is unknown, β is not positive, or α is negative or given in variant 1.

    Source:
        Zeng et al., TDPO (arXiv:2404.11999).

    Example:
        >>> TDPO("jensen_shannon", beta=0.3).alpha
        0.5
    """
    return TokenPairwise(resolve(divergence), beta, alpha, variant, weighting)


@numeric_arguments
def FDPG(  # noqa: N802 - the paper's name
    divergence: Divergence | str,
    target: Target,
    *,
    baseline: Literal["leave_one_out", "constant", "none"] = "leave_one_out",
) -> DistributionMatching:
    """Return f-DPG: the policy gradient of ``D_f(π‖p)`` to an energy-based target.

    Args:
        divergence: f, or its name; the paper recommends Jensen-Shannon as the default.
        target: p, up to its normalizer.
        baseline: See :class:`DistributionMatching`.

    Returns:
        The objective.

    Raises:
        ValueError: The divergence is unknown, or its ``f'(∞)`` is infinite and the target has zeros.

    Source:
        Go et al., f-DPG (arXiv:2302.08215).

    Example:
        >>> from falign.objectives import BinaryConstraint
        >>> FDPG("jensen_shannon", BinaryConstraint()).needs == {
        ...     "features", "reference_logprobs", "old_logprobs", "log_partition"
        ... }
        True
    """
    return DistributionMatching(resolve(divergence), target, baseline)


@numeric_arguments
def DPHRL(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "jensen_shannon",
    coefficient: float | None = None,
    *,
    advantage: AdvantageEntry | Sequence[AdvantageEntry] = "group_normalised",
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.28,
    reduction: CompletionMean = "token_mean",
) -> Hybrid:
    """Return DPH-RL: a clipped policy gradient without penalty, plus rehearsal on samples of the reference.

    Args:
        divergence: f of the rehearsal, per token, or its name.
        coefficient: Weight of the rehearsal; None is :func:`dph_rl_coefficient`.
        advantage: See :class:`PolicyGradient`.
        clip_low: See :class:`PolicyGradient`.
        clip_high: See :class:`PolicyGradient`.
        reduction: Reduction of the policy gradient; the rehearsal is a mean over tokens.

    Returns:
        The objective.

    Raises:
        ValueError: The divergence is unknown, an argument is out of range, or no coefficient is published for it.

    Source:
        Li et al., DPH-RL (arXiv:2509.07430); bounds, advantage and mean over tokens follow the authors' code.

    Example:
        >>> DPHRL("forward_kl").rehearsal.divergence.name
        'forward_kl'
    """
    exploration = PolicyGradient(
        advantage=advantage, clip_low=clip_low, clip_high=clip_high, importance="token", reduction=reduction
    )
    rehearsal = Rehearsal(resolve(divergence))
    weight = dph_rl_coefficient(rehearsal.divergence) if coefficient is None else coefficient
    return Hybrid(exploration, rehearsal, weight)


@numeric_arguments
def SALSA(  # noqa: N802 - the paper's name
    beta: float = 0.05,
    divergence: Divergence | str = "reverse_kl",
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    level: Level = "sequence",
    reduction: CompletionMean = "token_mean",
) -> PolicyGradient:
    """Return SALSA's objective: PPO with a value head and a penalty to the reference.

    SALSA's reference, an average of fine-tuned models, is chosen outside of the objective.

    Args:
        beta: β, strength of the penalty, nats of reward.
        divergence: f, or its name; the paper uses the reverse KL.
        clip_low: See :class:`PolicyGradient`.
        clip_high: See :class:`PolicyGradient`.
        level: Level of the penalty; see :class:`PolicyGradient`.
        reduction: See :class:`PolicyGradient`.

    Returns:
        The objective.

    Raises:
        ValueError: The divergence is unknown, or an argument is out of range.

    Source:
        Chegini et al., SALSA (arXiv:2411.01798); there the penalty is in the reward of each token, which for the
        reverse KL has the same mean gradient.

    Example:
        >>> sorted(SALSA(0.1).needs)
        ['old_logprobs', 'old_values', 'reference_logprobs', 'rewards', 'values']
    """
    return PolicyGradient(
        resolve(divergence),
        beta,
        "gae",
        clip_low=clip_low,
        clip_high=clip_high,
        importance="token",
        level=level,
        reduction=reduction,
    )


@numeric_arguments
def SALSARLOO(  # noqa: N802 - after the paper's name
    beta: float = 0.05,
    divergence: Divergence | str = "reverse_kl",
    *,
    advantage: AdvantageEntry | Sequence[AdvantageEntry] = "leave_one_out",
    level: Level = "sequence",
) -> PolicyGradient:
    """Return SALSA's penalty with RLOO in place of PPO: no value head, no clipping.

    Args:
        beta: β, strength of the penalty, nats of reward.
        divergence: f, or its name.
        advantage: An alternative to RLOO's; see :class:`PolicyGradient`.
        level: Level of the penalty; see :class:`PolicyGradient`.

    Returns:
        The objective.

    Raises:
        ValueError: A name is unknown, or β is negative.

    Source:
        The reference is that of Chegini et al., SALSA (arXiv:2411.01798); the estimator is that of Ahmadian et al.,
        RLOO (arXiv:2402.14740).

    Example:
        >>> sorted(SALSARLOO(0.1).needs)
        ['old_logprobs', 'reference_logprobs', 'rewards']
    """
    return PolicyGradient(resolve(divergence), beta, advantage, level=level)
