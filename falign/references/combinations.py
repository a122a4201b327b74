"""Combinations of references: mixtures of their probabilities, and geometric ones."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from falign.errors import ConfigError
from falign.objectives import TokenWeighting
from falign.references.base import Reference
from falign.references.scores import ReferenceScores
from falign.scoring import DEFAULT_CHUNK_TOKENS, CompletionStates, Predictions, TokenBatch
from falign.scoring.combinations import GeometricPredictions, MixturePredictions, geometric, mixture

__all__ = ["Combination", "Geometric", "GeometricLevel", "Mixture", "check_geometric", "check_mixture"]

GeometricLevel = Literal["token", "sequence"]

_TOLERANCE = 1e-6  # of a sum of weights: 0.1 + 0.2 + 0.7 is not 1 in floating point


class Combination(Reference):
    """A function of several references, each of which runs once per batch.

    A run moves, saves and checks the members under their own names. So each member must itself be a reference of the
    run; see :attr:`Reference.members`.

    Args:
        members: The references, by name.
        weights: One weight for each of them.
        chunk_tokens: Number of positions that reach a head at once.

    Raises:
        ConfigError: Members and weights have different names, or the weights are invalid.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        members: Mapping[str, Reference],
        weights: Mapping[str, float],
        *,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    ) -> None:
        if members.keys() != weights.keys():
            raise ConfigError(
                f"{self.kind}: the members are {', '.join(sorted(members)) or 'none'} and the weights are of "
                f"{', '.join(sorted(weights)) or 'none'}: give one weight for each member."
            )
        self.weights = dict(weights)
        self.chunk_tokens = chunk_tokens
        self._members = {name: members[name] for name in weights}
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Refuse weights and members that do not fit.

        Raises:
            ConfigError: The message names the weights and the remedy.
        """

    @abstractmethod
    def logprobs_of(self, members: Mapping[str, Float[Tensor, "N T"]]) -> Float[Tensor, "N T"]:
        """Return the combination's log-probabilities of tokens from those of the members."""

    @abstractmethod
    def predictions_of(self, members: Mapping[str, Predictions]) -> Predictions:
        """Return the combination's distributions from those of the members."""

    @property
    @override
    def members(self) -> Mapping[str, Reference]:
        return self._members

    @override
    def with_members(self, members: Mapping[str, Reference]) -> Combination:
        made = copy.copy(self)
        made._members = {name: members[name] for name in self.weights}
        return made

    @override
    def identity(self) -> dict[str, Any]:
        parts = {name: member.identity().get("weights") for name, member in self._members.items()}
        content = json.dumps([self._settings(), self.weights, parts], sort_keys=True)
        known = all(value is not None for value in parts.values())
        return {
            "kind": self.kind,
            "weights": hashlib.sha256(content.encode()).hexdigest() if known else None,
            "members": self.weights,
            **self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        return {}

    @override
    def logprobs(self, policy_model: nn.Module, batch: TokenBatch) -> Float[Tensor, "N T"]:
        return self._scores(policy_model, batch).logprobs(self)

    @override
    def states(
        self, policy_model: nn.Module, batch: TokenBatch, *, weighting: TokenWeighting = "none"
    ) -> CompletionStates:
        return self.states_in(self._scores(policy_model, batch), weighting=weighting)

    @override
    def logprobs_in(self, scores: ReferenceScores) -> Float[Tensor, "N T"]:
        combined = self.logprobs_of(scores.all_logprobs(self._members))
        return combined.masked_fill(~scores.batch.completion_mask, 0.0)

    @override
    def states_in(self, scores: ReferenceScores, *, weighting: TokenWeighting = "none") -> CompletionStates:
        if weighting != "none":
            raise ConfigError(
                f"token weights from activations (weighting={weighting!r}) with a {self.kind} of references, which has "
                "no activations: name a single model as the reference."
            )
        return CompletionStates(
            self.predictions_of({name: scores.states(member).distribution for name, member in self._members.items()})
        )

    def _scores(self, policy_model: nn.Module, batch: TokenBatch) -> ReferenceScores:
        return ReferenceScores(policy_model, batch, chunk_tokens=self.chunk_tokens)


class Mixture(Combination):
    """The mixture of next-token distributions, ``p(v | s) = Σ_k w_k p_k(v | s)``, at each token.

    This is not the mixture of distributions of whole completions, in which the weights of later tokens depend on how
    likely each member finds the earlier ones.

    Args:
        members: The references, by name.
        weights: ``w_k``, positive, with sum 1.
        chunk_tokens: Number of positions that reach a head at once.

    Raises:
        ConfigError: A weight is not positive, or they do not sum to 1.
    """

    kind = "mixture"

    @override
    def check(self) -> None:
        check_mixture(self.weights, place=self.kind)
        _require_normalized(self._members, place=self.kind)

    @override
    def logprobs_of(self, members: Mapping[str, Float[Tensor, "N T"]]) -> Float[Tensor, "N T"]:
        return mixture(members, self.weights)

    @override
    def predictions_of(self, members: Mapping[str, Predictions]) -> Predictions:
        return MixturePredictions(members, self.weights)


class Geometric(Combination):
    """The geometric combination ``p ∝ Π_k p_k^{w_k}``, such as ``base^{1-λ} teacher^λ``; λ > 1 extrapolates.

    At level ``token`` each next-token distribution is normalized over the vocabulary, so it is a distribution, and its
    log-probabilities need the members' whole distributions. At level ``sequence`` it is the combination of the
    distributions of whole completions, ``Σ_k w_k log p_k(y)``, whose normalizer, a sum over all completions, is
    unknown. Only an objective that needs none accepts it (:attr:`BaseObjective.accepts_unnormalized`).

    Args:
        members: The references, by name.
        weights: ``w_k``, with sum 1; some may be negative.
        level: ``"token"`` or ``"sequence"``.
        chunk_tokens: Number of positions that reach a head at once.

    Raises:
        ConfigError: The weights do not sum to 1, or a weight is NaN or infinite.

    Source:
        Yang et al., G-OPD (arXiv:2602.12125): with λ = 1.25, ``{teacher: 1.25, base: -0.25}``. Their code uses the
        sampled token's unnormalized ``λ log T + (1-λ) log base``.
    """

    kind = "geometric"

    def __init__(
        self,
        members: Mapping[str, Reference],
        weights: Mapping[str, float],
        *,
        level: GeometricLevel = "token",
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    ) -> None:
        if level not in ("token", "sequence"):
            raise ConfigError(f"geometric: level={level!r}: choose 'token' or 'sequence'.")
        self.level: GeometricLevel = level
        super().__init__(members, weights, chunk_tokens=chunk_tokens)

    @override
    def check(self) -> None:
        check_geometric(self.weights, place=self.kind)
        if self.level == "token":
            _require_normalized(self._members, place=self.kind)

    @property
    @override
    def reads_whole(self) -> bool:
        return self.level == "token"

    @property
    @override
    def normalized(self) -> bool:
        return self.level == "token"

    @override
    def _settings(self) -> dict[str, Any]:
        return {"level": self.level}

    @override
    def logprobs_of(self, members: Mapping[str, Float[Tensor, "N T"]]) -> Float[Tensor, "N T"]:
        return geometric(members, self.weights)

    @override
    def predictions_of(self, members: Mapping[str, Predictions]) -> Predictions:
        if self.level == "sequence":
            raise ConfigError(
                "A geometric combination at level 'sequence' has no next-token distributions, because its normalizer "
                "is a sum over all completions: set level to 'token' for measures and metrics over the vocabulary."
            )
        return GeometricPredictions(members, self.weights)


def check_mixture(weights: Mapping[str, float], *, place: str) -> None:
    """Refuse weights that are not probabilities.

    Args:
        weights: One for each member.
        place: The combination in messages.

    Raises:
        ConfigError: A weight is not positive, or they do not sum to 1.
    """
    if negative := [name for name, weight in weights.items() if not 0 < weight < math.inf]:
        raise ConfigError(
            f"{place}.weights.{negative[0]}={weights[negative[0]]!r}: the weights of a mixture are probabilities, so "
            "each is positive: leave the member out, or use kind geometric, which takes negative weights."
        )
    if not math.isclose(total := math.fsum(weights.values()), 1.0, abs_tol=_TOLERANCE):
        raise ConfigError(
            f"{place}.weights={dict(weights)} sum to {total:g}, and the weights of a mixture sum to 1: divide each by "
            f"{total:g}."
            if weights
            else f"{place}.weights={{}} has no member: give a weight for each reference."
        )


def check_geometric(weights: Mapping[str, float], *, place: str) -> None:
    """Refuse weights that do not sum to 1.

    Args:
        weights: One for each member; some may be negative.
        place: The combination in messages.

    Raises:
        ConfigError: A weight is NaN or infinite, or they do not sum to 1.
    """
    if wrong := [name for name, weight in weights.items() if not math.isfinite(weight)]:
        raise ConfigError(f"{place}.weights.{wrong[0]}={weights[wrong[0]]!r}: must be finite.")
    if math.isclose(total := math.fsum(weights.values()), 1.0, abs_tol=_TOLERANCE):
        return
    # A combination whose weights sum to 1 is unchanged by a common factor of all members; one whose weights sum to
    # more sharpens (or, below 1, flattens) all of them and is no extrapolation from anything.
    raise ConfigError(
        f"{place}.weights={dict(weights)} sum to {total:g}, and those of a geometric combination sum to 1: add the "
        f"base that it extrapolates from with the weight {1 - total:g}, as in {{teacher: 1.25, base: -0.25}}."
    )


def _require_normalized(members: Mapping[str, Reference], *, place: str) -> None:
    for name, member in members.items():
        if not member.normalized:
            raise ConfigError(
                f"{place}: its member {name!r} is known only up to a factor per prompt (level sequence), and this "
                "combination needs its probabilities: set the member's level to 'token'."
            )
