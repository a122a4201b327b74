"""A user's own reward function with a deadline, called for one completion at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from falign.rewards.base import Scores, check_rewards
from falign.rewards.child import Call, ChildPool
from falign.rewards.forms import FORMS, FormName, arguments, check_columns, load_function
from falign.rewards.identity import Identity
from falign.rewards.outcomes import scores_of

__all__ = ["TimedFunction"]


@dataclass(frozen=True)
class TimedFunction:
    """Calls a reward function in processes that are killed at the deadline, so that one completion costs only itself.

    The function is given lists of one prompt and one completion, or single values in the form ``verl``; one that
    compares completions needs them all, and cannot be timed.

    Attributes:
        function: ``module:function``.
        timeout: Seconds per completion.
        failed: What a completion is worth whose call timed out, or raised and was counted; None leaves it out.
        errors: ``stop``: an exception stops the run; ``count``: it is counted, as timeouts always are.
        form: As for :class:`falign.rewards.OwnFunction`.
        pool: Where it runs; by default a pool of its own, without a limit on memory.

    Raises:
        ConfigError: It cannot be imported, or has the parameters of another form.
    """

    function: str
    timeout: float = 10.0
    failed: float | None = 0.0
    errors: Literal["stop", "count"] = "stop"
    form: FormName = "falign"
    pool: ChildPool = field(default_factory=lambda: ChildPool(memory_bytes=None))
    _imported: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_imported", load_function(self.function, self.form))

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        return self.score(prompts, completions, **columns).values

    def score(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> Scores:
        """Return values and counts; the arguments are those of the function."""
        form = FORMS[self.form]
        given = arguments(self._imported, self.form, prompts, completions, columns)
        calls = [
            Call(
                self.function,
                {name: values[i : i + 1] if form.takes_lists else values[i] for name, values in given.items()},
                self.timeout,
            )
            for i in range(len(completions))
        ]

        def value(returned: Any, where: str) -> Any:
            if form.takes_lists:
                return check_rewards(returned, 1, name=self.function, places=[where])[0]
            return form.value(returned)

        return scores_of(
            self.pool.run(calls),
            name=self.function,
            failed=self.failed,
            stop_on_errors=self.errors == "stop",
            places=columns.get("place"),
            completions=completions,
            value=value,
            hint=lambda raised: form.hint(raised, prompts),
        )

    def row_errors(self, prompts: list[Any], **columns: list[Any]) -> list[str | None]:
        """Accept every row.

        Raises:
            RewardError: A required parameter of the function is neither a column nor an argument.
        """
        check_columns(self.function, self._imported, self.form, columns)
        return [None] * len(prompts)

    def identity(self) -> Identity:
        """Return the module of the function, and what a failed call is worth."""
        settings = {
            "function": self.function,
            "form": self.form,
            "timeout": self.timeout,
            "failed": self.failed,
            "errors": self.errors,
        }
        return Identity(self.function.partition(":")[0], settings)
