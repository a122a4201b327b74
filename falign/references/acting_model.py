"""A reference as a model that can be sampled from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from falign.errors import ModelError
from falign.references.adapter_off import AdapterOff, adapter_off
from falign.references.adapter_reference import AdapterReference
from falign.references.base import Reference
from falign.references.frozen_model import FrozenModel
from falign.references.moving import MovingReference
from falign.references.soup import Soup

__all__ = ["acting_model"]


@contextmanager
def acting_model(reference: Reference, policy_model: nn.Module) -> Iterator[nn.Module]:
    """Yield a model that is the reference: its own, or the policy with its adapter off or another one on.

    Args:
        reference: Any but values from disk.
        policy_model: The policy, which some references are a part of; afterwards it is as it was.

    Raises:
        ModelError: The reference is no model.
    """
    if isinstance(reference, MovingReference | Soup):
        reference = reference.held
    if isinstance(reference, FrozenModel):
        yield reference.model
    elif isinstance(reference, AdapterOff):
        with adapter_off(policy_model):
            yield policy_model
    elif isinstance(reference, AdapterReference):
        with reference.acting(policy_model):
            yield policy_model
    else:
        raise ModelError(
            f"A {type(reference).__name__} has values of known completions alone and writes none: take the reference "
            "that it was computed from."
        )
