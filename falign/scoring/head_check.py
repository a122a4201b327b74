"""A check of the head that was read against the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from falign.errors import ModelError
from falign.scoring.completions import completion_scores
from falign.scoring.evaluation_mode import evaluation_mode
from falign.scoring.layouts import pad
from falign.scoring.trees import PromptTree

__all__ = ["check_head"]

_NUM_TOKENS = 32


def check_head(model: nn.Module, token_ids: Sequence[int], *, tolerance: float | None = None) -> None:
    """Compare scores with the log-softmax of the model's own logits, once, on a few tokens.

    Architectures alter logits after the head in ways that no configuration field announces; a head that
    misses one gives plausible numbers.

    Args:
        model: The model that will be scored.
        token_ids: Two or more tokens, for example of a prompt; the first 32 are used.
        tolerance: Largest difference in nats; None means 1e-4 for logits of 32 bits and more, 0.1 below.

    Raises:
        ModelError: If a log-probability differs by more than the tolerance, or is not a number.
    """
    ids = tuple(token_ids[:_NUM_TOKENS])
    batch = pad([PromptTree(ids[:1], (ids[1:],))], pad_token_id=ids[0]).to(next(model.parameters()).device)
    with torch.no_grad(), evaluation_mode(model):
        scores = completion_scores(model, batch).logprobs[0]
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits[0, :-1]
    if tolerance is None:
        tolerance = 1e-4 if logits.dtype.itemsize >= torch.float32.itemsize else 0.1
    dense = logits.to(scores.dtype).log_softmax(dim=-1)
    difference = (scores - dense.gather(-1, batch.completion_ids[0][:, None])[:, 0]).abs().max().item()
    if not (scores.isfinite().all() and logits.isfinite().all()):
        raise ModelError(
            f"{type(model).__name__} has logits that are not finite: its weights are damaged, or too large for its "
            "dtype. Check both."
        )
    if not difference <= tolerance:
        raise ModelError(
            f"Scores of {type(model).__name__} differ from its own logits by {difference:.3g} nats (at most "
            f"{tolerance:.3g} allowed): its head does something that falign.scoring.read_head does not know."
        )
