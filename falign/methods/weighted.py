"""Methods that are advantages and weights: ACE, APO, RLAD, PACED, BD-KD's gate, TSD-KD, AdaSPEC, SparsePO."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from falign.choices import require_choice
from falign.divergences import Divergence, get, resolve
from falign.methods.core import grpo, require_positive
from falign.numeric_fields import named_as, numeric_arguments
from falign.objectives.advantage_list import ace, stcr
from falign.objectives.anchored import Anchored
from falign.objectives.base import Objective
from falign.objectives.difficulty import Dads, DifficultyKernel
from falign.objectives.distillation import TEACHER, Distillation
from falign.objectives.groups import CompletionMean
from falign.objectives.measures import DivergenceTo, Entropy
from falign.objectives.pairwise import Pairwise
from falign.objectives.penalty import Level
from falign.objectives.policy_gradient import PolicyGradient
from falign.objectives.ranking import RankTopK
from falign.objectives.schedules import Scheduled, Steps
from falign.objectives.sum import Selected, Sum
from falign.objectives.token_gates import DivergenceBetween, EntropyGap, EntropyGate, EntropyPrefix, QuantileFilter
from falign.objectives.token_pairwise import TokenPairwise

Mask = Literal["mapo", "learned", "learned_independent"]

__all__ = ["ACE", "APO", "BDKD", "OPADPO", "PACED", "RLAD", "TSDKD", "AdaSPEC", "SparsePO"]


@numeric_arguments
def ACE(  # noqa: N802 - the paper's name
    divergence: Divergence | str | None = None,
    beta: float = 0.0,
    *,
    alpha: float = 1.0,
    length_norm: Literal["token", "none"] = "token",
    kernel: Literal["softplus", "relu"] = "softplus",
    cap: float | None = None,
    level: Level = "sequence",
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    reduction: CompletionMean = "token_mean",
) -> PolicyGradient:
    """Return ACE: GRPO with negative advantages times ``1 + α softplus(c)``, ``c = log π/π_ref`` of the completion.

    Args:
        divergence: f of a penalty, or its name; by default none.
        beta: Strength of the penalty.
        alpha: α; 0 is GRPO.
        length_norm: See :func:`falign.objectives.ace`.
        kernel: See :func:`falign.objectives.ace`.
        cap: See :func:`falign.objectives.ace`.
        level: Level of the penalty; see :class:`PolicyGradient`.
        clip_low: See :class:`PolicyGradient`.
        clip_high: See :class:`PolicyGradient`.
        reduction: See :class:`PolicyGradient`.

    Returns:
        The objective.

    Raises:
        ValueError: A name is unknown or a number out of range.

    Source:
        Xu et al., ACE (arXiv:2602.21420). No code was published; the form of the factor is not settled, and the
        length norm is falign's, because c of a whole completion grows with its length.

    Example:
        >>> sorted(ACE().needs)
        ['old_logprobs', 'reference_logprobs', 'rewards']
    """
    punished = ace(alpha, length_norm=length_norm, kernel=kernel, cap=cap)
    return grpo(divergence, beta, punished, clip_low=clip_low, clip_high=clip_high, level=level, reduction=reduction)


@numeric_arguments
def APO(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "reverse_kl",
    beta: float = 1e-3,
    *,
    rate: float = 1e-5,
    pass_reward: float = 1.0,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    reduction: CompletionMean = "token_mean",
) -> PolicyGradient:
    """Return APO, asymmetric policy optimization: GRPO with DADS on the penalty and STCR on the advantages.

    The penalty of a right completion is multiplied by ``1 - e^(-e p)`` with p its prompt's pass rate
    (:class:`falign.objectives.Dads`); the advantage of a wrong one by ``2 - (1 + rate)^-(L - L̄)`` where it is longer
    than the right ones (:func:`falign.objectives.stcr`).

    Args:
        divergence: f of the penalty, per token, or its name.
        beta: Strength of the penalty.
        rate: Growth of STCR's factor per token.
        pass_reward: A completion with at least this reward is right.
        clip_low: See :class:`PolicyGradient`.
        clip_high: See :class:`PolicyGradient`.
        reduction: See :class:`PolicyGradient`.

    Returns:
        The objective.

    Raises:
        ValueError: The divergence is unknown or a number out of range.

    Source:
        APO, asymmetric policy optimization, from its code: 8 completions, coefficient 1e-3. There the penalty is k3 as
        a loss, which has the gradient of the *forward* KL per token: ``APO("forward_kl")`` has it.

    Example:
        >>> APO().penalty_weights
        (Dads(pass_reward=1.0),)
    """
    shaped = stcr(rate=rate, pass_reward=pass_reward)
    plain = grpo(divergence, beta, shaped, clip_low=clip_low, clip_high=clip_high, level="token", reduction=reduction)
    return replace(plain, penalty_weights=[Dads(pass_reward)])


@numeric_arguments
def RLAD(  # noqa: N802 - the paper's name
    divergence: Divergence | str | None = None,
    beta: float = 0.0,
    *,
    old_exponent: float = 0.5,
    reference: str = TEACHER,
    level: Level = "token",
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    reduction: CompletionMean = "sequence_mean",
) -> PolicyGradient:
    """Return RLAD: GRPO with ``π/(π_old^a T^(1-a))`` in place of ``π/π_old``.

    Args:
        divergence: f of a penalty to ``reference_logprobs``, the start, or its name; by default none.
        beta: Strength of the penalty.
        old_exponent: a, in [0, 1]; 1 is GRPO, and 0 compares with the teacher alone.
        reference: Name of the teacher T.
        level: Level of the penalty; see :class:`PolicyGradient`.
        clip_low: See :class:`PolicyGradient`.
        clip_high: See :class:`PolicyGradient`.
        reduction: See :class:`PolicyGradient`.

    Returns:
        The objective.

    Raises:
        ValueError: A name is unknown or a number out of range.

    Source:
        Zhang et al., RLAD (arXiv:2602.22495). The mixture ``π_old^a T^(1-a)`` is not normalized there either: in the
        first step the ratio is ``(π_old/T)^(1-a)``, so tokens are clipped before anything has moved.

    Example:
        >>> sorted(RLAD(old_exponent=0.5).needs)
        ['old_logprobs', 'references.teacher', 'rewards']
    """
    of_penalty: Level = "sequence" if divergence is None else level
    plain = grpo(divergence, beta, clip_low=clip_low, clip_high=clip_high, level=of_penalty, reduction=reduction)
    return replace(plain, importance_reference=reference, old_exponent=old_exponent)


@numeric_arguments
def PACED(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "forward_kl",
    *,
    a: float = 1.0,
    b: float = 1.0,
    then: Divergence | str | None = "reverse_kl",
    switch: int | None = None,
    reference: str = TEACHER,
    pass_reward: float = 1.0,
) -> Objective:
    """Return PACED: on-policy distillation with each prompt's loss times ``p^a (1 - p)^b``, p its pass rate.

    Args:
        divergence: f to the teacher, over the vocabulary, or its name.
        a: Exponent of p.
        b: Exponent of 1 - p; ``a = b = 0`` is plain distillation.
        then: f from step ``switch`` on; not used without it.
        switch: Optimizer step at which the divergence changes; None for no change.
        reference: Name of the teacher.
        pass_reward: A completion with at least this reward passes.

    Returns:
        The objective; it reads rewards, for the pass rates alone.

    Raises:
        ValueError: A name is unknown or a number out of range.

    Source:
        Xu et al., PACED (arXiv:2603.11178): ``p (1 - p)``, the forward KL first and then the reverse KL. The pass rate
        is that of the rollout's own group; the kernel is not in the authors' repository.

    Example:
        >>> sorted(PACED().needs)
        ['rewards']
    """
    kernel = DifficultyKernel(a, b, pass_reward)
    distillation = Distillation(resolve(divergence), reference, weights=[kernel])
    if switch is None or then is None:
        return distillation
    return Scheduled(distillation, {"divergence": Steps({0: resolve(divergence), switch: resolve(then)})})


@numeric_arguments
def BDKD(  # noqa: N802 - the paper's name
    reference: str = TEACHER, *, other: float = 0.0, reduction: CompletionMean = "token_mean"
) -> Sum:
    """Return BD-KD's gate: the forward KL where the teacher's entropy is higher, the reverse KL where the student's is.

    Args:
        reference: Name of the teacher.
        other: Weight of each divergence at the other tokens, from 0 to 1.
        reduction: See :class:`Distillation`.

    Returns:
        The objective, a sum of the terms ``forward`` and ``reverse``.

    Raises:
        ValueError: ``other`` is out of range.

    Source:
        BD-KD, balanced divergence for knowledge distillation; the gate as summarized, its code was not seen.

    Example:
        >>> [term for term in BDKD().terms]
        ['forward', 'reverse']
    """

    def part(name: str, higher: Literal["reference", "policy"]) -> Distillation:
        gate = EntropyGate(higher, reference, other)
        return Distillation(get(name), reference, reduction=reduction, weights=[gate])

    return Sum({"forward": part("forward_kl", "reference"), "reverse": part("reverse_kl", "policy")})


@numeric_arguments
def TSDKD(  # noqa: N802 - the paper's name
    mixture: float = 0.9,
    entropy: float = 1.0,
    ranking: float = 0.1,
    *,
    keep: float = 0.1,
    k: int = 10,
    prefix: float = 0.5,
    reference: str = TEACHER,
) -> Sum:
    """Return TSD-KD: a gated Jensen–Shannon divergence, an entropy term on uncertain tokens, and a ranking term.

    On samples of the student S, as means over tokens::

        Σ_t σ(H_S - H_T) JSD_m(S, T)  +  entropy · Σ_{uncertain t} H_S  +  ranking · Σ_{early t} RankTopK

    Args:
        mixture: Parameter of ``generalized_js``.
        entropy: Weight of the entropy term, which makes the student more certain at its most uncertain tokens.
        ranking: Weight of the ranking term: Plackett–Luce of the student's top k in the teacher's order.
        keep: Share of a completion's tokens that count as uncertain.
        k: Number of tokens to rank.
        prefix: The ranking term reads the first tokens that hold this share of a completion's entropy.
        reference: Name of the teacher.

    Returns:
        The objective, a sum of the terms ``distillation``, ``entropy`` and ``ranking``.

    Raises:
        ValueError: A number is out of range.

    Source:
        Kim and Baek, TSD-KD (arXiv:2603.13260). Its code differs from the paper in three places, which are as in the
        paper here: its ranking loss has prefix sums, the likelihood of the reversed order; its quantile 0.1 keeps the
        90 % most uncertain tokens, among them prompt and padding; and one prefix length is computed for the flattened
        batch. The length of the prefix is not settled.

    Example:
        >>> sorted(TSDKD().terms)
        ['distillation', 'entropy', 'ranking']
    """
    divergence = get(f"generalized_js({mixture})")
    uncertain = QuantileFilter(Entropy(), keep)
    rank = RankTopK(k, reference, candidates="policy")
    require_positive(entropy=entropy, ranking=ranking)
    return Sum(
        {
            "distillation": Distillation(divergence, reference, weights=[EntropyGap(reference)]),
            "entropy": (Distillation(Entropy(), weights=[uncertain]), entropy),
            "ranking": (Distillation(rank, weights=[EntropyPrefix(prefix)]), ranking),
        }
    )


@numeric_arguments
def AdaSPEC(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "forward_kl",
    *,
    keep: float = 0.4,
    reference: str = TEACHER,
    draft: str = "reference",
    reduction: CompletionMean = "token_mean",
) -> Distillation:
    """Return AdaSPEC: distillation on the tokens where the student has most to gain over a distilled draft.

    The score is ``Δ_t = D_f(S‖T) - D_f(draft‖T)``; the share ``keep`` of a completion's tokens with the largest score
    counts, as a mean over these.

    Args:
        divergence: f, or its name; the forward KL is ``KL(T‖S)``.
        keep: Share of tokens to keep; 1 is plain distillation.
        reference: Name of the teacher.
        draft: Name of the draft, distilled before with the same divergence.
        reduction: See :class:`Distillation`.

    Returns:
        The objective.

    Raises:
        ValueError: The divergence is unknown, or ``keep`` is out of range.

    Source:
        AdaSPEC, from its code. The quantile is there over a batch and here over each completion, so that the loss does
        not depend on the size of micro-batches. A completion counts by its length.

    Example:
        >>> AdaSPEC(keep=0.4).weights[0].keep
        0.4
    """
    f = resolve(divergence)
    kept = QuantileFilter(DivergenceTo(f, reference), keep, DivergenceBetween(f, draft, reference))
    return Distillation(f, reference, reduction=reduction, weights=[kept])


@numeric_arguments
def OPADPO(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "reverse_kl",
    beta: float = 0.1,
    *,
    anchor: float = 1.0,
    weighting: Literal["none", "data"] = "data",
) -> Sum:
    """Return OPA-DPO on weighted tokens: ``-log σ(r̂_w - r̂_l) - anchor · log σ(r̂_w)``.

    ``r̂ = β f'(u)`` with ``log u = Σ_t w_t (log π - log π_ref)`` and the weights w of the data, which say how much each
    token matters (severity of its errors, relevance).

    Args:
        divergence: f, or its name; the paper uses the reverse KL.
        beta: β.
        anchor: Weight of the second term, which keeps the chosen answer's reward above 0.
        weighting: ``"none"`` for weights of 1.

    Returns:
        The objective, a sum of the terms ``pair`` and ``anchor``.

    Raises:
        ValueError: The divergence is unknown or has no barrier, or a number is out of range.

    Source:
        Yang et al., OPA-DPO (arXiv:2501.09695): β 0.1, anchor at reward 0 with coefficient 1, from its code. A weight
        of 0 removes a token from policy and reference alike. The first stage, fine-tuning on the policy's own and the
        experts' corrected answers, is ``Supervised``; its model is then start and reference. The pair with a masked
        image is not part of falign, which reads text.

    Example:
        >>> sorted(OPADPO().needs)
        ['preference', 'reference_logprobs', 'token_weights.data']
    """
    f = resolve(divergence)
    require_positive(anchor=anchor)
    return Sum(
        {
            "pair": Pairwise(f, beta=beta, weighting=weighting),
            "anchor": (Selected(Anchored(f, beta=beta, weighting=weighting), "chosen"), anchor),
        }
    )


@numeric_arguments
def SparsePO(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "forward_kl",
    beta: float = 0.1,
    *,
    mask: Mask = "mapo",
    mask_l1: float | None = None,
) -> TokenPairwise:
    """Return SparsePO: ``-log σ(β (u - d))``, u and d sums over tokens weighted by the mask.

    Args:
        divergence: f of d, or its name.
        beta: β; 0.8 for IMDB and TL;DR, 0.1 for HH in the paper.
        mask: ``"mapo"`` is the parameter-free mask of the reference's activations
            (:class:`falign.scoring.token_weights.MapoMask`). ``"learned"`` is one for both sums and
            ``"learned_independent"`` one for each, trained with the policy
            (:class:`falign.scoring.learned_masks.LearnedMasks`).
        mask_l1: Factor of the learned masks' mean; None means 0.001.

    Returns:
        The objective.

    Raises:
        ValueError: The divergence is unknown, or a number is out of range.

    Source:
        Christopoulou et al., SparsePO (arXiv:2410.05102).

    Example:
        >>> SparsePO(beta=0.8).weighting
        'mapo'
    """
    require_choice("mask", mask, Mask)
    with named_as(weighting="mask"):
        return TokenPairwise(resolve(divergence), beta, variant=1, weighting=mask, mask_l1=mask_l1)
