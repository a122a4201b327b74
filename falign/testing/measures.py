"""The battery of a measure."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from falign.errors import CheckError
from falign.objectives import Measure, Vocabulary
from falign.objectives.measures import block_of
from falign.scoring.model_parts import Head
from falign.scoring.vocabulary import Distribution, token_scores
from falign.testing.requirements import gradients, require, require_close

__all__ = ["check_measure"]

VOCABULARY, WIDTH = 11, 6


def check_measure(
    measure: Measure, *, gradient: Literal["value", "stopped", "none"] = "value", positions: int = 12
) -> None:
    """Check that a measure keeps the contract of :class:`falign.objectives.Measure`.

    One real number per position; a position's value does not depend on the others, unless the measure says so; the
    gradient is that of difference quotients; values and gradients are finite where both distributions are nearly
    one-hot; and the chunked visit to the vocabulary gives the same values and gradients as the whole tensor.

    Args:
        measure: The measure.
        gradient: ``"value"``: it has the gradient of its value. ``"stopped"``: another one, because some factor is a
            constant on purpose. ``"none"``: it is a constant.
        positions: Number of positions; at least two blocks of a measure that mixes them.

    Raises:
        CheckError: A rule is broken; the message has the place and the value.

    Example:
        >>> from falign.objectives import Entropy
        >>> check_measure(Entropy())
    """
    if isinstance(measure, type) or not isinstance(measure, Measure):
        raise CheckError(
            f"{measure!r:.80} is not a measure: it needs references (a frozenset of names) and __call__(at)."
        )
    name = type(measure).__name__
    hidden, head, others = _models(measure, positions)
    targets = torch.arange(positions) % VOCABULARY
    value = measure(_at(measure, head(hidden), head, others, targets))
    require(isinstance(value, Tensor), f"{name} returned a {type(value).__name__}; it must return a tensor.")
    require(
        value.shape == (positions,) and value.is_floating_point(),
        f"{name} returned {value.dtype} of shape {tuple(value.shape)} for {positions} positions; it must return one "
        f"real number for each: ({positions},).",
    )
    require(bool(value.isfinite().all()), f"{name} is {value.tolist()} at ordinary distributions; it must be finite.")
    require(
        value.requires_grad == (gradient != "none"),
        f"{name} has {'a' if value.requires_grad else 'no'} gradient, and gradient={gradient!r}.",
    )
    _separate(measure, name, hidden, head, others, targets)
    if gradient == "value":
        _slope(measure, name, hidden, head, others, targets)
    _extreme(measure, name, head, others, targets)
    _visited(measure, name, hidden, head, others, targets)


def _models(measure: Measure, positions: int) -> tuple[Tensor, nn.Linear, dict[str, Tensor]]:
    """Hidden states and head of a policy, and logits of each reference, in float64."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.float64)
    head.weight = nn.Parameter(draw(VOCABULARY, WIDTH), requires_grad=False)
    others = {name: draw(positions, WIDTH) @ head.weight.T for name in sorted(measure.references)}
    return draw(positions, WIDTH).requires_grad_(), head, others


def _at(measure: Measure, logits: Tensor, head: nn.Linear, others: dict[str, Tensor], targets: Tensor) -> Vocabulary:
    return Vocabulary(
        logprobs=logits.log_softmax(dim=-1),
        targets=targets,
        references={name: each.log_softmax(dim=-1) for name, each in others.items()},
        log_normalizer=logits.logsumexp(dim=-1, keepdim=True),
        embeddings=head.weight,
    )


def _separate(
    measure: Measure, name: str, hidden: Tensor, head: nn.Linear, others: dict[str, Tensor], targets: Tensor
) -> None:
    """A position's value depends on its own block only; a block is one position unless the measure says otherwise."""
    block = block_of(measure)
    whole = measure(_at(measure, head(hidden), head, others, targets)) if block == 1 else None
    if whole is None:
        return
    for row in range(len(targets)):
        own = slice(row, row + 1)
        alone = measure(
            _at(measure, head(hidden[own]), head, {key: each[own] for key, each in others.items()}, targets[own])
        )
        place = f"{name}: position {row} has another value beside others than alone (state a block if it mixes them)"
        require_close(alone, whole[own], rtol=1e-9, atol=1e-12, place=place)


def _slope(
    measure: Measure, name: str, hidden: Tensor, head: nn.Linear, others: dict[str, Tensor], targets: Tensor
) -> None:
    step, direction = 1e-6, torch.randn(hidden.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    def total(moved: Tensor) -> Tensor:
        return _of_blocks(measure, head(moved), head, others, targets).sum()

    (slope,) = torch.autograd.grad(total(hidden), hidden)
    base = hidden.detach()
    quotient = (total(base + step * direction) - total(base - step * direction)) / (2 * step)
    require_close(
        (slope * direction).sum(),
        quotient,
        rtol=1e-5,
        atol=1e-7,
        place=f"{name}: the gradient is not that of its value (if a factor is a constant on purpose, pass "
        "gradient='stopped')",
    )


def _of_blocks(measure: Measure, logits: Tensor, head: nn.Linear, others: dict[str, Tensor], targets: Tensor) -> Tensor:
    """The value at every position, in the measure's blocks."""
    block = block_of(measure)
    if block == 1:
        return measure(_at(measure, logits, head, others, targets))
    parts = [slice(start, start + block) for start in range(0, len(targets), block)]
    return torch.cat(
        [
            measure(_at(measure, logits[p], head, {key: each[p] for key, each in others.items()}, targets[p]))
            for p in parts
        ]
    )


def _extreme(measure: Measure, name: str, head: nn.Linear, others: dict[str, Tensor], targets: Tensor) -> None:
    """Nearly one-hot distributions, apart and together, in float32."""
    for sign in (1.0, -1.0):
        logits = torch.zeros(len(targets), VOCABULARY)
        logits[:, 0], logits[:, 1] = 300.0, -300.0
        references = {key: sign * logits for key in others}
        leaf = logits.clone().requires_grad_()
        value = _of_blocks(measure, leaf, head.float(), references, targets)
        where = "at distributions that are nearly one-hot, in float32"
        require(
            bool(value.isfinite().all()), f"{name} is {value.detach().tolist()[:3]} ... {where}; it must be finite."
        )
        if value.requires_grad:
            (slope,) = torch.autograd.grad(value.sum(), leaf)
            require(bool(slope.isfinite().all()), f"{name} has a gradient that is NaN or infinite {where}.")
    head.double()


def _visited(
    measure: Measure, name: str, hidden: Tensor, head: nn.Linear, others: dict[str, Tensor], targets: Tensor
) -> None:
    """The chunked visit to the vocabulary agrees with the whole tensor."""
    direct = _of_blocks(measure, head(hidden), head, others, targets)
    policy = Distribution(hidden, Head(embeddings=head))
    references = {key: Distribution(each, Head(embeddings=nn.Identity())) for key, each in others.items()}
    chunk = max(5, block_of(measure))
    visited = token_scores(policy, targets, measures={"own": measure}, references=references, chunk_tokens=chunk)
    value = visited.measures["own"]
    place = f"{name}: the visit in chunks of {chunk} positions differs in"
    require_close(value, direct, rtol=1e-9, atol=1e-12, place=f"{place} its value")
    if direct.requires_grad:
        weight = torch.arange(1.0, len(targets) + 1, dtype=torch.float64)
        expected = gradients((weight * direct).sum(), {"hidden": hidden})["hidden"]
        found = gradients((weight * value).sum(), {"hidden": hidden})["hidden"]
        require_close(found, expected, rtol=1e-8, atol=1e-11, place=f"{place} its gradient")
