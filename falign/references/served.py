"""A reference on a vLLM server, which gives the log-probabilities of given tokens."""

from __future__ import annotations

from bisect import bisect_left
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from falign.errors import ConfigError, DataError
from falign.objectives import TokenWeighting
from falign.references.base import Reference
from falign.rollouts.vllm_prompt_scores import PromptScorer
from falign.scoring import CompletionStates, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["VLLMReference"]

_BLOCK = 4096  # ids in one request

# Characters of one to four bytes, most of them rare, so that tokens of single bytes of a character occur, too.
_TEXT = "".join(
    (
        "Water boils at 100 degrees;\n\n  ‘heute’ it is 3,000 m – mean(values)?",
        *map(chr, range(0xA1, 0x800)),
        *(chr(code) for code in range(0x800, 0x10000, 0x3D7) if not 0xD800 <= code < 0xE000),
        *map(chr, range(0x10000, 0x10FFFF, 0xD7A7)),
    )
)


class VLLMReference(Reference):
    """``log π_k(y_t | y_<t, x)`` of given tokens from a vLLM server, without a model in this process.

    It gives no whole distributions: measures over the vocabulary need a model.

    Args:
        scorer: The client of the server.
        place: The reference in messages.

    Example:
        >>> from falign.rollouts import PromptScorer
        >>> teacher = VLLMReference(PromptScorer("http://127.0.0.1:8000"))  # doctest: +SKIP
    """

    def __init__(self, scorer: PromptScorer, *, place: str = "reference") -> None:
        self.scorer = scorer
        self.place = place
        self._num_ids: int | None = None

    @override
    def identity(self) -> dict[str, Any]:
        served = self.scorer.served
        return {"kind": "vllm", "weights": None, "model": served.model, "root": served.root, "vllm": served.version}

    @override
    def logprobs(self, policy_model: nn.Module, batch: TokenBatch) -> Float[Tensor, "N T"]:
        sequences = batch.token_ids()
        for place, (prompt, completion) in zip(batch.place, sequences, strict=True):
            if not prompt:
                raise DataError(
                    f"{place or 'a row'} has an empty prompt, and {self.scorer.client.url} gives no log-probability of "
                    "a first token: give it a prompt, if only the token that begins a text."
                )
            self.check_length(len(prompt) + len(completion), place=f"{self.place}, {place or 'a row'}")
        values = [
            value
            for each, counted in zip(self.scorer.score(sequences), batch.counted, strict=True)
            for value in (each if counted is None else compress(each, counted))
        ]
        return batch.scatter(torch.tensor(values, device=batch.input_ids.device))

    @override
    def states(
        self, policy_model: nn.Module, batch: TokenBatch, *, weighting: TokenWeighting = "none"
    ) -> CompletionStates:
        raise ConfigError(
            f"{self.place}: a vLLM server gives the log-probabilities of given tokens, and the objective or a measure "
            "reads whole distributions: name the model as `kind: frozen` with its path, or use an objective of sampled "
            "tokens (distillation with level: token)."
        )

    @override
    def check_length(self, longest: int, *, place: str) -> None:
        limit = self.scorer.served.max_length
        if longest + 1 > limit:  # the server generates one token
            raise ConfigError(
                f"{place}: {longest} tokens and one that vLLM adds are more than the {limit} that "
                f"{self.scorer.client.url} reads: start it with a larger --max-model-len (MAX_MODEL_LEN of "
                "scripts/vllm_server.sh), or lower the lengths of the run."
            )

    @override
    def check_fits(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
        if self._num_ids is None:
            self._check_tokens(tokenizer)
            self._num_ids = self._count_ids(vocabulary)
        if self._num_ids > vocabulary:
            raise ConfigError(
                f"{self.place}: the model {self.scorer.served.root} of {self.scorer.client.url} has more than the "
                f"{vocabulary} ids that the policy and the other references share, and a server cannot leave the "
                f"others out of its softmax. Cut it to them (`model.resize_token_embeddings({vocabulary})`, save it, "
                "serve that), or name it as `kind: frozen`."
            )
        return self._num_ids

    def _count_ids(self, limit: int) -> int:
        """Return the number of ids of the server's model, or limit + 1 if it has more than that."""

        def is_missing(id_: int) -> bool:
            return not self.scorer.has_id(id_)

        return bisect_left(range(limit), True, key=is_missing) if is_missing(limit) else limit + 1

    def _check_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # First, because in the texts below bytes that are no whole characters look alike.
        own, theirs = tokenizer(_TEXT, add_special_tokens=False)["input_ids"], self.scorer.tokenize(_TEXT)
        if own != theirs:
            first = next(i for i in range(len(own) + 1) if own[i : i + 1] != theirs[i : i + 1])
            token = tokenizer.convert_ids_to_tokens(own[first]) if first < len(own) else "the end"
            raise ConfigError(
                f"{self._models()} have different tokens: in a text with rare characters, {token!r} has the id "
                f"{own[first] if first < len(own) else 'none'} in the first and "
                f"{theirs[first] if first < len(theirs) else 'none'} in the second. {_SAME}"
            )
        padding = None if tokenizer.pad_token == tokenizer.eos_token else tokenizer.pad_token_id
        ids = sorted(id_ for id_ in tokenizer.get_vocab().values() if id_ != padding)  # no model reads the padding
        for start in range(0, len(ids), _BLOCK):
            block = ids[start : start + _BLOCK]
            if not self._agrees(tokenizer, block):
                first = self._first(tokenizer, block)
                raise ConfigError(
                    f"{self._models()} have different tokens: the id {first} is {tokenizer.decode([first])!r} in the "
                    f"first and {self.scorer.detokenize([first])!r} in the second. {_SAME}"
                )

    def _agrees(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> bool:
        return self.scorer.detokenize(ids) == tokenizer.decode(ids)

    def _first(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
        """Return the first id that is read differently, by bisection."""
        while len(ids) > 1:
            half = ids[: len(ids) // 2]
            ids = ids[len(half) :] if self._agrees(tokenizer, half) else half
        return ids[0]

    def _models(self) -> str:
        served = self.scorer.served
        return f"The policy and {self.place} ({served.root} on {self.scorer.client.url})"


_SAME = "Serve a model with the policy's tokenizer."
