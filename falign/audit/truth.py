"""The true gradient of each divergence in an enumerated world, from its definition alone."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from falign import divergences
from falign.audit.world import World
from falign.divergences import Divergence

__all__ = ["LEVELS", "PARAMETERS", "TruthLevel", "registry", "true_gradient", "true_value"]

TruthLevel = Literal["sequence", "token", "token_returns", "token_reference", "token_old"]
"""Of a divergence: whole completions; or the sum over tokens of that of the next-token distributions, where the
prefixes are the policy's and held fixed, the policy's and differentiated, the reference's, or the old policy's."""

LEVELS: tuple[TruthLevel, ...] = get_args(TruthLevel)

PARAMETERS = {"alpha": (0.3, 0.5, 0.7), "generalized_js": (0.2,)}
"""Parameters of the families that take one. Others can be named in the call of the audit."""


def registry(more: Iterable[Divergence] = ()) -> tuple[Divergence, ...]:
    """Return every divergence of the registry, families with a parameter at several values.

    Args:
        more: Further divergences to compare with.

    Returns:
        Divergences of different names, those of ``more`` at the end.

    Example:
        >>> len(registry())
        14
    """
    names = [
        f"{name}({parameter})" if parameter is not None else name
        for name in divergences.names()
        for parameter in PARAMETERS.get(name, (None,))
    ]
    found = {name: divergences.get(name) for name in names}
    return tuple({**found, **{each.name: each for each in more if each.name not in found}}.values())


def true_value(
    divergence: Divergence, world: World, level: TruthLevel, reference: str = "reference"
) -> Float[Tensor, ""]:
    """Return a divergence of the policy to a reference, differentiable in the policy's logits.

    Args:
        divergence: f.
        world: The models.
        level: Level of the divergence.
        reference: Name of the reference.

    Returns:
        ``Σ_y π_ref(y) f(π(y)/π_ref(y))``, or ``Σ_s P(s) Σ_v π_ref(v|s) f(π(v|s)/π_ref(v|s))`` with P the probability
        that a sample passes through the prefix s; a constant for every level but ``"token_returns"``.
    """
    if level == "sequence":
        log_reference = world.sequence_logprobs(reference)
        return (log_reference.exp() * divergence.f(world.sequence_logprobs("policy") - log_reference)).sum()
    log_reference = world.table(reference)
    at_prefix = (log_reference.exp() * divergence.f(world.table("policy") - log_reference)).sum(dim=-1)
    owner = {"token_reference": reference, "token_old": "old"}.get(level, "policy")
    visits = world.visits(owner)
    return ((visits if level == "token_returns" else visits.detach()) * at_prefix).sum()


@lru_cache(maxsize=4096)
def true_gradient(
    divergence: Divergence, world: World, level: TruthLevel, reference: str = "reference"
) -> Float[Tensor, "S V"]:
    """Return the gradient of :func:`true_value` by the policy's logits; arguments as there."""
    (gradient,) = torch.autograd.grad(true_value(divergence, world, level, reference), world.policy)
    return gradient
