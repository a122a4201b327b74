"""Preference oracles: the reward of a completion is its win rate over the other completions of its prompt."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from falign.choices import shown
from falign.code_identity import code_identity
from falign.data import DataSource
from falign.data.samples import read_samples, same_prompt
from falign.errors import ConfigError, RewardError
from falign.registry import import_member
from falign.rewards.base import ARGUMENTS, RowReward, Scores, place_of, reward_raised, select_columns
from falign.rewards.forms import finished
from falign.rewards.identity import Identified, Identity

__all__ = ["CountingOracle", "OracleReward", "PreferenceOracle", "Preferences", "opponents_of"]

PER_COMPLETION = frozenset({"completion_ids"})
"""Columns that differ between the completions of a prompt, so that a pair has no single value."""


class PreferenceOracle(Protocol):
    """A judge of pairs, called with keyword arguments; it may name only those that it reads, and may be ``async``."""

    def __call__(
        self, prompts: list[Any], first: list[str], second: list[str], **columns: list[Any]
    ) -> Sequence[float | None]:
        """Return the probability that the first completion is preferred to the second, one per pair.

        Args:
            prompts: The prompt of each pair.
            first: Its first completion.
            second: Its second completion.
            columns: The columns of the data by name, and ``place``; each a list with one value per pair.
        """
        ...


class Preferences(NamedTuple):
    """Preferences of pairs, some of which may have failed.

    Attributes:
        values: The probability that the first completion is preferred; None where the oracle has no verdict.
        message: Why the first of these has none; ``""`` if all have one.
        measured: Further values to log, by key.
    """

    values: list[float | None]
    message: str = ""
    measured: Mapping[str, list[float]] = {}


@runtime_checkable
class CountingOracle(PreferenceOracle, Protocol):
    """A preference oracle that also reports pairs without a verdict."""

    def preferences(self, prompts: list[Any], first: list[str], second: list[str], **columns: list[Any]) -> Preferences:
        """Return the preferences of pairs; the arguments are those of the call."""
        ...


class _Duel(NamedTuple):
    """A completion against a text, which may be another completion of the call."""

    completion: int
    other: str
    opponent: int | None


@dataclass(frozen=True)
class OracleReward:
    """``P(y ≻ y')``, the mean over the opponents y' of a completion y.

    The opponents are the other completions of the prompt in the same call, so that the reward is an unbiased estimate
    of ``E_{y'~π}[P(y ≻ y')]`` for the policy that was sampled; or fixed texts, such as samples of the reference. The
    mean over a group whose completions meet each other is 1/2, whatever the policy. Objectives on preferences rank by
    it; with two completions per prompt it is the oracle's answer itself.

    Attributes:
        oracle: ``P(first ≻ second)`` of pairs.
        name: Its name in messages.
        both_orders: Ask for both orders of a pair, and take ``(P(a, b) + 1 - P(b, a))/2``, which no preference for a
            position can bias. Their difference ``|P(a, b) + P(b, a) - 1|`` is logged as ``asymmetry``. False asks once,
            and takes ``P(b, a) = 1 - P(a, b)``.
        opponents: Texts by prompt (:func:`falign.data.samples.same_prompt`), in place of the other completions.
        failed: Probability of a pair without a verdict, which a :class:`CountingOracle` may have; None leaves the pair
            out, and a completion without any other pair has no value. A completion none of whose pairs has a verdict
            counts as an error.

    Raises:
        ConfigError: The oracle has no parameters ``first`` and ``second``.
    """

    oracle: Callable[..., Any]
    name: str = "oracle"
    both_orders: bool = True
    opponents: Mapping[str, Sequence[str]] | None = None
    failed: float | None = None

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.oracle).parameters.values()
        named = {each.name for each in parameters}
        takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
        if not takes_all and not named >= {"first", "second"}:
            raise ConfigError(
                f"oracle {self.name} has the parameters {sorted(named)}: it must be a function oracle(prompts, first, "
                "second, **columns) that returns the probability that the first is preferred."
            )

    @property
    def compares(self) -> bool:
        """True if a completion needs another one of its prompt."""
        return self.opponents is None

    @classmethod
    def named(cls, function: str, *, both_orders: bool = True, samples: str | Path | None = None) -> OracleReward:
        """Return the reward of ``module:function``, or of an object there.

        Args:
            function: Its name.
            both_orders: See the class.
            samples: A file of samples whose completions are the opponents.

        Raises:
            ConfigError: It cannot be imported, or is not an oracle.
            DataError: The file is missing or damaged.
        """
        oracle = import_member(function, place=f"oracle {function!r}", wanted="function")
        if not callable(oracle) or inspect.isclass(oracle):
            raise ConfigError(f"oracle {function!r} is a {type(oracle).__name__}; it must be a function, or an object.")
        opponents = None if samples is None else opponents_of(samples)
        return cls(oracle, function, both_orders, opponents)

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        return self.score(prompts, completions, **columns).values

    def score(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> Scores:
        """Return the win rates, and the asymmetry of each pair that was asked in both orders.

        Args:
            prompts: The prompt of each completion; those of one prompt come one after another.
            completions: Their texts.
            columns: One value per completion.

        Raises:
            RewardError: A completion has no opponent, or the oracle raised or returned invalid values.
        """
        duels = self._duels(prompts, completions, columns.get("place"))
        # Equal texts are not preferred to each other, so the oracle is not asked.
        asked = [duel for duel in duels if completions[duel.completion] != duel.other]
        pairs = [(duel.completion, completions[duel.completion], duel.other) for duel in asked]
        turned = [(row, b, a) for row, a, b in pairs] if self.both_orders else []
        answers = self._ask([*pairs, *turned], prompts, columns)
        forward, backward = answers.values[: len(pairs)], answers.values[len(pairs) :]
        orders = [*zip(forward, backward if self.both_orders else forward, strict=True)]
        both = [(p, q) for p, q in orders if p is not None and q is not None]
        rates = {
            duel: (None if p is None or q is None else (p + 1 - q) / 2 if self.both_orders else p)
            for duel, (p, q) in zip(asked, orders, strict=True)
        }
        found: list[list[float | None]] = [[] for _ in completions]
        for duel in duels:
            rate = rates.get(duel, 0.5)
            found[duel.completion].append(rate)
            if duel.opponent is not None:
                found[duel.opponent].append(None if rate is None else 1 - rate)
        gaps = {"asymmetry": [abs(p + q - 1) for p, q in both]} if self.both_orders and both else {}
        return Scores(
            [self._mean(each) for each in found],
            errors=sum(all(rate is None for rate in each) for each in found),
            message=answers.message,
            measured={**answers.measured, **gaps},
        )

    def _mean(self, rates: Sequence[float | None]) -> float | None:
        counted = [self.failed if rate is None else rate for rate in rates]
        values = [rate for rate in counted if rate is not None]
        return math.fsum(values) / len(values) if values else None

    def row_errors(self, prompts: list[Any], **columns: list[Any]) -> list[str | None]:
        """Return which prompts have no opponents.

        Raises:
            RewardError: A required parameter of the oracle is neither a column nor an argument.
        """
        known = {"prompts", "first", "second", *columns} - PER_COMPLETION
        for each in inspect.signature(self.oracle).parameters.values():
            optional = each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL) or each.default is not each.empty
            if not optional and each.name not in known:
                raise RewardError(
                    f"oracle {self.name}: its parameter {each.name!r} is neither a column of the data, which has "
                    f"{sorted(columns.keys() - ARGUMENTS)}, nor an argument (prompts, first, second)."
                )
        found = (
            self.oracle.row_errors(prompts, **columns) if isinstance(self.oracle, RowReward) else [None] * len(prompts)
        )
        if self.opponents is None:
            return [*found]
        missing = "the oracle's file of samples has no completion of this prompt: sample all prompts of the run"
        has = [same_prompt(prompt) in self.opponents for prompt in prompts]
        return [reason if known else missing for reason, known in zip(found, has, strict=True)]

    def identity(self) -> Identity:
        """Return the code of the oracle, the order of its questions and the opponents."""
        opponents = None if self.opponents is None else {key: list(texts) for key, texts in self.opponents.items()}
        of_oracle = self.oracle.identity() if isinstance(self.oracle, Identified) else code_identity(self.oracle)
        settings = {"oracle": of_oracle, "both_orders": self.both_orders, "opponents": opponents}
        return Identity(__name__, settings if self.failed is None else {**settings, "failed": self.failed})

    def _duels(self, prompts: list[Any], completions: list[str], places: list[Any] | None) -> list[_Duel]:
        """Return each pair of opponents once."""
        duels: list[_Duel] = []
        keys = [(None if places is None else places[i], same_prompt(prompt)) for i, prompt in enumerate(prompts)]
        for key, group in groupby(range(len(prompts)), key=lambda i: keys[i]):
            rows = list(group)
            if self.opponents is None:
                duels += [_Duel(a, completions[b], b) for a, b in combinations(rows, 2)]
            else:
                duels += [_Duel(a, other, None) for a in rows for other in self.opponents.get(key[1], ())]
            if not duels or duels[-1].completion not in rows:
                raise RewardError(
                    f"{place_of(places, rows[0])}: the oracle {self.name} has nothing to compare a completion with. "
                    "Sample two or more of each prompt, or give it samples of another model, of all prompts."
                )
        return duels

    def _ask(
        self, pairs: Sequence[tuple[int, str, str]], prompts: list[Any], columns: Mapping[str, list[Any]]
    ) -> Preferences:
        """Return the oracle's probabilities, checked."""
        if not pairs:
            return Preferences([])
        rows, first, second = (list(each) for each in zip(*pairs, strict=True))
        shared = {name: [values[i] for i in rows] for name, values in columns.items() if name not in PER_COMPLETION}
        given = {"prompts": [prompts[i] for i in rows], "first": first, "second": second, **shared}
        places = shared.get("place")
        if isinstance(self.oracle, CountingOracle):
            return self.oracle.preferences(**given)
        try:
            returned = finished(self.oracle(**select_columns(self.oracle, given)))
        except RewardError:
            raise
        except (Exception, SystemExit) as error:
            raise reward_raised(error, name=self.name, completions=first, places=places) from error
        if not isinstance(returned, list | tuple) or len(returned) != len(pairs):
            what = f"{len(returned)} values" if isinstance(returned, list | tuple) else f"a {type(returned).__name__}"
            raise RewardError(
                f"oracle {self.name} returned {what} for {len(pairs)} pairs; return a list of one probability per pair."
            )
        for i, value in enumerate(returned):
            if not isinstance(value, Real) or not 0 <= float(value) <= 1:
                raise RewardError(
                    f"oracle {self.name}, {place_of(places, i)}: the value is {shown(value)} for {shown(first[i])} "
                    f"against {shown(second[i])}; return the probability that the first is preferred, from 0 to 1."
                )
        return Preferences([float(value) for value in returned])


def opponents_of(samples: str | Path) -> dict[str, tuple[str, ...]]:
    """Return the completions of a file of samples by prompt.

    Args:
        samples: A file as `falign sample` writes it.

    Raises:
        DataError: The file is missing, or a row is neither.
    """
    found: dict[str, list[str]] = {}
    for sample in read_samples(DataSource(str(samples))):
        found.setdefault(same_prompt(sample.prompt), []).append(sample.completion)
    return {key: tuple(texts) for key, texts in found.items()}
