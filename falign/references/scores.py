"""Scores of one batch under several references, each of which runs once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from falign.objectives import TokenWeighting
from falign.scoring import DEFAULT_CHUNK_TOKENS, CompletionStates, TokenBatch
from falign.scoring.vocabulary import target_logprobs

if TYPE_CHECKING:
    from falign.references.base import Reference

__all__ = ["ReferenceScores", "read_whole", "with_members"]


class ReferenceScores:
    """Scores of one batch under references; a model runs once, however many combinations contain it.

    Args:
        policy_model: The policy, which contains some references; it is left unchanged.
        batch: The rows to score.
        chunk_tokens: Number of positions that reach a head at once.
    """

    def __init__(self, policy_model: nn.Module, batch: TokenBatch, *, chunk_tokens: int = DEFAULT_CHUNK_TOKENS) -> None:
        self.policy_model = policy_model
        self.batch = batch
        self.chunk_tokens = chunk_tokens
        # By identity, because a reference of a user's own need not have a hash.
        self._states: dict[int, CompletionStates] = {}
        self._logprobs: dict[int, Tensor] = {}

    def states(self, reference: Reference, *, weighting: TokenWeighting = "none") -> CompletionStates:
        """Return whole next-token distributions, as :meth:`Reference.states` does.

        Args:
            reference: The reference.
            weighting: Also return token weights; ask for them in the first call.
        """
        if id(reference) not in self._states:
            self._states[id(reference)] = reference.states_in(self, weighting=weighting)
        return self._states[id(reference)]

    def logprobs(self, reference: Reference) -> Float[Tensor, "N T"]:
        """Return the log-probabilities of the completion tokens, as :meth:`Reference.logprobs` does.

        Args:
            reference: The reference.
        """
        return self.all_logprobs({"": reference})[""]

    def all_logprobs(self, references: Mapping[str, Reference]) -> dict[str, Float[Tensor, "N T"]]:
        """Return the log-probabilities of the completion tokens under several references.

        Args:
            references: By name. Those whose whole distributions are known, or are needed for their log-probabilities,
                are read in one visit to the vocabulary.
        """
        missing = {name: each for name, each in references.items() if id(each) not in self._logprobs}
        whole = read_whole(missing)
        visited = {
            name: self.states(each).distribution
            for name, each in missing.items()
            if name in whole or id(each) in self._states
        }
        if visited:
            targets = self.batch.completion_ids[self.batch.completion_mask]
            found = target_logprobs(visited, targets, chunk_tokens=self.chunk_tokens)
            self._logprobs |= {id(missing[name]): self.batch.scatter(values) for name, values in found.items()}
        for each in missing.values():
            if id(each) not in self._logprobs:
                self._logprobs[id(each)] = each.logprobs_in(self)
        return {name: self._logprobs[id(each)] for name, each in references.items()}


def read_whole(references: Mapping[str, Reference], named: Collection[str] = ()) -> frozenset[str]:
    """Return the names of the references whose whole distributions are read.

    Args:
        references: By name.
        named: Names of those that a measure reads.

    Returns:
        These, those that need them for their log-probabilities, and the members of all of them.
    """
    found: set[int] = set()

    def add(reference: Reference) -> None:
        found.add(id(reference))
        for member in reference.members.values():
            add(member)

    for name, reference in references.items():
        if name in named or reference.reads_whole:
            add(reference)
    return frozenset(name for name, reference in references.items() if id(reference) in found)


def with_members(references: Mapping[str, Reference]) -> dict[str, Reference]:
    """Return references by name, with each combination made of the others of these names.

    Args:
        references: By name; a member of a combination may have been replaced, such as by its cache.
    """
    made: dict[str, Reference] = {}

    def remake(name: str) -> Reference:
        if name not in made:
            own = {member: remake(member) for member in references[name].members if member in references}
            made[name] = references[name].with_members({**references[name].members, **own})
        return made[name]

    return {name: remake(name) for name in references}
