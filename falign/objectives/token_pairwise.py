"""TDPO and variants: the margin of a pair's log-ratios, corrected by the divergences at its tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from falign.divergences import Divergence, ForwardKL
from falign.objectives.base import BaseObjective, CompletionBatch, ObjectiveOutput, Term, TokenWeighting
from falign.objectives.groups import accuracies, completion_term, pairs_in
from falign.objectives.margins import logistic
from falign.objectives.measures import DivergenceTo, Measure

__all__ = ["TokenPairwise"]


@dataclass(frozen=True)
class TokenPairwise(BaseObjective):
    """``-log σ(r̂_w - r̂_l)`` for each pair, with ``r̂(y) = β (m(y) + a δ(y))``, m and δ sums over the tokens of y.

    ``m(y) = Σ_t w_t (log π(y_t|s_t) - log π_ref(y_t|s_t))`` and ``δ(y) = Σ_t w_t D_f(π(·|s_t)‖π_ref(·|s_t))``, all
    ``w_t = 1`` without weighting. Variant 1 has ``a = 1`` and is ``-log σ(β [(m_w - m_l) - (δ_l - δ_w)])``.
    Variant 2 is ``-log σ(β [(m_w - m_l) - α (δ_l - sg(δ_w))])``: ``a = α``, and no gradient through the chosen
    completion's δ: the loss changes only the rejected completion's δ. ``α = 0`` is DPO.

    δ is an additive regularizer and no closed form is inverted, so f needs no barrier.

    Attributes:
        divergence: f of δ; the paper uses ``KL(π_ref‖π)``, the forward KL.
        beta: β, nats of reward; positive.
        alpha: α, weight of δ, not negative; None means 0.5 in variant 2; not allowed in variant 1.
        variant: 1 (TDPO1) or 2 (TDPO2).
        weighting: Source of ``w_t``; a token of weight 0 is ignored. ``"none"``: all 1. ``"mapo"``: the MaPO mask of
            SparsePO, from the reference's activations (:class:`falign.scoring.token_weights.MapoMask`).
            ``"activations"``: falign's own weights from them. ``"data"``: weights of the data. ``"learned"``: a mask
            that is trained with the policy (:class:`falign.scoring.learned_masks.LearnedMasks`);
            ``"learned_independent"``: one for m and one for δ.
        mask_l1: Only with learned masks: factor of their mean over tokens, a further term; None means 0.001.

    Raises:
        ValueError: β is not positive, α is negative or given in variant 1, or a choice is unknown.

    Source:
        Zeng et al., TDPO (arXiv:2404.11999), the losses of TDPO1 and TDPO2, with f the forward KL. Their derivation
        starts from the reverse KL, which would give a different δ. Weights: variant 1 with ``weighting="mapo"`` is the
        MaPO loss of Christopoulou et al., SparsePO (arXiv:2410.05102), which has one mask for both sums; with the
        learned masks it is their loss of these. Their code has the L1 factor 0.001, and the weight decay 0.01 for the
        masks' parameters.

    Example:
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0, -1.0], [-3.0, -1.0]]),
        ...     reference_logprobs=torch.full((2, 2), -1.5),
        ...     measures={"divergence": torch.tensor([[0.25, 0.0], [0.5, 0.25]])},
        ...     completion_mask=torch.ones(2, 2, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 0]),
        ...     preference=torch.tensor([1.0, 0.0]),
        ... )
        >>> TokenPairwise(beta=1.0, variant=1)(batch).metrics["rewards/margins"]  # (1 - -1) - (0.75 - 0.25)
        tensor([1.5000])
        >>> TokenPairwise(beta=1.0, alpha=0.5)(batch).metrics["rewards/margins"]  # (1 - -1) - 0.5 (0.75 - 0.25)
        tensor([1.7500])
    """

    divergence: Divergence = field(default_factory=ForwardKL)
    beta: float = 0.1
    alpha: float | None = None
    variant: Literal[1, 2] = 2
    weighting: TokenWeighting = "none"
    mask_l1: float | None = None

    def __post_init__(self) -> None:
        if self.variant not in (1, 2):
            raise ValueError(f"variant={self.variant!r}: choose 1 (TDPO1) or 2 (TDPO2).")
        if self.weighting not in get_args(TokenWeighting):
            raise ValueError(f"weighting={self.weighting!r}: choose one of {', '.join(get_args(TokenWeighting))}.")
        if self._is_learned:
            object.__setattr__(self, "mask_l1", 1e-3 if self.mask_l1 is None else self.mask_l1)
        elif self.mask_l1 is not None:
            raise ValueError(
                f"mask_l1={self.mask_l1!r} with weighting={self.weighting!r}: it is for learned masks; leave it "
                "out, or set weighting='learned'."
            )
        if self.mask_l1 is not None and not 0 <= self.mask_l1 < math.inf:
            raise ValueError(f"mask_l1={self.mask_l1!r} must be finite and not negative.")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta!r} must be positive and finite.")
        if self.variant == 1 and self.alpha is not None:
            raise ValueError(
                f"alpha={self.alpha!r} with variant=1: TDPO1 counts the divergences in full, without α; leave alpha "
                "out, or set variant=2."
            )
        if self.variant == 2 and self.alpha is None:
            object.__setattr__(self, "alpha", 0.5)
        if self.alpha is not None and not 0 <= self.alpha < math.inf:
            raise ValueError(
                f"alpha={self.alpha!r} must be finite and not negative: a negative one would reward divergence."
            )

    @property
    def _is_learned(self) -> bool:
        return self.weighting in ("learned", "learned_independent")

    @property
    @override
    def reads_row_weights(self) -> bool:
        return True

    @property
    @override
    def needs(self) -> frozenset[str]:
        weights = set[str]() if self.weighting == "none" else {f"token_weights.{self.weighting}"}
        return frozenset({"reference_logprobs", "preference"} | weights)

    @property
    @override
    def measures(self) -> Mapping[str, Measure]:
        return {"divergence": DivergenceTo(self.divergence)}

    def implicit_reward(self, log_ratio: Float[Tensor, "*S"], divergence: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Return ``r̂ = β (m + a δ)`` with ``a = 1`` in variant 1 and ``a = α`` in variant 2.

        The log-ratio alone does not determine the reward. In both variants the value of the loss is ``-log σ`` of the
        difference of two such rewards.

        Args:
            log_ratio: m, (weighted) sums of ``log u`` over tokens, nats.
            divergence: δ, (weighted) sums of ``D_f`` over tokens, same shape.

        Returns:
            The reward, same shape.
        """
        return self.beta * (log_ratio + (1.0 if self.alpha is None else self.alpha) * divergence)

    @override
    def completion_rewards(self, batch: CompletionBatch) -> Float[Tensor, " N"]:
        # Unlike in the loss of variant 2, the gradient flows through δ of the chosen completion too.
        return self.implicit_reward(*self._sums(batch))

    @override
    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        """Return one loss per pair of the batch.

        Args:
            batch: Completions with ``reference_logprobs``, ``measures["divergence"]``, ``preference``, and
                ``token_weights`` with a weighting; any two completions of one prompt with different preferences form
                a pair.

        Returns:
            One term of shape (pairs,), and the metrics of each pair: ``rewards/*`` (:meth:`implicit_reward`, so that
            ``rewards/margins`` is the logit of the loss), ``divergence/*`` (δ, with weights where they are used),
            ``logratios/*`` and ``logps/*`` (plain sums over tokens); a tie counts half in ``rewards/accuracies``.

        Raises:
            ValueError: A needed field is None, or no two completions of one prompt differ in preference.
        """
        chosen, rejected = pairs_in(batch)
        m, delta = self._sums(batch)
        kept = delta if self.variant == 1 else delta.detach()
        chosen_rewards = self.implicit_reward(m[chosen], kept[chosen])
        rejected_rewards = self.implicit_reward(m[rejected], delta[rejected])
        margin = chosen_rewards - rejected_rewards
        losses = logistic(margin)
        with torch.no_grad():
            logprobs = batch.sequence_sum(batch.logprobs)
            log_ratio = batch.sequence_sum(batch.log_ratio)
            metrics = {
                "rewards/chosen": chosen_rewards,
                "rewards/rejected": rejected_rewards,
                "rewards/margins": margin,
                "rewards/accuracies": accuracies(margin, torch.maximum(chosen_rewards.abs(), rejected_rewards.abs())),
                "divergence/chosen": delta[chosen],
                "divergence/rejected": delta[rejected],
                "logratios/chosen": log_ratio[chosen],
                "logratios/rejected": log_ratio[rejected],
                "logps/chosen": logprobs[chosen],
                "logps/rejected": logprobs[rejected],
            }
        terms = [Term(losses, batch.weighted(torch.ones_like(losses), chosen), name="token_pairwise")]
        if self._is_learned:
            assert self.mask_l1 is not None
            names = ("ratio",) if self.weighting == "learned" else ("ratio", "divergence")
            sizes = torch.stack([batch.sequence_sum(batch.require(f"learned_masks.{name}")) for name in names]).sum(0)
            metrics["mask"] = sizes / (len(names) * batch.num_tokens)
            size = completion_term(sizes, batch.num_tokens, "token_mean", self.mask_l1, name="mask_l1")
            terms.append(size._replace(weights=batch.weighted(size.weights)))
        return ObjectiveOutput(tuple(terms), {k: v.detach() for k, v in metrics.items()})

    def _sums(self, batch: CompletionBatch) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """``m`` and ``δ`` of each completion."""
        divergence = batch.require("measures.divergence")
        return self._sum(batch, batch.log_ratio, "ratio"), self._sum(batch, divergence, "divergence")

    def _sum(self, batch: CompletionBatch, per_token: Float[Tensor, "N T"], mask: str) -> Float[Tensor, " N"]:
        """``Σ_t w_t x_t``; where the weight is 0, x is masked first, because 0 · inf would be NaN."""
        if self.weighting == "none":
            return batch.sequence_sum(per_token)
        name = f"learned_masks.{mask}" if self._is_learned else "token_weights"
        weights = batch.require(name).masked_fill(~batch.completion_mask, 0.0)
        return (weights * per_token.masked_fill(weights == 0, 0.0)).sum(dim=-1)
