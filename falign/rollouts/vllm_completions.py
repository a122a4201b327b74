"""One request for the completions of a prompt, and a strict check of the reply."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

from falign.errors import EngineError
from falign.rollouts.base import SampledCompletion, SamplingParams
from falign.rollouts.vllm_client import HTTPClient, RefusedError, reply_line

__all__ = ["VersionUnknownError", "complete"]

_ROUNDING = 1e-4  # nats by which rounding may put a log-probability above 0


class VersionUnknownError(EngineError):
    """The server has no weights under the name of the version."""


def complete(
    client: HTTPClient,
    prompt_ids: Sequence[int],
    n: int,
    params: SamplingParams,
    *,
    model: str,
    version: int,
    seed: int,
) -> list[SampledCompletion]:
    """Sample the completions of one prompt on a server.

    Args:
        client: The client of the server.
        prompt_ids: The prompt.
        n: Number of completions.
        params: Sampling parameters.
        model: The server's name for the version.
        version: The run's number for the version.
        seed: vLLM gives completion j the seed ``seed + j``, so requests need seeds that are far apart (``mixed``).

    Raises:
        VersionUnknownError: The server does not know the name.
        EngineError: The reply does not fit the request.
    """
    try:
        reply = client.post_json("/v1/completions", _request(prompt_ids, n, params, model=model, seed=seed))
    except RefusedError as error:
        if error.status == 404:
            raise VersionUnknownError(str(error)) from error
        raise
    try:
        return _rollouts(reply, prompt_ids, n, params, model=model, version=version)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(
            f"{client.url}/v1/completions: the reply does not fit the request ({type(error).__name__}: {error}): "
            f"{reply_line(json.dumps(reply))}"
        ) from error


def _request(prompt_ids: Sequence[int], n: int, params: SamplingParams, *, model: str, seed: int) -> dict[str, Any]:
    # Every setting is given, because the server would take missing ones from the model's generation_config.
    return {
        "model": model,
        "prompt": [list(prompt_ids)],
        "n": n if params.temperature > 0 else 1,
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": sorted(params.stop_token_ids),
        "seed": seed,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def _rollouts(
    reply: Any, prompt_ids: Sequence[int], n: int, params: SamplingParams, *, model: str, version: int
) -> list[SampledCompletion]:
    if reply["model"] != model:
        raise ValueError(f"it is of {reply['model']!r}, and {model!r} was asked for")
    drawn = n if params.temperature > 0 else 1
    choices = sorted(reply["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(drawn)):
        raise ValueError(f"{len(choices)} completions, and {drawn} were asked for")
    rollouts = [_rollout(choice, prompt_ids, params, version=version) for choice in choices]
    return rollouts if drawn == n else rollouts * n  # greedy completions are identical


def _rollout(
    choice: dict[str, Any], prompt_ids: Sequence[int], params: SamplingParams, *, version: int
) -> SampledCompletion:
    if choice["prompt_token_ids"] != list(prompt_ids):
        raise ValueError("its prompt is not the one that was sent")
    ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    if not ids or len(ids) != len(logprobs):
        raise ValueError(f"{len(ids)} tokens and {len(logprobs)} log-probabilities")
    if not all(math.isfinite(value) and value <= _ROUNDING for value in logprobs):
        raise ValueError("invalid log-probabilities; are the weights damaged (has training diverged?)")
    if any(token in params.stop_token_ids for token in ids[:-1]) or len(ids) > params.max_new_tokens:
        raise ValueError("a completion goes on after its end")
    stopped: Literal["stop", "length"] = "stop" if ids[-1] in params.stop_token_ids else "length"
    if stopped == "length" and len(ids) != params.max_new_tokens:
        raise ValueError(f"a completion ends after {len(ids)} tokens by {choice['finish_reason']!r}")
    return SampledCompletion(
        prompt_ids=tuple(prompt_ids),
        completion_ids=tuple(ids),
        # Greedy decoding draws from a point mass, and the server reports other log-probabilities.
        logprobs=tuple(map(float, logprobs)) if params.temperature > 0 else (0.0,) * len(ids),
        finish_reason=stopped,
        policy_version=version,
    )
