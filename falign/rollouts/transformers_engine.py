"""Sampling in the training process, directly from the weights in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from falign.errors import RolloutError
from falign.models.sharding import gathered_weights
from falign.rollouts.base import (
    Engine,
    EngineCapabilities,
    SampledCompletion,
    SamplingParams,
    check_prompts,
    check_request,
)
from falign.rollouts.decoding import Decoding, draw, uniform_streams
from falign.scoring import evaluation_mode, without_wrapper

__all__ = ["TransformersEngine", "sampling_batches"]

_MOST_ALIVE = 0.75  # finished rows are dropped once at most this share of the computed rows is still running


class TransformersEngine(Engine):
    """Sampling from a Transformers model, with falign's own loop over the model's cache.

    Each prompt is computed once, and its keys and values are shared by all its completions; finished completions leave
    the batch. The model's own generation settings (penalties, suppressed tokens, temperatures) are not applied, so that
    a trainer can recompute the distribution. Each completion has its own stream of random numbers, derived from the
    seed and its number in the call; the global random state is not used.

    A model that FSDP2 shards over processes is gathered in each of them during sampling, because completions end
    earlier in one process than in another; all processes must sample at the same time.

    Args:
        model: A causal language model, with or without adapters; with the active ones it is the policy.
        pad_token_id: The id that fills short prompts; any valid id, also a stop token.
        max_batch_tokens: Maximum number of tokens with keys and values in memory; affects memory and speed only.
    """

    def __init__(self, model: nn.Module, *, pad_token_id: int, max_batch_tokens: int = 16_384) -> None:
        self.model, self.pad_token_id, self.max_batch_tokens = model, pad_token_id, max_batch_tokens
        self.version: int | None = None

    @override
    def publish(self, model: nn.Module, version: int) -> None:
        if without_wrapper(model) is not without_wrapper(self.model):
            raise RolloutError(
                f"Version {version} belongs to another model than the engine's: publish the model that the engine was "
                "made with, or make another engine."
            )
        self.version = version

    @override
    def sample(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        *,
        version: int,
        seed: int | list[int],
        first: int = 0,
    ) -> list[SampledCompletion]:
        if version != self.version:
            raise RolloutError(
                f"Version {version} is not what the engine holds ({self.version}), the model in its present state: "
                f"call publish(model, {version}) first."
            )
        check_request(prompt_ids, n, seed)
        check_prompts(prompt_ids, params, vocabulary=self._config.vocab_size, positions=self.capabilities().max_length)
        batches = sampling_batches(
            [len(prompt) for prompt in prompt_ids],
            n,
            max_new_tokens=params.max_new_tokens,
            max_batch_tokens=self.max_batch_tokens,
        )
        completions: dict[int, _Completion] = {}
        with torch.no_grad(), evaluation_mode(self.model), gathered_weights(self.model):
            for rows in batches:
                prompts = list(dict.fromkeys(row // n for row in rows))
                decoding = Decoding(
                    self.model,
                    [prompt_ids[prompt] for prompt in prompts],
                    [prompts.index(row // n) for row in rows],
                    room=params.max_new_tokens - 1,
                    pad_token_id=self.pad_token_id,
                )
                places = [f"completion {row % n} of prompt {row // n}" for row in rows]
                if isinstance(seed, int):
                    numbers = [first * n + row for row in rows]
                    uniforms = uniform_streams(numbers, params.max_new_tokens, seed=seed)
                else:
                    own, seeds = [row % n for row in rows], [seed[row // n] for row in rows]
                    uniforms = uniform_streams(own, params.max_new_tokens, seed=seeds)
                completions |= zip(rows, _complete(decoding, params, uniforms, places), strict=True)
        return [
            SampledCompletion(
                prompt_ids=tuple(prompt_ids[row // n]),
                completion_ids=tuple(completions[row].ids),
                logprobs=tuple(completions[row].logprobs),
                finish_reason="stop" if completions[row].stopped else "length",
                policy_version=version,
            )
            for row in range(len(prompt_ids) * n)
        ]

    @override
    def retire(self, version: int) -> None:
        if version == self.version:
            self.version = None

    @override
    def capabilities(self) -> EngineCapabilities:
        dtype = next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())
        positions = getattr(self._config, "max_position_embeddings", None)
        return EngineCapabilities(
            dtype=str(dtype).removeprefix("torch."),
            processed_logprobs=True,
            max_length=positions if isinstance(positions, int) else None,
        )

    @override
    def close(self) -> None:
        self.version = None

    @property
    def _config(self) -> Any:
        return without_wrapper(self.model).config.get_text_config()  # pyright: ignore


@dataclass
class _Completion:
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False


def _complete(
    decoding: Decoding, params: SamplingParams, uniforms: Float[Tensor, "B T"], places: Sequence[str]
) -> list[_Completion]:
    """Continue every row of a decoding until it stops or reaches the maximum length."""
    uniforms = uniforms.to(decoding.logits.device)
    completions = [_Completion() for _ in places]
    alive = list(range(len(places)))  # which completion each row of the decoding continues
    for step in range(params.max_new_tokens):
        drawn = draw(decoding.logits, params, uniforms[:, step])
        for i, token_id, logprob in zip(alive, drawn.token_ids.tolist(), drawn.logprobs.tolist(), strict=True):
            completion = completions[i]
            if completion.stopped:
                continue
            if not math.isfinite(logprob):
                raise RolloutError(
                    f"The logits of {places[i]} are not finite after {step} tokens: the weights are damaged (has "
                    "training diverged?), or their dtype is too narrow for the model's activations; try bfloat16 or "
                    "float32."
                )
            completion.ids.append(token_id)
            completion.logprobs.append(logprob)
            completion.stopped = token_id in params.stop_token_ids
        running = [row for row, i in enumerate(alive) if not completions[i].stopped]
        if not running or step == params.max_new_tokens - 1:
            break
        token_ids = drawn.token_ids
        if len(running) <= _MOST_ALIVE * len(alive):
            decoding.keep(running)
            alive, token_ids, uniforms = [alive[row] for row in running], token_ids[running], uniforms[running]
        decoding.append(token_ids)
    return completions


def sampling_batches(lengths: Sequence[int], n: int, *, max_new_tokens: int, max_batch_tokens: int) -> list[list[int]]:
    """Return the rows of each batch, from the longest prompts to the shortest, to keep padding small.

    Row ``i * n + j`` is completion j of prompt i. The completions of one prompt stay together, so that the prompt is
    computed once, unless they exceed the room of a batch.

    Args:
        lengths: Tokens of each prompt.
        n: Completions per prompt.
        max_new_tokens: Tokens of the longest completion.
        max_batch_tokens: Maximum number of tokens with keys and values in memory: rows × (longest prompt +
            max_new_tokens). A batch has at least one row.

    Returns:
        Batches of row numbers; each row is in exactly one.

    Example:
        >>> sampling_batches([3, 9, 4], 2, max_new_tokens=1, max_batch_tokens=20)
        [[2, 3], [4, 5, 0, 1]]
    """
    batches: list[list[int]] = []
    room = 0  # rows
    for prompt in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        most = max(1, max_batch_tokens // (lengths[prompt] + max_new_tokens))
        for start in range(0, n, most):
            part = range(prompt * n + start, prompt * n + min(start + most, n))
            if len(part) > room:
                batches.append([])
                room = most
            batches[-1] += part
            room -= len(part)
    return batches
