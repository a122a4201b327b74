"""Rewards of completions: callables, verifiers in killable processes, reward models, and their sums."""
