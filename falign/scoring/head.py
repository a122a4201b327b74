"""Log-probabilities of given tokens from hidden states, without ever holding [tokens, vocabulary]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from falign.errors import ModelError
from falign.scoring.backbone import without_wrapper

__all__ = ["DEFAULT_CHUNK_TOKENS", "Head", "TokenScores", "read_head", "token_logprobs"]

# A float32 tile of 512 tokens over a vocabulary of 128k is 256 MiB; a backward pass holds about five.
DEFAULT_CHUNK_TOKENS = 512

# What model configurations call the same three things. `check_head` finds what this table does not know.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)


class TokenScores(NamedTuple):
    """What scoring knows about each token, shape (M,) for a flat list and (N, T) for a batch.

    Attributes:
        logprobs: log π of the token, nats; carries the gradient.
        entropy: Entropy of the distribution that the token was predicted from, nats; detached.
    """

    logprobs: Float[Tensor, "*shape"]
    entropy: Float[Tensor, "*shape"]


@dataclass(frozen=True)
class Head:
    """From a hidden state to logits: ``c tanh(s E(h) / c)``, or ``s E(h)`` without a cap.

    Attributes:
        embeddings: E, the output embeddings; called as a module, so that adapters on it and quantisation act.
        scale: s, what the model multiplies its logits by.
        softcap: c, the bound of its logits; None for none.
    """

    embeddings: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "M H"]) -> Float[Tensor, "M V"]:
        """Return the logits in float32, or in float64 for a float64 model.

        Args:
            hidden: Last hidden states, shape (M, H).

        Returns:
            Logits over the vocabulary, shape (M, V).
        """
        logits = self.embeddings(hidden)
        logits = self.scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def read_head(model: nn.Module) -> Head:
    """Read the head of a causal language model from its output embeddings and its configuration.

    Args:
        model: A causal language model in the Transformers layout, with or without adapters.

    Returns:
        Its head. A cap or scale under a name unknown here is missed; `check_head` compares with the model.

    Raises:
        ModelError: If the model has no output embeddings.
    """
    language_model = without_wrapper(model)
    embeddings = getattr(language_model, "get_output_embeddings", lambda: None)()
    if embeddings is None:
        raise ModelError(
            f"{type(language_model).__name__} has no output embeddings: load it with its language-model head "
            "(AutoModelForCausalLM)."
        )
    whole = language_model.config
    config = getattr(whole, "get_text_config", lambda: whole)()
    multiplies = getattr(config, "model_type", None) in _MULTIPLIES_BY_LOGITS_SCALING
    scale = 1.0
    for name in _MULTIPLIERS + _DIVISORS:
        value = getattr(config, name, None)
        if isinstance(value, float | int):
            scale *= 1.0 / value if name in _DIVISORS and not multiplies else float(value)
    caps = [float(cap) for name in _SOFTCAPS if (cap := getattr(config, name, None))]
    return Head(embeddings=embeddings, scale=scale, softcap=caps[0] if caps else None)


def token_logprobs(
    hidden: Float[Tensor, "M H"],
    head: Head,
    targets: Int[Tensor, " M"],
    *,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> TokenScores:
    """Return log π of each target token, and the entropy of the distribution it comes from.

    The head is applied to `chunk_tokens` positions at a time and once more in the backward pass, so that
    neither pass holds more than a few tensors of [chunk_tokens, vocabulary].

    Args:
        hidden: The hidden state that predicts each target, shape (M, H).
        head: The model's head.
        targets: Token ids, shape (M,).
        chunk_tokens: How many positions reach the head at once; changes memory and speed alone.

    Returns:
        Log-probabilities and entropies, each of shape (M,), float32 (float64 for a float64 model).

    Raises:
        ValueError: If `chunk_tokens` is not positive or there is nothing to score.

    Example:
        >>> head = Head(embeddings=torch.nn.Identity())
        >>> token_logprobs(torch.zeros(1, 4), head, torch.tensor([3])).logprobs
        tensor([-1.3863])
    """
    if chunk_tokens < 1 or not len(targets):
        raise ValueError(f"chunk_tokens={chunk_tokens} and {len(targets)} tokens: both must be at least 1.")
    # The random state is kept (checkpoint's default): dropout in an adapter on the head repeats itself.
    chunks = [
        checkpoint(_score_chunk, hidden_chunk, targets_chunk, head, use_reentrant=False)
        for hidden_chunk, targets_chunk in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    logprobs, entropy = zip(*chunks, strict=True)
    return TokenScores(torch.cat(logprobs), torch.cat(entropy))


def _score_chunk(
    hidden: Float[Tensor, "C H"], targets: Int[Tensor, " C"], head: Head
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    log_probabilities = head.logits(hidden).log_softmax(dim=-1)
    logprobs = log_probabilities.gather(-1, targets[:, None]).squeeze(-1)
    # Last, because the recomputation in the backward pass stops before it. entr(0) = 0, where p log p is nan.
    with torch.no_grad():
        entropy = torch.special.entr(log_probabilities.exp()).sum(dim=-1)
    return logprobs, entropy
