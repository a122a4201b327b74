"""A reference with log-probabilities that are computed once and then read from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from falign.errors import ConfigError, DataError, ModelError
from falign.objectives import TokenWeighting
from falign.objectives.vocabulary import TopTokens
from falign.references.base import Reference
from falign.references.store import CacheKey, LogprobStore, entry_digest
from falign.scoring import DEFAULT_CHUNK_TOKENS, CompletionStates, PromptTree, Scorer, TokenBatch
from falign.scoring.distributions import StoredTokens
from falign.scoring.vocabulary import top_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Cached"]

_ENTRIES_PER_SHARD = 2048


class Cached(Reference):
    """The log-probabilities of another reference, computed at most once per completion.

    With ``key.top_k`` it also holds the most likely tokens at each position, for measures that read no more of it.

    Completions are looked up by their token ids, in any order and epoch. The wrapped reference computes missing
    values, which are kept. `precompute` fills the cache beforehand, in a few large files; the cache can then be opened
    without a reference, which saves its memory.

    Args:
        reference: Computes missing values; None if no value is missing.
        directory: The store's folder.
        key: The inputs that the values depend on, besides the token ids.
        origin: Identity of the reference that computed the values, for the record, if it is not given.

    Raises:
        ConfigError: If the store was written under another key, key and reference name different weights, or the
            reference moves.
    """

    def __init__(
        self,
        reference: Reference | None,
        *,
        directory: Path,
        key: CacheKey,
        origin: dict[str, Any] | None = None,
    ) -> None:
        # A reference may not know its hash; then the caller answers for the key.
        weights = None if reference is None else reference.identity().get("weights")
        if weights not in (None, key.weights):
            raise ConfigError(f"The cache key has the weights {key.weights!r}, but its reference has {weights!r}.")
        if reference is not None and _moves(reference):
            raise ConfigError(
                "A moving reference gives other log-probabilities after every move: use a fixed one, or leave "
                "the cache out."
            )
        self.reference = reference
        self.origin = origin if reference is None else reference.identity()
        self.store = LogprobStore(directory, key=key)

    @property
    def top_k(self) -> int:
        """Number of most likely tokens that are stored at each position; 0 for none."""
        return self.store.key.top_k

    @property
    @override
    def own_model(self) -> nn.Module | None:
        return None if self.reference is None else self.reference.own_model

    @override
    def identity(self) -> dict[str, Any]:
        return {"kind": "cached", "reference": self.origin, **self.store.key.record}

    @override
    def logprobs(self, policy_model: nn.Module, batch: TokenBatch) -> Float[Tensor, "N T"]:
        logprobs = torch.zeros(batch.completion_mask.shape)
        for row, values in zip(logprobs, self._read(policy_model, batch), strict=True):
            row[: len(values)] = values[:, 0]
        return logprobs.to(batch.input_ids.device)

    def _read(self, policy_model: nn.Module, batch: TokenBatch) -> list[Float[Tensor, "T columns"]]:
        """Return the stored values of each completion: log-probability, then those of the top tokens, then their ids.

        Ids are stored as float32 numbers too, which is exact up to 2^24.
        """
        digests = _digests(batch)
        if any(digest not in self.store for digest in digests):
            self.store.append(self._compute(policy_model, batch, digests))
        return [values.unflatten(0, (-1, 1 + 2 * self.top_k)) for values in self.store.read(digests)]

    @override
    def states(
        self, policy_model: nn.Module, batch: TokenBatch, *, weighting: TokenWeighting = "none"
    ) -> CompletionStates:
        if self.top_k:
            if weighting != "none":
                raise ConfigError(
                    f"{self.store.directory} holds the most likely tokens of a reference and no activations for token "
                    "weights: drop the cache (reference.cache)."
                )
            values = torch.cat(self._read(policy_model, batch)).to(batch.input_ids.device)
            of_targets, logprobs, ids = values.split([1, self.top_k, self.top_k], dim=-1)
            return CompletionStates(StoredTokens(of_targets[:, 0], TopTokens(logprobs, ids.long())))
        if self.reference is None:
            raise ConfigError(
                f"{self.store.directory} holds log-probabilities of single tokens, but this objective needs the "
                "reference's whole distributions, which must be computed live: drop the cache (reference.cache), "
                "or give Cached its reference."
            )
        return self.reference.states(policy_model, batch, weighting=weighting)

    @override
    def acting(self, policy_model: nn.Module) -> AbstractContextManager[nn.Module]:
        raise ModelError(
            "A Cached reference only has values of known completions and cannot generate: use the reference that "
            "computed them."
        )

    @override
    def check_fits(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
        return vocabulary if self.reference is None else self.reference.check_fits(tokenizer, vocabulary)

    def precompute(
        self,
        policy_model: nn.Module,
        trees: Iterable[PromptTree],
        *,
        scorer: Scorer,
        batch_size: int = 8,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Compute missing values, the longest trees first, so that memory runs out at once or never.

        Args:
            policy_model: The policy, on the device to compute on.
            trees: The data; trees with all values present cost nothing.
            scorer: Scorer with a layout that the reference's model can read.
            batch_size: Trees per forward pass.
            on_progress: Called after each pass with the numbers of trees done and to do.

        Returns:
            Number of trees with missing values.
        """
        missing = {digests: tree for tree in trees if (digests := self._missing(tree))}  # equal trees are scored once
        ordered = sorted(missing.values(), key=lambda tree: tree.longest_path, reverse=True)
        computed: dict[bytes, Tensor] = {}
        for start in range(0, len(ordered), batch_size):
            batch = scorer.lay_out(ordered[start : start + batch_size], model=policy_model)
            digests = _digests(batch)
            computed |= self._compute(policy_model, batch, digests)
            done = min(start + batch_size, len(ordered))
            if len(computed) >= _ENTRIES_PER_SHARD or done == len(ordered):
                self.store.append(computed)
                computed = {}
            if on_progress is not None:
                on_progress(done, len(ordered))
        return len(ordered)

    def _missing(self, tree: PromptTree) -> tuple[bytes, ...]:
        completions = zip(tree.completion_ids, tree.counted_or_none, strict=True)
        digests = (entry_digest(tree.prompt_ids, ids, counted) for ids, counted in completions)
        return tuple(digest for digest in digests if digest not in self.store)

    def _compute(
        self, policy_model: nn.Module, batch: TokenBatch, digests: list[bytes]
    ) -> dict[bytes, Float[Tensor, " _"]]:
        missing = [n for n, digest in enumerate(digests) if digest not in self.store]
        if self.reference is None:
            raise DataError(
                f"{len(missing)} of {len(digests)} completions of a batch (first: {batch.place[missing[0]]!r}) "
                f"are not in {self.store.directory}: precompute them, or give the cache its reference."
            )
        mask = batch.completion_mask.cpu()
        if self.top_k:
            targets = batch.completion_ids[batch.completion_mask]
            chunk = DEFAULT_CHUNK_TOKENS
            found = top_tokens(
                self.reference.states(policy_model, batch).distribution, targets, self.top_k, chunk_tokens=chunk
            )
            values = torch.cat([found.of_targets[:, None], found.top.logprobs, found.top.ids], dim=-1).float().cpu()
        else:
            values = self.reference.logprobs(policy_model, batch).cpu()[mask][:, None]
        if not values.isfinite().all():
            row = int(mask.nonzero()[int((~values.isfinite()).any(dim=1).nonzero()[0]), 0])
            raise ModelError(
                f"The reference gives {batch.place[row] or f'row {row}'} a log-probability that is not "
                "finite; it is not stored. Check the reference's weights and dtype."
            )
        rows = values.split(mask.sum(dim=1).tolist())
        return {digests[n]: rows[n].flatten() for n in missing}


def _digests(batch: TokenBatch) -> list[bytes]:
    return [
        entry_digest(prompt, completion, counted)
        for (prompt, completion), counted in zip(batch.token_ids(), batch.counted, strict=True)
    ]


def _moves(reference: Reference) -> bool:
    return reference.moves or any(map(_moves, reference.members.values()))
