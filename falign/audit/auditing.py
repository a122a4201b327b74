"""``falign.audit``: from a loss to the verdict whose gradient it has."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from falign import divergences
from falign.audit.cases import CASES
from falign.audit.comparison import Comparison, compare_means, compare_pairs, is_zero, sum_of_two
from falign.audit.functions import Credit, LossLevel, Use
from falign.audit.objective_losses import ObjectiveLoss
from falign.audit.result import LEVEL_NAMES, AuditResult, Finding, level_name, noun, sentence
from falign.audit.samples import FunctionLoss, MeanGradient, Samples, Subject
from falign.audit.truth import LEVELS, TruthLevel, registry
from falign.audit.world import World, worlds
from falign.choices import nearest, require_choice
from falign.divergences import Divergence
from falign.errors import ConfigError
from falign.objectives import Objective
from falign.registry import import_member, is_own_name

__all__ = ["audit"]

EQUAL_REWARDS = "It was given equal rewards: whatever depends on their differences, or on passing, is zero here."


def audit(
    loss: object,
    divergence: Divergence | str | None = None,
    *,
    samples: str | None = None,
    level: str | None = None,
    use: str | None = None,
    credit: str | None = None,
    reference: str | None = None,
    name: str | None = None,
) -> AuditResult:
    """Return which divergence's gradient a loss has, by enumerating everything that a small model can sample.

    The loss is a falign objective, or a function that names what it reads among ``logprobs``, ``reference_logprobs``,
    ``old_logprobs``, ``teacher_logprobs``, ``base_logprobs``, ``mask`` (or ``completion_mask``), ``rewards`` (zeros),
    ``tokens``, ``vocabulary_logprobs`` and ``reference_vocabulary_logprobs`` (N, T, V). It returns one loss per token
    (summed over each completion) or per completion, or the mean over the batch. A loss of pairs names
    ``chosen_logprobs``, ``rejected_logprobs``, ``reference_chosen_logprobs``, ``reference_rejected_logprobs``.

    Args:
        loss: The function or objective; or its name: ``module:name``, or one of the known cases
            (``falign audit --list``).
        divergence: The divergence that the loss is meant to have the gradient of. Any other than those of the registry
            is compared with, too.
        samples: ``"policy"`` (the default), ``"reference"``, ``"old"`` (an older policy; the loss has to apply
            importance weights), or ``"pairs"`` (the default of a loss of pairs).
        level: ``"token"``: a function is given (N, T) tensors, the default. ``"sequence"``: sums over completions, the
            default of pairs.
        use: ``"loss"``: the result is differentiated. ``"reward"``: the result is subtracted from the reward, so that
            its gradient is that of ``E[c ∇log π]`` with c a constant.
        credit: With ``use="reward"`` and one value per token: ``"returns"`` (the default) gives each token the sum of
            its own and all later ones, ``"fixed_prefix"`` only its own.
        reference: Name of the reference that the policy is compared with, such as ``"teacher"`` or ``"old"``; by
            default all that the loss reads.
        name: Name of the loss in messages.

    Returns:
        The verdict, with the table of cosines and ratios.

    Raises:
        ConfigError: The loss cannot be enumerated, or an argument is unknown.

    Example:
        >>> def k3(logprobs, reference_logprobs):
        ...     log_ratio = reference_logprobs - logprobs
        ...     return log_ratio.exp() - 1 - log_ratio
        >>> print(audit(k3, "reverse_kl").verdict)
        On samples of the policy, what k3 minimizes has the gradient of the forward KL by token on fixed prefixes
        (cosine 1.000, ratio 1), not of the reverse KL (0.913).
    """
    case = CASES.get(loss) if isinstance(loss, str) else None
    if case is not None:
        built, name = case.build(), name or str(loss)
        samples, level, use = samples or case.samples, level or case.level, use or case.use
        credit, reference, divergence = credit or case.credit, reference or case.reference, divergence or case.claimed
    else:
        built = _member(loss) if isinstance(loss, str) else loss
        name = name or (loss if isinstance(loss, str) else _name_of(loss))
    source: Samples | None = _chosen("samples", samples, Samples)
    subject = _subject(
        built, name, _chosen("level", level, LossLevel), _chosen("use", use, Use), _chosen("credit", credit, Credit)
    )
    chosen = divergences.get(divergence, field="divergence") if isinstance(divergence, str) else divergence
    if not (chosen is None or isinstance(chosen, Divergence)):
        raise ConfigError(
            f"divergence={divergence!r} is a {type(divergence).__name__}; give a name, or a Divergence such as "
            "from_generator(f)."
        )
    if source == "pairs" or (source is None and subject.of_pairs):
        if not subject.of_pairs:
            raise ConfigError(f"samples='pairs': {name} reads no pairs; choose 'policy', 'reference' or 'old'.")
        if reference not in (None, "reference"):
            raise ConfigError(f"reference={reference!r}: pairs are compared with the one that they read; leave it out.")
        return _of_pairs(subject, chosen)
    if subject.of_pairs:
        raise ConfigError(f"samples={samples!r}: {name} is a loss of pairs; set samples='pairs'.")
    if reference is not None:
        require_choice(
            "reference", reference, ("reference", "old", *sorted({*subject.references} - {"reference", "old"}))
        )
    result = _of_samples(subject, chosen, source or "policy", reference)
    if source is None and result.finding not in ("exact", "direction"):
        result = replace(result, notes=(*result.notes, *_elsewhere(subject, chosen, reference)))
    return result


def _chosen(option: str, value: str | None, choices: Any) -> Any:
    if value is not None:
        require_choice(option, value, choices)
    return value


def _member(name: str) -> object:
    close = nearest(name, CASES)
    hint = f"did you mean {close!r}? " if close else ""
    if not is_own_name(name):
        raise ConfigError(
            f"loss={name!r} is no known loss; {hint}`falign audit --list` has all; give module:name of your own."
        )
    try:
        return import_member(name, place=f"loss={name!r}")
    except ConfigError as error:
        if close is None or close.partition(":")[0] != name.partition(":")[0]:
            raise
        raise ConfigError(f"{error} Of the known losses, {hint}`falign audit --list` has all.") from error


def _name_of(loss: object) -> str:
    return getattr(loss, "__name__", type(loss).__name__)


def _subject(loss: Any, name: str, level: LossLevel | None, use: Use | None, credit: Credit | None) -> Subject:
    if inspect.isclass(loss):
        raise ConfigError(f"{name} is a class: give an instance of it, as in {name}().")
    if isinstance(loss, Objective):
        for option, value in (("level", level), ("credit", credit)):
            if value is not None:
                raise ConfigError(f"{option}={value!r}: {name} is an objective, which reads tokens; leave it out.")
        if use == "reward":
            raise ConfigError(f"use='reward': {name} is an objective, which gives losses; leave it out.")
        return ObjectiveLoss.of(loss, name)
    if not callable(loss):
        raise ConfigError(f"{name} is a {type(loss).__name__}: give a function of log-probabilities or an objective.")
    if credit is not None and (use or "loss") == "loss":
        raise ConfigError(
            f"credit={credit!r} with use='loss': it is of coefficients; set use='reward', or leave it out."
        )
    return FunctionLoss(loss, name, level, use or "loss", credit or "returns")


def _of_samples(
    subject: Subject, divergence: Divergence | None, samples: Samples, reference: str | None
) -> AuditResult:
    read = subject.references
    references = (reference,) if reference else read or ("old" if samples == "old" else "reference",)
    known = registry([*([] if divergence is None else [divergence]), *subject.divergences])
    all_worlds = worlds(tuple({*read, *references}))
    means = [subject.mean_gradient(world, samples) for world in all_worlds]
    if all(is_zero(mean) for mean in means):
        verdict = sentence(subject.name, samples, "zero", None, None, named=False)
        notes = (EQUAL_REWARDS,) if subject.reads_rewards else ()
        return AuditResult(subject.name, samples, "zero", (), None, None, _name(divergence), verdict, notes)
    levels: list[TruthLevel] = [each for each in LEVELS if samples == "old" or each != "token_old"]
    table = tuple(
        row
        for row in compare_means(means, all_worlds, known, levels, references)
        if (row.level, row.reference) != ("token_old", "old")  # the reference's own prefixes, by another name
    )
    return _judged(subject, samples, table, divergence, _sums(means, all_worlds, known, table, references[0]))


def _of_pairs(subject: Subject, divergence: Divergence | None) -> AuditResult:
    all_worlds = worlds(subject.references)
    slopes = [subject.pair_slopes(world) for world in all_worlds]
    if not any(each.chosen.any() or each.rejected.any() for each in slopes):
        verdict = sentence(subject.name, "pairs", "zero", None, None, named=False)
        return AuditResult(subject.name, "pairs", "zero", (), None, None, _name(divergence), verdict)
    known = registry([*([] if divergence is None else [divergence]), *subject.divergences])
    return _judged(subject, "pairs", tuple(compare_pairs(slopes, all_worlds, known)), divergence, None)


def _name(divergence: Divergence | None) -> str | None:
    return None if divergence is None else divergence.name


def _judged(
    subject: Subject, samples: Samples, table: tuple[Comparison, ...], divergence: Divergence | None, parts: str | None
) -> AuditResult:
    name, named = subject.name, _name(divergence)
    table = tuple(each for each in table if not any(math.isnan(cosine) for cosine in each.cosines))
    finding, best, fitting = _finding(table, named, {each.name for each in subject.divergences})
    rival = _rival(table, best, named, finding)
    verdict = sentence(name, samples, finding, best, rival, named=rival is not None and rival.divergence == named)
    notes = []
    if others := [each for each in fitting if each is not best]:
        notes.append(f"Equally: {'; '.join(_brief(each) for each in others)}.")
    if finding == "none" and parts:
        notes.append(parts)
    return AuditResult(name, samples, finding, table, best, rival, named, verdict, tuple(notes))


def _finding(
    table: tuple[Comparison, ...], named: str | None, own: set[str]
) -> tuple[Finding, Comparison, list[Comparison]]:
    """Return the finding, the row it names, and all rows that it is true of."""

    def first(rows: list[Comparison]) -> Comparison:
        # The named divergence; otherwise the loss's own, or one without a parameter.
        return min(rows, key=lambda row: (row.divergence != named, row.divergence not in own, "(" in row.divergence))

    kinds: list[tuple[Finding, list[Comparison]]] = [
        ("exact", [row for row in table if row.exact]),
        ("direction", [row for row in table if row.same_direction]),
        ("opposite", [row for row in table if row.opposite]),
    ]
    for finding, rows in kinds:
        if rows:
            return finding, first(rows), rows
    return "none", max(table, key=lambda row: row.cosine), []


def _rival(table: tuple[Comparison, ...], best: Comparison, named: str | None, finding: Finding) -> Comparison | None:
    """Return the row to contrast the verdict with: the named divergence, or one of the two KL."""
    at_level = [row for row in table if (row.level, row.reference) == (best.level, best.reference)]
    if finding == "none":
        of_named = [row for row in table if row.divergence == named]
        return max(of_named, key=lambda row: row.cosine) if of_named else None
    for wanted in (named, "reverse_kl", "forward_kl"):
        for row in at_level:
            if row.divergence == wanted and not (row.same_direction or row.opposite):
                return row
    return None


def _brief(row: Comparison) -> str:
    ratio = f" (ratio {row.ratio:.4g})" if row.ratios and row.constant else ""
    return f"{noun(row)} {level_name(row)}{ratio}"


def _sums(
    means: Sequence[MeanGradient],
    all_worlds: Sequence[World],
    known: Sequence[Divergence],
    table: tuple[Comparison, ...],
    reference: str,
) -> str | None:
    """Return a sentence if no single divergence fits and two of them add up to the gradient."""
    if any(row.same_direction or row.opposite for row in table):
        return None
    present = {row.level for row in table}
    levels: tuple[TruthLevel, ...] = LEVELS
    for level in levels:
        if level not in present:
            continue
        found = sum_of_two(means, all_worlds, known, level, reference)
        if found:
            (a, first), (b, second) = found
            sign = "+" if b > 0 else "−"
            return f"It is {a:.4g} ∇{first} {sign} {abs(b):.4g} ∇{second}, {LEVEL_NAMES[level]}.".replace("-", "−")
    return None


def _elsewhere(subject: Subject, divergence: Divergence | None, reference: str | None) -> list[str]:
    """Return a sentence for each other source of samples on which the loss would be exact."""
    found = []
    others: tuple[Samples, ...] = ("reference", "old")
    for samples in others:
        result = _of_samples(subject, divergence, samples, reference)
        if result.finding == "exact" and result.best is not None:
            found.append(f"With samples={samples!r} it has the gradient of {_brief(result.best)}.")
    return found
