"""Divergences by name, as run files and metrics spell them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from falign.choices import shown
from falign.divergences.alpha import Alpha, SquaredHellinger
from falign.divergences.base import Divergence
from falign.divergences.bounded import LeCam, TotalVariation
from falign.divergences.chi_squared import Chi2KL, NeymanChi2, PearsonChi2
from falign.divergences.jensen_shannon import GeneralizedJS, JensenShannon
from falign.divergences.kullback_leibler import ForwardKL, Jeffreys, ReverseKL
from falign.errors import ConfigError
from falign.registry import Registry, is_own_name

__all__ = ["DIVERGENCES", "get", "names", "resolve"]

FAMILIES: dict[str, Callable[..., Divergence]] = {
    "reverse_kl": ReverseKL,
    "forward_kl": ForwardKL,
    "jensen_shannon": JensenShannon,
    "alpha": Alpha,
    "jeffreys": Jeffreys,
    "squared_hellinger": SquaredHellinger,
    "pearson_chi2": PearsonChi2,
    "neyman_chi2": NeymanChi2,
    "chi2_kl": Chi2KL,
    "total_variation": TotalVariation,
    "le_cam": LeCam,
    "generalized_js": GeneralizedJS,
}
ALIASES = {
    "rkl": "reverse_kl",
    "fkl": "forward_kl",
    "js": "jensen_shannon",
    "js_divergence": "jensen_shannon",
    "jeffrey": "jeffreys",
    "hellinger": "squared_hellinger",
    "chi2": "pearson_chi2",
    "chi_square": "pearson_chi2",
    "chi_squared": "pearson_chi2",
    "pearson": "pearson_chi2",
    "neyman": "neyman_chi2",
    "chipo": "chi2_kl",
    "tv": "total_variation",
    "lecam": "le_cam",
    "gjs": "generalized_js",
}
REFUSED = {
    "kl": "'kl' does not say which: choose 'reverse_kl' = KL(π‖π_ref) (DPO, PPO, GRPO) or 'forward_kl' = KL(π_ref‖π).",
    "alpha_divergence": (
        "'alpha_divergence' does not say whose α: 'alpha(a)' is the f-DPO paper's, with α → 0 the reverse KL; "
        "TRL's f_alpha_divergence_coef c is alpha(1 - c)."
    ),
}
WRAPPERS: dict[str, Callable[[Divergence], Divergence]] = {
    "standardized": lambda divergence: divergence.standardized(),
    "dual": lambda divergence: divergence.dual(),
}


def _is_divergence(value: Any) -> bool:
    is_family = inspect.isclass(value) and issubclass(value, Divergence)
    return is_family or isinstance(value, Divergence) or inspect.isfunction(value)


DIVERGENCES: Registry[Any] = Registry(
    "divergence",
    FAMILIES,
    aliases=ALIASES,
    refused=REFUSED,
    wanted="falign Divergence, a family of them or a function that returns one",
    is_member=_is_divergence,
)
"""Families by name; an own member may also be a divergence itself."""


def names() -> tuple[str, ...]:
    """Return the registry names of the families, in the order of the documentation.

    Returns:
        ``("reverse_kl", "forward_kl", ...)``; ``alpha`` and ``generalized_js`` take a parameter.

    Example:
        >>> names()[:2]
        ('reverse_kl', 'forward_kl')
    """
    return tuple(FAMILIES)


def get(name: str, *, field: str | None = None, **parameters: float) -> Divergence:
    """Return a divergence by name.

    Args:
        name: A registry name or alias, its parameter in parentheses where it has one (``"alpha(0.5)"``);
            ``"standardized(NAME)"`` and ``"dual(NAME)"`` wrap another; ``"module:Name"`` is one of your own, a
            divergence or a class or function that makes one (``"module:Name(0.5)"``).
        field: The run-file field or option that holds the name, for messages.
        **parameters: The parameter by name instead (``get("alpha", alpha=0.5)``).

    Returns:
        The divergence; equal names give equal divergences.

    Raises:
        ValueError: The name is unknown or ambiguous, or a parameter is missing, unknown, given twice or out of range.

    Source:
        The table of docs/divergences.md.

    Example:
        >>> get("alpha(0.5)") == get("alpha", alpha=0.5)
        True
    """
    place = f"divergence {name!r}" if field is None else f"{field}={name!r}"
    match = re.fullmatch(r"\s*([A-Za-z_][\w.:-]*)\s*(?:\((.*)\))?\s*", name)
    if match is None:
        raise ConfigError(f"{place} is not of the form NAME or NAME(PARAMETER), as in 'alpha(0.5)'.")
    key, argument = match[1], match[2]
    if not is_own_name(key):
        key = key.lower().replace("-", "_")
    if key in WRAPPERS:
        return WRAPPERS[key](get(argument or "", field=field, **parameters))
    family = DIVERGENCES.get(key, field=field)
    if isinstance(family, Divergence):
        if argument is not None or parameters:
            raise ConfigError(f"{place} is a divergence, so it takes no parameter.")
        return family
    given = _parameters(family, place, match[1], argument, parameters)
    try:
        divergence = family(**given)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error
    if not isinstance(divergence, Divergence):
        raise ConfigError(f"{place} returned a {type(divergence).__name__}, not a falign Divergence.")
    return divergence


def _parameters(
    family: Callable[..., Divergence], place: str, key: str, argument: str | None, given: dict[str, float]
) -> dict[str, float]:
    # A family has at most one parameter that a name can hold: its first.
    known = inspect.signature(family).parameters
    if argument is None and not given and all(each.default is not each.empty for each in known.values()):
        return {}
    if not known:
        raise ConfigError(f"{place}: {key} takes no parameter.")
    parameter = next(iter(known))
    if argument is not None and given:
        raise ConfigError(f"{place} with {given}: its parameter is given twice; give it once.")
    if argument is not None:
        text = argument.split("=")[-1].strip() if argument.startswith(f"{parameter}=") else argument.strip()
        try:
            given = {**given, parameter: float(text)}
        except ValueError:
            raise ConfigError(f"{place}: {argument!r} is not a number; write {key}(0.5).") from None
    if set(given) != {parameter}:
        extra = f", got {sorted(given)}" if given else ""
        raise ConfigError(f"{place}: {key} needs its parameter {parameter}{extra}; write {key}(0.5).")
    return given


def resolve(divergence: Divergence | str) -> Divergence:
    """Return a divergence that is given as an object or by its name.

    Args:
        divergence: f, or its name.

    Returns:
        The divergence.

    Raises:
        ConfigError: The name is unknown, or it is neither.

    Example:
        >>> resolve("alpha(0.5)") == resolve(Alpha(0.5))
        True
    """
    if isinstance(divergence, str):
        return get(divergence)
    if not isinstance(divergence, Divergence):
        given = divergence.__name__ if isinstance(divergence, type) else shown(divergence)
        raise ConfigError(
            f"divergence is {given}: give a name, such as 'jensen_shannon', or a falign.divergences.Divergence object."
        )
    return divergence
