"""Methods on labels and demonstrations: KTO, H-DPO, f-SFT and SequenceMatch."""

from __future__ import annotations

from falign.divergences import Divergence, resolve
from falign.objectives.unpaired import ReferencePoint, Unpaired

__all__ = ["KTO"]


def KTO(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "reverse_kl",
    beta: float = 0.1,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reference_point: ReferencePoint = "mismatched",
) -> Unpaired:
    """Return KTO: ``λ_D (1 - σ(r̂ - z))`` for desirable and ``λ_U (1 - σ(z - r̂))`` for undesirable completions.

    Args:
        divergence: f of the implicit reward ``r̂ = β f'(u)``, or its name; the paper uses the reverse KL.
        beta: β, strength of the divergence.
        desirable_weight: ``λ_D``.
        undesirable_weight: ``λ_U``.
        reference_point: z; see :class:`Unpaired`. ``"zero"`` with the reverse KL is APO-zero on labels.

    Returns:
        The objective.

    Raises:
        ValueError: A name is unknown, the divergence has no barrier, or a number is not positive.

    Source:
        Ethayarajh et al., KTO (arXiv:2402.01306), Eq. 7; ``"zero"``: D'Oosterlinck et al. (arXiv:2408.06266). The
        reference point is a mean over an optimizer step, and not over a micro-batch as in TRL.

    Example:
        >>> KTO("jensen_shannon", beta=0.3).divergence.name
        'jensen_shannon'
    """
    return Unpaired(resolve(divergence), beta, desirable_weight, undesirable_weight, reference_point)
