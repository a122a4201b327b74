"""The registry of benchmarks."""

from __future__ import annotations

import inspect

from falign.errors import ConfigError
from falign.evaluation.benchmarks.base import Benchmark
from falign.registry import Registry

__all__ = ["BENCHMARKS", "get", "names"]

_HERE = "falign.evaluation.benchmarks"

MEMBERS = ", ".join(sorted(name for name in vars(Benchmark) if not name.startswith("_")))

BENCHMARKS: Registry[type[Benchmark]] = Registry(
    "benchmark",
    {
        "rewardbench": f"{_HERE}.rewardbench:RewardBench",
        "rewardbench2": f"{_HERE}.rewardbench2:RewardBench2",
        "rm_bench": f"{_HERE}.rm_bench:RMBench",
        "judgebench": f"{_HERE}.judgebench:JudgeBench",
        "llmbar": f"{_HERE}.llmbar:LLMBar",
        "preferences": f"{_HERE}.preferences:Preferences",
    },
    wanted=f"benchmark class: its instances need {MEMBERS}",
    is_member=inspect.isclass,
)


def names() -> tuple[str, ...]:
    """Return the names of all benchmarks, in the order of the documentation."""
    return BENCHMARKS.names()


def get(name: str) -> Benchmark:
    """Return a benchmark by name; a class of the user's own, ``module:Class``, is called without arguments.

    Raises:
        ConfigError: No benchmark has that name, or the class is not a :class:`Benchmark`.
    """
    benchmark = BENCHMARKS.get(name, field="benchmark")()
    if not isinstance(benchmark, Benchmark):
        raise ConfigError(
            f"benchmark={name!r} makes a {type(benchmark).__name__}, not a falign Benchmark: it needs {MEMBERS}."
        )
    return benchmark
