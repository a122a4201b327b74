"""Methods that maximize win rates: over the reference (InfAlign), or over the policy itself (Nash mirror prox)."""

from __future__ import annotations

from falign.divergences import Divergence, get
from falign.numeric_fields import numeric_arguments
from falign.objectives.advantages import Advantage
from falign.objectives.base import Importance
from falign.objectives.distillation import Distillation
from falign.objectives.policy_gradient import PolicyGradient
from falign.objectives.sum import Sum

__all__ = ["InfAlign", "NashMirrorProx"]

PREVIOUS = "previous"
"""Name of the reference that holds the policy of the last iteration."""


@numeric_arguments
def InfAlign(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "reverse_kl",
    *,
    beta: float,
    advantage: Advantage | str = "leave_one_out",
) -> PolicyGradient:
    """Return the KL-RL of InfAlign-CTRL: ``E_π[Φ(C)] - β KL(π‖π_ref)``.

    The method lies in the reward: C is the win rate over samples of the reference for the same prompt, and Φ a
    transform for the way in which completions are served, such as ``e^{tC}`` for the best of n. Both are the
    ``transform`` of a reward (:mod:`falign.rewards.transforms`). The optimum is ``π_ref e^{Φ(C)/β}/Z``.

    Args:
        divergence: f, or its name; the paper has the reverse KL.
        beta: β, in units of the transformed reward.
        advantage: See :class:`PolicyGradient`. ``"group_normalised"`` would divide by the spread, and undo a part of
            the transform.

    Returns:
        The objective.

    Raises:
        ValueError: A name is unknown, or β is invalid.

    Source:
        Balashankar et al., InfAlign (arXiv:2412.19792). The paper's constants, t near 10 for the best of 4, are not
        confirmed here, so t has no default. The baseline is that of the group.

    Example:
        >>> InfAlign(beta=0.1).divergence.name
        'reverse_kl'
    """
    return PolicyGradient(get(divergence) if isinstance(divergence, str) else divergence, beta, advantage)


@numeric_arguments
def NashMirrorProx(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "reverse_kl",
    *,
    beta: float,
    eta: float,
    importance: Importance = "sequence",
    clip_low: float | None = None,
    clip_high: float | None = None,
) -> Sum:
    """Return the half step of Nash mirror prox: the preference over an opponent, held to two references.

    An iteration from π_k has two half steps, with ``KL`` of whole completions:

    * ``π_{k+1/2} = argmax_π P(π ≻ π_k)       - β KL(π‖π_ref) - KL(π‖π_k)/η``
    * ``π_{k+1}   = argmax_π P(π ≻ π_{k+1/2}) - β KL(π‖π_ref) - KL(π‖π_k)/η``

    Both have the same form: the opponent is the policy that the rollout was sampled from, and π_k the reference
    ``previous``. So a half step is one rollout with its updates, the reward is a preference oracle
    (:class:`falign.rewards.OracleReward`), whose opponents are the other completions of the prompt, and ``previous``
    is reset every two rollouts: ``references: {previous: {kind: periodic_reset, every: 2 U}}``, where U is the number
    of updates on a rollout. The last iterate converges to the Nash equilibrium of the regularized game.

    Args:
        divergence: f of the first penalty, or its name; the paper has the reverse KL.
        beta: β, strength of the divergence to the reference, in units of probability.
        eta: η, step size of an iteration.
        importance: See :class:`PolicyGradient`.
        clip_low: See :class:`PolicyGradient`.
        clip_high: See :class:`PolicyGradient`.

    Returns:
        The sum of ``preference``, a policy gradient with its penalty, and ``proximal``, with weight 1/η.

    Raises:
        ValueError: A name is unknown, or β or η is not positive.

    Source:
        Tiapkin et al. (arXiv:2505.19731). The advantage is the reward minus the group's mean, which is 1/2 whatever was
        sampled; a leave-one-out baseline contains the opponent's own reward, and would multiply the gradient by
        ``G/(G-1)``. The paper's practical version has policy-gradient inner steps with a slowly moving target; its
        details beyond two gradients per step are not settled. Here the second half step starts from π_{k+1/2}, not from
        π_k, which changes nothing where a half step is solved.

    Example:
        >>> {name: weight for name, (_, weight) in NashMirrorProx(beta=0.1, eta=2.0).terms.items()}
        {'preference': 1.0, 'proximal': 0.5}
    """
    if not beta > 0 or not eta > 0:
        raise ValueError(
            f"beta={beta}, eta={eta}: both must be positive; without β the game has no unique equilibrium."
        )
    preference = PolicyGradient(
        get(divergence) if isinstance(divergence, str) else divergence,
        beta,
        "group_centred",
        clip_low=clip_low,
        clip_high=clip_high,
        importance=importance,
    )
    proximal = Distillation(get("reverse_kl"), PREVIOUS, "sequence", importance=importance)
    return Sum({"preference": preference, "proximal": (proximal, 1 / eta)})
