"""References: the distributions that the divergence keeps the policy close to."""

from falign.references.adapters import AdapterOff, AdapterReference
from falign.references.base import (
    REFERENCE,
    MovingRule,
    ObjectiveInputs,
    Reference,
    check_interval,
    check_same_at_start,
    completion_batch,
    detached_logprobs,
    detached_states,
    field_of_reference,
    objective_inputs,
)
from falign.references.cached import Cached
from falign.references.combinations import Combination, Geometric, Mixture
from falign.references.frozen_model import FrozenModel
from falign.references.moving import MovingAverage, MovingReference, PeriodicReset
from falign.references.prompted import Prompted
from falign.references.scores import ReferenceScores, read_whole, with_members
from falign.references.served import VLLMReference
from falign.references.soup import Soup
from falign.references.stalling import ResetOnStall, StallReset
from falign.references.store import CacheKey, LogprobStore, entry_digest

__all__ = [
    "REFERENCE",
    "AdapterOff",
    "AdapterReference",
    "CacheKey",
    "Cached",
    "Combination",
    "FrozenModel",
    "Geometric",
    "LogprobStore",
    "Mixture",
    "MovingAverage",
    "MovingReference",
    "MovingRule",
    "ObjectiveInputs",
    "PeriodicReset",
    "Prompted",
    "Reference",
    "ReferenceScores",
    "ResetOnStall",
    "Soup",
    "StallReset",
    "VLLMReference",
    "check_interval",
    "check_same_at_start",
    "completion_batch",
    "detached_logprobs",
    "detached_states",
    "entry_digest",
    "field_of_reference",
    "objective_inputs",
    "read_whole",
    "with_members",
]
