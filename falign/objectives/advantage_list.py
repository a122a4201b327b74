"""Lists of advantages: the first entry makes advantages, often from rewards; the others transform them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from falign.choices import shown
from falign.divergences.base import numbers
from falign.numeric_fields import NumericFields
from falign.objectives.advantages import ADVANTAGES, Advantage
from falign.objectives.batch import CompletionBatch
from falign.objectives.groups import groups_of, total
from falign.raised import calling
from falign.registry import Registry

__all__ = [
    "TRANSFORMS",
    "AdvantageEntry",
    "AdvantageList",
    "AdvantageTransform",
    "BatchAdvantage",
    "ace",
    "entries_of",
    "get_transform",
    "stcr",
]


@runtime_checkable
class BatchAdvantage(Protocol):
    """Interface of an advantage that reads more of a rollout than its rewards; the first entry of a list.

    Attributes:
        needs: Optional fields of :class:`CompletionBatch` that it reads, before the first update on a rollout.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    def advantages(self, batch: CompletionBatch) -> Tensor:
        """Return the advantages of a whole rollout.

        Args:
            batch: The rollout before its first update, with :attr:`needs`; ``logprobs`` are the sampler's.

        Returns:
            Shape (N,), or (N, T) for an advantage of each token.
        """
        ...


@runtime_checkable
class AdvantageTransform(Protocol):
    """Interface of a transform of advantages; an entry of a list after the first.

    Attributes:
        needs: As :attr:`BatchAdvantage.needs`.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    def transform(self, advantages: Float[Tensor, "N T"], batch: CompletionBatch) -> Float[Tensor, "N T"]:
        """Return other advantages.

        Args:
            advantages: Those of the entries before, shape (N, T), 0 outside the mask.
            batch: As for :meth:`BatchAdvantage.advantages`.

        Returns:
            Shape (N, T).
        """
        ...


AdvantageEntry = str | Advantage | BatchAdvantage | AdvantageTransform | Callable[[Tensor, CompletionBatch], Tensor]
"""An entry of a list: a name, an object, or a function: of rewards and prompt index if it is the first, else of
advantages and batch."""


@dataclass(frozen=True)
class _OfRewards:
    """A function of rewards and prompt index."""

    function: Advantage
    needs: frozenset[str] = frozenset({"rewards"})

    def advantages(self, batch: CompletionBatch) -> Tensor:
        rewards = batch.require("rewards")
        with calling("advantage", self.function):
            return self.function(rewards, batch.prompt_index)


@dataclass(frozen=True)
class _Plain:
    """A function of advantages and batch, which reads fields that the objective reads anyway."""

    function: Callable[[Tensor, CompletionBatch], Tensor]
    needs: frozenset[str] = frozenset()

    def transform(self, advantages: Float[Tensor, "N T"], batch: CompletionBatch) -> Tensor:
        with calling("advantage", self.function):
            return self.function(advantages, batch)


@dataclass(frozen=True)
class _Ace(NumericFields):
    alpha: float
    length_norm: str
    kernel: str
    cap: float | None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"ace: alpha={self.alpha!r} must be finite and not negative.")
        if self.length_norm not in ("token", "none"):
            raise ValueError(f"ace: length_norm={self.length_norm!r}: choose 'token' or 'none'.")
        if self.kernel not in ("softplus", "relu"):
            raise ValueError(f"ace: kernel={self.kernel!r}: choose 'softplus' or 'relu'.")
        if self.cap is not None and not 1 <= self.cap < math.inf:
            raise ValueError(f"ace: cap={self.cap!r} must be finite and at least 1.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reference_logprobs"})

    def transform(self, advantages: Float[Tensor, "N T"], batch: CompletionBatch) -> Float[Tensor, "N T"]:
        confidence = batch.sequence_sum(batch.log_ratio.detach())
        if self.length_norm == "token":
            confidence = confidence / batch.num_tokens
        factor = 1 + self.alpha * (F.softplus(confidence) if self.kernel == "softplus" else confidence.relu())
        factor = factor if self.cap is None else factor.clamp(max=self.cap)
        return torch.where(advantages < 0, advantages * factor[:, None], advantages)


def ace(
    alpha: float = 1.0,
    *,
    length_norm: Literal["token", "none"] = "token",
    kernel: Literal["softplus", "relu"] = "softplus",
    cap: float | None = None,
) -> AdvantageTransform:
    """Multiply negative advantages by ``1 + α softplus(c)``, with ``c = log π/π_ref`` of the completion.

    A wrong completion that became more likely than under the reference is punished more. Positive advantages stay, so
    the mean over a group is no longer 0. ``c`` is taken before the first update on the rollout, as a constant. At the
    reference c = 0, where softplus already gives ``1 + α log 2``; the kernel ``relu`` gives 1.

    Args:
        alpha: α, not negative; 0 changes nothing.
        length_norm: ``"token"`` divides c by the completion's length. With ``"none"`` c is a sum over tokens, which
            reaches hundreds of nats for long completions, and the factor with it.
        kernel: ``"softplus"``, or ``"relu"`` for ``max(c, 0)``.
        cap: Upper bound of the factor, at least 1; none by default.

    Returns:
        The transform, an entry of a list after the first.

    Raises:
        ValueError: An argument is out of range.

    Source:
        Xu et al., ACE (arXiv:2602.21420). No code was published: the form ``1 + α softplus(c)`` and the absence of a
        length norm there are not settled. Softplus rather than ReLU is the paper's; the length norm is falign's.

    Example:
        >>> batch = CompletionBatch(
        ...     logprobs=torch.tensor([[-1.0, -1.0]]),
        ...     reference_logprobs=torch.tensor([[-2.0, -2.0]]),
        ...     completion_mask=torch.ones(1, 2, dtype=torch.bool),
        ...     prompt_index=torch.tensor([0]),
        ... )
        >>> ace(alpha=2.0, kernel="relu").transform(torch.tensor([[-0.5, -0.5]]), batch)
        tensor([[-1.5000, -1.5000]])
    """
    return _Ace(alpha, length_norm, kernel, cap)


@dataclass(frozen=True)
class _Stcr(NumericFields):
    rate: float
    pass_reward: float

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ValueError(f"stcr: rate={self.rate!r} must be positive and finite.")
        if not math.isfinite(self.pass_reward):
            raise ValueError(f"stcr: pass_reward={self.pass_reward!r} must be finite.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"rewards"})

    def transform(self, advantages: Float[Tensor, "N T"], batch: CompletionBatch) -> Float[Tensor, "N T"]:
        rewards, lengths = batch.require("rewards"), batch.num_tokens.to(advantages.dtype)
        groups = groups_of(batch.prompt_index)
        right = rewards >= self.pass_reward
        number = total(right.to(lengths.dtype), groups)
        mean = total(lengths.masked_fill(~right, 0.0), groups) / number.clamp(min=1)
        excess = torch.where(~right & (number > 0), (lengths - mean).clamp(min=0.0), torch.zeros_like(lengths))
        # 2 - (1 + rate)^-excess, exactly 1 where the excess is 0.
        factor = 1 - torch.expm1(-excess * math.log1p(self.rate))
        return advantages * factor[:, None]


def stcr(*, rate: float = 1e-5, pass_reward: float = 1.0) -> AdvantageTransform:
    """Multiply the advantage of a wrong completion of L tokens by ``2 - (1 + rate)^-(L - L̄)`` where it is too long.

    ``L̄`` is the mean length of the right completions of its prompt. The factor is 1 for right completions, for wrong
    ones not longer than L̄, and for prompts without a right completion.

    Args:
        rate: Growth per token of excess; at the published 1e-5 a thousand tokens more give the factor 1.01.
        pass_reward: A completion with at least this reward is right.

    Returns:
        The transform, an entry of a list after the first.

    Raises:
        ValueError: The rate is not positive, or ``pass_reward`` is not finite.

    Source:
        APO, asymmetric policy optimization: the part called STCR, from its code.

    Example:
        >>> batch = CompletionBatch(
        ...     logprobs=torch.zeros(2, 3),
        ...     completion_mask=torch.tensor([[True, True, True], [True, False, False]]),
        ...     prompt_index=torch.tensor([0, 0]),
        ...     rewards=torch.tensor([0.0, 1.0]),
        ... )
        >>> stcr(rate=1.0).transform(torch.tensor([[-1.0, -1.0, -1.0], [1.0, 0.0, 0.0]]), batch)
        tensor([[-1.7500, -1.7500, -1.7500],
                [ 1.0000,  0.0000,  0.0000]])
    """
    return _Stcr(rate, pass_reward)


TRANSFORMS: Registry[Any] = Registry(
    "transform of advantages",
    {"ace": ace, "stcr": stcr},
    wanted="transform of advantages: a function of advantages and batch, or an object with needs and transform",
)


def get_transform(name: str, *, field: str | None = None) -> AdvantageTransform:
    """Return a transform of advantages by name, with its default settings.

    Args:
        name: ``ace``, ``stcr``; or a custom ``module:name``: an :class:`AdvantageTransform`, its class, or a function
            of advantages, shape (N, T), and batch.
        field: The run-file field that holds the name, for messages.

    Returns:
        The transform.

    Raises:
        ValueError: The name is unknown.

    Example:
        >>> get_transform("ace") == ace(alpha=1.0)
        True
    """
    member = TRANSFORMS.get(name, field=field)
    return _as_transform(member() if name in TRANSFORMS.members or isinstance(member, type) else member)


def _as_transform(entry: Any) -> AdvantageTransform:
    if isinstance(entry, str):
        return get_transform(entry)
    if isinstance(entry, AdvantageTransform):
        return entry
    if isinstance(entry, BatchAdvantage) or not callable(entry):
        raise ValueError(
            f"advantage has {shown(entry)} after the first entry, which does not transform advantages: give a function "
            "of advantages and batch, or an object with needs and transform."
        )
    return _Plain(cast("Callable[[Tensor, CompletionBatch], Tensor]", entry))


def _as_source(entry: Any) -> BatchAdvantage:
    if entry in TRANSFORMS.members if isinstance(entry, str) else isinstance(entry, AdvantageTransform):
        raise ValueError(
            f"advantage begins with {shown(entry)}, which only transforms advantages: begin the list with one of "
            f"{', '.join(ADVANTAGES.names())}, gae, or a function of rewards and prompt_index."
        )
    found = ADVANTAGES.get(entry) if isinstance(entry, str) else entry
    if isinstance(found, type):
        found = found()
    if isinstance(found, BatchAdvantage):
        return found
    if not callable(found):
        raise ValueError(f"advantage is {shown(found)}: give a name, or a function of rewards and prompt_index.")
    return _OfRewards(cast("Advantage", found))


def entries_of(advantage: Any) -> tuple[Any, ...]:
    """Return the entries of a list of advantages, or of a single one.

    Args:
        advantage: An entry, or several in order.

    Returns:
        The entries.

    Raises:
        ValueError: The list is empty.

    Example:
        >>> entries_of("leave_one_out"), entries_of(["gae", "ace"])
        (('leave_one_out',), ('gae', 'ace'))
    """
    entries = tuple(advantage) if isinstance(advantage, list | tuple) else (advantage,)
    if not entries:
        raise ValueError("advantage is an empty list: give one or more entries, such as leave_one_out.")
    return entries


@dataclass(frozen=True)
class AdvantageList:
    """The advantages of a rollout: those of a source, changed by transforms in order.

    Attributes:
        source: Makes advantages; None if they are given to :meth:`transformed`.
        transforms: Applied in order.

    Example:
        >>> from falign.objectives.advantages import group_centred
        >>> sorted(AdvantageList.of([group_centred, ace(alpha=0.5)]).needs)
        ['reference_logprobs', 'rewards']
    """

    source: BatchAdvantage | None
    transforms: tuple[AdvantageTransform, ...] = ()

    @classmethod
    def of(cls, advantage: Any) -> AdvantageList:
        """Return the list of entries that may be names; ``"gae"`` as the first one stands for no source.

        Args:
            advantage: An entry, or several in order.

        Returns:
            The list.

        Raises:
            ValueError: A name is unknown, the list is empty, or an entry cannot stand in its place.
        """
        first, *others = entries_of(advantage)
        return cls(None if first == "gae" else _as_source(first), tuple(_as_transform(each) for each in others))

    @property
    def needs(self) -> frozenset[str]:
        """Fields that source and transforms read."""
        parts = [each.needs for each in self.transforms] + ([] if self.source is None else [self.source.needs])
        return frozenset[str]().union(*parts)

    def __call__(self, batch: CompletionBatch) -> Float[Tensor, "N T"]:
        """Return the advantages of a whole rollout.

        Args:
            batch: The rollout before its first update.

        Returns:
            Shape (N, T), 0 outside the mask.

        Raises:
            ValueError: A needed field is None, or an entry returns another shape.
        """
        assert self.source is not None
        mask = batch.completion_mask
        with calling("advantage", self.source):
            made = self.source.advantages(batch)
        made = numbers(made, "advantages")
        if made.shape == mask.shape[:1]:
            made = made[:, None].expand(mask.shape)
        return self.transformed(_of_tokens(made, batch), batch)

    def transformed(self, advantages: Float[Tensor, "N T"], batch: CompletionBatch) -> Float[Tensor, "N T"]:
        """Return given advantages after all transforms.

        Args:
            advantages: Shape (N, T).
            batch: As for a call.

        Returns:
            Shape (N, T), 0 outside the mask.

        Raises:
            ValueError: A needed field is None, or a transform returns another shape.
        """
        for each in self.transforms:
            with calling("advantage", each):
                made = each.transform(advantages, batch)
            advantages = _of_tokens(numbers(made, "advantages"), batch)
        return advantages


def _of_tokens(advantages: Tensor, batch: CompletionBatch) -> Float[Tensor, "N T"]:
    mask = batch.completion_mask
    if advantages.shape != mask.shape:
        raise ValueError(
            f"An advantage has shape {tuple(advantages.shape)} for {mask.shape[0]} completions of at most "
            f"{mask.shape[1]} tokens: return shape (N,) from the first entry of the list, or (N, T) from any."
        )
    return advantages.masked_fill(~mask, 0.0)
