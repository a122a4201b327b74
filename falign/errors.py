"""The errors that falign raises at its borders; each message has the place, the value and the remedy."""

__all__ = [
    "ConfigError",
    "DataError",
    "EngineError",
    "FalignError",
    "ModelError",
    "NonFiniteRewardError",
    "RewardError",
    "RolloutError",
    "TrainingError",
]


class FalignError(Exception):
    """Base of all errors that a user can mend; the command line prints it and exits with status 2."""


class ConfigError(FalignError, ValueError):
    """A run file, an option or a combination of options that cannot work."""


class DataError(FalignError, ValueError):
    """A data file, or a row of one, that cannot be used."""


class ModelError(FalignError):
    """A model, tokenizer or adapter that cannot be loaded, used or exported."""


class RewardError(FalignError):
    """A reward that cannot be called, or that returns what is no reward."""


class NonFiniteRewardError(RewardError):
    """A reward that is no number."""


class RolloutError(FalignError):
    """A sampling that cannot be done, or whose result is no sample of the policy."""


class EngineError(RolloutError):
    """An engine outside of this process that fails or does what it should not; the policy here is untouched by that."""


class TrainingError(FalignError):
    """A run that cannot go on; what it has written stays."""
