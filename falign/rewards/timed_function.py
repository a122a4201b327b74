"""A user's own reward function with a deadline, called for one completion at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from falign.rewards.base import Reward, Scores, check_rewards, select_columns
from falign.rewards.child import Call, ChildPool
from falign.rewards.identity import Identity
from falign.rewards.importing import import_function
from falign.rewards.outcomes import scores_of

__all__ = ["TimedFunction"]


@dataclass(frozen=True)
class TimedFunction:
    """Calls a reward function in processes that are killed at the deadline, so that one completion costs only itself.

    The function is given lists of one prompt and one completion; one that compares completions needs them all, and
    cannot be timed.

    Attributes:
        function: ``module:function``.
        timeout: Seconds per completion.
        failed: What a completion is worth whose call timed out, or raised and was counted; None leaves it out.
        errors: ``stop``: an exception stops the run; ``count``: it is counted, as timeouts always are.
        pool: Where it runs; by default a pool of its own, without a limit on memory.

    Raises:
        ConfigError: It cannot be imported.
    """

    function: str
    timeout: float = 10.0
    failed: float | None = 0.0
    errors: Literal["stop", "count"] = "stop"
    pool: ChildPool = field(default_factory=lambda: ChildPool(memory_bytes=None))
    _imported: Reward = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_imported", import_function(self.function))

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        return self.score(prompts, completions, **columns).values

    def score(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> Scores:
        """Return values and counts; the arguments are those of the function."""
        given = {"prompts": prompts, "completions": completions, **columns}
        taken = select_columns(self._imported, given)
        calls = [
            Call(self.function, {name: [values[i]] for name, values in taken.items()}, self.timeout)
            for i in range(len(completions))
        ]
        return scores_of(
            self.pool.run(calls),
            name=self.function,
            failed=self.failed,
            stop_on_errors=self.errors == "stop",
            places=columns.get("place"),
            value=lambda value, where: check_rewards(value, 1, name=self.function, places=[where])[0],
        )

    def identity(self) -> Identity:
        """Return the module of the function, and what a failed call is worth."""
        settings = {"function": self.function, "timeout": self.timeout, "failed": self.failed, "errors": self.errors}
        return Identity(self.function.partition(":")[0], settings)
