"""Measures: functionals of whole next-token distributions, with one value per position."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from falign import divergences
from falign.choices import nearest
from falign.divergences import Divergence
from falign.divergences.estimators import full_vocabulary
from falign.errors import ConfigError
from falign.numeric_fields import NumericFields
from falign.registry import Registry, is_own_name

__all__ = [
    "MEASURES",
    "Constant",
    "DivergenceTo",
    "Entropy",
    "Measure",
    "MixingMeasure",
    "TopTokens",
    "Vocabulary",
    "block_of",
    "cosines_with",
    "get_measure",
    "log_rest",
    "references_of",
]


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
        >>> Entropy()(at) / torch.tensor(2.0).log()  # bits
        tensor([1.5000])
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
