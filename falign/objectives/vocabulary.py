"""The next-token distributions that a measure reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from falign.errors import ConfigError

__all__ = ["TopTokens", "Vocabulary", "cosines_with", "log_rest"]


class TopTokens(NamedTuple):
    """The K most likely tokens at each position.

    Attributes:
        logprobs: Their log-probabilities, the largest first, shape (M, K), nats.
        ids: Their ids, shape (M, K).
    """

    logprobs: Float[Tensor, "M K"]
    ids: Int[Tensor, "M K"]

    @classmethod
    def of(cls, logprobs: Float[Tensor, "M V"], k: int) -> TopTokens:
        """Return the k most likely tokens of whole distributions.

        Args:
            logprobs: ``log p``, shape (M, V).
            k: Number of tokens.

        Returns:
            Shape (M, k).

        Raises:
            ValueError: k is not between 1 and V.

        Example:
            >>> TopTokens.of(torch.tensor([[0.2, 0.5, 0.3]]).log(), 2).ids
            tensor([[1, 2]])
        """
        if not 1 <= k <= logprobs.shape[-1]:
            raise ValueError(f"k={k} must be between 1 and the {logprobs.shape[-1]} tokens of the vocabulary.")
        return cls(*logprobs.topk(k, dim=-1))


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The next-token distributions at M positions, over all V tokens of the vocabulary.

    Scoring passes a measure one block of positions at a time; a measure must not keep any of these tensors.

    Attributes:
        logprobs: ``log π``, shape (M, V), nats; carries the gradient if one is needed.
        targets: The token at each position, shape (M,).
        references: ``log π_k`` over the same vocabulary for each reference that the measures name, shape (M, V),
            constants.
        tops: Most likely tokens of each reference of which nothing else is known, by its name.
        log_normalizer: ``logsumexp`` of the logits, shape (M, 1); carries a gradient like ``logprobs``.
        embeddings: The policy's output embeddings, shape (V, H), a constant; None if its head is not one matrix.
        shared_cosines: Returns what :meth:`cosines` returns, where scoring computes it once for a whole chunk.

    Example:
        >>> at = Vocabulary(torch.tensor([[0.5, 0.25, 0.25]]).log(), targets=torch.tensor([0]))
        >>> at.logprobs.exp()
        tensor([[0.5000, 0.2500, 0.2500]])
    """

    logprobs: Float[Tensor, "M V"]
    targets: Int[Tensor, " M"]
    references: Mapping[str, Float[Tensor, "M V"]] = field(default_factory=dict)
    log_normalizer: Float[Tensor, "M 1"] | None = None
    embeddings: Float[Tensor, "V H"] | None = None
    tops: Mapping[str, TopTokens] = field(default_factory=dict)
    shared_cosines: Callable[[], Tensor] | None = None

    @property
    def logits(self) -> Float[Tensor, "M V"]:
        """The policy's logits, shape (M, V), differentiable.

        Raises:
            ValueError: ``log_normalizer`` is None: log-probabilities alone do not determine the logits.
        """
        if self.log_normalizer is None:
            raise ValueError("Vocabulary.logits needs log_normalizer, which is None: pass logsumexp of the logits.")
        return self.logprobs + self.log_normalizer

    def reference(self, name: str = "reference") -> Float[Tensor, "M V"]:
        """Return ``log π_k`` over the vocabulary.

        Args:
            name: Name of the reference; the measure must list it in its ``references``.

        Returns:
            Shape (M, V), a constant.

        Raises:
            ConfigError: The measure does not list it, or only its most likely tokens are known.
        """
        if name in self.tops:
            raise ConfigError(
                f"A measure reads the whole distribution of the reference {name!r}, of which only the "
                f"{self.tops[name].ids.shape[-1]} most likely tokens are known: use a measure of these, such as top_k, "
                "or a reference that computes whole distributions."
            )
        if name not in self.references:
            raise ConfigError(
                f"A measure reads the distribution of the reference {name!r} but does not list it: its `references` "
                f"must be frozenset({{{name!r}}})."
            )
        return self.references[name]

    def rows(self, rows: slice) -> Vocabulary:
        """Return the distributions at some of the positions.

        Args:
            rows: The positions.

        Returns:
            Views of these rows.
        """
        return replace(
            self,
            logprobs=self.logprobs[rows],
            targets=self.targets[rows],
            references={name: each[rows] for name, each in self.references.items()},
            log_normalizer=None if self.log_normalizer is None else self.log_normalizer[rows],
            tops={name: TopTokens(each.logprobs[rows], each.ids[rows]) for name, each in self.tops.items()},
            shared_cosines=None if self.shared_cosines is None else lambda: self.cosines()[rows],
        )

    def cosines(self) -> Float[Tensor, "M V"]:
        """Return ``cos(e_v, e_y)`` of every token v with the token y at each position, e the output embeddings.

        Returns:
            Shape (M, V), a constant: one product with the embeddings serves a value and its gradient.

        Raises:
            ConfigError: The policy's head is not one matrix.
        """
        if self.embeddings is None:
            raise ConfigError(
                "A measure reads the policy's output embeddings, and its head is not one matrix: leave the head out of "
                "adapter.target_modules and of quantization."
            )
        if self.shared_cosines is not None:
            return self.shared_cosines()
        return cosines_with(self.embeddings, self.targets, self.logprobs.dtype)

    def top(self, name: str, k: int) -> TopTokens:
        """Return the k most likely tokens of a reference.

        Args:
            name: As in :meth:`reference`. Of this reference no more than these tokens need to be known.
            k: Number of tokens, at least 1 and at most V.

        Returns:
            Shape (M, k), constants.

        Raises:
            ConfigError: The measure does not list the reference, or fewer of its tokens are known.
            ValueError: k is not between 1 and V.

        Example:
            >>> teacher = torch.tensor([[0.2, 0.5, 0.3]]).log()
            >>> at = Vocabulary(torch.zeros(1, 3), torch.tensor([0]), {"teacher": teacher})
            >>> at.top("teacher", 2).ids
            tensor([[1, 2]])
        """
        if name not in self.tops:
            return TopTokens.of(self.reference(name), k)
        known = self.tops[name]
        if known.ids.shape[-1] < k:
            raise ConfigError(
                f"A measure reads the {k} most likely tokens of the reference {name!r}, of which "
                f"{known.ids.shape[-1]} are known: lower k of the measure, or store more tokens of the reference."
            )
        return TopTokens(known.logprobs[:, :k], known.ids[:, :k])

    def rest(self, name: str, k: int) -> Float[Tensor, " M"]:
        """Return the log-probability of all tokens of a reference outside :meth:`top`; meaningless if these are all.

        Args:
            name: As in :meth:`top`.
            k: As in :meth:`top`.

        Returns:
            Shape (M,), a constant. If only the K most likely tokens are known, ``log(1 - Σ p)`` of these, no smaller
            than the rounding error of 1, enters it.
        """
        if name not in self.tops:
            return log_rest(self.reference(name), self.top(name, k).ids)
        known = self.tops[name].logprobs
        total = known.logsumexp(dim=-1).clamp(max=-torch.finfo(known.dtype).eps)
        unknown = torch.log(-torch.expm1(total))
        return torch.logaddexp(unknown, known[:, k:].logsumexp(dim=-1)) if known.shape[-1] > k else unknown


SLICE = 8192
"""Embeddings that :func:`cosines_with` converts to its type at a time."""


def cosines_with(
    embeddings: Float[Tensor, "V H"], targets: Int[Tensor, " M"], dtype: torch.dtype
) -> Float[Tensor, "M V"]:
    """Return ``cos(e_v, e_y)`` of every token v with each target y.

    Args:
        embeddings: e, shape (V, H).
        targets: Token ids, shape (M,).
        dtype: Type of the result.

    Returns:
        Shape (M, V); 0 for an embedding of zeros.

    Example:
        >>> cosines_with(torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0]), torch.float32)
        tensor([[1., 0., 1.]])
    """
    of_targets = torch.nn.functional.normalize(embeddings[targets].to(dtype), dim=-1)
    found = of_targets.new_empty(len(targets), len(embeddings))
    # In slices: the embeddings of a large vocabulary, converted and normalized at once, may be larger than a chunk.
    for start in range(0, len(embeddings), SLICE):
        part = embeddings[start : start + SLICE].to(dtype)
        torch.div(of_targets @ part.T, part.norm(dim=-1).clamp(min=1e-12), out=found[:, start : start + SLICE])
    return found


def log_rest(logprobs: Float[Tensor, "M V"], ids: Int[Tensor, "M K"]) -> Float[Tensor, " M"]:
    """Return ``log Σ_{v ∉ ids} p(v)`` at each position, differentiable.

    Args:
        logprobs: ``log p``, shape (M, V).
        ids: The tokens to leave out, shape (M, K), fewer than V.

    Returns:
        Shape (M,). At least about -10⁴, so that it is finite and keeps a gradient where p is very small.

    Example:
        >>> log_rest(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0]])).exp()
        tensor([0.5000])
    """
    # A sum over the others, not 1 - Σ p(ids): the difference loses all digits where the rest is small.
    return logprobs.scatter(-1, ids, -1e4).logsumexp(dim=-1)
