"""Rewards by name: a function of one's own, or one that is built in with its arguments."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from falign.errors import ConfigError
from falign.registry import Registry, is_own_name
from falign.rewards import verified
from falign.rewards.base import Reward
from falign.rewards.own_function import OwnFunction
from falign.rewards.words import Words

__all__ = ["REWARDS", "load_reward"]

REWARDS: Registry[Callable[..., Reward]] = Registry(
    "reward",
    {
        "math": verified.mathematics,
        "number": verified.number,
        "choice": verified.choice,
        "regex": verified.regex,
        "sections": verified.sections,
        "sql": verified.sql,
        "words": Words,
    },
)


def load_reward(name: str) -> Reward:
    r"""Return a reward by name.

    Args:
        name: ``module:function``, or a name of ``REWARDS`` with its arguments as a Python call, literals only:
            ``math``, ``number(answer='label', tolerance=0.01)``, ``regex(r'\d+', whole=True)``.

    Raises:
        ConfigError: It is unknown, cannot be imported, or does not take these arguments.
    """
    if is_own_name(name.strip()):
        return OwnFunction(name.strip())
    function, arguments, keywords = _parsed(name)
    make = REWARDS.get(function)
    try:
        return make(*arguments, **keywords)
    except TypeError as error:
        raise ConfigError(f"reward {name!r}: {error}; write its arguments as in a Python call.") from error


def _parsed(name: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Return function, arguments and keywords; the whole name as function where it is no such call."""
    try:
        node = ast.parse(name.strip(), mode="eval").body
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
            return node.func.id, [ast.literal_eval(argument) for argument in node.args], keywords
    except SyntaxError:
        pass  # a plain name, or an unknown one
    except ValueError as error:
        raise ConfigError(f"reward {name!r}: {error}; its arguments must be literals.") from error
    return name.strip(), [], {}
