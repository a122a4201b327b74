"""The result of an audit: the table, the verdict, and a plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from falign.audit.comparison import Comparison
from falign.audit.samples import Samples
from falign.durable import writing
from falign.errors import ConfigError

__all__ = ["LEVEL_NAMES", "SAMPLE_NAMES", "AuditResult", "Finding", "drawn_cosine"]

Finding = Literal["exact", "direction", "opposite", "zero", "none"]
"""Relation of a gradient to that of a divergence: a constant times it; its direction with a factor that varies; its
opposite; zero; or that of no divergence of the registry."""

NOUNS = {
    "reverse_kl": "the reverse KL",
    "forward_kl": "the forward KL",
    "jensen_shannon": "the Jensen–Shannon divergence",
    "jeffreys": "the Jeffreys divergence",
    "squared_hellinger": "the squared Hellinger distance",
    "pearson_chi2": "Pearson's χ²",
    "neyman_chi2": "Neyman's χ²",
    "chi2_kl": "chi2_kl",
    "total_variation": "the total variation",
    "le_cam": "the Le Cam divergence",
}
LEVEL_NAMES = {
    "sequence": "of whole completions",
    "token": "by token on fixed prefixes",
    "token_returns": "by token with later prefixes",
    "token_reference": "by token on the reference's prefixes",
    "token_old": "by token on the old policy's prefixes",
    "token_mean": "of the mean ratio per token",
}
SAMPLE_NAMES = {
    "policy": "samples of the policy",
    "reference": "samples of the reference",
    "old": "samples of an old policy",
    "pairs": "pairs",
}


def drawn_cosine(cosine: float) -> str:
    """Return a cosine as text; 1.000 only if it is 1 to nine digits.

    Example:
        >>> drawn_cosine(0.9999), drawn_cosine(1 - 1e-12), drawn_cosine(-0.711)
        ('0.9999', '1.000', '−0.711')
    """
    if abs(cosine) > 1 - 1e-9:
        text = "1.000"
    else:
        digits = 3
        while digits < 9 and float(f"{abs(cosine):.{digits}f}") == 1.0:
            digits += 1
        text = f"{abs(cosine):.{digits}f}"
    return f"−{text}" if cosine < 0 and float(text) else text


BESIDE = {"old": "the old policy", "teacher": "the teacher", "base": "the base"}


@dataclass(frozen=True)
class AuditResult:
    """The outcome of :func:`falign.audit`.

    Attributes:
        name: Name of the loss.
        samples: Source of the completions.
        finding: What its gradient is.
        table: Its gradient beside that of every divergence, level and reference.
        best: The row that the verdict names; None if the gradient is zero.
        rival: The row that the verdict contrasts it with: the named divergence, or the nearest other one.
        named: Name of the divergence that was asked for; None if none was.
        verdict: One sentence.
        notes: Further sentences.
    """

    name: str
    samples: Samples
    finding: Finding
    table: tuple[Comparison, ...]
    best: Comparison | None
    rival: Comparison | None
    named: str | None
    verdict: str
    notes: tuple[str, ...] = ()

    def row(self, divergence: str, level: str, reference: str | None = None) -> Comparison:
        """Return one row of the table.

        Args:
            divergence: Name of the divergence.
            level: Its level.
            reference: Name of the reference; by default the first that the loss reads.

        Raises:
            ConfigError: There is no such row.
        """
        for each in self.table:
            if (each.divergence, each.level) == (divergence, level) and reference in (None, each.reference):
                return each
        raise ConfigError(
            f"the audit of {self.name} has no row for {divergence!r}, level {level!r}, reference {reference!r}: its "
            f"levels are {', '.join(dict.fromkeys(each.level for each in self.table))}."
        )

    def is_gradient_of(self, divergence: str, level: str | None = None) -> bool:
        """Return True if the loss has the gradient of a divergence, times a constant.

        Args:
            divergence: Its name.
            level: Its level; any by default.
        """
        return any(each.exact and each.divergence == divergence and level in (None, each.level) for each in self.table)

    @property
    def passed(self) -> bool | None:
        """Whether the loss has the gradient of the named divergence; None if none was named."""
        return None if self.named is None else self.is_gradient_of(self.named)

    def __str__(self) -> str:
        return "\n".join([self.verdict, *self.notes])

    def plot(self, path: str | Path) -> Path:
        """Draw the cosines to every divergence at each level.

        Args:
            path: The image file; its suffix (.png, .svg, .pdf) selects the format.

        Returns:
            The path.

        Raises:
            ConfigError: The suffix is no image format, the folder does not exist, or the gradient is zero.
        """
        path = Path(path)
        if self.finding == "zero":
            raise ConfigError(f"plot={str(path)!r}: the gradient of {self.name} is zero and has no direction to draw.")
        from matplotlib.figure import Figure

        levels = list(dict.fromkeys(each.level for each in self.table))
        reference = self.best.reference if self.best else "reference"
        rows = [each for each in self.table if each.reference == reference]
        names = list(dict.fromkeys(each.divergence for each in rows))
        figure = Figure(figsize=(7.6, 1.6 + 0.27 * len(names)), layout="constrained")
        kinds, kind = sorted(figure.canvas.get_supported_filetypes()), path.suffix.lstrip(".").lower()
        if kind not in kinds or not path.absolute().parent.is_dir():
            raise ConfigError(
                f"plot={str(path)!r}: give a file in an existing folder with one of the suffixes {', '.join(kinds)}."
            )
        axes = figure.subplots()
        for i, level in enumerate(levels):
            own = [each for each in rows if each.level == level]
            axes.plot(
                [each.cosine for each in own],
                [names.index(each.divergence) for each in own],
                linestyle="none",
                marker="osD^v"[i],
                color=("#1f6fb5", "#b8520e", "#1a7f4c", "#7b4cb4", "#b5317b")[i],
                markersize=6,
                alpha=0.85,
                label=LEVEL_NAMES[level],
            )
        exact = [each for each in rows if each.exact]
        axes.plot(
            [1.0] * len(exact),
            [names.index(each.divergence) for each in exact],
            linestyle="none",
            marker="o",
            markersize=13,
            markerfacecolor="none",
            markeredgecolor="#1b1f24",
            label="exact" if exact else None,
        )
        axes.set_yticks(range(len(names)), labels=names)
        axes.set(
            xlabel="cosine with the true gradient", xlim=(min(-0.05, *(each.cosine for each in rows)) - 0.05, 1.06)
        )
        axes.invert_yaxis()
        axes.axvline(1, color="0.6", linewidth=0.8)
        axes.axvline(0, color="0.6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
        axes.set_title(f"{self.name}, on {SAMPLE_NAMES[self.samples]}", loc="left", fontsize=10)
        figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8)
        with writing(path) as temporary:
            figure.savefig(temporary, dpi=150, format=kind)
        return path


def noun(row: Comparison) -> str:
    """Return the name of a row in a sentence, without its level.

    Example:
        >>> noun(Comparison("forward_kl", "token", "teacher", (1.0,), (1.0,), True))
        'the forward KL to the teacher'
    """
    beside = "" if row.reference == "reference" else f" to {BESIDE.get(row.reference, row.reference)}"
    return f"{NOUNS.get(row.divergence, row.divergence)}{beside}"


def level_name(row: Comparison) -> str:
    """Return the level of a row in a sentence."""
    if row.level == "token_reference":
        owner = BESIDE.get(row.reference, row.reference if row.reference != "reference" else "the reference")
        return f"by token on {owner}'s prefixes"
    return LEVEL_NAMES[row.level]


def sentence(
    name: str,
    samples: Samples,
    finding: Finding,
    best: Comparison | None,
    rival: Comparison | None,
    *,
    named: bool,
) -> str:
    """Return the verdict.

    Args:
        name: Name of the loss.
        samples: Source of the completions.
        finding: What its gradient is.
        best: The row that fits best.
        rival: A row that does not fit.
        named: Whether ``rival`` is the divergence that was asked for.
    """
    where = f"On {SAMPLE_NAMES[samples]}, what {name} minimizes"
    if finding == "zero" or best is None:
        return f"{where} has no mean gradient: it holds the policy to nothing and adds noise."
    of = f"{noun(best)} {level_name(best)}"
    other = "" if rival is None else f", not of {noun(rival)} ({drawn_cosine(rival.cosine)})"
    if samples == "pairs":
        return f"{where} {_of_pairs(finding, best, of, rival)}."
    if finding == "exact":
        return f"{where} has the gradient of {of} (cosine 1.000, ratio {best.ratio:.4g}){other}."
    if finding == "direction":
        low, high = min(best.ratios), max(best.ratios)
        return (
            f"{where} has the direction of the gradient of {of} (cosine 1.000), with a strength that depends on the "
            f"policy ({low:.3g} to {high:.3g}){other}."
        )
    if finding == "opposite":
        return (
            f"{where} has the opposite of the gradient of {of} (cosine −1.000): it pushes the policy away from the "
            "reference."
        )
    away = " It pushes away from the reference." if best.cosine < 0 else ""
    wanted = f"; its cosine with {noun(rival)} is {drawn_cosine(rival.cosine)}" if rival and named else ""
    return (
        f"{where} has the gradient of no divergence of the registry; the nearest is {of} (cosine "
        f"{drawn_cosine(best.cosine)}){wanted}.{away}"
    )


def _of_pairs(finding: Finding, best: Comparison, of: str, rival: Comparison | None) -> str:
    not_under = "" if rival is None else f", not under {noun(rival)} ({drawn_cosine(rival.cosine)})"
    if finding == "none":
        return (
            f"is an f-DPO loss under no divergence of the registry; the nearest is {of} (cosine "
            f"{drawn_cosine(best.cosine)})"
        )
    if finding == "direction":
        return (
            f"has the direction of an f-DPO loss under {of} (cosine 1.000), with strengths that depend on more than "
            f"π/π_ref, so that β f′(u) is not its implicit reward{not_under}"
        )
    opposite = "the opposite of " if finding == "opposite" else ""
    return f"is {opposite}an f-DPO loss under {of} (cosine {drawn_cosine(best.cosine)}){not_under}"
