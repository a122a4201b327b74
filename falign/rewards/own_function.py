"""A user's own reward function, called for all completions at once in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from falign.code_identity import code_identity
from falign.errors import RewardError
from falign.rewards.base import Scores, check_rewards, reward_raised
from falign.rewards.child import Call, ChildPool
from falign.rewards.forms import FORMS, FormName, arguments, check_columns, check_parameters, finished, load_function
from falign.rewards.identity import Identity
from falign.rewards.outcomes import scores_of

__all__ = ["OwnFunction", "TimedFunction"]


@dataclass(frozen=True)
class OwnFunction:
    """A function, called in the form that it is written in; it may be ``async``.

    Attributes:
        function: ``module:function``, or the name in messages of the given function.
        form: ``falign``: lists of prompts, texts and columns; ``trl``: the same, with completions of conversations as
            lists of one message; ``verl``: ``data_source, solution_str, ground_truth, extra_info`` of one completion.
        given: The function itself, instead of an imported one.

    Raises:
        ConfigError: It cannot be imported, or has the parameters of another form.
    """

    function: str
    form: FormName = "falign"
    given: Callable[..., Any] | None = None
    _imported: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.given is None:
            object.__setattr__(self, "_imported", load_function(self.function, self.form))
        else:
            check_parameters(self.function, self.given, self.form)
            object.__setattr__(self, "_imported", self.given)

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        return self.score(prompts, completions, **columns).values

    def score(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> Scores:
        """Return the function's values.

        Args:
            prompts: The prompt of each completion.
            completions: Their texts.
            columns: One value per completion.

        Raises:
            RewardError: The function raised; the message has its code lines and, if known, the completion.
        """
        form, places = FORMS[self.form], columns.get("place")
        given = arguments(self._imported, self.form, prompts, completions, columns)
        if form.takes_lists:
            return Scores(self._call(given, prompts, completions, given.get("completions", completions), places))
        values: list[Any] = []
        for i, text in enumerate(completions):
            one = {name: column[i] for name, column in given.items()}
            place = None if places is None else places[i : i + 1]
            values.append(form.value(self._call(one, prompts[i : i + 1], [text], [text], place)))
        return Scores(values)

    def row_errors(self, prompts: list[Any], **columns: list[Any]) -> list[str | None]:
        """Accept every row.

        Raises:
            RewardError: A required parameter of the function is neither a column nor an argument.
        """
        check_columns(self.function, self._imported, self.form, columns)
        return [None] * len(prompts)

    def identity(self) -> Identity:
        """Return the module and the form of the function; of a given function, its own code."""
        if self.given is not None:
            return Identity("", {"function": self.function, "form": self.form, "code": code_identity(self.given)})
        return Identity(self.function.partition(":")[0], {"function": self.function, "form": self.form})

    def _call(
        self, given: Mapping[str, Any], prompts: list[Any], completions: list[str], objects: list[Any], places: Any
    ) -> Any:
        try:
            return finished(self._imported(**given))
        except RewardError:
            raise
        except (Exception, SystemExit) as error:  # sys.exit() in a function would end the run without a message
            raise reward_raised(
                error,
                name=self.function,
                completions=completions,
                places=places,
                objects=objects,
                hint=FORMS[self.form].hint(f"{type(error).__name__}: {error}", prompts),
            ) from error


@dataclass(frozen=True)
class TimedFunction:
    """A reward function in processes that are killed at a deadline, so that a slow call affects one completion only.

    The function is given lists of one prompt and one completion, or single values in the form ``verl``; one that
    compares completions needs them all, and cannot be timed.

    Attributes:
        function: ``module:function``.
        timeout: Seconds per completion.
        failed: Value of a completion if its call timed out, or raised and was counted; None leaves it out.
        errors: ``stop``: an exception stops the run; ``count``: it is counted, as timeouts always are.
        form: As for :class:`falign.rewards.OwnFunction`.
        pool: The pool of processes; by default a separate one, without a limit on memory.

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
        """Return the module of the function, and the value of a failed call."""
        settings = {
            "function": self.function,
            "form": self.form,
            "timeout": self.timeout,
            "failed": self.failed,
            "errors": self.errors,
        }
        return Identity(self.function.partition(":")[0], settings)
