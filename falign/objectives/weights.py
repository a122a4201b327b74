"""Token weights: constant factors of the loss at each token, composed by multiplication."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from falign.divergences.base import numbers
from falign.errors import ConfigError
from falign.objectives.base import CompletionBatch
from falign.objectives.measures import Measure
from falign.raised import calling
from falign.registry import Registry

__all__ = [
    "WEIGHTS",
    "TokenWeight",
    "check_weights",
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


def check_weights(weights: Sequence[TokenWeight], *, field: str = "weights") -> None:
    """Refuse what is not a list of token weights.

    Args:
        weights: The list.
        field: Its name in messages.

    Raises:
        ValueError: It is a name or a single weight, or has an entry that is not a weight.

    Example:
        >>> check_weights([get_weight("dads")])
    """
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise ValueError(f"{field}={weights!r} is not a list: give a list of token weights, as in {field}=[Dads()].")
    for weight in weights:
        if isinstance(weight, str):
            raise ValueError(f"{field} has the name {weight!r}: give the weight itself, get_weight({weight!r}).")
        if isinstance(weight, type) or not isinstance(weight, TokenWeight):
            raise ValueError(
                f"{field} has {weight!r}, which is not a token weight: give an object with needs, measures and "
                "__call__(batch)."
            )


def needs_of_weights(weights: Sequence[TokenWeight]) -> frozenset[str]:
    """Return the fields that the weights read.

    Args:
        weights: Any weights.

    Returns:
        The union of their ``needs``.

    Example:
        >>> from falign.objectives import DifficultyKernel
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
        >>> from falign.objectives import DifficultyKernel
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
        >>> from falign.objectives import DifficultyKernel
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
        with calling("token weight", weight):
            given = weight(batch)
        factor = _checked(weight, given, batch)
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
    """Return the product of weights of whole completions, a constant.

    Args:
        weights: Any number of weights.
        batch: Completions with what the weights read.

    Returns:
        Shape (N,), detached.

    Raises:
        ValueError: As :func:`token_factor`; or the product differs between the tokens of a completion.

    Example:
        >>> from falign.objectives import DifficultyKernel
        >>> batch = CompletionBatch(
        ...     logprobs=torch.zeros(2, 1),
        ...     completion_mask=torch.ones(2, 1, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0, 0]),
        ...     rewards=torch.tensor([1.0, 0.0]),
        ... )
        >>> completion_factor([DifficultyKernel()], batch)
        tensor([0.2500, 0.2500])
    """
    factor, mask = token_factor(weights, batch), batch.completion_mask
    whole = factor.amax(dim=-1)
    uneven = (factor != whole[:, None]) & mask
    if uneven.any():
        row, token = uneven.nonzero()[0].tolist()
        names = ", ".join(type(weight).__name__ for weight in weights)
        raise ValueError(
            f"The weights {names} differ between the tokens of completion {row} ({factor[row, token].item():g} and "
            f"{whole[row].item():g}), where a whole completion is weighted: use them where the loss is a sum over "
            "tokens."
        )
    return whole


WEIGHTS: Registry[Any] = Registry(
    "token weight",
    {
        "difficulty_kernel": "falign.objectives.difficulty:DifficultyKernel",
        "dads": "falign.objectives.difficulty:Dads",
        "entropy_gate": "falign.objectives.token_gates:EntropyGate",
        "entropy_gap": "falign.objectives.token_gates:EntropyGap",
        "entropy_prefix": "falign.objectives.token_gates:EntropyPrefix",
        "quantile_filter": "falign.objectives.token_gates:quantile_filter",
        "first_tokens": "falign.objectives.token_gates:FirstTokens",
    },
    wanted="token weight: an object with needs, measures and __call__(batch), or a function that returns one",
)


def get_weight(name: str, *, field: str | None = None, **settings: Any) -> TokenWeight:
    """Return a token weight by name.

    Args:
        name: ``difficulty_kernel``, ``dads``, ``entropy_gate``, ``entropy_gap``, ``entropy_prefix``,
            ``quantile_filter``, ``first_tokens``; or a custom ``module:Name``, which is called with the settings
            unless it is a weight itself.
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
