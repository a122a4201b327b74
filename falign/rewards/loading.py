"""Rewards by name: a function of one's own, or one that is built in with its arguments."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable
from typing import Any

from falign.errors import ConfigError
from falign.rewards import verified
from falign.rewards.base import Reward
from falign.rewards.own_function import OwnFunction
from falign.rewards.words import Words

__all__ = ["BUILT_IN", "load_reward"]

BUILT_IN: dict[str, Callable[..., Reward]] = {
    "math": verified.mathematics,
    "number": verified.number,
    "choice": verified.choice,
    "regex": verified.regex,
    "sections": verified.sections,
    "sql": verified.sql,
    "words": Words,
}


def load_reward(name: str) -> Reward:
    r"""Return a reward by name.

    Args:
        name: ``module:function``, or a name of ``BUILT_IN`` with its arguments as a Python call, literals only:
            ``math``, ``number(answer='label', tolerance=0.01)``, ``regex(r'\d+', whole=True)``.

    Raises:
        ConfigError: It is unknown, cannot be imported, or does not take these arguments.
    """
    function, arguments, keywords = _parsed(name)
    if function not in BUILT_IN:
        if ":" in name:
            return OwnFunction(name)
        close = difflib.get_close_matches(function, BUILT_IN, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? Choose" if close else "choose"
        raise ConfigError(f"reward {name!r} is unknown; {hint} one of {', '.join(BUILT_IN)}, or give module:function.")
    try:
        return BUILT_IN[function](*arguments, **keywords)
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
        pass  # module:function is none
    except ValueError as error:
        raise ConfigError(f"reward {name!r}: {error}; its arguments must be literals.") from error
    return name.strip(), [], {}
