"""Quantities over the whole vocabulary at each token, without holding a [tokens, vocabulary] tensor.

With logits z, ``log p = z - log Z`` and ``log Z = logsumexp z``; for a token y, and for a measure D, a function of
log p and possibly log Z::

    log p(y)            ∂/∂z_v = [v = y] - p_v
    D(log p, log Z)     ∂/∂z_v = h_v - p_v (Σ_w h_w - s),   h_v = ∂D/∂log p_v,  s = ∂D/∂log Z

Each is one number per token, and its gradient is one vector per token. So if the head is frozen, the forward pass,
which has the logits, also computes the gradients by the hidden states, and the backward pass only multiplies them by
the incoming gradient: the vocabulary is visited once, for all measures together. If the head trains, its gradient
depends on the incoming one, so the logits are recomputed in the backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from falign.errors import ConfigError
from falign.objectives.measures import Measure, Vocabulary, references_of
from falign.scoring.distributions import Distribution, Predictions, VisitedReferences, normalize
from falign.scoring.model_parts import Head

__all__ = ["DEFAULT_CHUNK_TOKENS", "TokenScores", "token_scores"]

# A float32 tile of 256 tokens over a vocabulary of 128k is 128 MiB; with a divergence four of them are in memory.
DEFAULT_CHUNK_TOKENS = 256
# On a CPU, elementwise operations run on blocks of this many logits: 1 MiB in float32, which fits its caches.
_CACHED_LOGITS = 2**18


class TokenScores(NamedTuple):
    """Scores of each token, shape (M,) for a flat list and (N, T) for a batch.

    Attributes:
        logprobs: log π of the token, nats; carries the gradient.
        entropy: Entropy of the distribution that the token was predicted from, nats; detached.
        measures: The requested measures, by name; they carry the gradient.
        references: Log-probabilities of the token under each given reference, by name.
        values: Value of the prefix that the token was predicted from, if requested; carries the gradient.
    """

    logprobs: Float[Tensor, "*shape"]
    entropy: Float[Tensor, "*shape"]
    measures: dict[str, Float[Tensor, "*shape"]]
    references: dict[str, Float[Tensor, "*shape"]]
    values: Float[Tensor, "*shape"] | None = None


def token_scores(
    policy: Distribution,
    targets: Int[Tensor, " M"],
    *,
    measures: Mapping[str, Measure] | None = None,
    references: Mapping[str, Predictions] | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> TokenScores:
    """Return log π of each target token, the entropy of the distribution it comes from, and measures of it.

    The head is applied to `chunk_tokens` positions at a time, so that no pass holds more than a few tensors of
    [chunk_tokens, vocabulary]. Sums over the vocabulary are in float32 (float64 for a float64 model).

    Args:
        policy: The distributions that predict the targets.
        targets: Token ids, shape (M,).
        measures: Measures by name, custom ones included.
        references: Distributions by name: those that the measures read, and others for their log-probabilities only.
        chunk_tokens: Number of positions that reach the head at once; affects only memory and speed.

    Returns:
        Values of shape (M,), float32 (float64 for a float64 model). Gradients reach the policy's hidden states and,
        where it trains, its head.

    Raises:
        ValueError: If `chunk_tokens` is not positive, there is nothing to score, or a reference that a measure reads is
            missing.
        ConfigError: A measure does not return one real number per position.

    Source:
        The formulas at the top of this module.

    Example:
        >>> head = Head(embeddings=torch.nn.Identity())
        >>> token_scores(Distribution(torch.zeros(1, 4), head), torch.tensor([3])).logprobs
        tensor([-1.3863])
    """
    measures, references = dict(measures or {}), dict(references or {})
    if chunk_tokens < 1 or not len(targets):
        raise ValueError(f"chunk_tokens={chunk_tokens} and {len(targets)} tokens: both must be at least 1.")
    for name in references_of(measures.values()):
        if name not in references:
            raise ValueError(f"A measure reads the reference {name!r}, which is missing from references: add it.")
    visit = _Visit(policy.head, measures, VisitedReferences(references))
    own = zip(policy.hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    others = visit.references.chunks(chunk_tokens) if references else itertools.repeat([])
    parts = []
    for (hidden, ids), of_references in zip(own, others, strict=bool(references)):
        if policy.head.trains:
            # checkpoint restores the random state (its default), so dropout in an adapter on the head is repeated.
            parts.append(checkpoint(_with_trained_head, hidden, ids, visit, *of_references, use_reentrant=False))
        else:
            parts.append(_FrozenHead.apply(hidden, ids, visit, *of_references))
    logprobs, entropy, *more = (torch.cat(column) for column in zip(*parts, strict=True))
    return TokenScores(
        logprobs,
        entropy,
        dict(zip(measures, more[: len(measures)], strict=True)),
        dict(zip(references, more[len(measures) :], strict=True)),
    )


class _Block(NamedTuple):
    """Values at a block of positions, and their gradients by the output of the head's embeddings.

    Attributes:
        rows: The positions.
        values: Log-probability, entropy, each measure, and the log-probability under each reference.
        gradients: Of the log-probability and of each measure; empty unless requested.
    """

    rows: slice
    values: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Visit:
    """One visit to the vocabulary: everything that is computed from the logits of a chunk."""

    head: Head
    measures: Mapping[str, Measure]
    references: VisitedReferences
    live: set[str] = field(default_factory=set)
    """Measures that had a gradient in a block since this was last cleared."""

    def of_constants(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return those outputs that carry no gradient: entropy, constant measures, log-probs of references."""
        constant = [values[2 + k] for k, name in enumerate(self.measures) if name not in self.live]
        return [values[1], *constant, *values[2 + len(self.measures) :]]

    def values(self, raw: Tensor, targets: Tensor, prepared: Sequence[Tensor]) -> tuple[Tensor, ...]:
        blocks = [block.values for block in self.blocks(raw, targets, prepared, gradients=False)]
        return tuple(torch.cat(column) for column in zip(*blocks, strict=True))

    def values_and_gradients(
        self, raw: Tensor, targets: Tensor, prepared: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Return the values, and the gradients by `raw`, each of the shape and type of `raw`."""
        gradients = [torch.empty_like(raw) for _ in range(1 + len(self.measures))]
        blocks = []
        for rows, values, of_block in self.blocks(raw, targets, prepared, gradients=True):
            blocks.append(values)
            for whole, part in zip(gradients, of_block, strict=True):
                whole[rows] = part
        return tuple(torch.cat(column) for column in zip(*blocks, strict=True)), gradients

    @torch.no_grad()
    def blocks(self, raw: Tensor, targets: Tensor, prepared: Sequence[Tensor], *, gradients: bool) -> Iterator[_Block]:
        size = len(raw) if raw.device.type != "cpu" else max(1, _CACHED_LOGITS // raw.shape[-1])
        for start in range(0, len(raw), size):
            rows = slice(start, start + size)
            target = targets[rows, None]
            logits = self.head.logits(raw[rows])
            slope = self.head.slope(logits) if gradients else 1.0
            logprobs, probabilities, log_normalizer = normalize(logits)
            of_target = logprobs.gather(-1, target)[:, 0]
            # Clamped: a logit of -inf must contribute p log p = 0, but 0 · -inf is NaN.
            entropy = -torch.linalg.vecdot(probabilities, logprobs.clamp_(min=torch.finfo(logprobs.dtype).min))
            readings = self.references.read(prepared, rows, target[:, 0])
            references = {name: each.logprobs for name, each in readings.items() if each.logprobs is not None}
            tops = {name: each.top for name, each in readings.items() if each.top is not None}
            of_references = [each.of_targets for each in readings.values()]
            matrix = self.head.matrix
            if matrix is not None:
                matrix = matrix[: logprobs.shape[-1]]  # a padded head has rows for ids that are left out
            at = Vocabulary(logprobs, target[:, 0], references, log_normalizer, matrix, tops)
            # `slope` takes each gradient from the capped and scaled logits back to the output of the embeddings.
            measured, slopes = [], []
            for name, measure in self.measures.items():
                value, by_logits = _measured(name, measure, at, probabilities, gradients=gradients)
                measured.append(value)
                if gradients and by_logits is None:
                    by_logits = torch.zeros_like(logprobs)
                elif gradients:
                    self.live.add(name)
                if by_logits is not None:
                    slopes.append(by_logits.mul_(slope))
            if gradients:
                # ∂ log p(y)/∂z = [v = y] - p_v, in place: nothing reads the probabilities after this.
                of_logprob = probabilities.neg_()
                of_logprob.scatter_add_(-1, target, torch.ones_like(target, dtype=of_logprob.dtype))
                slopes.insert(0, of_logprob.mul_(slope))
            yield _Block(rows, (of_target, entropy, *measured, *of_references), tuple(slopes))


def _measured(
    name: str, measure: Measure, at: Vocabulary, probabilities: Tensor, *, gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the value of a measure at each position, and its gradient by the logits; None for a constant."""
    if not gradients:
        return _of_positions(name, measure(at), at), None
    assert at.log_normalizer is not None
    with torch.enable_grad():
        leaves = at.logprobs.detach().requires_grad_(), at.log_normalizer.detach().requires_grad_()
        value = _of_positions(name, measure(replace(at, logprobs=leaves[0], log_normalizer=leaves[1])), at)
        if not value.requires_grad:
            return value, None
        by_logprobs, by_normalizer = torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)
    # The chain rule of the module's docstring: h_v - p_v (Σ_w h_w - s).
    excess = by_logprobs.sum(dim=-1, keepdim=True).sub_(by_normalizer)
    # Autograd may return a constant gradient as an expanded tensor, which cannot be written to in place.
    return value.detach(), by_logprobs.contiguous().sub_(probabilities * excess)


def _of_positions(name: str, value: Any, at: Vocabulary) -> Tensor:
    if not isinstance(value, Tensor) or value.is_complex():
        found = f"dtype {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ConfigError(f"measure {name!r} returned {found}; it must return a tensor of real numbers.")
    if value.shape != at.targets.shape:
        raise ConfigError(
            f"measure {name!r} returned shape {tuple(value.shape)} for {len(at.targets)} positions; it must return one "
            f"value for each: {tuple(at.targets.shape)}."
        )
    return value


class _FrozenHead(torch.autograd.Function):
    """Values of one chunk under a frozen head; the forward pass also computes gradients by the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, visit: _Visit, *of_references: Tensor) -> tuple:
        ctx.set_materialize_grads(False)  # outputs without a gradient give None in backward, not zeros
        prepared = visit.references.prepare(of_references)
        if not ctx.needs_input_grad[0]:
            return visit.values(visit.head.embeddings(hidden), targets, prepared)
        # A small graph of the embeddings alone: it takes gradients by the logits back to the hidden states, also
        # through adapters and quantized layers.
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            raw = visit.head.embeddings(leaf)
        visit.live.clear()
        values, gradients = visit.values_and_gradients(raw.detach(), targets, prepared)
        last = len(gradients) - 1  # the graph of the embeddings is kept until the last of its uses
        slopes = [
            torch.autograd.grad(raw, leaf, gradient, retain_graph=k < last)[0] for k, gradient in enumerate(gradients)
        ]
        ctx.num_inputs = len(of_references)
        ctx.save_for_backward(*slopes)
        ctx.mark_non_differentiable(*visit.of_constants(values))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        slopes = ctx.saved_tensors
        terms = [grad[:, None] * slope for grad, slope in _incoming(grads, slopes) if grad is not None]
        total = torch.stack(terms).sum(dim=0).to(slopes[0].dtype) if terms else None
        return (total, None, None, *[None] * ctx.num_inputs)


def _incoming(grads: Sequence[Tensor | None], slopes: Sequence[Tensor]) -> list[tuple[Tensor | None, Tensor]]:
    """Pair the incoming gradients of log-probability and measures with their slopes; skip output 1, the entropy."""
    return list(zip((grads[0], *grads[2 : 1 + len(slopes)]), slopes, strict=True))


def _with_trained_head(hidden: Tensor, targets: Tensor, visit: _Visit, *of_references: Tensor) -> tuple:
    return _FromLogits.apply(visit.head.embeddings(hidden), targets, visit, *visit.references.prepare(of_references))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _FromLogits(torch.autograd.Function):
    """Values of one chunk of logits under a trained head; the backward pass recomputes what it needs."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, targets: Tensor, visit: _Visit, *prepared: Tensor) -> tuple:
        ctx.set_materialize_grads(False)
        ctx.visit = visit
        ctx.save_for_backward(raw, targets, *prepared)
        # A custom measure may use autograd inside. Identity hooks hide its tensors from the checkpoint, which would
        # count them and find the recomputed number different.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            values = visit.values(raw, targets, prepared)
        # Which measures are constants is known only in the backward pass, where their gradients are zeros.
        ctx.mark_non_differentiable(values[1], *values[2 + len(visit.measures) :])
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        raw, targets, *prepared = ctx.saved_tensors
        _, slopes = ctx.visit.values_and_gradients(raw, targets, prepared)
        terms = [slope.mul_(grad[:, None]) for grad, slope in _incoming(grads, slopes) if grad is not None]
        return ((sum(terms) if terms else None), None, None, *[None] * len(prepared))
