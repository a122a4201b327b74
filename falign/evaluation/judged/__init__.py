"""Evaluation of answers by an LLM judge: MT-Bench, Arena-Hard, and files in AlpacaEval's format."""

from falign.evaluation.judged.benchmarks import BENCHMARKS, Answers, JudgedBenchmark, JudgedItem

__all__ = ["BENCHMARKS", "Answers", "JudgedBenchmark", "JudgedItem"]
