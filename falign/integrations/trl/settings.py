"""Settings of TRL that an objective replaces: each is left at its default, and one number must not be given twice."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

import torch

from falign.errors import ConfigError
from falign.objectives import BaseObjective, CompletionBatch, Objective, complete, reference_names
from falign.objectives.base import token_weighting
from falign.objectives.batch import OFFLINE, REFERENCE, field_of

__all__ = ["beta_of", "check_objective", "of_objective", "reads_sums", "require_defaults"]

Args = TypeVar("Args")

log = logging.getLogger(__name__)

BY_TRL = frozenset({"reference_logprobs", "preference"})
"""Fields that TRL's own forward passes can supply."""


def require_defaults(args: Any, remedies: Mapping[str, str]) -> None:
    """Refuse settings of TRL's loss, which would have no effect.

    Args:
        args: TRL's configuration.
        remedies: What to do instead, by the name of the setting; names that this TRL lacks are skipped.

    Raises:
        ConfigError: A setting is not at its default.
    """
    defaults = _defaults(args)
    for name, remedy in remedies.items():
        if name in defaults and (value := getattr(args, name)) != defaults[name]:
            raise ConfigError(
                f"{type(args).__name__}.{name}={value!r} would have no effect, because objective decides the loss: "
                f"leave it out. {remedy}".rstrip()
            )


def of_objective(args: Args, name: str, value: float | None) -> Args:
    """Return TRL's configuration with the objective's value of a number that both have.

    Args:
        args: TRL's configuration, which is not changed.
        name: A setting with a default, for example ``beta``.
        value: The objective's; None if it has none, or none that is constant.

    Raises:
        ConfigError: The setting is neither at its default nor the objective's value.
    """
    given, default = getattr(args, name), _defaults(args)[name]
    if value is None or given == value:
        if value is None and given != default:
            raise ConfigError(
                f"{type(args).__name__}.{name}={given!r} would have no effect: this objective has no constant {name}, "
                "or several. Leave it out."
            )
        return args
    if given != default:
        raise ConfigError(
            f"{type(args).__name__}.{name}={given!r} and the objective's {name}={value!r} differ: give it in the "
            "objective only, or the same number in both."
        )
    log.warning(
        "%s.%s=%r is TRL's default; the objective's %s=%r is used.", type(args).__name__, name, given, name, value
    )
    changed = copy.copy(args)
    setattr(changed, name, value)
    return changed


def _defaults(args: Any) -> dict[str, Any]:
    return {
        each.name: each.default_factory() if each.default_factory is not MISSING else each.default
        for each in fields(args)
    }


def beta_of(objective: BaseObjective) -> float | None:
    """Return β of the objective's implicit reward, or its only β; None if there is none or it changes.

    Args:
        objective: Any objective.
    """
    if any(path.rpartition(".")[2] == "beta" for path in (*objective.coefficients(0), *objective.controllers)):
        return None
    if objective.link is not None:
        return objective.link.beta
    parts = objective.summands.values() or [objective]
    found = {beta for each in parts if isinstance(beta := getattr(each, "beta", None), float | int)}
    return float(found.pop()) if len(found) == 1 else None


def check_objective(objective: Objective, *, layout: str, kind: str, other_trainer: str) -> BaseObjective:
    """Return an objective with all its members, after refusing one that cannot work on TRL's batches.

    Args:
        objective: Any objective.
        layout: How batches are scored.
        kind: ``"pairs"`` or ``"labels"``: what the batches hold.
        other_trainer: The trainer for the other kind.

    Raises:
        ConfigError: It cannot work; the message has the reason and a remedy.
    """
    try:
        whole = complete(objective)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"objective: {error}") from error
    name = type(objective).__name__
    if unknown := sorted(each for each in whole.needs if field_of(each) not in OFFLINE):
        raise ConfigError(
            f"objective: {name} reads {', '.join(unknown)}, which pairs and labels do not have: it learns from samples "
            "of the policy. See FGRPOTrainer, or falign train with rollouts."
        )
    if whole.preference_kinds and kind not in whole.preference_kinds:
        raise ConfigError(f"objective: {name} reads {', '.join(whole.preference_kinds)}: take {other_trainer}.")
    if whole.imitates and "preference" not in whole.needs:
        raise ConfigError(
            f"objective: {name} makes all its completions more likely, the rejected ones among them: give it only the "
            f"chosen ones, with falign.objectives.Selected({name}(...), 'chosen'), for example as a term of a Sum."
        )
    if whole.controllers:
        raise ConfigError(
            f"objective: {', '.join(whole.controllers)} follows a metric, whose state TRL's checkpoints do not have: "
            "give a number or a schedule, or train with falign.train."
        )
    weighting = token_weighting(whole.needs)
    if weighting in ("data", "learned", "learned_independent"):
        raise ConfigError(
            f"objective: {name} reads token weights ({weighting}), which TRL's batches do not have: use falign.train."
        )
    if layout == "trl":
        _check_by_trl(whole, name)
    return whole


def _check_by_trl(objective: BaseObjective, name: str) -> None:
    remedy = "set layout='tree' (or 'padded', where the model cannot read trees)."
    if objective.measures:
        raise ConfigError(
            f"objective: {name} reads whole distributions ({', '.join(sorted(objective.measures))}), which TRL's "
            f"forward pass does not return: {remedy}"
        )
    if beyond := sorted(each for each in objective.needs if each not in BY_TRL):
        raise ConfigError(
            f"objective: {name} reads {', '.join(beyond)}, which TRL's forward passes do not supply: {remedy}"
        )


def reads_sums(objective: BaseObjective) -> bool:
    """Return whether a loss reads the reference's log-probabilities only as sums over completions.

    Precomputed columns of TRL hold such sums. The loss and its gradient are computed on random completions, with the
    same sums distributed over the tokens in two ways.

    Args:
        objective: Any objective on pairs or labels.

    Example:
        >>> from falign import FDPO, TDPO
        >>> reads_sums(FDPO("jensen_shannon")), reads_sums(TDPO())
        (True, False)
    """
    if reference_names(frozenset(), objective.measures) & {REFERENCE}:
        return False
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 4, 2, 3])[:, None]
    policy, reference, other = torch.rand(3, *mask.shape, generator=generator, dtype=torch.float64).neg()
    reference, other = (values.masked_fill(~mask, 0.0) for values in (reference, other))
    other = other * (reference.sum(dim=-1) / other.sum(dim=-1))[:, None]
    rows = policy.new_full((len(mask),), 0.1)
    found = []
    for values in (reference, other):
        logprobs = policy.clone().requires_grad_()
        batch = CompletionBatch(
            logprobs=logprobs,
            completion_mask=mask,
            prompt_index=torch.arange(3).repeat_interleave(2),
            reference_logprobs=values,
            references={name: reference for name in reference_names(objective.needs, {}) - {REFERENCE}},
            preference=torch.tensor([1.0, 0.0]).repeat(3),
            measures=dict.fromkeys(objective.measures, policy),
            step_means=dict.fromkeys(objective.step_means, rows),
        )
        loss = objective(batch).mean()
        (gradient,) = torch.autograd.grad(loss, logprobs)
        found.append(torch.cat([loss.detach()[None], gradient.flatten()]))
    return torch.allclose(found[0], found[1], rtol=1e-9, atol=1e-12)
