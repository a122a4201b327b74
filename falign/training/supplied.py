"""Which fields of a batch a run can supply: what an objective needs decides whether it can be trained there."""

__all__ = ["OFFLINE", "ONLINE"]

OFFLINE = frozenset({"reference_logprobs", "preference", "token_divergence", "token_weights"})
"""Of completions that are there."""

ONLINE = OFFLINE | {
    *("rewards", "features", "log_partition", "from_reference"),
    *("old_logprobs", "values", "old_values"),
}
"""Of the policy's own samples."""
