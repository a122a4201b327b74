"""The battery of a reward."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from falign.errors import CheckError, FalignError
from falign.rewards.base import Prompt, Reward, Scores, call_reward
from falign.rewards.forms import finished

__all__ = ["check_reward"]

ODD = ("", " ", "\n\n", "é 漢字 🙂", "\\boxed{", "0" * 4000, "</s>", "None", "NaN")
"""Completions that models do write, and that parsers stumble over."""


def check_reward(
    reward: Reward,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    name: str | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    compares: bool = False,
) -> None:
    """Check that a reward keeps the contract of :class:`falign.rewards.Reward`.

    One finite number or None per completion; the same values in a second call, in another order of the completions and,
    unless the reward compares completions, one at a time; arguments are left as they were; and odd completions (empty,
    endless, other scripts, half a formula) get a value like any other.

    Args:
        reward: The function or object; it may be ``async``.
        prompts: The prompt of each completion.
        completions: Texts that it is meant for, two or more.
        name: Its name in messages.
        columns: Values of data columns, one per completion.
        compares: Whether the value of a completion depends on the others of its prompt.

    Raises:
        CheckError: A rule is broken; the message has the place and the value.

    Example:
        >>> def length(prompts, completions, **columns):
        ...     return [float(len(completion)) for completion in completions]
        >>> check_reward(length, ["Why?", "Why?"], ["Because.", "So."])
    """
    name = str(name or getattr(reward, "__name__", type(reward).__name__))
    if len(completions) < 2:
        raise CheckError(f"reward {name}: {len(completions)} completions to check it with; give two or more.")
    given = {key: list(values) for key, values in (columns or {}).items()}
    prompts, completions = list(prompts), list(completions)
    first = _values(reward, prompts, completions, given, name)
    _require_same(name, first, _values(reward, prompts, completions, given, name), "in a second call", completions)
    backward = slice(None, None, -1)
    turned = _values(reward, prompts[backward], completions[backward], {k: v[backward] for k, v in given.items()}, name)
    _require_same(name, first, turned[backward], "in reverse order", completions)
    if not compares:
        single = [
            _values(
                reward, prompts[i : i + 1], completions[i : i + 1], {k: v[i : i + 1] for k, v in given.items()}, name
            )
            for i in range(len(completions))
        ]
        alone = [values[0] for values in single]
        _require_same(name, first, alone, "alone (set compares=True if it compares completions)", completions)
    for odd in ODD:
        # Beside an ordinary completion, because a reward may compare them.
        texts = [odd, completions[0]]
        _values(reward, [prompts[0]] * 2, texts, {key: [values[0]] * 2 for key, values in given.items()}, name)


def _waiting(reward: Any) -> Any:
    """Return a reward that waits for its result if it is ``async``, as a run does."""
    if not (inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)):
        return reward

    @functools.wraps(reward, updated=())
    def finishing(**given: Any) -> Any:
        return finished(reward(**given))

    return finishing


def _values(
    reward: Reward, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]], name: str
) -> list[float | None]:
    reward = _waiting(reward)
    before = copy.deepcopy((prompts, completions, columns))
    try:
        scores: Scores = call_reward(reward, prompts, completions, columns, name=name)
    except FalignError as error:
        shown = [text if len(text) <= 40 else f"{text[:40]}…" for text in completions]
        raise CheckError(f"{error}\nIt was given the completions {shown!r}.") from error
    if (prompts, completions, columns) != before:
        raise CheckError(f"reward {name} changed the lists that it was given; make copies of what it changes.")
    if scores.errors or scores.timeouts:
        raise CheckError(
            f"reward {name} counted {scores.errors} errors and {scores.timeouts} timeouts: {scores.message}"
        )
    return scores.values


def _require_same(
    name: str, first: Sequence[float | None], other: Sequence[float | None], when: str, completions: Sequence[str]
) -> None:
    for one, two, text in zip(first, other, completions, strict=True):
        same = one is two is None or (one is not None and two is not None and math.isclose(one, two, rel_tol=1e-6))
        if not same:
            raise CheckError(f"reward {name}: {one} becomes {two} {when}, for the completion {text[:60]!r}.")
