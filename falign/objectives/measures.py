"""Measures: functionals of whole next-token distributions, with one value per position."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from falign import divergences
from falign.choices import nearest
from falign.divergences import Divergence
from falign.divergences.estimators import full_vocabulary
from falign.errors import ConfigError
from falign.numeric_fields import NumericFields
from falign.objectives.vocabulary import Vocabulary
from falign.registry import Registry, is_own_name

__all__ = [
    "MEASURES",
    "Constant",
    "DivergenceTo",
    "Entropy",
    "Measure",
    "MixingMeasure",
    "block_of",
    "get_measure",
    "references_of",
]


@runtime_checkable
class Measure(Protocol):
    """Interface of a functional of the distribution at each position; these two members suffice.

    Autograd computes its gradient by the policy's log-probabilities, one block of positions at a time.

    Attributes:
        references: Names of the references that it reads whole distributions of.
    """

    @property
    def references(self) -> frozenset[str]: ...

    def __call__(self, at: Vocabulary) -> Float[Tensor, " M"]:
        """Return the value at each position.

        Args:
            at: M positions; each value may depend only on its own position, unless the measure is a
                :class:`MixingMeasure`. Scoring compares values with those of single positions, and refuses a
                measure that mixes positions without saying so.

        Returns:
            Shape (M,), not NaN where the distributions are not. Differentiable unless the measure is meant as a
            constant.
        """
        ...


@runtime_checkable
class MixingMeasure(Measure, Protocol):
    """Interface of a measure whose values depend on several positions together: a third member says on how many.

    The completion tokens of a micro-batch, one completion after the other, are split into blocks of this many
    positions. The last block has what remains. So the values depend on the composition of the micro-batches, and
    accumulation over smaller ones is not the same as one large batch.

    Attributes:
        block: Number of positions in a block, at least 2. So many positions reach the head at once.
    """

    @property
    def block(self) -> int: ...


def block_of(measure: Measure) -> int:
    """Return the number of positions that a measure reads together: 1 unless it is a :class:`MixingMeasure`.

    Args:
        measure: Any measure.

    Returns:
        At least 1.

    Raises:
        ValueError: Its ``block`` is not a positive integer.

    Example:
        >>> block_of(Entropy())
        1
    """
    if not isinstance(measure, MixingMeasure):
        return 1
    if not isinstance(measure.block, int) or measure.block < 1:
        raise ValueError(f"{type(measure).__name__}.block is {measure.block!r}; it must be a positive integer.")
    return measure.block


@dataclass(frozen=True)
class DivergenceTo(NumericFields):
    """``D_f(π‖π_k) = Σ_v π_k(v) f(π(v)/π_k(v))`` at each position.

    Attributes:
        divergence: Any f.
        reference: Name of the reference π_k.
        temperature: T, positive: both distributions are computed from ``logits/T``.

    Raises:
        ValueError: The temperature is not positive and finite.

    Source:
        :func:`falign.divergences.estimators.full_vocabulary`. The value is not multiplied by T², unlike in distillation
        with soft targets (Hinton et al., arXiv:1503.02531, Section 2).

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
        >>> at = Vocabulary(p.log(), targets=torch.tensor([0]), references={"teacher": q.log()})
        >>> DivergenceTo(divergences.get("total_variation"), "teacher")(at)
        tensor([0.2500])
    """

    divergence: Divergence
    reference: str = "reference"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r} must be positive and finite.")

    @property
    def references(self) -> frozenset[str]:
        """The name of the reference."""
        return frozenset({self.reference})

    def __call__(self, at: Vocabulary) -> Float[Tensor, " M"]:
        """Return the divergence at each position.

        Args:
            at: M positions.

        Returns:
            Shape (M,), not negative.
        """
        policy, reference = at.logprobs, at.reference(self.reference)
        if self.temperature != 1.0:
            policy, reference = (each.div(self.temperature).log_softmax(dim=-1) for each in (policy, reference))
        return full_vocabulary(self.divergence, policy, reference)


@dataclass(frozen=True)
class Constant:
    """Another measure without its gradient, which needs less memory.

    Attributes:
        measure: Any measure.

    Example:
        >>> at = Vocabulary(torch.tensor([[0.5, 0.5]]).log().requires_grad_(), targets=torch.tensor([0]))
        >>> Constant(Entropy())(at)
        tensor([0.6931])
    """

    measure: Measure

    @property
    def references(self) -> frozenset[str]:
        """Those of the measure."""
        return self.measure.references

    @torch.no_grad()
    def __call__(self, at: Vocabulary) -> Float[Tensor, " M"]:
        """Return the value at each position, a constant.

        Args:
            at: M positions.

        Returns:
            Shape (M,).
        """
        return self.measure(at)


@dataclass(frozen=True)
class Entropy:
    """``-Σ_v π(v) log π(v)`` at each position, differentiable.

    Example:
        >>> Entropy()(Vocabulary(torch.tensor([[0.5, 0.5]]).log(), targets=torch.tensor([0])))  # log 2
        tensor([0.6931])
    """

    @property
    def references(self) -> frozenset[str]:
        """Empty: the entropy reads no reference."""
        return frozenset()

    def __call__(self, at: Vocabulary) -> Float[Tensor, " M"]:
        """Return the entropy at each position.

        Args:
            at: M positions.

        Returns:
            Shape (M,), nats, not negative.
        """
        # A token of probability 0 contributes p log p = 0; 0 · -inf would be NaN.
        logprobs = at.logprobs.clamp(min=torch.finfo(at.logprobs.dtype).min)
        return (logprobs.exp() * -logprobs).sum(dim=-1).clamp(min=0.0)


MEASURES: Registry[Any] = Registry(
    "measure",
    {
        "divergence_to": DivergenceTo,
        "entropy": Entropy,
        "log_normalizer": "falign.objectives.sequence_match:LogNormalizer",
        "entropy_of": "falign.objectives.token_gates:ReferenceEntropy",
        "divergence_between": "falign.objectives.token_gates:DivergenceBetween",
        "top_k": "falign.objectives.top_k:TopK",
        "rank_top_k": "falign.objectives.ranking:RankTopK",
        "expected": "falign.objectives.expected:Expected",
        "expected_cost": "falign.objectives.expected:ExpectedCost",
        "surprisal": "falign.objectives.expected:Surprisal",
        "balanced": "falign.objectives.expected:Balanced",
        "standardized": "falign.objectives.teacher_transforms:Standardized",
        "target_split": "falign.objectives.teacher_transforms:TargetSplit",
        "sinkhorn": "falign.objectives.sinkhorn:Sinkhorn",
    },
    wanted="measure: an object with references and __call__(at), or a function that returns one",
)


def get_measure(name: str, *, field: str | None = None) -> Measure:
    """Return a measure by name, with its arguments in parentheses.

    Args:
        name: ``"entropy"``, ``"divergence_to(DIVERGENCE)"`` or another of :data:`MEASURES`. Arguments are those of the
            measure's class, in its order or by name: ``"divergence_to(jensen_shannon, teacher, temperature=2)"``. Or
            a custom ``module:Name``, without arguments.
        field: The run-file field that holds the name, for messages.

    Returns:
        The measure; equal names give equal measures.

    Raises:
        ConfigError: The name is unknown, its arguments do not fit, or the custom member is not a measure.

    Example:
        >>> get_measure("divergence_to(alpha(0.5), teacher)").references
        frozenset({'teacher'})
    """
    place = f"measure {name!r}" if field is None else f"{field}={name!r}"
    if name.count("(") != name.count(")"):
        raise ConfigError(
            f"{place}: a parenthesis is missing; write it as in 'divergence_to(jensen_shannon, teacher)'."
        )
    if "(" in name and is_own_name(own := name.partition("(")[0].strip()):
        raise ConfigError(
            f"{place}: a measure of your own has its settings in a section: write {{kind: {own!r}, ...}}, or in Python "
            "give the object."
        )
    match = None if is_own_name(name) else re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", name)
    key, text = (name, "") if match is None else (match[1], match[2])
    member: Any = MEASURES.get(key, field=field)
    if isinstance(member, Measure) and not isinstance(member, type):
        return member
    try:
        made = member(**_settings(cast("Callable[..., Any]", member), text))
    except TypeError as error:
        raise ConfigError(f"{place}: {error}; write it as in 'divergence_to(jensen_shannon, teacher)'.") from error
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error
    if not isinstance(made, Measure):
        raise ConfigError(f"{place} gives a {type(made).__name__}, which has no references or cannot be called.")
    return made


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{text!r} must be true or false.")
    return text.lower() == "true"


_READERS: dict[str, Callable[[str], Any]] = {
    "Divergence": divergences.get,
    "Measure": get_measure,
    "float": float,
    "int": int,
    "int | None": int,
    "float | None": float,
    "bool": _truth,
}
"""Readers of arguments that are given as text, by the annotations of built-in measures; any other is a name."""


def _settings(member: Callable[..., Any], text: str) -> dict[str, Any]:
    """Return the arguments of a measure from the text in its parentheses."""
    signature = inspect.signature(member)
    positional, named = [], {}
    for argument in _arguments(text):
        match = re.fullmatch(r"(\w+)\s*=\s*(.*)", argument)
        if match is None and named:
            raise ValueError(f"{argument!r} follows an argument with a name: give it a name too.")
        if match is None:
            positional.append(argument)
        else:
            named[match[1]] = match[2]
    for name in named:
        if name not in signature.parameters:
            close = nearest(name, signature.parameters)
            hint = f"; did you mean {close}?" if close else ":"
            raise ValueError(f"unknown argument {name!r}{hint} The arguments are {', '.join(signature.parameters)}.")
    given = signature.bind(*positional, **named).arguments
    return {name: _read(name, value, signature.parameters[name].annotation) for name, value in given.items()}


def _read(name: str, text: str, annotation: str) -> Any:
    """Return the value of an argument that is given as text."""
    try:
        return _READERS.get(annotation, str)(text)
    except ConfigError:
        raise  # already has its place
    except ValueError as error:
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        if (kind := annotation.partition(" ")[0]) not in wanted:
            raise
        raise ValueError(f"{name}={text} must be {wanted[kind]}.") from error


def _arguments(text: str) -> list[str]:
    """Split at the commas outside parentheses."""
    found, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return [each.strip() for each in found] if text.strip() else []


def references_of(measures: Iterable[Measure]) -> tuple[str, ...]:
    """Return the names of all references that the measures read, without repeats.

    Args:
        measures: Any measures.

    Returns:
        Names, sorted.

    Example:
        >>> references_of([Entropy(), get_measure("divergence_to(forward_kl)")])
        ('reference',)
    """
    return tuple(sorted({name for measure in measures for name in measure.references}))
