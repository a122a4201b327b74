"""Quantities over the whole vocabulary at each token, without holding a [tokens, vocabulary] tensor.

With logits z, ``log p = z - log Z`` and ``log Z = logsumexp z``; for a token y, and for a measure D, a function of
log p and possibly log Z::

    log p(y)            ∂/∂z_v = [v = y] - p_v
    D(log p, log Z)     ∂/∂z_v = h_v - p_v (Σ_w h_w - s),   h_v = ∂D/∂log p_v,  s = ∂D/∂log Z

Each is one number per token, and its gradient is one vector per token. So if the head is frozen, the forward pass,
which has the logits, also computes the gradients by the hidden states, and the backward pass only multiplies them by
the incoming gradient: the vocabulary is visited once, for all measures together. If the head trains, its gradient
depends on the incoming one, so the logits are recomputed in the backward pass. So they are if a measure mixes
positions, because its gradient at one position depends on the incoming gradients of others.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from falign.errors import ConfigError, FalignError
from falign.objectives.measures import Measure, block_of, references_of
from falign.objectives.vocabulary import TopTokens, Vocabulary, cosines_with
from falign.raised import calling
from falign.scoring.distributions import (
    Distribution,
    Predictions,
    Reading,
    StoredTokens,
    VisitedReferences,
    normalize,
)
from falign.scoring.model_parts import Head

__all__ = ["DEFAULT_CHUNK_TOKENS", "TokenScores", "target_logprobs", "token_scores", "top_tokens"]

P = ParamSpec("P")
R = TypeVar("R")

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
        most_likely: 1 where the token is the most likely one (the first of equals), else 0.
        mean_logits: Mean of the logits over the vocabulary.
        values: Value of the prefix that the token was predicted from, if requested; carries the gradient.
        second_values: The same of the second value head, if there are two.
        learned_rewards: A reward head's value of each completion, shape (N,), if requested; carries the gradient.
    """

    logprobs: Float[Tensor, "*shape"]
    entropy: Float[Tensor, "*shape"]
    measures: dict[str, Float[Tensor, "*shape"]]
    references: dict[str, Float[Tensor, "*shape"]]
    most_likely: Float[Tensor, "*shape"]
    mean_logits: Float[Tensor, "*shape"]
    values: Float[Tensor, "*shape"] | None = None
    second_values: Float[Tensor, "*shape"] | None = None
    learned_rewards: Float[Tensor, " N"] | None = None


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
        ConfigError: A measure does not return one real number per position, returns NaN, or mixes positions without
            saying so.

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
    first_names = _first_names(measures)
    visit = _Visit(policy.head, {name: measures[name] for name in first_names.values()}, VisitedReferences(references))
    chunk_tokens = visit.whole_blocks(chunk_tokens)
    own = zip(policy.hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    others = visit.references.chunks(chunk_tokens) if references else itertools.repeat([])
    parts = []
    for (hidden, ids), of_references in zip(own, others, strict=bool(references)):
        if policy.head.trains or visit.mixes:
            # checkpoint restores the random state (its default), so dropout in an adapter on the head is repeated.
            parts.append(checkpoint(_recomputed, hidden, ids, visit, *of_references, use_reentrant=False))
        else:
            parts.append(_FrozenHead.apply(hidden, ids, visit, *of_references))
    logprobs, entropy, *more, most_likely, mean_logits = (torch.cat(column) for column in zip(*parts, strict=True))
    measured = dict(zip(visit.measures, more[: len(visit.measures)], strict=True))
    of_references = dict(zip(references, more[len(visit.measures) :], strict=True))
    _refuse_nan(measured, [logprobs, *of_references.values()])
    of_measures = {name: measured[first_names[name]] for name in measures}
    return TokenScores(logprobs, entropy, of_measures, of_references, most_likely, mean_logits)


def _first_names(measures: Mapping[str, Measure]) -> dict[str, str]:
    """Return for each name the first name of an equal measure, so that equal measures are computed once."""
    first: dict[Any, str] = {}
    return {name: first.setdefault(_key(measure), name) for name, measure in measures.items()}


def _key(measure: Measure) -> Any:
    try:
        hash(measure)
    except TypeError:  # a measure that cannot be hashed, such as a dataclass with a list, equals only itself
        return id(measure)
    return type(measure), measure


def _refuse_nan(measured: Mapping[str, Tensor], given: Sequence[Tensor]) -> None:
    """Refuse a measure that is NaN where the policy's and the references' log-probabilities are not."""
    if not measured:
        return
    sound = ~torch.stack([each.detach().isnan() for each in given]).any(dim=0)
    counts = torch.stack([(each.detach().isnan() & sound).sum() for each in measured.values()])
    for name, count in zip(measured, counts.tolist(), strict=True):
        if count:
            raise ConfigError(
                f"measure {name!r} returned NaN at {count} of {len(sound)} positions where all distributions are "
                "numbers: avoid 0 · -inf and -inf + inf, for example with masked_fill in place of a product, or with "
                "log-probabilities clamped from below."
            )


class _Wanted(Enum):
    """Outputs of measures that a visit to a block computes."""

    VALUES = "values"
    LIVE = "values, and whether they carry a gradient"
    GRADIENTS = "values, and their gradients by the logits"


@torch.no_grad()
def target_logprobs(
    references: Mapping[str, Predictions], targets: Int[Tensor, " M"], *, chunk_tokens: int
) -> dict[str, Float[Tensor, " M"]]:
    """Return the log-probability of each target token under each reference, in one visit and without a policy.

    Args:
        references: Distributions that predict the targets, by name.
        targets: Token ids, shape (M,).
        chunk_tokens: Number of positions that are prepared at once.

    Returns:
        Shape (M,) for each reference, nats.

    Example:
        >>> uniform = Distribution(torch.zeros(1, 4), Head(embeddings=torch.nn.Identity()))
        >>> target_logprobs({"reference": uniform}, torch.tensor([3]), chunk_tokens=256)
        {'reference': tensor([-1.3863])}
    """
    found = [
        [readings[name].of_targets for name in references] for readings in _readings(references, targets, chunk_tokens)
    ]
    return dict(zip(references, (torch.cat(column) for column in zip(*found, strict=True)), strict=True))


@torch.no_grad()
def top_tokens(reference: Predictions, targets: Int[Tensor, " M"], k: int, *, chunk_tokens: int) -> StoredTokens:
    """Return the k most likely tokens of a reference, and the log-probability of each target token.

    Args:
        reference: Whole distributions that predict the targets.
        targets: Token ids, shape (M,).
        k: Number of tokens to keep, at least 1.
        chunk_tokens: Number of positions that are prepared at once.

    Returns:
        The reference's values, without the reference.

    Raises:
        ConfigError: The reference's distributions are not whole.
        ValueError: k is not between 1 and the size of the vocabulary.

    Example:
        >>> p = Distribution(torch.tensor([[0.2, 0.5, 0.3]]).log(), Head(embeddings=torch.nn.Identity()))
        >>> top_tokens(p, torch.tensor([0]), 2, chunk_tokens=256).top.ids
        tensor([[1, 2]])
    """
    parts = []
    for readings in _readings({"": reference}, targets, chunk_tokens):
        of_targets, logprobs, _ = readings[""]
        if logprobs is None:
            raise ConfigError("The reference has stored its most likely tokens, so whole distributions are unknown.")
        parts.append((of_targets, *TopTokens.of(logprobs, k)))
    of_targets, logprobs, ids = (torch.cat(column) for column in zip(*parts, strict=True))
    return StoredTokens(of_targets, TopTokens(logprobs, ids))


def _readings(
    references: Mapping[str, Predictions], targets: Tensor, chunk_tokens: int
) -> Iterator[dict[str, Reading]]:
    """Read references without a policy, one block of positions after another."""
    visited = VisitedReferences(references)
    for inputs, ids in zip(visited.chunks(chunk_tokens), targets.split(chunk_tokens), strict=True):
        prepared = visited.prepare(inputs)
        size = len(ids) if ids.device.type != "cpu" else min(_rows_in_cache(each) for each in prepared)
        for start in range(0, len(ids), size):
            rows = slice(start, start + size)
            yield visited.read(prepared, rows, ids[rows])


def _rows_in_cache(tensor: Tensor) -> int:
    return max(1, _CACHED_LOGITS * len(tensor) // tensor.numel())


class _Block(NamedTuple):
    """Values at a block of positions, and their gradients by the output of the head's embeddings.

    Attributes:
        rows: The positions.
        values: Log-probability, entropy, each measure, the log-probability under each reference, whether the token is
            the most likely one, and the mean logit.
        gradients: Of the log-probability and of each measure; empty unless requested.
    """

    rows: slice
    values: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def _without_autocast(method: Callable[P, R]) -> Callable[P, R]:
    """Compute in the types given: mixed precision is for the model, and would round sums over the vocabulary."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        raw: Any = args[1]
        with torch.autocast(raw.device.type, enabled=False):
            return method(*args, **kwargs)

    return run


@dataclass(frozen=True)
class _Visit:
    """One visit to the vocabulary: everything that is computed from the logits of a chunk."""

    head: Head
    measures: Mapping[str, Measure]
    references: VisitedReferences
    live: set[str] = field(default_factory=set)
    """Measures that had a gradient in a block since this was last cleared."""
    checked: set[str] = field(default_factory=set)
    """Measures that were found not to mix positions."""

    @property
    def mixes(self) -> bool:
        """True if a measure reads several positions together."""
        return any(block_of(measure) > 1 for measure in self.measures.values())

    def whole_blocks(self, size: int) -> int:
        """Return a number of positions near `size` that splits no block of a measure that mixes positions."""
        step = math.lcm(*(block_of(measure) for measure in self.measures.values()))
        return step * max(1, size // step)

    def of_constants(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return those outputs that carry no gradient: all but the log-probability and the measures that have one."""
        constant = [values[2 + k] for k, name in enumerate(self.measures) if name not in self.live]
        return [values[1], *constant, *values[2 + len(self.measures) :]]

    @_without_autocast
    def values(
        self, raw: Tensor, targets: Tensor, prepared: Sequence[Tensor], *, find_live: bool = False
    ) -> tuple[Tensor, ...]:
        wanted = _Wanted.LIVE if find_live else _Wanted.VALUES
        blocks = [block.values for block in self.blocks(raw, targets, prepared, wanted)]
        return tuple(torch.cat(column) for column in zip(*blocks, strict=True))

    @_without_autocast
    def values_and_gradients(
        self, raw: Tensor, targets: Tensor, prepared: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Return the values, and the gradients by `raw`, each of the shape and type of `raw`."""
        gradients = [torch.empty_like(raw) for _ in range(1 + len(self.measures))]
        blocks = []
        for rows, values, of_block in self.blocks(raw, targets, prepared, _Wanted.GRADIENTS):
            blocks.append(values)
            for whole, part in zip(gradients, of_block, strict=True):
                whole[rows] = part
        return tuple(torch.cat(column) for column in zip(*blocks, strict=True)), gradients

    @_without_autocast
    def gradient(
        self, raw: Tensor, targets: Tensor, prepared: Sequence[Tensor], incoming: Sequence[Tensor | None]
    ) -> Tensor | None:
        """Return the gradient by `raw`, given those by the log-probability and each measure; None for no gradient."""
        if all(each is None for each in incoming):
            return None
        whole = torch.empty_like(raw)
        for rows, _, parts in self.blocks(raw, targets, prepared, _Wanted.GRADIENTS, incoming):
            whole[rows] = functools.reduce(Tensor.add_, parts)
        return whole

    @torch.no_grad()
    def blocks(
        self,
        raw: Tensor,
        targets: Tensor,
        prepared: Sequence[Tensor],
        wanted: _Wanted,
        incoming: Sequence[Tensor | None] | None = None,
    ) -> Iterator[_Block]:
        """Visit one block of positions after another.

        Args:
            raw: Output of the head's embeddings at the chunk's positions.
            targets: The token at each of them.
            prepared: What the references have prepared for the chunk.
            wanted: What to compute of the measures.
            incoming: Gradients by the log-probability and by each measure, by which theirs are multiplied; those that
                are None are left out. By default each gradient is that of the sum over positions.
        """
        gradients = wanted is _Wanted.GRADIENTS
        matrix, cosines = self.head.matrix, None
        if matrix is not None:
            matrix = matrix[: raw.shape[-1]]  # a padded head has rows for ids that are left out
            # Once for the chunk, at the first measure that asks: a block on a CPU is a few positions, for each of which
            # all embeddings would be read.
            dtype = torch.promote_types(raw.dtype, torch.float32)
            cosines = functools.cache(functools.partial(cosines_with, matrix, targets, dtype))
        size = len(raw) if raw.device.type != "cpu" else self.whole_blocks(_CACHED_LOGITS // raw.shape[-1])
        for start in range(0, len(raw), size):
            rows = slice(start, start + size)
            target = targets[rows, None]
            logits = self.head.logits(raw[rows])
            slope = self.head.slope(logits) if gradients else 1.0
            logprobs, probabilities, log_normalizer = normalize(logits)
            of_target = logprobs.gather(-1, target)[:, 0]
            most_likely = (logprobs.argmax(dim=-1) == target[:, 0]).to(logprobs.dtype)
            mean_logits = logprobs.mean(dim=-1) + log_normalizer[:, 0]
            # Clamped: a logit of -inf must contribute p log p = 0, but 0 · -inf is NaN.
            entropy = -torch.linalg.vecdot(probabilities, logprobs.clamp_(min=torch.finfo(logprobs.dtype).min))
            readings = self.references.read(prepared, rows, target[:, 0])
            references = {name: each.logprobs for name, each in readings.items() if each.logprobs is not None}
            tops = {name: each.top for name, each in readings.items() if each.top is not None}
            of_references = [each.of_targets for each in readings.values()]
            shared = None if cosines is None else functools.partial(_rows_of, cosines, rows)
            at = Vocabulary(logprobs, target[:, 0], references, log_normalizer, matrix, tops, shared)
            # `slope` takes each gradient from the capped and scaled logits back to the output of the embeddings.
            measured, slopes = [], []
            weights = [None if each is None else each[rows] for each in incoming or [None] * (1 + len(self.measures))]
            for (name, measure), weight in zip(self.measures.items(), weights[1:], strict=True):
                if incoming is not None and weight is None:
                    continue
                value, live, by_logits = _measured(name, measure, at, probabilities, wanted, weight)
                measured.append(value)
                if live:
                    self.live.add(name)
                if gradients:
                    by_logits = torch.zeros_like(logprobs) if by_logits is None else by_logits
                    slopes.append(by_logits.mul_(slope))
                if name not in self.checked and len(value) > 1:
                    _refuse_mixing(name, measure, at, value)
                    self.checked.add(name)
            if gradients and (incoming is None or weights[0] is not None):
                # ∂ log p(y)/∂z = [v = y] - p_v, in place: nothing reads the probabilities after this.
                of_logprob = probabilities.neg_()
                of_logprob.scatter_add_(-1, target, torch.ones_like(target, dtype=of_logprob.dtype))
                of_logprob.mul_(slope)
                slopes.insert(0, of_logprob if weights[0] is None else of_logprob.mul_(weights[0][:, None]))
            values = (of_target, entropy, *measured, *of_references, most_likely, mean_logits)
            yield _Block(rows, values, tuple(slopes))


def _rows_of(chunk: Callable[[], Tensor], rows: slice) -> Tensor:
    return chunk()[rows]


def _measured(
    name: str, measure: Measure, at: Vocabulary, probabilities: Tensor, wanted: _Wanted, weight: Tensor | None
) -> tuple[Tensor, bool, Tensor | None]:
    """Return the value of a measure at each position, whether it carries a gradient, and its gradient by the logits."""
    if wanted is _Wanted.VALUES:
        return _evaluated(name, measure, at), False, None
    assert at.log_normalizer is not None
    with torch.enable_grad():
        leaves = at.logprobs.detach().requires_grad_(), at.log_normalizer.detach().requires_grad_()
        value = _evaluated(name, measure, replace(at, logprobs=leaves[0], log_normalizer=leaves[1]))
        if wanted is _Wanted.LIVE or not value.requires_grad:
            return value.detach(), value.requires_grad, None
        total = value.sum() if weight is None else torch.dot(value, weight)
        by_logprobs, by_normalizer = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    # The chain rule of the module's docstring: h_v - p_v (Σ_w h_w - s).
    excess = by_logprobs.sum(dim=-1, keepdim=True).sub_(by_normalizer)
    # Autograd may return a constant gradient as an expanded tensor, which cannot be written to in place.
    return value.detach(), True, by_logprobs.contiguous().sub_(probabilities * excess)


def _evaluated(name: str, measure: Measure, at: Vocabulary) -> Tensor:
    """Return the values of a measure; one that mixes positions is called once for each of its blocks."""
    size, block = len(at.targets), block_of(measure)
    step = size if block == 1 else block
    parts = [at] if step >= size else [at.rows(slice(start, start + step)) for start in range(0, size, step)]
    values = []
    for part in parts:
        try:
            with calling(f"measure {name!r}:", measure):
                value = measure(part)
        except FalignError:
            raise  # already has its place
        except ValueError as error:
            raise ConfigError(f"measure {name!r}: {error}") from error
        values.append(_of_positions(name, value, part))
    return values[0] if len(values) == 1 else torch.cat(values)


def _refuse_mixing(name: str, measure: Measure, at: Vocabulary, values: Tensor) -> None:
    """Refuse a measure whose value at a position changes if the position is alone, unless it says that it mixes."""
    if block_of(measure) > 1:
        return
    last = len(values) - 1
    # Both ends: a sum over earlier positions leaves the first one unchanged, a sum over later ones the last one.
    alone = torch.cat([_evaluated(name, measure, at.rows(slice(k, k + 1))) for k in (0, last)])
    together = values[[0, last]]
    if values.is_floating_point():
        eps = torch.finfo(values.dtype).eps
        same = torch.isclose(alone, together, rtol=4 * eps**0.5, atol=eps**0.75, equal_nan=True).tolist()
    else:
        same = (alone == together).tolist()
    if not all(same):
        row = same.index(False)
        raise ConfigError(
            f"measure {name!r} mixes positions: at one of them it is {together[row].item():.6g} among {len(values)} "
            f"positions and {alone[row].item():.6g} alone. Give it an attribute `block`, the number of positions that "
            "it reads together, or let each value depend on its own position only."
        )


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
        incoming = (grads[0], *grads[2 : 1 + len(slopes)])  # output 1 is the entropy
        terms = [grad[:, None] * slope for grad, slope in zip(incoming, slopes, strict=True) if grad is not None]
        total = torch.stack(terms).sum(dim=0).to(slopes[0].dtype) if terms else None
        return (total, None, None, *[None] * ctx.num_inputs)


def _recomputed(hidden: Tensor, targets: Tensor, visit: _Visit, *of_references: Tensor) -> tuple:
    return _FromLogits.apply(visit.head.embeddings(hidden), targets, visit, *visit.references.prepare(of_references))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _FromLogits(torch.autograd.Function):
    """Values of one chunk of logits; the backward pass recomputes what it needs."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, targets: Tensor, visit: _Visit, *prepared: Tensor) -> tuple:
        ctx.set_materialize_grads(False)
        ctx.visit = visit
        ctx.save_for_backward(raw, targets, *prepared)
        visit.live.clear()
        # A custom measure may use autograd inside. These hooks hide its tensors from the checkpoint, which would count
        # them and find the recomputed number different. Detached, because an output that its own node keeps with its
        # graph is a cycle, and no graph without a backward pass would ever be freed.
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _as_it_is):
            values = visit.values(raw, targets, prepared, find_live=ctx.needs_input_grad[0])
        ctx.mark_non_differentiable(*visit.of_constants(values))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        raw, targets, *prepared = ctx.saved_tensors
        incoming = (grads[0], *grads[2 : 2 + len(ctx.visit.measures)])  # output 1 is the entropy
        return (ctx.visit.gradient(raw, targets, prepared, incoming), None, None, *[None] * len(prepared))
