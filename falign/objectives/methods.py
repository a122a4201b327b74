"""The papers' methods under the papers' names: compositions of the five choices, nothing else."""

from __future__ import annotations

from typing import Literal

from falign.divergences import Divergence, get
from falign.objectives.advantages import Advantage
from falign.objectives.completion_mean import CompletionMean
from falign.objectives.distribution_matching import DistributionMatching
from falign.objectives.hybrid import Hybrid
from falign.objectives.margins import MarginLoss, logistic
from falign.objectives.pairwise import Pairwise
from falign.objectives.penalty import Level
from falign.objectives.policy_gradient import PolicyGradient
from falign.objectives.rehearsal import Rehearsal
from falign.objectives.targets import Target
from falign.objectives.token_pairwise import TokenPairwise

__all__ = ["DPHRL", "FDPG", "FDPO", "SALSA", "TDPO"]


def FDPO(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "reverse_kl",
    beta: float = 0.1,
    *,
    margin_loss: MarginLoss | str = logistic,
    length_norm: Literal["none", "token"] = "none",
) -> Pairwise:
    """Return f-DPO: ``-log σ(β f'(u_w) - β f'(u_l))``; with the reverse KL it is DPO.

    Args:
        divergence: f, or its name.
        beta: β, strength of the divergence.
        margin_loss: Another loss on the same margin.
        length_norm: See :class:`Pairwise`.

    Returns:
        The objective.

    Raises:
        ValueError: The divergence is unknown or has no barrier, or β is not positive.

    Source:
        Wang et al., f-DPO (arXiv:2309.16240).

    Example:
        >>> FDPO("jensen_shannon", beta=0.3).divergence.name
        'jensen_shannon'
    """
    return Pairwise(_resolve(divergence), margin_loss, beta, length_norm)


def TDPO(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "forward_kl",
    beta: float = 0.1,
    alpha: float | None = None,
    variant: Literal[1, 2] = 2,
    weighting: Literal["none", "activations"] = "none",
) -> TokenPairwise:
    """Return TDPO2, ``-log σ(β [(m_w - m_l) - α (δ_l - sg(δ_w))])``, or TDPO1; any f in place of the forward KL.

    Args:
        divergence: f of the divergences per token, or its name.
        beta: β, strength of the regularisation.
        alpha: α, in variant 2 only; None is 0.5 there.
        variant: 1 or 2.
        weighting: ``"activations"`` is SparsePO's parameter-free weighting of tokens; see :class:`TokenPairwise`.

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
    return TokenPairwise(_resolve(divergence), beta, alpha, variant, weighting)


def FDPG(  # noqa: N802 - the paper's name
    divergence: Divergence | str,
    target: Target,
    *,
    baseline: Literal["leave_one_out", "constant", "none"] = "leave_one_out",
) -> DistributionMatching:
    """Return f-DPG: the policy gradient of ``D_f(π‖p)`` to an energy-based target.

    Args:
        divergence: f, or its name; Jensen-Shannon is the paper's advice where nothing speaks for another.
        target: p, up to its normaliser.
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
    return DistributionMatching(_resolve(divergence), target, baseline)


def DPHRL(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "jensen_shannon",
    coefficient: float = 0.025,
    *,
    advantage: Advantage | str = "group_normalised",
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.28,
    reduction: CompletionMean = "token_mean",
) -> Hybrid:
    """Return DPH-RL: a clipped policy gradient without penalty, and rehearsal of what the reference could do.

    Args:
        divergence: f of the rehearsal, per token, or its name.
        coefficient: Weight of the rehearsal. The paper's η for Jensen-Shannon is 0.2 in a mean over all rows, 8 fresh
            ones for each of the reference; between two means that is 0.025.
        advantage: See :class:`PolicyGradient`.
        clip_low: See :class:`PolicyGradient`.
        clip_high: See :class:`PolicyGradient`.
        reduction: Of the policy gradient; the rehearsal is a mean over tokens.

    Returns:
        The objective.

    Raises:
        ValueError: The divergence is unknown, or an argument out of range.

    Source:
        Li et al., DPH-RL (arXiv:2509.07430); bounds, advantage and mean over tokens as in their code.

    Example:
        >>> DPHRL("forward_kl").rehearsal.divergence.name
        'forward_kl'
    """
    exploration = PolicyGradient(
        advantage=advantage, clip_low=clip_low, clip_high=clip_high, importance="token", reduction=reduction
    )
    return Hybrid(exploration, Rehearsal(_resolve(divergence)), coefficient)


def SALSA(  # noqa: N802 - the paper's name
    beta: float = 0.05,
    divergence: Divergence | str = "reverse_kl",
    *,
    advantage: Advantage | str = "leave_one_out",
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    level: Level = "sequence",
) -> PolicyGradient:
    """Return SALSA's objective: PPO's clipped policy gradient with a penalty to the reference.

    What makes it SALSA is the reference, an average of fine-tuned models, which is chosen outside.

    Args:
        beta: β, strength of the penalty, nats of reward.
        divergence: f, or its name; the paper's is the reverse KL.
        advantage: See :class:`PolicyGradient`; ``"gae"`` is the paper's, with a value head.
        clip_low: See :class:`PolicyGradient`.
        clip_high: See :class:`PolicyGradient`.
        level: Of the penalty; see :class:`PolicyGradient`.

    Returns:
        The objective.

    Raises:
        ValueError: The divergence is unknown, or an argument out of range.

    Source:
        Chegini et al., SALSA (arXiv:2411.01798); there the penalty is in the reward of each token, which for the
        reverse KL has the same mean gradient.

    Example:
        >>> SALSA(0.1).needs == {"rewards", "old_logprobs", "reference_logprobs"}
        True
    """
    return PolicyGradient(
        _resolve(divergence),
        beta,
        advantage,
        clip_low=clip_low,
        clip_high=clip_high,
        importance="token",
        level=level,
    )


def _resolve(divergence: Divergence | str) -> Divergence:
    return get(divergence) if isinstance(divergence, str) else divergence
