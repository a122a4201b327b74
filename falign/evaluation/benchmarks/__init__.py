"""Reward benchmarks: their rows in the published schemas, and their published aggregations."""

from falign.evaluation.benchmarks.base import Benchmark, BenchmarkItem, missing_subsets

__all__ = ["Benchmark", "BenchmarkItem", "missing_subsets"]
