"""The papers' methods under the papers' names: compositions of the five choices, nothing else."""

from __future__ import annotations

from typing import Literal

from falign.divergences import Divergence, get
from falign.objectives.margins import MarginLoss, logistic
from falign.objectives.pairwise import Pairwise

__all__ = ["FDPO"]


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
    resolved = get(divergence) if isinstance(divergence, str) else divergence
    return Pairwise(resolved, margin_loss, beta, length_norm)
