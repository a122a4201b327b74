"""Display names of metrics, and the format of their values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeAlias

__all__ = [
    "MINUS",
    "NOTHING",
    "Number",
    "divergence_label",
    "fixed",
    "held_out_rows",
    "number",
    "share",
    "written",
]

Number: TypeAlias = float | int
"""A number in JSON; it may have stored a float as an integer."""

NOTHING, MINUS = "–", "−"

HELD_OUT = {
    "reward": ("reward", "{:.4f}"),
    "reward, best of 8": ("reward/best_of_8", "{:.4f}"),
    "pass@1": ("pass@1", "{:.1%}"),
    "pass@8": ("pass@8", "{:.1%}"),
    "reverse KL to the reference": ("divergence/reverse_kl", "{:.3f}"),
    "reverse KL to the teacher": ("teacher/divergence/reverse_kl", "{:.3f}"),
    "different bigrams": ("distinct-2", "{:.3f}"),
    "tokens": ("completions/length", "{:.1f}"),
    "reward accuracy": ("rewards/accuracies", "{:.1%}"),
    "mean margin": ("rewards/margins", "{:+.3f}"),
    "loss": ("loss", "{:.4f}"),
    "log-ratio of chosen": ("logratios/chosen", "{:+.2f}"),
    "log-ratio of rejected": ("logratios/rejected", "{:+.2f}"),
    "entropy per token": ("entropy", "{:.3f}"),
}
"""Metric and format by label, in the order of the table of held-out values."""


def held_out_rows(metrics: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return the rows of the table of held-out values, in the terminal and in the report: label, metric, format.

    Metrics of a term of a sum follow those of the whole, behind the name of the term.

    Args:
        metrics: Names of the metrics that there are.

    Example:
        >>> held_out_rows(["loss", "dpo/rewards/accuracies", "sft/nll"])
        [('loss', 'loss', '{:.4f}'), ('dpo: reward accuracy', 'dpo/rewards/accuracies', '{:.1%}')]
    """
    found = set(metrics)
    rows = [(label, metric, style) for label, (metric, style) in HELD_OUT.items() if metric in found]
    own = {metric for _, metric, _ in rows}
    terms = sorted({name.partition("/")[0] for name in found if "/" in name})
    return rows + [
        (f"{term}: {label}", f"{term}/{metric}", style)
        for term in terms
        for label, (metric, style) in HELD_OUT.items()
        if f"{term}/{metric}" in found - own
    ]


SPOKEN = {
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "jensen_shannon": "Jensen–Shannon",
    "alpha": "α",
    "jeffreys": "Jeffreys",
    "squared_hellinger": "squared Hellinger",
    "pearson_chi2": "Pearson χ²",
    "neyman_chi2": "Neyman χ²",
    "chi2_kl": "χ² + KL",
    "le_cam": "Le Cam",
    "generalized_js": "generalized JS",
}


def written(value: Number | None, style: str = "{:.4g}") -> str:
    """Return a formatted value; a missing one as a dash.

    Example:
        >>> written(-0.51234, "{:+.2f}"), written(None), written(float("inf"))
        ('−0.51', '–', '∞')
    """
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    text = style.format(value)
    return text.replace("-", MINUS) if "e" not in text else text


def number(value: Number | None) -> str:
    """Return a value with four digits."""
    return written(value)


def fixed(value: Number | None) -> str:
    """Return a value with three decimals, so that columns align; a large one with one decimal."""
    return written(value, "{:.3f}" if value is None or abs(value) < 10 else "{:.1f}")


def share(value: Number | None) -> str:
    """Return a share as a percentage."""
    return written(value, "{:.1%}")


def divergence_label(name: str) -> str:
    """Return the display name of a divergence.

    Example:
        >>> divergence_label("reverse_kl"), divergence_label("alpha(0.5)")
        ('reverse KL', 'α(0.5)')
    """
    family, opening, parameter = name.partition("(")
    return f"{SPOKEN.get(family, family.replace('_', ' '))}{opening}{parameter}"
