"""Losses that are objectives: the batch that enumerates a world for them, and their mean over it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from falign.audit.functions import RELATIVE
from falign.audit.samples import CHOSEN, REJECTED, MeanGradient, PairSlopes, Samples, mean_of, same_slopes
from falign.audit.world import COMPLETIONS, MASK, SHIFT, World
from falign.divergences import Divergence
from falign.errors import ConfigError
from falign.objectives import BaseObjective, CompletionBatch, Term, complete, field_of, reference_names
from falign.objectives.measures import block_of

__all__ = ["ObjectiveLoss"]

N = len(COMPLETIONS)
FIRST, SECOND = torch.cartesian_prod(torch.arange(N), torch.arange(N)).unbind(dim=-1)
GROUPED = torch.stack([FIRST, SECOND], dim=-1).flatten()
"""The completions of every group of two samples, side by side: an advantage compares the samples of a group."""

CONSTANTS = {"rewards": 0.0, "values": 0.0, "old_values": 0.0, "token_weights": 1.0}
"""Fields that are the same for every completion: with equal rewards, what remains of a loss is what regularizes it."""


@dataclass(frozen=True)
class _Enumerated:
    """A batch of everything that can be sampled.

    Attributes:
        batch: The completions.
        rows: The completion of each row, in the enumeration.
        units: Index of the group of each row; a group is what one loss may compare.
        law: Probability of each row.
    """

    batch: CompletionBatch
    rows: Int[Tensor, " M"]
    units: Int[Tensor, " M"]
    law: Float[Tensor, " M"]

    def select(self, kept: Tensor) -> _Enumerated:
        return _Enumerated(self.batch.select(kept), self.rows[kept], self.units[kept], self.law[kept])

    def law_of(self, losses: Tensor) -> Tensor | None:
        """Return the probability of each loss of a term, by its number; None if the losses belong to no known unit."""
        _, inverse, counts = torch.unique(self.units, return_inverse=True, return_counts=True)
        per_unit = torch.zeros(len(counts), dtype=torch.float64).index_add(0, inverse, self.law)
        stored = self.batch.from_reference
        laws = [self.law, per_unit]
        if stored is not None:
            laws += [self.law[~stored], self.law[stored]]
        law = next((each for each in laws if len(each) == losses.shape[0]), None) if losses.ndim else None
        return None if law is None else law.view(-1, *[1] * (losses.ndim - 1))


def _divergences_in(value: Any) -> Iterator[Divergence]:
    """Yield the divergences among the fields of a dataclass, and of those inside it."""
    if isinstance(value, Divergence):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from _divergences_in(getattr(value, each.name))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _divergences_in(each)
    elif isinstance(value, Mapping):
        yield from _divergences_in(tuple(value.values()))


@dataclass(frozen=True)
class ObjectiveLoss:
    """An objective, whose needs and measures are supplied.

    Attributes:
        objective: The objective.
        name: Its name in messages.
    """

    objective: BaseObjective
    name: str

    @classmethod
    def of(cls, objective: object, name: str) -> ObjectiveLoss:
        """Return the loss of any objective, with or without a base class; of schedules, that of the first step."""
        return cls(complete(objective).at(0), name)  # pyright: ignore[reportArgumentType]

    @property
    def references(self) -> tuple[str, ...]:
        """See :class:`falign.audit.samples.Subject`."""
        found = reference_names(self.objective.needs, self.objective.measures)
        return tuple(sorted(found, key=lambda name: (name != "reference", name)))

    @property
    def of_pairs(self) -> bool:
        """See :class:`falign.audit.samples.Subject`."""
        return bool(self.objective.preference_kinds)

    @property
    def reads_rewards(self) -> bool:
        """See :class:`falign.audit.samples.Subject`."""
        return "rewards" in self.objective.needs

    @property
    def divergences(self) -> tuple[Divergence, ...]:
        """See :class:`falign.audit.samples.Subject`."""
        return tuple(_divergences_in(self.objective))

    def mean_gradient(self, world: World, samples: Samples) -> MeanGradient:
        """See :class:`falign.audit.samples.Subject`.

        Raises:
            ConfigError: The objective cannot be enumerated.
        """
        given = self._samples(world, samples)
        slopes = self._slopes(given)
        leaves = {
            "logprobs": world.token_logprobs("policy")[given.rows],
            **{
                f"measures.{name}": world.measure(measure)[given.rows]
                for name, measure in self.objective.measures.items()
            },
        }
        # The slopes hold the probabilities already; of the size, they are taken out again.
        ones = torch.ones_like(given.law)
        mean = mean_of(world, ones, {name: (slope, leaves[name]) for name, slope in slopes.items()})
        size = sum((slope.square() / given.law[:, None]).sum().item() for slope in slopes.values())
        return MeanGradient(mean.gradient, size**0.5)

    def pair_slopes(self, world: World) -> PairSlopes:
        """See :class:`falign.audit.samples.Subject`.

        Raises:
            ConfigError: The objective cannot be enumerated.
        """
        if "pairs" not in self.objective.preference_kinds:
            raise ConfigError(
                f"{self.name} reads {', '.join(sorted(self.objective.preference_kinds))}, not pairs: the gradient of a "
                "loss of one completion fits every divergence with some strength, so that there is nothing to compare."
            )
        rows = torch.stack([CHOSEN, REJECTED], dim=-1).flatten()
        units = torch.arange(len(CHOSEN)).repeat_interleave(2)
        preference = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(CHOSEN))
        law = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
        batch = self._batch(world, rows, units, "pairs", preference=preference)
        found = []
        for each in (batch, self._moved(batch, rows)):
            slopes = self._slopes(_Enumerated(each, rows, units, law))
            own = slopes.pop("logprobs")
            beside = sum((slope.square().sum(dim=-1) for slope in slopes.values()), torch.zeros_like(own[:, 0]))
            found.append(PairSlopes(own[0::2], own[1::2], beside[0::2] + beside[1::2]))
        here, moved = found
        return here._replace(of_ratios=same_slopes(here, moved))

    def _moved(self, batch: CompletionBatch, rows: Tensor) -> CompletionBatch:
        """Return the batch with other log-probabilities and the same ratios."""

        def move(name: str, value: Tensor) -> Tensor:
            if name == "logprobs":
                return (value.detach() + SHIFT[rows]).requires_grad_()
            return value + SHIFT[rows] if field_of(name) in ("reference_logprobs", "references") else value

        return CompletionBatch.of({name: move(name, value) for name, value in batch.tensors().items()})

    def _samples(self, world: World, samples: Samples) -> _Enumerated:
        """All groups of two samples; if the objective tells stored samples of the reference apart, all of them too."""
        law = world.law(samples)
        rows, units = GROUPED, torch.arange(N * N).repeat_interleave(2)
        drawn = (law[FIRST] * law[SECOND]).repeat_interleave(2) / 2
        if "from_reference" not in self.objective.needs:
            return self._with_step_means(_Enumerated(self._batch(world, rows, units, samples), rows, units, drawn))
        stored = torch.arange(N)
        rows, units = torch.cat([rows, stored]), torch.cat([units, N * N + stored])
        flags = torch.arange(len(rows)) >= len(drawn)
        batch = self._batch(world, rows, units, samples, from_reference=flags)
        return self._with_step_means(_Enumerated(batch, rows, units, torch.cat([drawn, world.law("reference")])))

    def _with_step_means(self, given: _Enumerated) -> _Enumerated:
        """Add the exact means over a step of everything that can be sampled."""
        means = {}
        for name, mean in self.objective.step_means.items():
            if mean.rows != "own":
                raise ConfigError(f"{self.name} cannot be enumerated: its mean {name!r} is over {mean.rows} rows.")
            with torch.no_grad():
                values, weights = (each.double() for each in mean(given.batch))
            law = given.law.view(-1, *[1] * (values.ndim - 1))
            means[name] = ((law * values * weights).sum() / (law * weights).sum()).expand(len(given.rows))
        return replace(given, batch=replace(given.batch, step_means=means)) if means else given

    def _batch(self, world: World, rows: Tensor, units: Tensor, samples: Samples, **known: Tensor) -> CompletionBatch:
        for name, measure in self.objective.measures.items():
            if block_of(measure) > 1:
                raise ConfigError(
                    f"{self.name} cannot be enumerated: its measure {name!r} mixes positions of a batch, so that its "
                    "mean over a batch is no mean over completions."
                )
        sampled_by = "old" if samples == "old" else "policy"
        given: dict[str, Tensor] = {
            "logprobs": world.token_logprobs("policy").detach()[rows].requires_grad_(),
            "completion_mask": MASK[rows],
            "prompt_index": units,
        }
        for name, measure in self.objective.measures.items():
            given[f"measures.{name}"] = world.measure(measure).detach()[rows].requires_grad_()
        for need in self.objective.needs:
            field, _, key = need.partition(".")
            if field in known:
                given[field] = known[field]
            elif field == "references":
                given[need] = world.token_logprobs(key)[rows]
            elif field in ("reference_logprobs", "old_logprobs"):
                model = sampled_by if field == "old_logprobs" else "reference"
                given[field] = world.token_logprobs(model).detach()[rows]
            elif field in CONSTANTS:
                shape = rows.shape if field == "rewards" else MASK[rows].shape
                given[field] = torch.full(shape, CONSTANTS[field], dtype=torch.float64)
            elif field == "features":
                given[field] = torch.ones(len(rows), 1, dtype=torch.float64)
            elif field != "log_partition":
                raise ConfigError(
                    f"{self.name} needs {need!r}, which the audit has no value for: it supplies log-probabilities of "
                    "the policy, of references and of an old policy, measures, pairs, and equal rewards."
                )
        batch = CompletionBatch.of(given)
        if "log_partition" not in self.objective.needs:
            return batch
        log_partition = torch.full(rows.shape, self._log_partition(world), dtype=torch.float64)
        return replace(batch, log_partition=log_partition)

    def _log_partition(self, world: World) -> float:
        """The exact ``log Z``, from every sample of the reference."""
        given = {
            "logprobs": world.token_logprobs("reference"),
            "completion_mask": MASK,
            "prompt_index": torch.zeros(N, dtype=torch.long),
            "reference_logprobs": world.token_logprobs("reference"),
            "old_logprobs": world.token_logprobs("reference"),
            "features": torch.ones(N, 1, dtype=torch.float64),
        }
        log_weights = self.objective.log_weights(CompletionBatch.of(given))
        return torch.logsumexp(world.sequence_logprobs("reference") + log_weights, dim=0).item()

    def _slopes(self, given: _Enumerated) -> dict[str, Tensor]:
        """The gradient of the mean loss by what carries the policy, shape (M, T) each."""
        leaves = {
            name: value
            for name, value in given.batch.tensors().items()
            if value.requires_grad and field_of(name) != "values"
        }
        terms = self._terms(given)
        total, denominators = torch.zeros((), dtype=torch.float64), []
        for term in terms:
            law = self._law(given, term)
            denominators.append((law * term.weights).sum())
            if denominators[-1] > 0:
                total = total + term.scale * (law * term.losses * term.weights).sum() / denominators[-1]
        if not total.requires_grad and self.reads_rewards:  # as of groups whose rewards are equal
            return {name: torch.zeros_like(value) for name, value in leaves.items()}
        if not total.requires_grad:
            raise ConfigError(f"{self.name} has losses without a gradient: nothing is minimized.")
        slopes = dict(self._grad(total, leaves))
        for name, slope in slopes.items():
            if not slope.isfinite().all():
                row = int((~slope.isfinite()).nonzero()[0][0])
                raise ConfigError(
                    f"{self.name} cannot be enumerated: its gradient by {name} is NaN or infinite at row {row}."
                )
        self._require_separate(given, leaves, slopes, denominators)
        return slopes

    def _terms(self, given: _Enumerated) -> tuple[Term, ...]:
        return self.objective(given.batch).terms

    def _law(self, given: _Enumerated, term: Term) -> Tensor:
        law = given.law_of(term.losses)
        if law is None:
            raise ConfigError(
                f"{self.name} cannot be enumerated: term {term.name!r} has losses of shape {tuple(term.losses.shape)} "
                f"for {len(given.rows)} completions of {len(given.units.unique())} prompts, not one per completion, "
                "token or prompt."
            )
        return law

    def _grad(self, total: Tensor, leaves: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return list(zip(leaves, found, strict=True))

    def _require_separate(
        self, given: _Enumerated, leaves: dict[str, Tensor], slopes: dict[str, Tensor], denominators: list[Tensor]
    ) -> None:
        """Refuse losses that depend on other prompts: their mean over a batch is no mean over prompts."""
        kept = given.units % 2 == 0
        half = given.select(kept)
        total = torch.zeros((), dtype=torch.float64)
        for term, denominator in zip(self._terms(half), denominators, strict=True):
            if denominator > 0:
                total = total + term.scale * (self._law(half, term) * term.losses * term.weights).sum() / denominator
        for name, slope in self._grad(total, leaves):
            scale = slopes[name].abs().max().item()
            if not torch.allclose(slope[kept], slopes[name][kept], RELATIVE, 1e-9 * scale):
                row = int((slope - slopes[name])[kept].abs().amax(dim=-1).argmax())
                raise ConfigError(
                    f"{self.name} cannot be enumerated: its losses depend on the completions of other prompts in the "
                    f"batch (the gradient by {name} at row {row} changes with them)."
                )
