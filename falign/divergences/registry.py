"""Divergences by name, as run files and metrics spell them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

from falign.divergences.alpha import Alpha, SquaredHellinger
from falign.divergences.base import Divergence
from falign.divergences.bounded import LeCam, TotalVariation
from falign.divergences.chi_squared import Chi2KL, NeymanChi2, PearsonChi2
from falign.divergences.jensen_shannon import GeneralizedJS, JensenShannon
from falign.divergences.kullback_leibler import ForwardKL, Jeffreys, ReverseKL

__all__ = ["get", "names"]

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
PARAMETERS = {"alpha": "alpha", "generalized_js": "b"}
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


def names() -> tuple[str, ...]:
    """Return the registry names of the twelve families, in the order of the documentation.

    Returns:
        ``("reverse_kl", "forward_kl", ...)``; ``alpha`` and ``generalized_js`` take a parameter.

    Example:
        >>> names()[:2]
        ('reverse_kl', 'forward_kl')
    """
    return tuple(FAMILIES)


def get(name: str, **parameters: float) -> Divergence:
    """Return a divergence by name.

    Args:
        name: A registry name or alias, its parameter in parentheses where it has one (``"alpha(0.5)"``);
            ``"standardized(NAME)"`` and ``"dual(NAME)"`` wrap another.
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
    match = re.fullmatch(r"\s*([A-Za-z][A-Za-z0-9_-]*)\s*(?:\((.*)\))?\s*", name)
    if match is None:
        raise ValueError(f"divergence {name!r} is not of the form NAME or NAME(PARAMETER), as in 'alpha(0.5)'.")
    key, argument = match[1].lower().replace("-", "_"), match[2]
    if key in WRAPPERS:
        return WRAPPERS[key](get(argument or "", **parameters))
    key = ALIASES.get(key, key)
    if key in REFUSED:
        raise ValueError(f"divergence {name!r}: {REFUSED[key]}")
    if key not in FAMILIES:
        close = difflib.get_close_matches(key, [*FAMILIES, *ALIASES], n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? Choose" if close else "choose"
        raise ValueError(f"divergence {name!r} is unknown; {hint} one of {', '.join(FAMILIES)}.")
    return FAMILIES[key](**_parameters(key, name, argument, parameters))


def _parameters(key: str, name: str, argument: str | None, given: dict[str, float]) -> dict[str, float]:
    parameter = PARAMETERS.get(key)
    if parameter is None:
        if argument is not None or given:
            raise ValueError(f"divergence {name!r}: {key} takes no parameter.")
        return {}
    if argument is not None and given:
        raise ValueError(f"divergence {name!r} with {given}: its parameter is given twice; give it once.")
    if argument is not None:
        text = argument.split("=")[-1].strip() if argument.startswith(f"{parameter}=") else argument.strip()
        try:
            given = {**given, parameter: float(text)}
        except ValueError:
            raise ValueError(f"divergence {name!r}: {argument!r} is not a number; write {key}(0.5).") from None
    if set(given) != {parameter}:
        extra = f", got {sorted(given)}" if given else ""
        raise ValueError(f"divergence {name!r}: {key} needs its parameter {parameter}{extra}; write {key}(0.5).")
    return given
