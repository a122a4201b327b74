"""From token ids to log-probabilities of completions."""

from falign.scoring.backbone import Adapted, read_backbone, without_wrapper
from falign.scoring.completions import completion_logprobs
from falign.scoring.evaluation_mode import evaluation_mode
from falign.scoring.head import DEFAULT_CHUNK_TOKENS, Head, TokenScores, read_head, token_logprobs
from falign.scoring.head_check import check_head
from falign.scoring.padded import PaddedBatch, pad
from falign.scoring.trees import PromptTree

__all__ = [
    "DEFAULT_CHUNK_TOKENS",
    "Adapted",
    "Head",
    "PaddedBatch",
    "PromptTree",
    "TokenScores",
    "check_head",
    "completion_logprobs",
    "evaluation_mode",
    "pad",
    "read_backbone",
    "read_head",
    "token_logprobs",
    "without_wrapper",
]
