"""Estimators of ``D_f(π‖π_ref)`` and of its gradient, by the source of the samples.

=================  ================================  ==================================================
samples from       value, one sample                 gradient in θ
=================  ================================  ==================================================
policy             ``f(u)/u = f°(1/u)``              ``E_π[f'(u) ∇log π]``: a score function
reference          ``f(u)``                          ``E_ref[f'(u) u ∇log π]``: differentiate ``f(u)``
full vocabulary    ``Σ_v π_ref(v) f(π(v)/π_ref(v))`` differentiate
=================  ================================  ==================================================

Samples of a behavior policy π_old take the importance weight ``π/π_old`` (policy rows) or ``π_ref/π_old`` (reference
row). A value estimate of the policy rows must not be differentiated: on policy samples that gives the gradient of
another divergence (k3 as a loss is the forward KL). So the functions here are named by their use: ``value_*`` are
constants, ``loss_*`` have the value's *gradient*.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from falign.divergences.base import Divergence, numbers
from falign.divergences.powers import power

__all__ = [
    "full_vocabulary",
    "loss_from_policy",
    "loss_from_reference",
    "loss_from_vocabulary",
    "penalty_from_policy",
    "value_from_policy",
    "value_from_reference",
]

LARGEST_PENALTY = 1e30  # its product with a log-prob of 1e4 and 1e3 tokens stays within float32
# Nats between which π_ref f(u) and π f'(u) lose no accuracy, for any power of u in f.
MODERATE = (-20.0, 10.0)


def value_from_policy(divergence: Divergence, log_ratio: Shaped[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Return ``f(u)/u``; its mean over ``y ~ π`` is ``D_f(π‖π_ref)``. Never negative, no gradient.

    Args:
        divergence: f.
        log_ratio: ``log π - log π_ref`` of policy samples, any shape, nats.

    Returns:
        One estimate per sample. For the reverse KL it is "k3".

    Source:
        ``E_π[f(u)/u] = E_ref[f(u)]``; ``f(u)/u`` is the dual generator at ``1/u``.

    Example:
        >>> from falign.divergences import get
        >>> value_from_policy(get("reverse_kl"), torch.tensor([0.0, 1.0]))  # 1/u - 1 + log u
        tensor([0.0000, 0.3679])
    """
    return divergence.dual().f(-numbers(log_ratio, "log_ratio").detach())


def value_from_reference(divergence: Divergence, log_ratio: Shaped[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Return ``f(u)``; its mean over ``y ~ π_ref`` is ``D_f(π‖π_ref)``. Never negative, no gradient.

    Args:
        divergence: f.
        log_ratio: ``log π - log π_ref`` of reference samples, any shape, nats.

    Returns:
        One estimate per sample.

    Source:
        The definition of ``D_f``.

    Example:
        >>> from falign.divergences import get
        >>> value_from_reference(get("pearson_chi2"), torch.tensor([0.0, 1.0]))  # (u - 1)²
        tensor([0.0000, 2.9525])
    """
    return divergence.f(numbers(log_ratio, "log_ratio").detach())


def loss_from_reference(
    divergence: Divergence,
    log_ratio: Shaped[Tensor, "*S"],
    *,
    importance_weight: Shaped[Tensor, "*S"] | None = None,
) -> Float[Tensor, "*S"]:
    """Return ``f(u)`` on reference samples: its mean is the divergence *and* its gradient is the divergence's.

    Args:
        divergence: f.
        log_ratio: ``log π - log π_ref``, differentiable in π, any shape, nats.
        importance_weight: ``π_ref/π_old`` if the samples come from π_old; a constant.

    Returns:
        One loss per sample.

    Source:
        The distribution of the samples does not depend on θ, so ``∇E_ref[f(u)] = E_ref[∇f(u)]``.

    Example:
        >>> from falign.divergences import get
        >>> log_ratio = torch.tensor([1.0], requires_grad=True)
        >>> loss_from_reference(get("forward_kl"), log_ratio).backward()
        >>> log_ratio.grad  # f'(u) u = u - 1
        tensor([1.7183])
    """
    loss = divergence.f(numbers(log_ratio, "log_ratio"))
    return loss if importance_weight is None else loss * numbers(importance_weight, "importance_weight").detach()


def penalty_from_policy(
    divergence: Divergence,
    log_ratio: Shaped[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    level: Literal["sequence", "token"] = "sequence",
    credit: Literal["fixed_prefix", "returns"] = "fixed_prefix",
    importance_log_ratio: Shaped[Tensor, "N T"] | None = None,
    importance: Literal["sequence", "token"] = "sequence",
    baseline: Shaped[Tensor, " N"] | None = None,
) -> Float[Tensor, "N T"]:
    """Return the weight ``c_t`` of each token such that ``E[Σ_t c_t ∇log π(y_t|s_t)]`` is the divergence's gradient.

    Subtracting ``β c_t`` from the advantage of token t is therefore the exact penalty, for every f.

    Args:
        divergence: f.
        log_ratio: ``log π - log π_ref`` of each sampled token, shape (N, T), nats; a constant.
        mask: True on completion tokens, shape (N, T).
        level: ``"sequence"``: ``D_f`` of whole completions, ``c_t = f'(u)`` with u their ratio. ``"token"``:
            ``Σ_t D_f(π(·|s_t)‖π_ref(·|s_t))`` on the policy's own prefixes. They differ for every f but KL.
        credit: At token level, ``"fixed_prefix"`` holds the distribution of prefixes fixed: ``c_t = f'(u_t)``;
            ``"returns"`` adds the effect on later prefixes, ``Σ_{t'>t} f(u_t')/u_t'``: the gradient of the mean
            under π.
        importance_log_ratio: ``log π - log π_old`` of each token if the samples come from π_old, shape (N, T). Its
            weights ``π/π_old`` continue as their tangent line beyond 30 nats, as the divergences do.
        importance: ``"sequence"``: the weight of token t is the product over the prefix up to and including t, which
            is exact. ``"token"``: at token level, the token's own ratio; it ignores that π and π_old differ in the
            distribution of prefixes, and its variance does not grow with the length.
        baseline: Subtracted from ``f'``, shape (N,); it must not depend on the completion's own tokens. It changes
            only the variance.

    Returns:
        ``c_t``, shape (N, T), zero outside the mask, without gradient; products of huge weights are capped at 1e30.

    Raises:
        ValueError: ``credit="returns"`` at sequence level, where it has no meaning; an unknown level or credit; or
            ``importance="token"`` where whole prefixes are weighted: at sequence level and for returns.

    Source:
        ``∇E_π[g] = E_π[g ∇log π] + E_π[∇g]`` applied to ``f(u)/u``, which sums to ``f'(u) ∇log π``; at token level the
        chain rule over prefixes, and ``E[∇log π(y_t|s_t)] = 0``.

    Example:
        >>> from falign.divergences import get
        >>> log_ratio, mask = torch.tensor([[0.5, -1.0]]), torch.tensor([[True, True]])
        >>> penalty_from_policy(get("reverse_kl"), log_ratio, mask)
        tensor([[-0.5000, -0.5000]])
        >>> penalty_from_policy(get("reverse_kl"), log_ratio, mask, level="token")
        tensor([[ 0.5000, -1.0000]])
    """
    log_ratio = numbers(log_ratio, "log_ratio").detach().masked_fill(~mask, 0.0)
    free = torch.zeros_like(log_ratio[:, :1]) if baseline is None else numbers(baseline, "baseline").detach()[:, None]
    _check_importance(importance, level, credit)
    # π/π_old over the prefix up to and including t, or of the token alone.
    importance_weight = torch.ones_like(log_ratio)
    if importance_log_ratio is not None:
        ratios = numbers(importance_log_ratio, "importance_log_ratio").detach().masked_fill(~mask, 0.0)
        importance_weight = power(ratios if importance == "token" else ratios.cumsum(dim=-1))
    if level == "sequence":
        if credit != "fixed_prefix":
            raise ValueError(f"credit={credit!r} needs level='token'; a whole completion has no later prefixes.")
        slope = divergence.f_prime(log_ratio.sum(dim=-1, keepdim=True)) - free
        penalty = (slope * importance_weight[:, -1:]).expand_as(log_ratio)
        return penalty.clamp(-LARGEST_PENALTY, LARGEST_PENALTY).masked_fill(~mask, 0.0)
    if level != "token" or credit not in ("fixed_prefix", "returns"):
        raise ValueError(
            f"level={level!r}, credit={credit!r}: level is sequence or token, credit fixed_prefix or returns."
        )
    penalty = (divergence.f_prime(log_ratio) - free) * importance_weight
    if credit == "returns":
        value = (value_from_policy(divergence, log_ratio) * importance_weight).clamp(max=LARGEST_PENALTY)
        # Σ_{t'>t}: shift the values left by one token, then sum from the right.
        later = F.pad(value.masked_fill(~mask, 0.0), (0, 1))[:, 1:]
        penalty = penalty + later.flip(-1).cumsum(dim=-1).flip(-1)
    return penalty.clamp(-LARGEST_PENALTY, LARGEST_PENALTY).masked_fill(~mask, 0.0)


def loss_from_policy(
    divergence: Divergence,
    logprobs: Shaped[Tensor, "N T"],
    reference_logprobs: Shaped[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    level: Literal["sequence", "token"] = "sequence",
    credit: Literal["fixed_prefix", "returns"] = "fixed_prefix",
    old_logprobs: Shaped[Tensor, "N T"] | None = None,
    importance: Literal["sequence", "token"] = "sequence",
    baseline: Shaped[Tensor, " N"] | None = None,
    token_weights: Shaped[Tensor, "N T"] | None = None,
) -> Float[Tensor, " N"]:
    """Return ``Σ_t sg(c_t) log π(y_t|s_t)``: on policy samples its mean *gradient* is that of the divergence.

    Args:
        divergence: f.
        logprobs: ``log π`` of the sampled tokens, differentiable, shape (N, T), nats.
        reference_logprobs: ``log π_ref`` of the same tokens, shape (N, T).
        mask: True on completion tokens, shape (N, T).
        level: See :func:`penalty_from_policy`.
        credit: See :func:`penalty_from_policy`.
        old_logprobs: ``log π_old`` of the same tokens if the samples come from π_old, shape (N, T).
        importance: See :func:`penalty_from_policy`.
        baseline: See :func:`penalty_from_policy`.
        token_weights: Constant factor of each token's divergence, a function of its prefix, shape (N, T); only at
            token level with fixed prefixes.

    Returns:
        One surrogate per completion, shape (N,). Only its gradient is meaningful; for the value use
        :func:`value_from_policy`.

    Raises:
        ValueError: As for :func:`penalty_from_policy`, or token weights at another level or with returns.

    Source:
        See :func:`penalty_from_policy`.

    Example:
        >>> from falign.divergences import get
        >>> logprobs, reference = torch.tensor([[-1.0, -2.0]], requires_grad=True), torch.tensor([[-1.5, -1.0]])
        >>> loss_from_policy(get("reverse_kl"), logprobs, reference, torch.ones(1, 2, dtype=torch.bool)).backward()
        >>> logprobs.grad  # log u = -0.5 for each
        tensor([[-0.5000, -0.5000]])
    """
    logprobs, reference_logprobs = numbers(logprobs, "logprobs"), numbers(reference_logprobs, "reference_logprobs")
    penalty = penalty_from_policy(
        divergence,
        logprobs - reference_logprobs,
        mask,
        level=level,
        credit=credit,
        importance_log_ratio=None if old_logprobs is None else logprobs - numbers(old_logprobs, "old_logprobs"),
        importance=importance,
        baseline=baseline,
    )
    if token_weights is not None:
        if (level, credit) != ("token", "fixed_prefix"):
            raise ValueError(f"token_weights need level='token' with fixed prefixes, not level={level!r}, {credit!r}.")
        penalty = _weighted(penalty, token_weights, mask)
    return (penalty * logprobs.masked_fill(~mask, 0.0)).sum(dim=-1)


def loss_from_vocabulary(
    token_divergence: Shaped[Tensor, "N T"],
    logprobs: Shaped[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    *,
    credit: Literal["fixed_prefix", "returns"] = "fixed_prefix",
    old_logprobs: Shaped[Tensor, "N T"] | None = None,
    importance: Literal["sequence", "token"] = "sequence",
    token_weights: Shaped[Tensor, "N T"] | None = None,
) -> Float[Tensor, " N"]:
    """Return ``Σ_t w_t D_f(π(·|s_t)‖π_ref(·|s_t))`` of policy samples, ``w_t = π/π_old`` of the prefix ``s_t``.

    Its mean is the token-level divergence on the policy's own prefixes, in value and in gradient.

    Args:
        token_divergence: The divergence over the full vocabulary at each position, differentiable, shape (N, T).
        logprobs: ``log π`` of the sampled tokens, shape (N, T), nats; differentiated only with ``credit="returns"``.
        mask: True on completion tokens, shape (N, T).
        credit: ``"fixed_prefix"`` holds the distribution of prefixes fixed, so ``w_t`` is a constant; ``"returns"``
            differentiates it, too: the gradient of the mean under π.
        old_logprobs: ``log π_old`` of the sampled tokens if they come from π_old, shape (N, T).
        importance: ``"sequence"`` as above, which is exact; ``"token"``: all ``w_t = 1``, which ignores that π and
            π_old differ in the distribution of prefixes (the sampled token itself plays no part here).
        token_weights: Constant factor of each token's divergence, a function of its prefix, shape (N, T).

    Returns:
        One loss per completion, shape (N,).

    Raises:
        ValueError: The credit is unknown, or ``importance="token"`` with returns.

    Source:
        ``∇E_old[w D] = E_old[w ∇D] + E_old[w D ∇log w]``, with ``w_t`` the product over the tokens before t.

    Example:
        >>> divergence, mask = torch.tensor([[0.5, 0.25]]), torch.ones(1, 2, dtype=torch.bool)
        >>> logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> loss_from_vocabulary(divergence, logprobs, mask, credit="returns").backward()
        >>> logprobs.grad  # the first token leads to a prefix with divergence 0.25, the last one to none
        tensor([[0.2500, 0.0000]])
    """
    if credit not in ("fixed_prefix", "returns"):
        raise ValueError(f"credit={credit!r}: choose 'fixed_prefix' or 'returns'.")
    _check_importance(importance, "vocabulary", credit)
    logprobs, token_divergence = numbers(logprobs, "logprobs"), numbers(token_divergence, "token_divergence")
    token_divergence = token_divergence.masked_fill(~mask, 0.0)
    if token_weights is not None:
        token_divergence = _weighted(token_divergence, token_weights, mask)
    if importance == "token":
        return token_divergence.sum(dim=-1)
    old = logprobs if old_logprobs is None else numbers(old_logprobs, "old_logprobs")
    importance_log_ratio = (logprobs - old.detach()).masked_fill(~mask, 0.0)
    # log w_t sums the tokens before t: shift the ratios right by one token, then sum from the left.
    before = F.pad(importance_log_ratio, (1, 0))[:, :-1].cumsum(dim=-1)
    weight = power(before if credit == "returns" else before.detach())
    return (weight * token_divergence).sum(dim=-1)


def _check_importance(importance: str, level: str, credit: str) -> None:
    if importance not in ("sequence", "token"):
        raise ValueError(f"importance={importance!r}: choose 'sequence' or 'token'.")
    if importance == "token" and (level == "sequence" or credit == "returns"):
        raise ValueError(
            f"importance='token' with level={level!r}, credit={credit!r}: whole prefixes are weighted there; leave "
            "importance out, or set level='token' or 'vocabulary' with credit='fixed_prefix'."
        )


def _weighted(per_token: Tensor, token_weights: Tensor, mask: Tensor) -> Tensor:
    weights = numbers(token_weights, "token_weights").detach().masked_fill(~mask, 0.0)
    # Where the weight is 0 the value is masked first, because 0 · inf would be NaN.
    return weights * per_token.masked_fill(weights == 0, 0.0)


def full_vocabulary(
    divergence: Divergence,
    logprobs: Shaped[Tensor, "*S V"],
    reference_logprobs: Shaped[Tensor, "*S V"],
) -> Float[Tensor, "*S"]:
    """Return ``Σ_v π_ref(v) f(π(v)/π_ref(v))`` exactly, differentiable in π.

    Args:
        divergence: f.
        logprobs: ``log π`` over the vocabulary, normalized, shape (..., V), nats.
        reference_logprobs: ``log π_ref`` over the vocabulary, normalized, shape (..., V).

    Returns:
        The divergence at each position, shape (...).

    Source:
        The definition. Where ``u > 1`` a summand is written ``π f(u)/u``, to avoid multiplying a tiny probability by a
        huge power of u.

    Example:
        >>> from falign.divergences import get
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> full_vocabulary(get("total_variation"), p.log(), q.log())
        tensor(0.2500)
    """
    logprobs = numbers(logprobs, "logprobs")
    reference_logprobs = numbers(reference_logprobs, "reference_logprobs").detach()
    # A token that neither model can produce contributes 0. If only one can, the ratio is clamped to the range of the
    # numerics. NaN stays NaN.
    neither = (logprobs == -torch.inf) & (reference_logprobs == -torch.inf)
    log_ratio = (logprobs - reference_logprobs).masked_fill(neither, 0.0).clamp(-1e4, 1e4)
    if log_ratio.device.type == "cpu" and log_ratio.amin() >= MODERATE[0] and log_ratio.amax() <= MODERATE[1]:
        # Both forms of a summand are equal here. On a CPU looking at the values is free, and saves most of the work.
        return _ModerateSum.apply(logprobs, reference_logprobs, log_ratio.detach(), divergence)
    below = reference_logprobs.exp() * divergence.f(torch.clamp(log_ratio, max=0.0))
    above = logprobs.exp() * divergence.dual().f(torch.clamp(-log_ratio, max=0.0))
    return torch.where(log_ratio <= 0, below, above).sum(dim=-1)


class _ModerateSum(torch.autograd.Function):
    """``Σ_v π_ref f(u)`` with its gradient in closed form, ``π f'(u)`` by ``log π``, in place of that of each step."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logprobs: Tensor, reference_logprobs: Tensor, log_ratio: Tensor, divergence: Divergence) -> Tensor:
        return torch.linalg.vecdot(reference_logprobs.exp(), divergence.f(log_ratio))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        logprobs, reference_logprobs, _, ctx.divergence = inputs
        ctx.save_for_backward(logprobs, reference_logprobs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logprobs, reference_logprobs = ctx.saved_tensors
        impossible = logprobs == -torch.inf  # here then under both: its ratio was set to 1
        log_ratio = (logprobs - reference_logprobs).masked_fill(impossible, 0.0)
        return grads[0][..., None] * logprobs.exp() * ctx.divergence.f_prime(log_ratio), None, None, None
