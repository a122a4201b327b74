"""Reward benchmarks: their rows in the published schemas, and their published aggregations."""

from falign.evaluation.benchmarks.base import Benchmark, BenchmarkItem, OwnTexts, missing_subsets
from falign.evaluation.benchmarks.judgebench import JudgeBench
from falign.evaluation.benchmarks.llmbar import LLMBar
from falign.evaluation.benchmarks.preferences import Preferences
from falign.evaluation.benchmarks.registry import get, names
from falign.evaluation.benchmarks.rewardbench import RewardBench
from falign.evaluation.benchmarks.rewardbench2 import RewardBench2
from falign.evaluation.benchmarks.rm_bench import RMBench

__all__ = [
    "Benchmark",
    "BenchmarkItem",
    "JudgeBench",
    "LLMBar",
    "OwnTexts",
    "Preferences",
    "RMBench",
    "RewardBench",
    "RewardBench2",
    "get",
    "missing_subsets",
    "names",
]
