"""From token ids to log-probabilities, entropies and divergences of completions."""

from falign.scoring.batch import (
    LAYOUTS,
    Layout,
    PromptTree,
    TokenBatch,
    TreeSpan,
    data_margins,
    data_weights,
    pack,
    pad,
    row_weights,
)
from falign.scoring.completions import CompletionStates, completion_distribution, completion_scores, completion_states
from falign.scoring.distributions import Distribution, Predictions, Reading, Source, TopTokens
from falign.scoring.layout_choice import LayoutChoice, check_head, choose_layout, why_not_trees
from falign.scoring.model_parts import Adapted, Head, read_backbone, read_head, run_backbone, without_wrapper
from falign.scoring.scorer import Scorer, detached_scores, evaluation_mode
from falign.scoring.token_budget import TokenBudgetBatches
from falign.scoring.tree_attention import TreeMask, tree_masks
from falign.scoring.vocabulary import DEFAULT_CHUNK_TOKENS, TokenScores, token_scores

__all__ = [
    "DEFAULT_CHUNK_TOKENS",
    "LAYOUTS",
    "Adapted",
    "CompletionStates",
    "Distribution",
    "Head",
    "Layout",
    "LayoutChoice",
    "Predictions",
    "PromptTree",
    "Reading",
    "Scorer",
    "Source",
    "TokenBatch",
    "TokenBudgetBatches",
    "TokenScores",
    "TopTokens",
    "TreeMask",
    "TreeSpan",
    "check_head",
    "choose_layout",
    "completion_distribution",
    "completion_scores",
    "completion_states",
    "data_margins",
    "data_weights",
    "detached_scores",
    "evaluation_mode",
    "pack",
    "pad",
    "read_backbone",
    "read_head",
    "row_weights",
    "run_backbone",
    "token_scores",
    "tree_masks",
    "why_not_trees",
    "without_wrapper",
]
