"""Methods on labels, demonstrations and pairs held up by a likelihood: KTO, RPO, H-DPO, f-SFT and SequenceMatch."""

from __future__ import annotations

import math

from falign.divergences import Divergence, resolve
from falign.methods.core import FDPO, require_positive
from falign.numeric_fields import named_as, numeric_arguments
from falign.objectives.pairwise import Pairwise
from falign.objectives.sequence_match import SequenceMatching
from falign.objectives.sum import Selected, Sum
from falign.objectives.supervised import Supervised
from falign.objectives.unpaired import ReferencePoint, Unpaired

__all__ = ["FSFT", "HDPO", "KTO", "RPO", "SequenceMatch"]


@numeric_arguments
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


@numeric_arguments
def RPO(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "reverse_kl",
    beta: float = 0.1,
    *,
    sft_weight: float = 1.0,
) -> Sum:
    """Return RPO: f-DPO plus λ times ``-log π`` of the tokens of chosen completions.

    f-DPO trains the margin alone, so both completions of a pair may become less likely. The second term holds the
    chosen one up.

    Args:
        divergence: f of f-DPO, or its name.
        beta: β of f-DPO.
        sft_weight: λ, positive.

    Returns:
        The objective, a sum of the terms ``dpo`` and ``sft``, each with its own denominator.

    Raises:
        ValueError: The divergence is unknown or has no barrier, or a number is not positive.

    Source:
        Pang et al., Iterative reasoning preference optimization (arXiv:2404.19733), Eq. 1, α = 1. The second term is a
        mean over tokens, as in TRL's ``loss_type=["sigmoid", "sft"]``; in the paper it is a mean over completions of
        the mean over tokens.

    Example:
        >>> RPO("jensen_shannon", sft_weight=0.2).weights
        {'dpo': 1.0, 'sft': 0.2}
    """
    require_positive(sft_weight=sft_weight)
    return Sum({"dpo": FDPO(divergence, beta), "sft": (Selected(Supervised(), "chosen"), sft_weight)})


@numeric_arguments
def HDPO(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "reverse_kl",
    beta: float = 0.1,
    *,
    alpha: float = 0.95,
) -> Pairwise:
    """Return H-DPO: ``-log σ`` of the margin of ``β (α log π - log π_ref)``.

    For another f the margin is that of ``β (f'(u) + (α - 1) log π)``.
    The optimum for the reverse KL is ``π ∝ (π_ref exp(r/β))^{1/α}``: α < 1 sharpens it, α > 1 flattens it. The term
    ``(α - 1) log π`` grows with the length of a completion: with α < 1 long completions get higher rewards, so a policy
    can raise the margin by the lengths of its answers alone. Compare ``logps/*`` and the lengths of samples.

    Args:
        divergence: f, or its name; with α < 1 the reverse KL, ``jeffreys`` or ``chi2_kl``.
        beta: β, strength of the regularization.
        alpha: α, positive; 1 is DPO.

    Returns:
        The objective.

    Raises:
        ValueError: A number is not positive, or f has no barrier or does not admit α < 1.

    Source:
        Omura et al., H-DPO (arXiv:2411.07595); the value of α could not be confirmed.

    Example:
        >>> HDPO(alpha=0.9).entropy_weight
        0.9
    """
    with named_as(entropy_weight="alpha"):
        return Pairwise(resolve(divergence), beta=beta, entropy_weight=alpha)


@numeric_arguments
def FSFT(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "pearson_chi2",
    beta: float = 0.1,
    *,
    max_weight: float | None = None,
) -> Supervised:
    """Return f-SFT: ``f*(-β log u)/β`` of each token of demonstrations.

    Args:
        divergence: f, or its name: of the paper ``pearson_chi2``, ``squared_hellinger``, and ``total_variation``, for
            which its loss is plain fine-tuning.
        beta: β; no effect with ``total_variation``.
        max_weight: Largest weight of a token, beyond which the loss continues as its tangent; None for no bound, and
            for 10 where ``f'(∞)`` is finite.

    Returns:
        The objective.

    Raises:
        ValueError: The divergence is unknown, or a number is out of range.

    Source:
        Wang et al. (arXiv:2507.00018), with ``φ(x) = -f*(-x)`` and ``x = β log u`` per token, divided by β. The paper
        has no bound; its exact scale could not be confirmed.

    Example:
        >>> FSFT("squared_hellinger", 0.5).max_weight, FSFT("total_variation").divergence
        (10.0, None)
    """
    resolved = resolve(divergence)
    if resolved.name == "total_variation" and max_weight is None:
        return Supervised()
    if max_weight is None and math.isfinite(resolved.f_prime_at_infinity):
        max_weight = 10.0
    return Supervised(resolved, beta, max_weight)


@numeric_arguments
def SequenceMatch(alpha: float = 0.5, gamma: float = 0.998) -> SequenceMatching:  # noqa: N802 - the paper's name
    """Return SequenceMatch without its backspace token, on data labeled true and samples of the model labeled false.

    Args:
        alpha: α of ``φ(x) = x - x²/(4α)``.
        gamma: γ, discount per token.

    Returns:
        The objective; :class:`SequenceMatching` says what is left out.

    Raises:
        ValueError: A number is out of range.

    Source:
        Cundy and Ermon, SequenceMatch (arXiv:2306.05426).

    Example:
        >>> sorted(SequenceMatch().measures)
        ['value']
    """
    return SequenceMatching(alpha, gamma)
