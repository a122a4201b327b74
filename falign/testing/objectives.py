"""The battery of an objective."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from falign.errors import CheckError, FalignError
from falign.objectives import (
    BaseObjective,
    CompletionBatch,
    Objective,
    complete,
    field_of,
    reduce_terms,
    total_weights,
)
from falign.testing.requirements import gradients, require, require_close

__all__ = ["check_objective", "example_batch"]

PROMPTS = torch.tensor([0, 0, 1, 1, 1, 2, 2])
LENGTHS = torch.tensor([5, 3, 4, 1, 5, 2, 4])
FAR = 1e4
MAY_BE_MISSING = frozenset({"old_logprobs", "old_values", "log_partition"})
"""Fields with a meaning where they are None: those of π itself, or estimated from the batch."""


def example_batch(
    objective: Objective, *, far: float = 1.0, fields: Mapping[str, Tensor] | None = None
) -> CompletionBatch:
    """Return just what an objective reads, of seven completions of three prompts, in float64.

    Args:
        objective: The objective.
        far: Size of the log-probabilities; beyond 1 they also take positive values, as log-ratios do.
        fields: Values of fields in place of the random ones, by the names of ``needs``.

    Returns:
        A batch; the last prompt's completions are the reference's.

    Raises:
        CheckError: The objective needs a field without an example; give it in ``fields``.

    Example:
        >>> from falign.objectives import Supervised
        >>> sorted(example_batch(Supervised()).tensors())
        ['completion_mask', 'logprobs', 'prompt_index']
    """
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.rand(*shape, generator=generator, dtype=torch.float64)

    def logprobs() -> Tensor:
        sign = 1.0 if far == 1.0 else torch.randn(7, 5, generator=generator, dtype=torch.float64).sign()
        return -draw(7, 5, scale=far) * sign

    known = {
        "reference_logprobs": logprobs(),
        "old_logprobs": logprobs(),
        "preference": torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0, 0.0, 1.0]).double(),
        "rewards": draw(7),
        "from_reference": PROMPTS == 2,
        "token_weights": draw(7, 5),
        "features": torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]).double()[:, None],
        "log_partition": -draw(7),
        "values": draw(7, 5).requires_grad_(),
        "old_values": draw(7, 5),
        "learned_rewards": draw(7).requires_grad_(),
        "margin": draw(7),
        **{name: logprobs() for name in sorted(objective.needs) if field_of(name) == "references"},
        **(fields or {}),
    }
    found: dict[str, Tensor] = {
        "logprobs": logprobs().requires_grad_(),
        "completion_mask": torch.arange(5) < LENGTHS[:, None],
        "prompt_index": PROMPTS,
    }
    for name in sorted(objective.needs):
        key = name if field_of(name) == "references" else field_of(name)
        if key not in known:
            raise CheckError(f"{type(objective).__name__} needs {name!r}, which has no example: give it in fields.")
        found[key] = known[key]
    for name in complete(objective).step_means:
        found[f"step_means.{name}"] = torch.full((7,), 0.4, dtype=torch.float64)
    for name in objective.measures:
        found[f"measures.{name}"] = draw(7, 5, scale=far).requires_grad_()
    return CompletionBatch.of(found)


def check_objective(objective: Objective, batch: CompletionBatch | None = None) -> None:
    """Check that an objective keeps the contract of :class:`falign.objectives.Objective`.

    Terms have names and one weight per loss; weights do not depend on the policy; padding, and the order of rows,
    change nothing; micro-batches of whole prompts add up to the batch; half precision is computed in float32; losses,
    gradients and metrics are finite to 10⁴ nats; a field that is missing is named.

    Args:
        objective: The objective, with or without a base class.
        batch: What it is called with; by default :func:`example_batch`, and the same with huge log-probabilities. It
            has two or more prompts, and at least two completions of each.

    Raises:
        CheckError: A rule is broken; the message has the place and the value.
        TypeError: It is no objective.

    Example:
        >>> from falign.methods import FDPO
        >>> check_objective(FDPO("jensen_shannon", beta=0.3))
    """
    whole = complete(objective)
    own = example_batch(whole) if batch is None else batch
    for check in (terms, contract, padding, order_of_rows, micro_batches, half_precision, missing_fields):
        check(whole, own)
    finite(whole, example_batch(whole, far=FAR) if batch is None else batch)


def _name(objective: BaseObjective) -> str:
    inner = getattr(objective, "objective", objective)
    return type(inner).__name__


def moving(batch: CompletionBatch) -> dict[str, Tensor]:
    """Return what carries the gradient, by name."""
    return {name: value for name, value in batch.tensors().items() if value.requires_grad}


def terms(objective: BaseObjective, batch: CompletionBatch) -> None:
    """Terms have different names and one weight per loss, and something has a gradient."""
    output = objective(batch)
    names = [term.name for term in output.terms]
    require(len(set(names)) == len(names), f"{_name(objective)}: two terms share a name: {', '.join(names)}.")
    for term in output.terms:
        require(
            term.losses.shape == term.weights.shape,
            f"{_name(objective)}: term {term.name!r} has losses of shape {tuple(term.losses.shape)} and weights of "
            f"shape {tuple(term.weights.shape)}.",
        )
    slopes = gradients(output.mean(), moving(batch))
    require(
        any(slope.abs().max() > 0 for slope in slopes.values()),
        f"{_name(objective)}: the gradient by {', '.join(slopes)} is 0; losses must not be detached.",
    )


def contract(objective: BaseObjective, batch: CompletionBatch) -> None:
    """Weights, names, scales and metrics keep the rules that a trainer checks at every step."""
    from falign.training.objective_contract import ObjectiveContract

    # As the trainer does: zeros for what the policy computes, so that weights cannot depend on it.
    blank = batch.map(lambda tensor: torch.zeros_like(tensor) if tensor.requires_grad else tensor)
    rules = ObjectiveContract()
    try:
        rules.check(rules.plan(objective(blank).terms, step=1), objective(batch), step=1)
    except FalignError as error:
        raise CheckError(f"{_name(objective)}: {error}") from error


def padding(objective: BaseObjective, batch: CompletionBatch) -> None:
    """Two more positions outside the mask, and NaN and infinity there, change nothing."""
    outside = ~batch.completion_mask

    def widened(tensor: Tensor) -> Tensor:
        if tensor.shape != outside.shape:
            return tensor
        if tensor.dtype == torch.bool:
            return F.pad(tensor, (0, 2), value=False)
        return F.pad(tensor.masked_fill(outside, torch.nan), (0, 2), value=torch.inf)

    _same(objective, batch, batch.map(widened), "padding, or values outside the mask, change")


def order_of_rows(objective: BaseObjective, batch: CompletionBatch) -> None:
    """The order of the completions changes nothing."""
    order = torch.randperm(len(batch.prompt_index), generator=torch.Generator().manual_seed(2))
    _same(objective, batch, batch.map(lambda tensor: tensor[order]), "the order of the rows changes", is_sorted=True)


def _same(
    objective: BaseObjective, batch: CompletionBatch, changed: CompletionBatch, fault: str, *, is_sorted: bool = False
) -> None:
    name = f"{_name(objective)}: {fault}"
    output, other = objective(batch), objective(changed)
    require_close(other.mean(), output.mean(), rtol=1e-12, atol=1e-14, place=f"{name} the loss")
    leaves = moving(batch)
    expected = gradients(output.mean(), leaves)
    for leaf, slope in gradients(other.mean(), leaves).items():
        require_close(slope, expected[leaf], rtol=1e-10, atol=1e-12, place=f"{name} the gradient by {leaf}")
    for metric, values in output.metrics.items():
        found = other.metrics[metric]
        if is_sorted:
            found, values = found.sort().values, values.sort().values  # noqa: PLW2901
        require_close(found, values, rtol=1e-11, atol=1e-13, place=f"{name} the metric {metric!r}")


def micro_batches(objective: BaseObjective, batch: CompletionBatch) -> None:
    """Micro-batches of whole prompts, with the denominators of the whole, add up to the loss and its gradient."""
    batch = objective.prepare(batch)
    first = batch.prompt_index == batch.prompt_index[0]
    outputs = [objective(batch.select(part)) for part in (first, ~first)]
    denominators = torch.stack([total_weights(output.terms) for output in outputs]).sum(dim=0)
    total = torch.stack([reduce_terms(output.terms, denominators) for output in outputs]).sum()
    name = f"{_name(objective)}: two micro-batches do not add up to"
    whole = objective(batch).mean()
    require_close(total, whole, rtol=1e-12, atol=1e-14, place=f"{name} the loss of the batch")
    leaves = moving(batch)
    expected = gradients(whole, leaves)
    for leaf, slope in gradients(total, leaves).items():
        require_close(slope, expected[leaf], rtol=1e-11, atol=1e-13, place=f"{name} the gradient by {leaf}")


def half_precision(objective: BaseObjective, batch: CompletionBatch) -> None:
    """Losses of half-precision inputs are those of the same numbers in float32, bit for bit."""
    for dtype in (torch.bfloat16, torch.float16):
        half = batch.map(lambda tensor, d=dtype: tensor.detach().to(d) if tensor.is_floating_point() else tensor)
        wide = half.map(lambda tensor, d=dtype: tensor.float() if tensor.dtype == d else tensor)
        for term, other in zip(objective(half).terms, objective(wide).terms, strict=True):
            name = f"{_name(objective)}: term {term.name!r} of {dtype} inputs"
            require(term.losses.dtype == torch.float32, f"{name} is in {term.losses.dtype}; compute it in float32.")
            require_close(term.losses, other.losses, rtol=0.0, atol=0.0, place=f"{name} differs from float32")


def finite(objective: BaseObjective, batch: CompletionBatch) -> None:
    """Losses, gradients and metrics are finite in float32 and bfloat16."""
    largest = batch.logprobs.detach().abs().max().item()
    for dtype in (torch.float32, torch.bfloat16):
        leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in moving(batch).items()}
        rest = {name: value for name, value in batch.tensors().items() if name not in leaves}
        narrow = {name: value.to(dtype) if value.is_floating_point() else value for name, value in rest.items()}
        output = objective(CompletionBatch.of({**narrow, **leaves}))
        found = {
            "the loss": output.mean(),
            **{f"the gradient by {name}": slope for name, slope in gradients(output.mean(), leaves).items()},
            **{f"the sum of the metric {name!r}": value.double().sum() for name, value in output.metrics.items()},
        }
        for what, value in found.items():
            require(
                bool(value.isfinite().all()),
                f"{_name(objective)}: {what} is NaN or infinite in {dtype} with log-probabilities up to {largest:.0f} "
                "nats: stay in log space, and mask before the formula instead of after it.",
            )


def missing_fields(objective: BaseObjective, batch: CompletionBatch) -> None:
    """A field of ``needs`` that is missing is named in an error, not replaced."""
    always = {"logprobs", "completion_mask", "prompt_index"}
    # A mean over the step's own rows is then that of the batch.
    own = {f"step_means.{name}" for name, mean in objective.step_means.items() if mean.rows == "own"}
    for name in batch.tensors().keys() - always - MAY_BE_MISSING - own:
        without = CompletionBatch.of({key: value for key, value in batch.tensors().items() if key != name})
        key = name.partition(".")[2] or name
        try:
            objective(without)
        except (ValueError, TypeError, KeyError) as error:
            require(
                key in str(error), f"{_name(objective)}: without {name} it raises {error!r}, which does not name it."
            )
            continue
        raise CheckError(
            f"{_name(objective)}: it names {name} in needs or measures, and without it returns a loss: read it with "
            f"batch.require({name!r}), or leave it out."
        )
