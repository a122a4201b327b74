"""Methods that are a measure of whole next-token distributions: EMO, PLD, SinKD, STAR-CKD, NKD, standardized logits."""

from __future__ import annotations

from typing import Literal

from falign.divergences import Divergence, get, resolve
from falign.methods.core import require_positive
from falign.numeric_fields import numeric_arguments
from falign.objectives.distillation import TEACHER, Distillation
from falign.objectives.expected import Balanced, ExpectedCost, Surprisal
from falign.objectives.groups import CompletionMean
from falign.objectives.measures import DivergenceTo
from falign.objectives.ranking import RankTopK
from falign.objectives.sinkhorn import Sinkhorn
from falign.objectives.sum import Sum
from falign.objectives.supervised import Supervised
from falign.objectives.teacher_transforms import Standardized, TargetSplit
from falign.objectives.top_k import TopK

__all__ = ["EMO", "LSKD", "NKD", "PLD", "STARCKD", "SinKD"]


@numeric_arguments
def EMO(  # noqa: N802 - the paper's name
    variant: Literal[1, 2] = 1, largest: float | None = None, *, reduction: CompletionMean = "token_mean"
) -> Distillation:
    """Return EMO on demonstrations, no teacher: ``(MLE + sg(MLE/DEMD) DEMD) / 2`` per token.

    ``MLE = -log π(y)`` and ``DEMD = 1 - Σ_v π(v) cos(e_v, e_y)``, an upper bound of the earth mover's distance between
    π and the token, at the cosine cost of the policy's output embeddings.

    Args:
        variant: 1 as above. 2 is ``(sg(DEMD/MLE) MLE + DEMD) / 2``, half of the published one.
        largest: Bound of the ratio; the published code has 3 for instruction tuning and none for language models.
        reduction: See :class:`Distillation`.

    Returns:
        The objective.

    Raises:
        ValueError: The variant is unknown, or the bound is not positive.

    Source:
        Ren et al., EMO (arXiv:2310.04691). The embeddings are those of the head at each step, without gradient; the
        published code also has frozen ones. One of its releases subtracts ``sg(π(y))`` before the product, so that the
        *value* of DEMD is larger by π(y) and the ratio another; see ``ExpectedCost(plus_target=True)``.

    Example:
        >>> sorted(EMO().measures)
        ['divergence']
    """
    if variant not in (1, 2):
        raise ValueError(f"variant={variant!r}: choose 1 or 2.")
    parts = (Surprisal(), ExpectedCost()) if variant == 1 else (ExpectedCost(), Surprisal())
    return Distillation(Balanced(*parts, largest), reduction=reduction)


@numeric_arguments
def PLD(  # noqa: N802 - the paper's name
    k: int = 100, reference: str = TEACHER, *, reduction: CompletionMean = "token_mean"
) -> Distillation:
    """Return PLD: ``Σ_i T(σ_i) [logsumexp_{j≥i} z(σ_j) - z(σ_i)]``: σ is the data's token, then the teacher's order.

    Args:
        k: Number of the teacher's tokens that are ranked; all others count as ranked after them. V is the paper's.
        reference: Name of the teacher.
        reduction: See :class:`Distillation`.

    Returns:
        The objective. Its first summand is a cross-entropy weighted by T(y), so it needs no supervised term.

    Raises:
        ValueError: ``k`` is less than 1.

    Source:
        Bassam et al., PLD (arXiv:2506.12542), which ranks all classes of an image.

    Example:
        >>> PLD(k=10).measures["divergence"].references
        frozenset({'teacher'})
    """
    measure = RankTopK(k, reference, weights="reference", target_first=True, whole=True)
    return Distillation(measure, reduction=reduction)


@numeric_arguments
def SinKD(  # noqa: N802 - the paper's name
    block: int = 8,
    reference: str = TEACHER,
    *,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
    kl_weight: float = 1.0,
    sinkhorn_weight: float | None = None,
) -> Sum:
    """Return SinKD: ``-log π(y) + a KL(T‖π) + b Σ P D``, with Sinkhorn's plan P between blocks of positions.

    Args:
        block: Number of positions that are matched with each other; see :class:`Sinkhorn`.
        reference: Name of the teacher.
        temperature: Of both divergences.
        epsilon: ε of the plan.
        iterations: Of the plan.
        kl_weight: a.
        sinkhorn_weight: b, for the mean over positions; by default ``0.001 block``, since the published code has 0.001
            times the sum over the batch.

    Returns:
        The objective; its values depend on the composition of micro-batches.

    Raises:
        ValueError: A number is out of range.

    Source:
        Cui et al., SinKD (arXiv:2402.17110). The paper matches the classifications of a batch; here rows are the
        positions of completions. The factor T² of its KL is left to ``kl_weight``.

    Example:
        >>> SinKD().weights
        {'likelihood': 1.0, 'kl': 1.0, 'sinkhorn': 0.008}
    """
    transport = Sinkhorn(block, reference, epsilon, iterations, temperature)
    require_positive(kl_weight=kl_weight, **({} if sinkhorn_weight is None else {"sinkhorn_weight": sinkhorn_weight}))
    return Sum(
        {
            "likelihood": (Supervised(), 1.0),
            "kl": (Distillation(get("forward_kl"), reference, temperature=temperature), kl_weight),
            "sinkhorn": (Distillation(transport), 0.001 * block if sinkhorn_weight is None else sinkhorn_weight),
        }
    )


@numeric_arguments
def STARCKD(  # noqa: N802 - the paper's name
    k: int = 100,
    strength: float = 10.0,
    stray_top: int | None = None,
    reference: str = TEACHER,
    *,
    reduction: CompletionMean = "token_mean",
) -> Distillation:
    """Return STAR's constrained distillation: ``Σ_{v∈top_k(T)} T log(T/π) + λ Σ_{v∈top_m(π) ∖ top_k(T)} π(v)``.

    The first sum alone is unbounded below: it falls as π puts more mass on the tokens than T has. The second keeps it
    from being reached through unlikely tokens.

    Args:
        k: Number of the teacher's tokens; a cache of their log-probabilities suffices.
        strength: λ.
        stray_top: m, by default k.
        reference: Name of the teacher.
        reduction: See :class:`Distillation`.

    Returns:
        The objective, for given completions or the policy's samples.

    Raises:
        ValueError: A number is out of range.

    Source:
        STAR (arXiv:2602.03022), first stage; k and λ as in its configuration, m is not settled.

    Example:
        >>> STARCKD(k=50).measures["divergence"].k
        50
    """
    measure = TopK(get("forward_kl"), k, reference, "none", linear=1.0, stray=strength, stray_top=stray_top)
    return Distillation(measure, reduction=reduction)


@numeric_arguments
def LSKD(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "forward_kl",
    *,
    temperature: float = 2.0,
    reference: str = TEACHER,
    weight: float = 1.0,
) -> Sum:
    """Return distillation of standardized logits: ``-log π(y) + w D_f`` of ``softmax((z - mean z)/(T std z))``.

    Args:
        divergence: f, or its name.
        temperature: T.
        reference: Name of the teacher.
        weight: w; the published code has 9 T² beside a supervised weight of 0.1 on images.

    Returns:
        The objective, on demonstrations.

    Raises:
        ValueError: A name is unknown or a number is out of range.

    Source:
        Sun et al., logit standardization (arXiv:2403.01681), with the forward KL.

    Example:
        >>> LSKD("jensen_shannon").weights
        {'likelihood': 1.0, 'standardized': 1.0}
    """
    measure = Standardized(DivergenceTo(resolve(divergence), reference), temperature)
    require_positive(weight=weight)
    return Sum({"likelihood": (Supervised(), 1.0), "standardized": (Distillation(measure), weight)})


@numeric_arguments
def NKD(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "forward_kl",
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    reference: str = TEACHER,
) -> Sum:
    """Return NKD: ``-log π(y) - T(y) log π(y) + γ λ² D_f`` of the distributions over all tokens but y, renormalized.

    Args:
        divergence: f of the last part, or its name; the paper's cross-entropy is the forward KL plus a constant.
        gamma: γ.
        temperature: λ, of the last part.
        reference: Name of the teacher.

    Returns:
        The objective, on demonstrations.

    Raises:
        ValueError: A name is unknown or a number is out of range.

    Source:
        Yang et al., NKD (arXiv:2303.13005). Decoupled distillation (arXiv:2203.08679) has a binary divergence in place
        of ``-T(y) log π(y)``: ``TargetSplit(forward_kl, "teacher", 1.0, 8.0, temperature=4.0)``.

    Example:
        >>> NKD().weights
        {'likelihood': 1.0, 'split': 1.0}
    """
    others = gamma * temperature**2
    measure = TargetSplit(resolve(divergence), reference, 1.0, others, temperature, "likelihood")
    return Sum({"likelihood": (Supervised(), 1.0), "split": (Distillation(measure), 1.0)})
