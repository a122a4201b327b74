"""Distillation from a teacher that reads another prompt: a context, or a solution that the policy does not see."""

from __future__ import annotations

from falign.divergences import Divergence, resolve
from falign.numeric_fields import numeric_arguments
from falign.objectives.distillation import TEACHER, Distillation
from falign.objectives.groups import CompletionMean
from falign.objectives.penalty import Level

__all__ = ["ContextDistillation", "PrivilegedDistillation"]


@numeric_arguments
def ContextDistillation(  # noqa: N802 - the paper's name
    divergence: str | Divergence = "forward_kl",
    *,
    reference: str = TEACHER,
    temperature: float = 1.0,
    reduction: CompletionMean = "token_mean",
) -> Distillation:
    """Return ``Σ_t D_f(π(·|x, y_<t)‖π_T(·|c(x), y_<t))``: the policy learns to do without the context c.

    The teacher is a reference with a ``prompt`` of its own, such as the policy with its adapter off behind few-shot
    examples (:class:`falign.references.Prompted`). The completions are given, or the policy's own.

    Args:
        divergence: f; the forward KL of the paper is ``KL(π_T‖π)``.
        reference: Name of the teacher.
        temperature: Both distributions are computed from ``logits/T``.
        reduction: See :class:`Distillation`.

    Returns:
        The objective.

    Source:
        Askell et al. (arXiv:2112.00861), Section 2.2, and Snell et al. (arXiv:2209.15189). The former keeps the 50 most
        likely tokens of the teacher, and one event for the rest: the measure
        ``top_k(forward_kl, k=50, reference=teacher)``. The latter trains on samples of the teacher alone.

    Example:
        >>> sorted(ContextDistillation().measures["divergence"].references)
        ['teacher']
    """
    return Distillation(resolve(divergence), reference, temperature=temperature, reduction=reduction)


@numeric_arguments
def PrivilegedDistillation(  # noqa: N802 - a constructor, like the others
    divergence: str | Divergence = "reverse_kl",
    *,
    reference: str = TEACHER,
    level: Level = "vocabulary",
    temperature: float = 1.0,
) -> Distillation:
    """Return distillation, on the policy's own samples, from a teacher with privileged information in its prompt.

    The teacher is a reference with a ``prompt`` that contains, say, the solution: the model itself as it was (adapter
    off, a moving average of the policy), or a larger one. No reward is read.

    Args:
        divergence: f; the reverse KL is ``KL(π‖π_T)``.
        reference: Name of the teacher.
        level: See :class:`Distillation`; ``"token"`` needs only the teacher's log-probabilities of sampled tokens.
        temperature: As in :class:`Distillation`, at level ``"vocabulary"``.

    Returns:
        The objective.

    Source:
        G-OPD's code (arXiv:2602.12125) since March 2026, on-policy context distillation: level ``"token"`` with the
        reverse KL, in a PPO loss with truncated importance weights.

    Example:
        >>> sorted(PrivilegedDistillation(level="token").needs)
        ['old_logprobs', 'references.teacher']
    """
    return Distillation(resolve(divergence), reference, level=level, temperature=temperature)
