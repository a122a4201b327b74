"""Token weights: constant factors of the loss at each token, composed by multiplication."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from falign.divergences.base import numbers
from falign.errors import ConfigError
from falign.objectives.base import CompletionBatch
from falign.objectives.groups import groups_of, total
from falign.objectives.measures import Measure
from falign.registry import Registry

__all__ = [
    "WEIGHTS",
    "DifficultyKernel",
    "TokenWeight",
    "completion_factor",
    "get_weight",
    "measures_of_weights",
    "merge_measures",
    "needs_of_weights",
    "token_factor",
]


@runtime_checkable
class TokenWeight(Protocol):
    """Interface of a token weight: a constant factor of the loss at each token; these three members suffice.

    A weight may depend on the policy (on its entropy, for example), so it multiplies the *losses* of a term, never
    ``Term.weights``, and :func:`token_factor` detaches it. An objective's ``needs`` and ``measures`` include those of
    its weights.

    The value at a token may depend only on the completions of its own prompt: a micro-batch has whole prompts, and a
    quantile or a mean over more than that would depend on the size of micro-batches. To sum the weights of a step, a
    trainer also calls it with zeros for everything that the policy computes.

    Attributes:
        needs: Optional fields of :class:`CompletionBatch` that it reads, as in :attr:`Objective.needs`.
        measures: Quantities of whole next-token distributions, by their name in ``CompletionBatch.measures``. Equal
            measures are computed once; a name must not stand for two different ones.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def measures(self) -> Mapping[str, Measure]: ...

    def __call__(self, batch: CompletionBatch) -> Float[Tensor, "N T"]:
        """Return the factor of each token.

        Args:
            batch: Completions with :attr:`needs` and :attr:`measures`.

        Returns:
            Shape (N, T), finite and not negative; values outside the mask are ignored.
        """
        ...


def needs_of_weights(weights: Sequence[TokenWeight]) -> frozenset[str]:
    """Return the fields that the weights read.

    Args:
        weights: Any weights.

    Returns:
        The union of their ``needs``.

    Example:
        >>> sorted(needs_of_weights([DifficultyKernel()]))
        ['rewards']
    """
    return frozenset[str]().union(*(weight.needs for weight in weights))


def measures_of_weights(weights: Sequence[TokenWeight]) -> dict[str, Measure]:
    """Return the measures that the weights read, by name.

    Args:
        weights: Any weights.

    Returns:
        The union of their ``measures``.

    Raises:
        ValueError: One name stands for two different measures.

    Example:
        >>> measures_of_weights([DifficultyKernel()])
        {}
    """
    return merge_measures(*(weight.measures for weight in weights))


def merge_measures(*measures: Mapping[str, Measure]) -> dict[str, Measure]:
    """Return the union of measures by name.

    Args:
        *measures: Those of an objective and of its parts.

    Returns:
        Every name with its measure.

    Raises:
        ValueError: One name stands for two different measures.

    Example:
        >>> from falign.objectives.measures import Entropy
        >>> merge_measures({"entropy": Entropy()}, {"entropy": Entropy()})
        {'entropy': Entropy()}
    """
    found: dict[str, Measure] = {}
    for name, measure in (pair for each in measures for pair in each.items()):
        if found.setdefault(name, measure) != measure:
            raise ValueError(f"Two parts name a measure {name!r}, {found[name]!r} and {measure!r}: rename one of them.")
    return found


def token_factor(weights: Sequence[TokenWeight], batch: CompletionBatch) -> Float[Tensor, "N T"]:
    """Return the product of token weights, a constant.

    Args:
        weights: Any number of weights; the empty product is 1.
        batch: Completions with what the weights read.

    Returns:
        Shape (N, T), detached; 0 outside the mask.

    Raises:
        ValueError: A weight has the wrong shape, or is NaN, infinite or negative at a token.

    Example:
        >>> batch = CompletionBatch(
        ...     logprobs=torch.zeros(2, 1),
        ...     completion_mask=torch.ones(2, 1, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 0]),
        ...     rewards=torch.tensor([1.0, 0.0]),
        ... )
        >>> token_factor([DifficultyKernel()], batch)
        tensor([[0.2500],
                [0.2500]])
    """
    mask = batch.completion_mask
    product = torch.ones_like(batch.logprobs.detach()).masked_fill(~mask, 0.0)
    for weight in weights:
        factor = _checked(weight, weight(batch), batch)
        product = product * factor.to(product.dtype)
    return product


def _checked(weight: TokenWeight, factor: Tensor, batch: CompletionBatch) -> Tensor:
    """Return a weight's values, detached and 0 outside the mask."""
    name, mask = type(weight).__name__, batch.completion_mask
    factor = numbers(factor, f"the token weight {name}").detach()
    if factor.shape != mask.shape:
        raise ValueError(
            f"The token weight {name} has shape {tuple(factor.shape)} for logprobs of shape {tuple(mask.shape)}: "
            "return one number for each token."
        )
    factor = factor.masked_fill(~mask, 0.0)
    bad = ~((factor >= 0) & (factor < math.inf))  # also true for NaN
    if bad.any():
        row, token = bad.nonzero()[0].tolist()
        raise ValueError(
            f"The token weight {name} is {factor[row, token].item():g} at token {token} of completion {row}: a weight "
            "must be finite and not negative."
        )
    return factor


def completion_factor(weights: Sequence[TokenWeight], batch: CompletionBatch) -> Float[Tensor, " N"]:
    """Return the product of weights for whole completions: its mean over their tokens, a constant.

    Args:
        weights: Any number of weights.
        batch: Completions with what the weights read.

    Returns:
        Shape (N,), detached. A weight that is the same at all tokens of a completion keeps its value.

    Raises:
        ValueError: As :func:`token_factor`.

    Example:
        >>> batch = CompletionBatch(
        ...     logprobs=torch.zeros(2, 1),
        ...     completion_mask=torch.ones(2, 1, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 0]),
        ...     rewards=torch.tensor([1.0, 0.0]),
        ... )
        >>> completion_factor([DifficultyKernel()], batch)
        tensor([0.2500, 0.2500])
    """
    return token_factor(weights, batch).sum(dim=-1) / batch.num_tokens


@dataclass(frozen=True)
class DifficultyKernel:
    """``p^a (1 - p)^b`` for every token of a prompt's completions, p the share of its completions that pass.

    With positive a and b it is 0 for prompts that always or never pass, and largest at ``p = a/(a + b)``. ``a = b = 0``
    is 1 everywhere.

    Attributes:
        a: Exponent of p, not negative.
        b: Exponent of 1 - p, not negative.
        pass_reward: A completion with at least this reward passes.

    Raises:
        ValueError: An exponent is negative or infinite, or ``pass_reward`` is not finite.

    Source:
        Xu et al., PACED (arXiv:2603.11178), with the current rollout's pass rate; ``a = b = 1`` is its default.
    """

    a: float = 1.0
    b: float = 1.0
    pass_reward: float = 1.0

    def __post_init__(self) -> None:
        for name, value in {"a": self.a, "b": self.b}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"difficulty_kernel: {name}={value!r} must be finite and not negative.")
        if not math.isfinite(self.pass_reward):
            raise ValueError(f"difficulty_kernel: pass_reward={self.pass_reward!r} must be finite.")

    @property
    def needs(self) -> frozenset[str]:
        """The rewards."""
        return frozenset({"rewards"})

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Empty."""
        return {}

    def __call__(self, batch: CompletionBatch) -> Float[Tensor, "N T"]:
        """Return the kernel of each prompt's pass rate.

        Args:
            batch: All completions of each prompt, with ``rewards``.

        Returns:
            Shape (N, T), within [0, 1].
        """
        groups = groups_of(batch.prompt_index)
        rewards = batch.require("rewards")
        passed = (rewards >= self.pass_reward).to(rewards.dtype)
        rate = total(passed, groups) / groups.size
        return (rate**self.a * (1 - rate) ** self.b)[:, None].expand(batch.logprobs.shape)


WEIGHTS: Registry[Any] = Registry(
    "token weight",
    {"difficulty_kernel": DifficultyKernel},
    wanted="token weight: an object with needs, measures and __call__(batch), or a function that returns one",
)


def get_weight(name: str, *, field: str | None = None, **settings: Any) -> TokenWeight:
    """Return a token weight by name.

    Args:
        name: ``difficulty_kernel``; or a custom ``module:Name``, which is called with the settings unless it is a
            weight itself.
        field: The run-file field that holds the name, for messages.
        **settings: Arguments of the weight.

    Returns:
        The weight.

    Raises:
        ConfigError: The name or a setting is unknown, or the custom member does not make a weight.
        ValueError: A setting is out of range.

    Example:
        >>> get_weight("difficulty_kernel", a=2.0)
        DifficultyKernel(a=2.0, b=1.0, pass_reward=1.0)
    """
    member = WEIGHTS.get(name, field=field)
    if isinstance(member, TokenWeight) and not isinstance(member, type) and not settings:
        return member
    place = f"token weight {name!r}" if field is None else f"{field}={name!r}"
    try:
        made = cast("Any", member)(**settings)
    except TypeError as error:
        raise ConfigError(f"{place}: {error}.") from error
    if not isinstance(made, TokenWeight):
        raise ConfigError(f"{place} makes a {type(made).__name__}, which lacks needs, measures or a call with a batch.")
    return made
