"""The distributions that a policy is held to."""

from falign.references.adapter_off import AdapterOff
from falign.references.base import Reference, check_same_at_start, detached_logprobs, detached_states
from falign.references.cached import Cached
from falign.references.frozen_model import FrozenModel
from falign.references.objective_inputs import ObjectiveInputs, completion_batch, objective_inputs
from falign.references.store import CacheKey, LogprobStore, entry_digest

__all__ = [
    "AdapterOff",
    "CacheKey",
    "Cached",
    "FrozenModel",
    "LogprobStore",
    "ObjectiveInputs",
    "Reference",
    "check_same_at_start",
    "completion_batch",
    "detached_logprobs",
    "detached_states",
    "entry_digest",
    "objective_inputs",
]
