"""Checks on a model before it is used: that its head is read correctly, and which layout it can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign.errors import ModelError
from falign.scoring.batch import Layout, PromptTree, pad
from falign.scoring.completions import completion_scores
from falign.scoring.model_parts import architecture_errors, other_attention, without_wrapper
from falign.scoring.scorer import Scorer, evaluation_mode
from falign.scoring.tree_attention import layer_types, text_config

__all__ = ["LayoutChoice", "check_head", "choose_layout", "why_not_trees"]


_LAYER_TYPES = {"full_attention", "sliding_attention"}

# Accepted difference of a token's log-probability, largest and mean, in nats; the key says whether all weights have 32
# bits or more. Two 16-bit runs of one model in batches of different shapes differ by about a fifth of this; a wrong
# mask or position causes differences several times larger.
_TOLERANCE = {True: (1e-4, 1e-4), False: (1.0, 0.1)}


class LayoutChoice(NamedTuple):
    """A layout and the reason for it.

    Attributes:
        layout: ``"tree"`` or ``"padded"``.
        reason: The reason for the choice, for the user.
        as_requested: False if trees were wanted but the model cannot read them.
    """

    layout: Layout
    reason: str
    as_requested: bool = True


def choose_layout(
    model: nn.Module,
    trees: Sequence[PromptTree],
    *,
    pad_token_id: int,
    wanted: Literal["auto", "tree", "padded"] = "auto",
) -> LayoutChoice:
    """Return the layout for a model: trees, if they give the same log-probabilities as padded rows.

    Args:
        model: The model, on its device.
        trees: Prompts to try: two or three of the longest are enough. Only trees with several completions can
            reveal a wrong mask.
        pad_token_id: Any valid id.
        wanted: ``"auto"`` tries trees; ``"padded"`` and ``"tree"`` are used as given, ``"tree"`` only if the model's
            configuration allows it.

    Returns:
        The choice.

    Raises:
        ValueError: ``wanted="tree"``, and the model cannot read trees.
        ModelError: The model cannot read padded rows either.
    """
    if wanted == "padded":
        return LayoutChoice("padded", "as requested")
    why_not = why_not_trees(model)
    if why_not is not None and wanted == "tree":
        raise ValueError(f"layout='tree' is not possible for this model: {why_not}. Use 'padded'.")
    if why_not is not None:
        return LayoutChoice("padded", why_not, as_requested=False)
    if wanted == "tree":
        return LayoutChoice("tree", "as requested")
    name = type(without_wrapper(model)).__name__

    def logprobs(layout: Layout) -> Float[Tensor, "N T"]:
        scorer = Scorer(layout, pad_token_id)
        return scorer.scores(model, scorer.lay_out(trees, model=model)).logprobs

    with architecture_errors(f"{name} cannot read padded rows", other_attention(model)):
        padded = logprobs("padded")
    try:
        with architecture_errors("it cannot read trees", ""):
            packed = logprobs("tree")
    except ModelError as error:
        return LayoutChoice("padded", str(error), as_requested=False)
    difference = (packed - padded).abs()
    largest, mean = difference.max().item(), difference.sum().item() / difference.count_nonzero().clamp(min=1).item()
    exact = all(p.dtype.itemsize >= 4 for p in model.parameters() if p.is_floating_point())
    allowed, allowed_mean = _TOLERANCE[exact]
    # False for NaN: then the layout is padded.
    if largest <= allowed and mean <= allowed_mean:
        rounding = "" if exact else f" at most and {mean:.1g} on average, the rounding of 16 bits"
        return LayoutChoice("tree", f"its log-probabilities equal those of padded rows to {largest:.1g} nats{rounding}")
    return LayoutChoice(
        "padded",
        f"trees change its log-probabilities by {largest:.3g} nats (mean {mean:.3g}), so it misreads them",
        as_requested=False,
    )


def why_not_trees(model: nn.Module) -> str | None:
    """Return the reason why a model's configuration rules out trees.

    Args:
        model: A causal language model in the Transformers layout, with or without adapters.

    Returns:
        The reason, or None if the configuration allows trees.
    """
    config = text_config(model)
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"its attention is {attention!r}, and trees need 'sdpa' or 'eager'"
    if others := sorted(set(layer_types(config)) - _LAYER_TYPES):
        return f"it has layers of type {others[0]!r}, in which completions of a prompt would see each other"
    if any(_attention_dropout(module) for module in model.modules()):
        return "its attention has dropout, which would differ between copies of a prompt"
    return None


def _attention_dropout(module: nn.Module) -> bool:
    names = ("attention_dropout", "attn_dropout")
    values = [value for name, value in vars(module).items() if name.endswith(names)]
    values += [
        inner.p for name, inner in module.named_children() if name.endswith(names) and isinstance(inner, nn.Dropout)
    ]
    return any(isinstance(value, float) and value > 0 for value in values)


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
    half = (len(ids) + 1) // 2  # the second half is changed below; a causal model gives the same logits before it
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
