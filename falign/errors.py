"""The errors that falign raises at its borders; each message has the place, the value and the remedy."""

from falign.terminal import without_secrets

__all__ = [
    "ConfigError",
    "DataError",
    "EngineError",
    "FalignError",
    "InstallationError",
    "ModelError",
    "NonFiniteRewardError",
    "RewardError",
    "RolloutError",
    "StoppedError",
    "TrainingError",
    "one_line",
]


def one_line(error: BaseException) -> str:
    r"""Return the whole message of an exception on one line.

    Example:
        >>> one_line(ValueError("first\n  second"))
        'first second'
    """
    return " ".join(str(error).split())


class FalignError(Exception):
    """Base of all errors that a user can correct; the command line prints it and exits with its status.

    Passwords and tokens are masked in its message, whatever it quotes.

    Attributes:
        exit_status: Of the command line.
    """

    exit_status: int = 2

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_secrets(each) if isinstance(each, str) else each for each in args))


class ConfigError(FalignError, ValueError):
    """A run file, an option or a combination of options that cannot work."""


class InstallationError(FalignError):
    """An installed library that is missing, too old or too new."""


class DataError(FalignError, ValueError):
    """A data file, or a row of one, that cannot be used."""


class ModelError(FalignError):
    """A model, tokenizer or adapter that cannot be loaded, used or exported."""


class RewardError(FalignError):
    """A reward that cannot be called, or that returns an invalid value."""


class NonFiniteRewardError(RewardError):
    """A reward that is NaN or infinite."""


class RolloutError(FalignError):
    """Sampling that is impossible, or with results that are not from the policy."""


class EngineError(RolloutError):
    """An engine outside of this process that fails or misbehaves; the policy in this process is unchanged."""


class TrainingError(FalignError):
    """A run that cannot continue; what it has written stays."""


class StoppedError(FalignError):
    """A run that was stopped by a signal, and can be resumed.

    Args:
        message: Where it stopped, and how it goes on.
        signal: The number of the signal.
    """

    def __init__(self, message: str, *, signal: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal
