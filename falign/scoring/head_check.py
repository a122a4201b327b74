"""Comparison of the scores through a head with the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from falign.errors import ModelError
from falign.scoring.batch import PromptTree
from falign.scoring.completions import completion_scores
from falign.scoring.layouts import pad
from falign.scoring.model_parts import architecture_errors, other_attention, without_wrapper
from falign.scoring.scorer import evaluation_mode

__all__ = ["check_head"]

_NUM_TOKENS = 32


def check_head(model: nn.Module, token_ids: Sequence[int], *, tolerance: float | None = None) -> None:
    """Compare scores with the log-softmax of the model's own logits on a few tokens, and check that it is causal.

    Some architectures change logits after the head without a configuration field that says so; scores that miss
    such a change look plausible. Encoders loaded as language models see the tokens that they predict.

    Args:
        model: The model that will be scored.
        token_ids: Two or more tokens, for example of a prompt; the first 32 are used.
        tolerance: Largest difference in nats; None means 1e-4 for logits of 32 bits and more, 0.1 below.

    Raises:
        ModelError: If the model cannot be run or read, a log-probability differs by more than the tolerance, or is NaN
            or infinite.
    """
    ids, name = tuple(token_ids[:_NUM_TOKENS]), type(without_wrapper(model)).__name__
    batch = pad([PromptTree(ids[:1], (ids[1:],))], pad_token_id=ids[0]).to(next(model.parameters()).device)
    half = (len(ids) + 1) // 2
    with torch.no_grad(), evaluation_mode(model):
        with architecture_errors(f"{name} cannot be run", other_attention(model)):
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            logits = model(**inputs, use_cache=False).logits[0, :-1]
            other_end = batch.input_ids.clone()
            other_end[:, half:] = (other_end[:, half:] + 1) % logits.shape[-1]
            begin = model(**{**inputs, "input_ids": other_end}, use_cache=False).logits[0, :half]
        with architecture_errors(f"{name} cannot be scored", "falign.scoring does not support its backbone or head."):
            scores = completion_scores(model, batch).logprobs[0]
    if tolerance is None:
        tolerance = 1e-4 if logits.dtype.itemsize >= torch.float32.itemsize else 0.1
    dense = logits.to(scores.dtype).log_softmax(dim=-1)
    difference = (scores - dense.gather(-1, batch.completion_ids[0][:, None])[:, 0]).abs().max().item()
    if not (scores.isfinite().all() and logits.isfinite().all()):
        raise ModelError(
            f"{name} has logits that are not finite: its weights are damaged or too large for its dtype. Check both."
        )
    ahead = (begin.to(scores.dtype).log_softmax(dim=-1)[: len(dense)] - dense[:half]).abs().max().item()
    if not ahead <= tolerance:
        raise ModelError(
            f"{name} is not causal: its log-probabilities at a token change by {ahead:.3g} nats (at "
            f"most {tolerance:.3g} allowed) with the tokens that follow. Load it as a decoder (`is_decoder: true` in "
            "its config.json), or use a causal language model."
        )
    if not difference <= tolerance:
        raise ModelError(
            f"Scores of {name} differ from its own logits by {difference:.3g} nats (at most "
            f"{tolerance:.3g} allowed): its head does something that falign.scoring.read_head does not support."
        )
