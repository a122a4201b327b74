"""What a trained policy does to completions: scores of files, streamed and resumable."""

from falign.evaluation.best_of_n import best_of_n_divergence
from falign.evaluation.completion_scorer import CompletionScorer, choose_common_layout
from falign.evaluation.frontier import BestOfN, Ideal, Limit, best_of_n_frontier, betas, ideal_frontier, sample_limit
from falign.evaluation.score_file import ScoreTotals, score_trees
from falign.evaluation.score_output import ScoreOutput, check_output
from falign.evaluation.score_rows import ScoreRow
from falign.evaluation.tree_stream import TreeStream, batches_in_order

__all__ = [
    "BestOfN",
    "CompletionScorer",
    "Ideal",
    "Limit",
    "ScoreOutput",
    "ScoreRow",
    "ScoreTotals",
    "TreeStream",
    "batches_in_order",
    "best_of_n_divergence",
    "best_of_n_frontier",
    "betas",
    "check_output",
    "choose_common_layout",
    "ideal_frontier",
    "sample_limit",
    "score_trees",
]
