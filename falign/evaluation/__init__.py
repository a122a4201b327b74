"""Evaluation of policies on completions: scores of files and benchmarks, streamed and resumable."""

from falign.evaluation.completion_scorer import CompletionScorer, ScoreRow, choose_common_layout
from falign.evaluation.item_scorer import SCORERS, ComparedScores, ItemRow, ItemScorer, ReferenceFreeScores, score_items
from falign.evaluation.item_stream import ItemStream, ItemTree, read_items
from falign.evaluation.reward_summary import scores_with_intervals, summarize_scorer
from falign.evaluation.score_file import ScoreTotals, TreeStream, batches_in_order, score_trees
from falign.evaluation.score_output import ScoreOutput, check_output

__all__ = [
    "SCORERS",
    "ComparedScores",
    "CompletionScorer",
    "ItemRow",
    "ItemScorer",
    "ItemStream",
    "ItemTree",
    "ReferenceFreeScores",
    "ScoreOutput",
    "ScoreRow",
    "ScoreTotals",
    "TreeStream",
    "batches_in_order",
    "check_output",
    "choose_common_layout",
    "read_items",
    "score_items",
    "score_trees",
    "scores_with_intervals",
    "summarize_scorer",
]
