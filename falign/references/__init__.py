"""The distributions that a policy is held to."""

from falign.references.acting_model import acting_model
from falign.references.adapter_off import AdapterOff
from falign.references.adapter_reference import AdapterReference
from falign.references.base import Reference, check_same_at_start, detached_logprobs, detached_states
from falign.references.cached import Cached
from falign.references.frozen_model import FrozenModel
from falign.references.moving import MovingReference
from falign.references.moving_rules import MovingAverage, PeriodicReset
from falign.references.objective_inputs import ObjectiveInputs, completion_batch, objective_inputs, token_weighting
from falign.references.own_model import own_model
from falign.references.soup import Soup
from falign.references.store import CacheKey, LogprobStore, entry_digest

__all__ = [
    "AdapterOff",
    "AdapterReference",
    "CacheKey",
    "Cached",
    "FrozenModel",
    "LogprobStore",
    "MovingAverage",
    "MovingReference",
    "ObjectiveInputs",
    "PeriodicReset",
    "Reference",
    "Soup",
    "acting_model",
    "check_same_at_start",
    "completion_batch",
    "detached_logprobs",
    "detached_states",
    "entry_digest",
    "objective_inputs",
    "own_model",
    "token_weighting",
]
