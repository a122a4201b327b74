"""Benchmarks by name."""

from __future__ import annotations

from falign.choices import require_choice
from falign.evaluation.benchmarks.base import Benchmark
from falign.evaluation.benchmarks.judgebench import JudgeBench
from falign.evaluation.benchmarks.llmbar import LLMBar
from falign.evaluation.benchmarks.preferences import Preferences
from falign.evaluation.benchmarks.rewardbench import RewardBench
from falign.evaluation.benchmarks.rewardbench2 import RewardBench2
from falign.evaluation.benchmarks.rm_bench import RMBench

__all__ = ["get", "names"]

_BENCHMARKS: tuple[Benchmark, ...] = (
    RewardBench(),
    RewardBench2(),
    RMBench(),
    JudgeBench(),
    LLMBar(),
    Preferences(),
)


def names() -> tuple[str, ...]:
    """Return the names of all benchmarks, in the order of the documentation."""
    return tuple(benchmark.name for benchmark in _BENCHMARKS)


def get(name: str) -> Benchmark:
    """Return a benchmark by name.

    Raises:
        ConfigError: No benchmark has that name.
    """
    require_choice("benchmark", name, names())
    return next(benchmark for benchmark in _BENCHMARKS if benchmark.name == name)
