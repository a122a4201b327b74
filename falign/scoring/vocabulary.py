"""Quantities over the whole vocabulary at each token, without ever holding [tokens, vocabulary].

With logits z, ``log p = z - logsumexp z``; for one token y and a divergence from q::

    log p(y)                            ∂/∂z_v = [v = y] - p_v
    D = Σ_v q_v f(p_v/q_v)              ∂/∂z_v = h_v - p_v Σ_w h_w,   h_v = ∂D/∂log p_v

Each is one number per token whose gradient is one vector per token. So where the head does not train, the forward
pass, which has the logits at hand, also takes them back to the hidden states, and the backward pass multiplies by the
incoming gradient and nothing else: the vocabulary is visited once. Where the head trains, its gradient needs the
incoming one, and the logits are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from falign.divergences import Divergence
from falign.divergences.estimators import full_vocabulary
from falign.scoring.head import Head

__all__ = ["DEFAULT_CHUNK_TOKENS", "Distribution", "TokenScores", "token_scores"]

# A float32 tile of 256 tokens over a vocabulary of 128k is 128 MiB; with a divergence four of them are alive.
DEFAULT_CHUNK_TOKENS = 256
# On a CPU what is done elementwise is done in blocks of so many logits, 1 MiB in float32, which its caches hold.
_CACHED_LOGITS = 2**18


class TokenScores(NamedTuple):
    """What scoring knows about each token, shape (M,) for a flat list and (N, T) for a batch.

    Attributes:
        logprobs: log π of the token, nats; carries the gradient.
        entropy: Entropy of the distribution that the token was predicted from, nats; detached.
        divergence: ``D_f(π‖π_ref)`` of that distribution, where asked for; carries the gradient.
        reference_logprobs: log π_ref of the token, where a divergence was asked for.
        values: Value of the prefix that the token was predicted from, where asked for; carries the gradient.
    """

    logprobs: Float[Tensor, "*shape"]
    entropy: Float[Tensor, "*shape"]
    divergence: Float[Tensor, "*shape"] | None = None
    reference_logprobs: Float[Tensor, "*shape"] | None = None
    values: Float[Tensor, "*shape"] | None = None


class Distribution(NamedTuple):
    """Next-token distributions as a model gives them: what its head is applied to, and the head.

    Attributes:
        hidden: Last hidden states, shape (M, H).
        head: From a hidden state to logits.
    """

    hidden: Float[Tensor, "M H"]
    head: Head


def token_scores(
    policy: Distribution,
    targets: Int[Tensor, " M"],
    *,
    divergence: Divergence | None = None,
    reference: Distribution | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> TokenScores:
    """Return log π of each target token, the entropy of the distribution it comes from, and its D_f to a reference.

    The head is applied to `chunk_tokens` positions at a time, so that no pass holds more than a few tensors of
    [chunk_tokens, vocabulary]. Sums over the vocabulary are in float32 (float64 for a float64 model).

    Args:
        policy: The distributions that predict the targets.
        targets: Token ids, shape (M,).
        divergence: f; any, a user's own included.
        reference: What f is taken to; given together with `divergence`.
        chunk_tokens: How many positions reach the head at once; changes memory and speed alone.

    Returns:
        Values of shape (M,), float32 (float64 for a float64 model). Gradients reach the policy's hidden states and,
        where it trains, its head.

    Raises:
        ValueError: If `chunk_tokens` is not positive, there is nothing to score, or one of divergence and reference
            is missing.

    Source:
        The formulas at the head of this module; D_f by :func:`falign.divergences.estimators.full_vocabulary`.

    Example:
        >>> head = Head(embeddings=torch.nn.Identity())
        >>> token_scores(Distribution(torch.zeros(1, 4), head), torch.tensor([3])).logprobs
        tensor([-1.3863])
    """
    if chunk_tokens < 1 or not len(targets):
        raise ValueError(f"chunk_tokens={chunk_tokens} and {len(targets)} tokens: both must be at least 1.")
    if (divergence is None) != (reference is None):
        raise ValueError("divergence and reference belong together: give both, or neither.")
    measure = _Measure(policy.head, divergence, None if reference is None else reference.head)
    reference_hidden = policy.hidden[:, :0] if reference is None else reference.hidden.detach()
    parts = []
    for hidden, ids, other in zip(
        policy.hidden.split(chunk_tokens),
        targets.split(chunk_tokens),
        reference_hidden.split(chunk_tokens),
        strict=True,
    ):
        if policy.head.trains:
            # The random state is kept (checkpoint's default): dropout in an adapter on the head repeats itself.
            parts.append(checkpoint(_with_trained_head, hidden, ids, other, measure, use_reentrant=False))
        else:
            parts.append(_FrozenHead.apply(hidden, ids, other, measure))
    logprobs, entropy, values, reference_logprobs = (torch.cat(column) for column in zip(*parts, strict=True))
    if divergence is None:
        return TokenScores(logprobs, entropy)
    return TokenScores(logprobs, entropy, values, reference_logprobs)


class _Values(NamedTuple):
    """Four numbers per token, the last two 0 without a divergence."""

    logprobs: Tensor
    entropy: Tensor
    divergence: Tensor
    reference_logprobs: Tensor


@dataclass(frozen=True)
class _Measure:
    """What is taken from logits, and its gradients by what the head's embeddings gave."""

    head: Head
    divergence: Divergence | None
    reference_head: Head | None

    def reference_raw(self, hidden: Tensor) -> Tensor | None:
        if self.reference_head is None:
            return None
        with torch.no_grad():
            return self.reference_head.embeddings(hidden)

    def values(self, raw: Tensor, targets: Tensor, reference_raw: Tensor | None) -> _Values:
        blocks = [block for _, block, _, _ in self._blocks(raw, targets, reference_raw, gradients=False)]
        return _Values(*(torch.cat(column) for column in zip(*blocks, strict=True)))

    def values_and_gradients(
        self, raw: Tensor, targets: Tensor, reference_raw: Tensor | None
    ) -> tuple[_Values, Tensor, Tensor | None]:
        """Return the values, and ``∂ log p(y)`` and ``∂ D`` by `raw`, each of the shape and type of `raw`."""
        by_logprob = torch.empty_like(raw)
        by_divergence = None if self.divergence is None else torch.empty_like(raw)
        blocks = []
        for rows, block, of_logprob, of_divergence in self._blocks(raw, targets, reference_raw, gradients=True):
            blocks.append(block)
            by_logprob[rows] = of_logprob
            if by_divergence is not None:
                by_divergence[rows] = of_divergence
        return _Values(*(torch.cat(column) for column in zip(*blocks, strict=True))), by_logprob, by_divergence

    @torch.no_grad()
    def _blocks(
        self, raw: Tensor, targets: Tensor, reference_raw: Tensor | None, *, gradients: bool
    ) -> Iterator[tuple[slice, _Values, Any, Any]]:
        size = len(raw) if raw.device.type != "cpu" else max(1, _CACHED_LOGITS // raw.shape[-1])
        for start in range(0, len(raw), size):
            rows = slice(start, start + size)
            target = targets[rows, None]
            logits = self.head.logits(raw[rows])
            slope = self.head.slope(logits) if gradients else 1.0
            logprobs, probabilities = _normalise(logits)
            of_target = logprobs.gather(-1, target)[:, 0]
            # A logit of -inf has p log p = 0, and 0 · inf would not be.
            entropy = -torch.linalg.vecdot(probabilities, logprobs.clamp_(min=torch.finfo(logprobs.dtype).min))
            value = of_reference = torch.zeros_like(of_target)
            of_divergence = None
            if self.divergence is not None and self.reference_head is not None and reference_raw is not None:
                reference, _ = _normalise(self.reference_head.logits(reference_raw[rows]))
                of_reference = reference.gather(-1, target)[:, 0]
                value, by_log_p = _divergence(self.divergence, logprobs, reference, gradients=gradients)
                if by_log_p is not None:
                    of_divergence = by_log_p.sub_(probabilities * by_log_p.sum(dim=-1, keepdim=True)).mul_(slope)
            of_logprob = None
            if gradients:
                of_logprob = probabilities.neg_()
                of_logprob.scatter_add_(-1, target, torch.ones_like(target, dtype=of_logprob.dtype))
                of_logprob.mul_(slope)
            yield rows, _Values(of_target, entropy, value, of_reference), of_logprob, of_divergence


def _normalise(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and probabilities; the logits are overwritten."""
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    probabilities = logits.exp()
    total = probabilities.sum(dim=-1, keepdim=True)
    return logits.sub_(total.log()), probabilities.div_(total)


def _divergence(
    divergence: Divergence, logprobs: Tensor, reference: Tensor, *, gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """Return ``D`` and ``∂D/∂log p`` of each row."""
    if not gradients:
        return full_vocabulary(divergence, logprobs, reference), None
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        value = full_vocabulary(divergence, leaf, reference)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


class _FrozenHead(torch.autograd.Function):
    """Values of one chunk, with their gradients by the hidden states computed on the spot."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, reference_hidden: Tensor, measure: _Measure) -> tuple:
        ctx.set_materialize_grads(False)
        reference_raw = measure.reference_raw(reference_hidden)
        if not ctx.needs_input_grad[0]:
            return tuple(measure.values(measure.head.embeddings(hidden), targets, reference_raw))
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            raw = measure.head.embeddings(leaf)
        values, by_logprob, by_divergence = measure.values_and_gradients(raw.detach(), targets, reference_raw)
        (slope,) = torch.autograd.grad(raw, leaf, by_logprob, retain_graph=by_divergence is not None)
        other = None if by_divergence is None else torch.autograd.grad(raw, leaf, by_divergence)[0]
        ctx.save_for_backward(slope, other)
        ctx.mark_non_differentiable(values.entropy, values.reference_logprobs)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        slope, other = ctx.saved_tensors
        parts = [(grads[0], slope), (grads[2], other)]
        terms = [grad[:, None] * by for grad, by in parts if grad is not None and by is not None]
        return (torch.stack(terms).sum(dim=0).to(slope.dtype) if terms else None), None, None, None


def _with_trained_head(hidden: Tensor, targets: Tensor, reference_hidden: Tensor, measure: _Measure) -> tuple:
    return _FromLogits.apply(measure.head.embeddings(hidden), targets, measure.reference_raw(reference_hidden), measure)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _FromLogits(torch.autograd.Function):
    """Values of one chunk of logits, to be recomputed with them."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, targets: Tensor, reference_raw: Tensor | None, measure: _Measure) -> tuple:
        ctx.set_materialize_grads(False)
        ctx.measure = measure
        ctx.save_for_backward(raw, targets, reference_raw)
        # A generator of the user's differentiates inside; that graph is its own, and not the checkpoint's to count.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            values = measure.values(raw, targets, reference_raw)
        ctx.mark_non_differentiable(values.entropy, values.reference_logprobs)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, by_logprob, by_divergence = ctx.measure.values_and_gradients(*ctx.saved_tensors)
        parts = [(grads[0], by_logprob), (grads[2], by_divergence)]
        terms = [by.mul_(grad[:, None]) for grad, by in parts if grad is not None and by is not None]
        return (sum(terms) if terms else None), None, None, None
