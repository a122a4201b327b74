"""Transforms of a reward that are calibrated on samples of the reference: the same KL-RL then optimizes another goal.

The calibrated reward of a completion is its win rate against the reference's samples for the same prompt,
``C(x, y) = P(r(x, z) < r(x, y)) + P(r(x, z) = r(x, y))/2`` with z from π_ref. A transform is a function Φ of it, and
the optimum of ``E_π[Φ(C)] - β KL(π‖π_ref)`` is ``π_ref e^{Φ(C)/β}/Z``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from falign.data import DataSource
from falign.data.samples import REWARD, read_samples, same_prompt
from falign.errors import ConfigError, DataError, RewardError
from falign.registry import Registry
from falign.rewards.base import ReadsFile, place_of
from falign.rewards.groups import calibrate
from falign.rewards.identity import Identity

__all__ = [
    "TRANSFORMS",
    "Calibrated",
    "Calibration",
    "RewardTransform",
    "best_of_n",
    "calibrated",
    "exponential",
    "inference_transform",
    "worst_of_n",
]


LARGEST_EXPONENT = 700.0
"""e to this power is finite in float64."""


@runtime_checkable
class RewardTransform(Protocol):
    """A function from a reward's values to those that count in the sum of rewards."""

    def __call__(self, values: list[float | None], prompts: list[Any], **columns: list[Any]) -> list[float | None]:
        """Return the transformed values, None where the reward does not apply.

        Args:
            values: One per completion.
            prompts: The prompt of each completion.
            columns: The columns of the data by name, one value per completion.
        """
        ...

    def row_errors(self, prompts: list[Any], **columns: list[Any]) -> list[str | None]:
        """Return for each row why its rewards cannot be transformed; None if they can.

        Args:
            prompts: One per row.
            columns: One value per row.
        """
        ...

    def identity(self) -> Identity:
        """Return the module whose source decides the values, and the settings."""
        ...


@dataclass(frozen=True)
class Calibration:
    """Rewards of the reference's samples, by prompt; drawn once and kept.

    Attributes:
        rewards: The rewards of K samples, shape (K,), by :func:`falign.data.samples.same_prompt`.
        path: Where they came from, for messages.
    """

    rewards: Mapping[str, Float[Tensor, " K"]] = field(repr=False)
    path: str = ""

    @classmethod
    def read(cls, samples: str | Path, *, column: str = REWARD) -> Calibration:
        """Return the rewards of a file of samples.

        Args:
            samples: A file as `falign sample --rewards` writes it.
            column: Column with the reward.

        Raises:
            DataError: The file is missing or has no samples, or a completion has no reward.
        """
        if not Path(samples).is_file():
            raise DataError(
                f"{samples}: there is no such file of samples. Draw them from the reference, for every prompt of the "
                "run: falign sample REFERENCE --file PROMPTS --num-completions 16 --rewards REWARDS.yaml --out "
                f"{samples}"
            )
        found: dict[str, list[float]] = {}
        for sample in read_samples(DataSource(str(samples)), reward=column):
            if sample.reward is None:
                raise DataError(
                    f"{sample.place}: the completion has no {column!r}: draw the samples with --rewards, or name the "
                    "column that holds their reward."
                )
            found.setdefault(same_prompt(sample.prompt), []).append(sample.reward)
        if not found:
            raise DataError(
                f"{samples} has no samples: draw them from the reference, for every prompt of the run: falign sample "
                f"REFERENCE --file PROMPTS --num-completions 16 --rewards REWARDS.yaml --out {samples} --overwrite"
            )
        tensors = {key: torch.tensor(values, dtype=torch.float64) for key, values in found.items()}
        return cls(tensors, str(samples))

    def missing(self, prompt: Any) -> str | None:
        """Return why a prompt cannot be calibrated; None if it can."""
        if same_prompt(prompt) in self.rewards:
            return None
        return (
            f"{self.path} has no sample of the reference for this prompt (as text or turns, after template and chat): "
            "sample all prompts of the run, also the held-out ones, with the run's template and chat"
        )

    def win_rate(self, prompt: Any, reward: float) -> float:
        """Return ``C(x, y)`` of a completion with this reward."""
        reference = self.rewards[same_prompt(prompt)]
        return calibrate(reference.new_tensor([[reward]]), reference[None]).item()

    def digest(self) -> str:
        """Return a hash of all prompts and rewards."""
        content = {key: values.tolist() for key, values in self.rewards.items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Calibrated:
    """``Φ(C(x, y))``: a function of the calibrated reward.

    Attributes:
        calibration: Rewards of the reference's samples.
        function: Φ, from C in [0, 1], shape (N,), to transformed rewards.
        settings: Name and parameters of Φ, for the record.

    Source:
        Balashankar et al., InfAlign-CTRL (arXiv:2412.19792).
    """

    calibration: Calibration
    function: Callable[[Float[Tensor, " N"]], Float[Tensor, " N"]]
    settings: Mapping[str, Any]

    def __call__(self, values: list[float | None], prompts: list[Any], **columns: list[Any]) -> list[float | None]:
        known = [i for i, value in enumerate(values) if value is not None]
        for i in known:
            if (reason := self.calibration.missing(prompts[i])) is not None:
                raise RewardError(f"{place_of(columns.get('place'), i)}: {reason}.")
            if not math.isfinite(values[i] or 0.0):
                raise RewardError(
                    f"{place_of(columns.get('place'), i)}: the reward is {values[i]}, which is neither above nor below "
                    "those of the reference; it must be finite."
                )
        rates = [self.calibration.win_rate(prompts[i], float(values[i] or 0.0)) for i in known]
        found: list[float | None] = [None] * len(values)
        for i, value in zip(known, self.function(torch.tensor(rates, dtype=torch.float64)).tolist(), strict=True):
            found[i] = value
        return found

    def row_errors(self, prompts: list[Any], **columns: list[Any]) -> list[str | None]:
        """Return which prompts have no samples of the reference."""
        return [self.calibration.missing(prompt) for prompt in prompts]

    def identity(self) -> Identity:
        """Return this module, Φ and its parameters, and a hash of the reference's rewards."""
        return Identity(__name__, {**self.settings, "samples": self.calibration.digest()})


Samples = Annotated[Path | str, ReadsFile()]


def calibrated(samples: Samples, *, column: str = REWARD) -> Calibrated:
    """``Φ(C) = C``: the win rate against the reference's samples, whatever the scale of the reward.

    Args:
        samples: File of samples of the reference with their rewards, from `falign sample --rewards`.
        column: Its column with the reward.
    """
    return Calibrated(Calibration.read(samples, column=column), lambda rates: rates, {"kind": "calibrated"})


def exponential(samples: Samples, t: float, *, column: str = REWARD) -> Calibrated:
    """``Φ(C) = e^{tC}`` for best of n (t > 0), ``-e^{tC}`` for worst of n (t < 0).

    Args:
        samples: As for ``calibrated``.
        t: Not 0. The paper's values, near 10 and -10 for n = 4, are not confirmed here.
        column: As for ``calibrated``.

    Raises:
        ConfigError: t is 0, or so large that e^t is not finite.
    """
    if not isinstance(t, Real) or not 0 < abs(t) <= LARGEST_EXPONENT:
        raise ConfigError(
            f"t={t!r} must be a number other than 0, of at most {LARGEST_EXPONENT:g} in size (e^t must be finite): "
            "positive for best of n, negative for worst of n."
        )
    settings = {"kind": "exponential", "t": t}
    return Calibrated(
        Calibration.read(samples, column=column), lambda rates: math.copysign(1.0, t) * (t * rates).exp(), settings
    )


AtLeastOne = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


def best_of_n(samples: Samples, n: AtLeastOne, beta: Positive, *, column: str = REWARD) -> Calibrated:
    """Optimize the win rate of the best of n over the reference's best of n.

    Args:
        samples: As for ``calibrated``.
        n: Number of completions from which the best is served.
        beta: β of the run's penalty, a reverse KL: the transform depends on it.
        column: As for ``calibrated``.
    """
    return _of_inference(samples, n, beta, column, best=True)


def worst_of_n(samples: Samples, n: AtLeastOne, beta: Positive, *, column: str = REWARD) -> Calibrated:
    """Optimize the win rate of the worst of n over the reference's worst of n, as against an attacker.

    Args:
        samples: As for ``calibrated``.
        n: Number of completions of which the worst counts.
        beta: As for ``best_of_n``.
        column: As for ``calibrated``.
    """
    return _of_inference(samples, n, beta, column, best=False)


def _of_inference(samples: Samples, n: int, beta: float, column: str, *, best: bool) -> Calibrated:
    if not isinstance(n, int) or n < 1:
        raise ConfigError(f"n={n!r} must be a whole number of at least 1: of how many completions one is served.")
    if not isinstance(beta, Real) or not 0 < beta < math.inf:
        raise ConfigError(f"beta={beta!r} must be positive and finite: β of the run's penalty.")
    knots = _knots(n, beta, best=best)
    settings = {"kind": "best_of_n" if best else "worst_of_n", "n": n, "beta": beta}
    return Calibrated(Calibration.read(samples, column=column), lambda rates: _interpolated(rates, knots), settings)


def inference_transform(n: int, beta: float, *, best: bool, num_points: int = 1025) -> Float[Tensor, " M"]:
    """Return Φ at equally spaced C from 0 to 1, for which KL-RL maximizes the win rate after best or worst of n.

    With F the distribution function of C under the policy, and that of the reference uniform, the win rate of the best
    of n is ``1 - ∫ F(u)^n n u^{n-1} du``. Less ``β KL``, it is concave in the policy, and largest where the policy's
    density is ``e^{Φ(u)/β}/Z`` with its own derivative ``Φ(u) = -n² ∫_u^1 F(v)^{n-1} v^{n-1} dv``. For the worst of n,
    F and v are replaced by 1 - F and 1 - v. n = 1 gives ``C - 1``.

    Args:
        n: Number of completions.
        beta: β.
        best: False for the worst of n.
        num_points: Number of points.

    Source:
        The optimality conditions of InfAlign (arXiv:2412.19792) for a reward without ties, derived here; with ties, C
        is the middle of its steps.

    Example:
        >>> inference_transform(1, 0.1, best=True, num_points=3)
        tensor([-1.0000, -0.5000,  0.0000], dtype=torch.float64)
    """
    return _interpolated(torch.linspace(0, 1, num_points, dtype=torch.float64), _knots(n, beta, best=best))


class _Knots(NamedTuple):
    """Φ and its derivative at the points of an integration with adaptive steps, by increasing C."""

    rates: Float[Tensor, " K"]
    values: Float[Tensor, " K"]
    slopes: Float[Tensor, " K"]


def _interpolated(rates: Float[Tensor, " N"], knots: _Knots) -> Float[Tensor, " N"]:
    """Return Φ(C) between the knots by cubic polynomials with the right derivatives."""
    rates = rates.clamp(0, 1)
    i = torch.searchsorted(knots.rates, rates).clamp(1, len(knots.rates) - 1)
    left, right = (_Knots(*(each[j] for each in knots)) for j in (i - 1, i))
    width = right.rates - left.rates
    t = (rates - left.rates) / width
    by_value = left.values + (right.values - left.values) * t * t * (3 - 2 * t)
    return by_value + width * t * (1 - t) * (left.slopes * (1 - t) - right.slopes * t)


def _knots(n: int, beta: float, *, best: bool) -> _Knots:
    # In w = v (best) or 1 - v (worst), with G the distribution function of w: (log G')' = ± n² (G w)^{n-1} / β, with
    # G(0) = 0 and G(1) = 1. G(1) rises with the density at 0, which is found by bisection. Log G' rises (best) or falls
    # (worst) by at most n/β, and is 0 on average of G', which bounds its start. For the worst, also G(1) ≥ W e^{start -
    # 1} with W = (β/n)^{1/n}, which keeps e^start finite.
    rate = (n * n / beta) * (1 if best else -1)
    low, high = (-n / beta, 0.0) if best else (0.0, 1 + max(0.0, math.log(n / beta)) / n)
    while high - low > 1e-13 * (1 + abs(low)):
        middle = (low + high) / 2
        exceeds = _log_density(middle, rate, n)[-1][0] < 1
        low, high = (low, middle) if exceeds else (middle, high)
    w, mass, log_density = torch.tensor(_log_density(low, rate, n), dtype=torch.float64).T.contiguous()
    slopes = beta * rate * (mass.clamp(max=1) * w).pow(n - 1)
    if best:
        return _Knots(w, beta * (log_density - log_density[-1]), slopes)
    return _Knots((1 - w).flip(0), beta * (log_density - log_density[0]).flip(0), -slopes.flip(0))


TOLERANCE = 1e-9
"""Largest error of one step in G and in log G'; both vary near C = 1 within β/n², which no fixed step resolves."""


def _log_density(start: float, rate: float, n: int) -> list[tuple[float, float, float]]:
    """Return w, G and ``log G'`` by the method of Runge and Kutta with adaptive steps; cut short where G exceeds 1."""

    def derivatives(w: float, mass: float, slope: float) -> tuple[float, float]:
        # Bounded: a start that is too high is cut short below, and must not overflow before.
        return math.exp(min(slope, 700.0)), rate * (min(mass, 1.0) * w) ** (n - 1)

    def step(w: float, mass: float, slope: float, h: float) -> tuple[float, float]:
        m1, s1 = derivatives(w, mass, slope)
        m2, s2 = derivatives(w + h / 2, mass + h / 2 * m1, slope + h / 2 * s1)
        m3, s3 = derivatives(w + h / 2, mass + h / 2 * m2, slope + h / 2 * s2)
        m4, s4 = derivatives(w + h, mass + h * m3, slope + h * s3)
        return mass + h / 6 * (m1 + 2 * m2 + 2 * m3 + m4), slope + h / 6 * (s1 + 2 * s2 + 2 * s3 + s4)

    w, mass, slope, h = 0.0, 0.0, start, 1 / 64
    path = [(w, mass, slope)]
    while w < 1:
        h = min(h, 1 - w)
        half = step(w, mass, slope, h / 2)
        two, one = step(w + h / 2, *half, h / 2), step(w, mass, slope, h)
        error = max(abs(two[0] - one[0]), abs(two[1] - one[1])) / 15  # of two halves, by their order 4
        if error > TOLERANCE:
            h *= max(0.1, 0.9 * (TOLERANCE / error) ** 0.2)
            continue
        w = 1.0 if h >= 1 - w else w + h
        mass, slope = two
        if mass > 1:
            break
        path.append((w, mass, slope))
        h = min(1 / 64, h * min(4.0, 0.9 * (TOLERANCE / max(error, 1e-30)) ** 0.2))
    return path


TRANSFORMS: Registry[Callable[..., RewardTransform]] = Registry(
    "transform",
    {
        "calibrated": calibrated,
        "exponential": exponential,
        "best_of_n": best_of_n,
        "worst_of_n": worst_of_n,
    },
    wanted="class or function that makes a transform",
)
"""Makers of the built-in transforms, by their kind in run files."""
