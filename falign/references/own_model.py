"""The model that a reference is, where it is not a part of the policy."""

from __future__ import annotations

from torch import nn

from falign.references.base import Reference
from falign.references.cached import Cached
from falign.references.frozen_model import FrozenModel
from falign.references.moving import MovingReference
from falign.references.soup import Soup

__all__ = ["own_model"]


def own_model(reference: Reference) -> nn.Module | None:
    """Return the second model in memory, or None for an adapter in the policy, its absence, or values from disk."""
    if isinstance(reference, FrozenModel):
        return reference.model
    if isinstance(reference, MovingReference | Soup):
        return own_model(reference.held)
    if isinstance(reference, Cached) and reference.reference is not None:
        return own_model(reference.reference)
    return None
