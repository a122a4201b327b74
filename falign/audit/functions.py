"""Losses that are functions of log-probabilities: what they are given, and the checks that they can be enumerated."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from falign.audit.world import COMPLETIONS, MASK, PREFIX, TOKENS, World
from falign.choices import nearest
from falign.errors import ConfigError
from falign.raised import code_lines, raised_message

__all__ = [
    "ARGUMENTS",
    "OF_PAIRS",
    "Credit",
    "LossLevel",
    "RowSlopes",
    "Use",
    "arguments_of",
    "inputs_of",
    "row_slopes",
]

LossLevel = Literal["token", "sequence"]
Use = Literal["loss", "reward"]
Credit = Literal["returns", "fixed_prefix"]

MODELS = {"logprobs": "policy", "reference_logprobs": "reference", "old_logprobs": "old"}
OTHERS = {"teacher_logprobs": "teacher", "base_logprobs": "base"}
DISTRIBUTIONS = {"vocabulary_logprobs": "policy", "reference_vocabulary_logprobs": "reference"}
MASKS = ("mask", "completion_mask")

ARGUMENTS = (*MODELS, *OTHERS, *DISTRIBUTIONS, *MASKS, "tokens", "rewards")
"""Names by which a loss of samples asks for its arguments."""

OF_PAIRS = tuple(
    f"{prefix}{side}_{what}"
    for side in ("chosen", "rejected")
    for prefix, what in (("", "logprobs"), ("reference_", "logprobs"), ("", "mask"))
)
"""Names by which a loss of pairs asks for its arguments."""

LEAVES = frozenset({"logprobs", "vocabulary_logprobs", "chosen_logprobs", "rejected_logprobs"})
RELATIVE, ABSOLUTE = 1e-9, 1e-12
"""Largest difference between results that are called the same."""


def arguments_of(function: Callable[..., Any], name: str) -> list[str]:
    """Return the names of the arguments that the audit gives a function.

    Args:
        function: The loss.
        name: Its name in messages.

    Raises:
        ConfigError: A parameter without a default has an unknown name, or the signature cannot be read.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} has no readable signature: wrap it in a function of log-probabilities.") from error
    known, asked = (*ARGUMENTS, *OF_PAIRS), []
    for parameter in parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in known:
            asked.append(parameter.name)
        elif parameter.default is parameter.empty:
            close = nearest(parameter.name, known)
            hint = f"did you mean {close!r}? The audit gives" if close else "the audit gives"
            raise ConfigError(
                f"{name} asks for {parameter.name!r}; {hint} {', '.join(ARGUMENTS)}; of pairs, {', '.join(OF_PAIRS)}. "
                "Give other parameters a default, or wrap the loss."
            )
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ConfigError(f"{name} takes {parameter.name!r} by position only: let it be given by name.")
    return asked


def inputs_of(world: World, asked: list[str], name: str, level: LossLevel, *, on_policy: bool) -> dict[str, Tensor]:
    """Return what a loss of samples asks for, one row per completion of the enumeration, without gradients.

    Args:
        world: The models.
        asked: Names of arguments.
        name: Name of the loss in messages.
        level: ``"token"`` for rows of tokens, ``"sequence"`` for sums over completions.
        on_policy: Whether the samples are the policy's own, whose old log-probabilities are its current ones.

    Raises:
        ConfigError: The loss asks for something that does not exist at this level.
    """
    found: dict[str, Tensor] = {}
    for each in asked:
        if each in OF_PAIRS:
            raise ConfigError(f"{name} asks for {each!r}, which only pairs have: set samples='pairs'.")
        if each == "rewards":
            found[each] = torch.zeros(len(COMPLETIONS), dtype=torch.float64)
        elif each in MODELS or each in OTHERS:
            model = {**MODELS, **OTHERS}[each]
            model = "policy" if model == "old" and on_policy else model
            per_token = world.token_logprobs(model).detach()
            found[each] = per_token if level == "token" else per_token.sum(dim=-1)
        elif level == "sequence":
            raise ConfigError(f"{name} asks for {each!r}, which whole completions do not have: set level='token'.")
        elif each in DISTRIBUTIONS:
            found[each] = world.table(DISTRIBUTIONS[each]).detach()[PREFIX]
        else:
            found[each] = TOKENS if each == "tokens" else MASK
    return found


class RowSlopes(NamedTuple):
    """The gradient of each row's loss by what carries the policy.

    Attributes:
        slopes: By the name of the argument; the shape of the argument.
        weights: What each row's loss is divided by, in the mean over samples.
    """

    slopes: dict[str, Tensor]
    weights: Float[Tensor, " M"]


@dataclass(frozen=True)
class _Evaluated:
    value: Tensor
    slopes: dict[str, Tensor]


def row_slopes(
    function: Callable[..., Any],
    name: str,
    inputs: Mapping[str, Tensor],
    mask: Tensor,
    *,
    use: Use = "loss",
    credit: Credit = "returns",
    rejected_mask: Tensor | None = None,
) -> RowSlopes:
    """Return the gradient of a loss by row, after checking that rows can be enumerated.

    Args:
        function: The loss.
        name: Its name in messages.
        inputs: Its arguments, one row per sample.
        mask: True at the tokens of each row, shape (M, T); of pairs, of the chosen side.
        rejected_mask: Of pairs, of the rejected side.
        use: ``"loss"``: the result is differentiated. ``"reward"``: it is a constant coefficient of ``∇log π``.
        credit: Of a coefficient per token: ``"returns"`` gives a token the sum of its own and all later ones, as a
            reward does; ``"fixed_prefix"`` only its own.

    Raises:
        ConfigError: The loss raises, is not deterministic, not finite, has no gradient or another shape or dtype than
            asked for, or depends on other rows.
    """
    with torch.random.fork_rng(devices=()):
        if use == "reward":
            return RowSlopes(
                {"logprobs": _coefficients(function, name, inputs, mask, credit)},
                torch.ones(len(mask), dtype=torch.float64),
            )
        masks = {"rejected_logprobs": mask if rejected_mask is None else rejected_mask}
        whole, again = (_evaluate(function, name, inputs, mask, masks) for _ in range(2))
        _require_same(name, whole, again, "its result differs between two calls with the same arguments")
        _require_finite(name, whole, mask)
        parts = [
            _evaluate(
                function,
                name,
                {key: value[rows] for key, value in inputs.items()},
                mask[rows],
                {key: each[rows] for key, each in masks.items()},
            )
            for rows in _halves(len(mask))
        ]
    return _by_row(name, whole, parts, mask)


def _halves(rows: int) -> tuple[Tensor, Tensor]:
    """Return two halves of the rows in a random order, in which no row keeps the neighbors that it had."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return order[: rows // 2], order[rows // 2 :]


def _call(function: Callable[..., Any], name: str, inputs: Mapping[str, Tensor]) -> Tensor:
    try:
        value = function(**inputs)
    except (Exception, SystemExit) as error:
        text = raised_message(f"{type(error).__name__}: {error}", code_lines(error), None)
        shapes = ", ".join(f"{key} {tuple(each.shape)}" for key, each in inputs.items())
        raise ConfigError(f"{name} raised {text}\nIt was given {shapes}, in float64.") from error
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"{name} returned a {type(value).__name__}; it must return a tensor: one loss per token or per completion, "
            "or their mean. A plain number has no gradient."
        )
    if value.dtype != torch.float64:
        raise ConfigError(
            f"{name} returned {value.dtype} from arguments in torch.float64: do not cast inside, because the verdict "
            "compares gradients to nine digits."
        )
    return value


def _evaluate(
    function: Callable[..., Any],
    name: str,
    inputs: Mapping[str, Tensor],
    mask: Tensor,
    masks: Mapping[str, Tensor],
) -> _Evaluated:
    given = {key: value.clone().requires_grad_(key in LEAVES) for key, value in inputs.items()}
    leaves = {key: value for key, value in given.items() if key in LEAVES}
    if not leaves:
        raise ConfigError(
            f"{name} asks for none of {', '.join(sorted(LEAVES))}: a loss is a function of the policy. Arguments are "
            "given by their names, and *args, **kwargs name none: write them out, or wrap the loss."
        )
    value = _call(function, name, given)
    rows = mask.shape
    if value.shape not in ((), rows[:1], rows):
        raise ConfigError(
            f"{name} returned shape {tuple(value.shape)} for {rows[0]} rows of {rows[1]} tokens; it must return one "
            f"loss per completion {tuple(rows[:1])} or token {tuple(rows)}, or their mean."
        )
    if not value.requires_grad:
        raise ConfigError(
            f"{name} returned a tensor without a gradient: nothing is minimized. If it is a penalty in the reward, a "
            "constant factor of ∇log π, set use='reward'."
        )
    kept = value.masked_fill(~mask, 0.0) if value.shape == rows else value
    found = torch.autograd.grad(kept.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    slopes = {}
    for (key, leaf), slope in zip(leaves.items(), found, strict=True):
        own = masks.get(key, mask)
        inside = own.view(*own.shape, *[1] * (leaf.ndim - 2)) if leaf.ndim > 1 else torch.ones_like(own[:, 0])
        slopes[key] = slope.masked_fill(~inside, 0.0)
    return _Evaluated(kept.detach(), slopes)


def _coefficients(
    function: Callable[..., Any], name: str, inputs: Mapping[str, Tensor], mask: Tensor, credit: Credit
) -> Tensor:
    pieces = []
    everything = torch.arange(len(mask))
    for rows in (everything, everything, *_halves(len(mask))):
        value = _call(function, name, {key: each[rows].clone() for key, each in inputs.items()}).detach()
        own = mask[rows]
        if value.shape not in (own.shape, own.shape[:1]):
            raise ConfigError(
                f"{name} returned shape {tuple(value.shape)}; a coefficient must have one value per completion "
                f"{tuple(own.shape[:1])} or token {tuple(own.shape)}."
            )
        if value.ndim == 1:
            value = value[:, None].expand(own.shape)
        elif credit == "returns":
            value = value.masked_fill(~own, 0.0).flip(-1).cumsum(dim=-1).flip(-1)
        pieces.append(_Evaluated(value.masked_fill(~own, 0.0), {}))
    whole, again, *parts = pieces
    _require_same(name, whole, again, "its result differs between two calls with the same arguments")
    _require_finite(name, whole, mask)
    _require_same(name, whole, _joined(parts), DEPENDS)
    return whole.value


DEPENDS = (
    "the gradient of a row's loss depends on the other rows, so that its mean over all samples is no sum over single "
    "samples: return one loss per row that reads its own row only"
)


def _require_same(name: str, first: _Evaluated, second: _Evaluated, fault: str) -> None:
    pairs = [(first.value, second.value), *zip(first.slopes.values(), second.slopes.values(), strict=True)]
    for one, other in pairs:
        if not torch.allclose(one, other, RELATIVE, ABSOLUTE, equal_nan=True):
            raise ConfigError(f"{name} cannot be enumerated: {fault}.{_where(one, other)}")


def _where(one: Tensor, other: Tensor) -> str:
    difference = (one - other).abs().reshape(len(one), -1).amax(dim=-1) if one.ndim else (one - other).abs()[None]
    row = int(difference.argmax())
    return f" At row {row} it differs by {difference[row].item():.3g}."


def _require_finite(name: str, evaluated: _Evaluated, mask: Tensor) -> None:
    for kind, each in (("loss", evaluated.value), *((f"gradient by {key}", v) for key, v in evaluated.slopes.items())):
        if not each.isfinite().all():
            row = int((~each.isfinite()).nonzero()[0][0]) if each.ndim else 0
            tokens = f" (row {row}, {int(mask[row].sum())} tokens)" if each.ndim else ""
            raise ConfigError(
                f"{name} cannot be enumerated: its {kind} is NaN or infinite{tokens}, at log-probabilities of "
                "ordinary size. Write it in log space, and mask before the formula instead of after it."
            )


def _joined(parts: list[_Evaluated]) -> _Evaluated:
    return _Evaluated(
        _in_order([part.value for part in parts]),
        {key: _in_order([part.slopes[key] for part in parts]) for key in parts[0].slopes},
    )


def _in_order(halves: list[Tensor]) -> Tensor:
    joined = torch.cat(halves)
    return joined[torch.cat(_halves(len(joined))).argsort()]


def _by_row(name: str, whole: _Evaluated, parts: list[_Evaluated], mask: Tensor) -> RowSlopes:
    """Return slopes by row; of a mean, times what it was divided by, which must explain the parts' slopes too."""
    lengths = mask.sum(dim=-1).double()
    ones = torch.ones_like(lengths)
    if whole.value.ndim:
        # Only the slopes: a constant that all rows share moves no gradient.
        slopes, of_parts = (replace(each, value=each.value.new_zeros(())) for each in (whole, _joined(parts)))
        _require_same(name, slopes, of_parts, DEPENDS)
        return RowSlopes(whole.slopes, ones)
    first, second = _halves(len(mask))
    for weights, divisors in (
        (ones, [ones, ones[first], ones[second]]),  # a mean over rows
        (lengths, [lengths, lengths[first], lengths[second]]),  # over tokens
        (ones, [ones[:1]] * 3),  # a sum
    ):
        scaled = [
            {key: slope * divisor.sum() for key, slope in each.slopes.items()}
            for each, divisor in zip((whole, *parts), divisors, strict=True)
        ]
        joined = {key: _in_order([part[key] for part in scaled[1:]]) for key in scaled[0]}
        if all(torch.allclose(slope, joined[key], RELATIVE, ABSOLUTE) for key, slope in scaled[0].items()):
            return RowSlopes(scaled[0], weights)
    raise ConfigError(
        f"{name} cannot be enumerated: it returns one number that is neither the mean nor the sum of losses of single "
        f"rows, nor a mean over their tokens: {DEPENDS}."
    )
