"""The calling conventions of reward functions: falign's own, TRL's for conversations, and verl's."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, Protocol

from falign.choices import nearest
from falign.errors import ConfigError, RewardError
from falign.registry import import_member
from falign.rewards.base import ARGUMENTS, select_columns

__all__ = ["FORMS", "Form", "FormName", "finished", "load_function"]

FormName = Literal["falign", "trl", "verl"]

TRAINER_ARGUMENTS = frozenset({"trainer_state", "log_extra", "log_metric", "environments"})
"""Arguments that only TRL's trainer can give."""


class Form(Protocol):
    """The calling convention of a reward function.

    Attributes:
        takes_lists: Whether one call judges many completions.
    """

    takes_lists: bool

    def given(self, prompts: list[Any], completions: list[str], columns: Mapping[str, list[Any]]) -> dict[str, Any]:
        """Return all arguments that a function of this form may name, one value per completion."""
        ...

    def value(self, returned: Any) -> Any:
        """Return the value of one completion from the result of its call."""
        ...

    def hint(self, raised: str, prompts: Sequence[Any]) -> str:
        """Return advice on the form from the class and message of an exception; ``""`` if there is none."""
        ...


class _Falign:
    takes_lists = True

    def given(self, prompts: list[Any], completions: list[str], columns: Mapping[str, list[Any]]) -> dict[str, Any]:
        return {"prompts": prompts, "completions": completions, **columns}

    def value(self, returned: Any) -> Any:
        return returned

    def hint(self, raised: str, prompts: Sequence[Any]) -> str:
        if not _indexes_text(raised):
            return ""
        return (
            " Completions are texts; a function that reads completion[0]['content'] is written for TRL's "
            "conversations: set form: trl."
        )


class _TRL(_Falign):
    def given(self, prompts: list[Any], completions: list[str], columns: Mapping[str, list[Any]]) -> dict[str, Any]:
        turns = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        return {"prompts": prompts, "completions": turns, **columns}

    def hint(self, raised: str, prompts: Sequence[Any]) -> str:
        if not _indexes_text(raised) or not any(isinstance(prompt, str) for prompt in prompts):
            return ""
        return " The prompts are texts, and then TRL gives texts as completions, too: set prompts.train.0.chat: true."


class _Verl:
    takes_lists = False

    def given(self, prompts: list[Any], completions: list[str], columns: Mapping[str, list[Any]]) -> dict[str, Any]:
        nested = columns.get("reward_model")
        truths = {} if nested is None else {"ground_truth": [_ground_truth(value) for value in nested]}
        extra = {"extra_info": [None] * len(completions)}
        return {"solution_str": completions, **extra, **truths, **columns}

    def value(self, returned: Any) -> Any:
        return returned["score"] if isinstance(returned, Mapping) and "score" in returned else returned

    def hint(self, raised: str, prompts: Sequence[Any]) -> str:
        return ""


FORMS: dict[str, Form] = {"falign": _Falign(), "trl": _TRL(), "verl": _Verl()}
"""Forms by their names in run files."""


def load_function(name: str, form: FormName) -> Callable[..., Any]:
    """Return the function that ``module:function`` names.

    Args:
        name: The module as in an import statement; the function may be an attribute of a class.
        form: Its calling convention.

    Raises:
        ConfigError: It cannot be imported or called, or has the parameters of another form.
    """
    function = import_member(name, place=f"reward {name!r}", wanted="function")
    if not callable(function):
        raise ConfigError(f"reward {name!r} is a {type(function).__name__}; it must be callable.")
    check_parameters(name, function, form)
    return function


def check_parameters(name: str, function: Callable[..., Any], form: FormName) -> None:
    """Refuse a function that cannot be called in a form.

    Args:
        name: Its name in messages.
        function: Any callable.
        form: Its calling convention.

    Raises:
        ConfigError: It has the parameters of another form, or parameters without a name.
    """
    parameters = _parameters(name, function)
    unnamed = [each.name for each in parameters if each.kind is each.POSITIONAL_ONLY and each.default is each.empty]
    if unnamed:
        raise ConfigError(
            f"reward {name}: its parameter {unnamed[0]!r} has no name for callers, and arguments are given by name; "
            "remove the / from its definition."
        )
    is_verl = any(each.name == "solution_str" for each in parameters)
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
    if is_verl and form != "verl":
        raise ConfigError(f"reward {name} has a parameter 'solution_str', so it is written for verl: set form: verl.")
    if form == "verl" and not (is_verl or takes_all):
        raise ConfigError(
            f"reward {name} has no parameter 'solution_str', which form: verl gives it; its parameters are "
            f"{[each.name for each in parameters]}. Leave form out if it takes lists of completions."
        )


def check_columns(name: str, function: Callable[..., Any], form: FormName, columns: Mapping[str, list[Any]]) -> None:
    """Refuse a function with a required parameter that gets no argument.

    Args:
        name: Its name in messages.
        function: Any callable.
        form: Its calling convention.
        columns: Columns of the data, by name.

    Raises:
        RewardError: There is such a parameter; the message names it and the columns of the data.
    """
    known = {*FORMS[form].given([], [], {key: [] for key in columns.keys() | ARGUMENTS}), *columns}
    for each in _parameters(name, function):
        if each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL) or each.default is not each.empty:
            continue
        if each.name not in known:
            raise RewardError(f"reward {name}: {_unknown(each.name, columns.keys() - ARGUMENTS)}")


def arguments(
    function: Callable[..., Any],
    form: FormName,
    prompts: list[Any],
    completions: list[str],
    columns: Mapping[str, list[Any]],
) -> dict[str, list[Any]]:
    """Return the arguments that a function names, one value per completion."""
    return select_columns(function, FORMS[form].given(prompts, completions, columns))


def finished(returned: Any) -> Any:
    """Return the result of a call, after awaiting it if the function is ``async``.

    All such calls run on one event loop in a separate thread, so that sessions and clients stay usable.

    Args:
        returned: Any value, awaitable or not.
    """
    if not inspect.isawaitable(returned):
        return returned

    async def wait() -> tuple[Any, SystemExit | None]:
        try:
            return await returned, None
        except SystemExit as error:  # it would end the loop, and the result would never arrive
            return None, error

    value, exited = asyncio.run_coroutine_threadsafe(wait(), _loop(os.getpid())).result()
    if exited is not None:
        raise exited
    return value


@lru_cache(maxsize=1)
def _loop(process: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="falign-async-rewards", daemon=True).start()
    return loop


def _parameters(name: str, function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError as error:
        raise ConfigError(f"reward {name}: {error}; wrap it in a function that names its arguments.") from error


def _unknown(parameter: str, columns: set[str]) -> str:
    if parameter in TRAINER_ARGUMENTS:
        return (
            f"its parameter {parameter!r} is given by TRL's trainer alone; give it a default value, and let the "
            "function work without it."
        )
    close = nearest(parameter, [*columns, *ARGUMENTS])
    hint = f" Did you mean {close!r}?" if close else ""
    return (
        f"its parameter {parameter!r} is neither a column of the data, which has {sorted(columns)}, nor an argument "
        f"({', '.join(sorted(ARGUMENTS))}).{hint}"
    )


def _ground_truth(value: Any) -> Any:
    return value.get("ground_truth") if isinstance(value, Mapping) else None


def _indexes_text(raised: str) -> bool:
    return raised.startswith("TypeError: string indices must be integers")
