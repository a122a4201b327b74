"""The papers' methods under the papers' names: compositions of the five choices, nothing else."""

from __future__ import annotations

from typing import Literal

from falign.divergences import Divergence, get
from falign.objectives.margins import MarginLoss, logistic
from falign.objectives.pairwise import Pairwise
from falign.objectives.token_pairwise import TokenPairwise

__all__ = ["FDPO", "TDPO"]


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


def _resolve(divergence: Divergence | str) -> Divergence:
    return get(divergence) if isinstance(divergence, str) else divergence
