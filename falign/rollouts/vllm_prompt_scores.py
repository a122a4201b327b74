"""Log-probabilities of given tokens under the model of a vLLM server; vLLM itself is never imported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from falign.errors import ConfigError, EngineError
from falign.rollouts.vllm_client import HTTPClient, RefusedError, ServerLostError, reply_line

__all__ = ["PromptScorer", "ServedModel"]

_MOST_LOSSES = 3  # losses of the server during one call; more suggest that the call itself causes them
_MOST_REQUESTS = 64  # concurrent requests, each for one sequence
_ROUNDING = 1e-4  # nats by which rounding may put a log-probability above 0
_IMPOSSIBLE = -9999.0  # vLLM writes it for log 0, which JSON cannot hold
T = TypeVar("T")


@dataclass(frozen=True)
class ServedModel:
    """A model of a vLLM server; equal ones score the same, as far as the server tells.

    Attributes:
        model: Its name in requests.
        root: The path or name that it was loaded from.
        version: The version of vLLM.
        max_length: Maximum number of tokens of a request.
    """

    model: str
    root: str
    version: str
    max_length: int


class PromptScorer:
    """A client that asks a vLLM server for the log-probabilities of given tokens.

    Token ids go both ways, never text. Each sequence is one request, which the server batches with the others. The
    client waits for a server that is unavailable, and repeats lost requests.

    Args:
        url: Address of the server.
        model: The server's name for the model; None for its base model.
        timeout: Seconds for each call.
        wait: Seconds that the server may be unavailable, also at the start.

    Attributes:
        served: The model.

    Raises:
        ConfigError: The server has no model of this name, or serves adapters.
        EngineError: The server is unavailable, or is no vLLM server.
    """

    def __init__(self, url: str, *, model: str | None = None, timeout: float = 600.0, wait: float = 300.0) -> None:
        self.client, self.asked, self.wait = HTTPClient(url, timeout=timeout), model, wait
        if not self.client.wait_until_healthy(wait):
            raise self._gone()
        self.served = self._describe()

    def tokenize(self, text: str) -> list[int]:
        """Return the server's token ids of a text, without special tokens."""
        body = {"model": self.served.model, "prompt": text, "add_special_tokens": False}
        reply = self._persist(lambda: self.client.post_json("/tokenize", body))
        return self._read("/tokenize", reply, lambda: [int(token) for token in reply["tokens"]])

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the server's text of token ids; those that are no tokens are left out."""
        body = {"model": self.served.model, "tokens": list(ids)}
        reply = self._persist(lambda: self.client.post_json("/detokenize", body))
        return self._read("/detokenize", reply, lambda: str(reply["prompt"]))

    def has_id(self, id_: int) -> bool:
        """Return whether the model's vocabulary has an id."""
        body = {"model": self.served.model, "prompt": [[id_]], "max_tokens": 1}
        try:
            self._persist(lambda: self.client.post_json("/v1/completions", body))
        except RefusedError as error:
            if error.status == 400 and "vocabulary" in str(error):
                return False
            raise
        return True

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Return log π of the completion tokens of each sequence, at temperature 1 and over the whole vocabulary.

        Args:
            sequences: Prompt ids and completion ids; a prompt has at least one token.

        Returns:
            Log-probabilities in nats, one for each completion token.

        Raises:
            EngineError: The server fails, stays away, or comes back with another model; or a reply does not fit.
        """
        distinct = list(dict.fromkeys((tuple(prompt), tuple(completion)) for prompt, completion in sequences))
        answered: dict[tuple[tuple[int, ...], tuple[int, ...]], list[float]] = {}

        def answer_the_rest() -> None:
            rest = [each for each in distinct if each not in answered]
            with ThreadPoolExecutor(min(_MOST_REQUESTS, max(len(rest), 1))) as pool:
                replies = {each: pool.submit(self._score, *each) for each in rest}
            failed = [error for reply in replies.values() if (error := reply.exception()) is not None]
            answered.update({each: reply.result() for each, reply in replies.items() if reply.exception() is None})
            if failed:
                raise next((error for error in failed if not isinstance(error, ServerLostError)), failed[0])

        self._persist(answer_the_rest)
        return [answered[tuple(prompt), tuple(completion)] for prompt, completion in sequences]

    def _score(self, prompt: tuple[int, ...], completion: tuple[int, ...]) -> list[float]:
        ids, path = [*prompt, *completion], "/v1/completions"
        # vLLM generates at least one token. The log-probabilities of a prompt do not depend on the sampling settings.
        body = {
            "model": self.served.model,
            "prompt": [ids],
            "n": 1,
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
            "return_token_ids": True,
        }
        reply = self.client.post_json(path, body)
        return self._read(path, reply, lambda: _logprobs(reply, ids, self.served.model)[len(prompt) :])

    def _read(self, path: str, reply: Any, read: Callable[[], T]) -> T:
        try:
            return read()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise EngineError(
                f"{self.client.url}{path}: the reply does not fit the request ({type(error).__name__}: {error}): "
                f"{reply_line(json.dumps(reply))}"
            ) from error

    def _describe(self) -> ServedModel:
        cards, version = self.client.get("/v1/models"), self.client.get("/version")

        def read() -> ServedModel | None:
            listed = {str(card["id"]): card for card in cards["data"]}
            base = next(card for card in listed.values() if not card.get("parent"))
            card = base if self.asked is None else listed.get(self.asked)
            if card is None:
                return None
            length = int(card.get("max_model_len") or base["max_model_len"])
            return ServedModel(str(card["id"]), str(card["root"]), str(version["version"]), length)

        found = self._read("/v1/models", cards, read)
        if self._serves_adapters(cards):
            raise ConfigError(
                f"{self.client.url} serves adapters, and vLLM then computes wrong prompt log-probabilities, or stops "
                "at the first batch of them: start it without (MAX_LORA_RANK=0 of scripts/vllm_server.sh), and serve a "
                "model with the adapter merged into it (`falign export RUN --format merged`)."
            )
        if found is None:
            names = ", ".join(str(card["id"]) for card in cards["data"])
            raise ConfigError(f"{self.client.url} serves {names}, and model={self.asked!r} was asked for.")
        return found

    def _serves_adapters(self, cards: Any) -> bool:
        if any(card.get("parent") for card in cards["data"]):
            return True
        try:
            info = self.client.get("/server_info?config_format=json")
        except RefusedError:
            return False  # only servers in developer mode give their settings, and scores need none of them
        return self._read("/server_info", info, lambda: info["vllm_config"]["lora_config"] is not None)

    def _persist(self, action: Callable[[], T]) -> T:
        """Repeat an action until the server stays available throughout."""
        losses = 0
        while True:
            try:
                return action()
            except ServerLostError as error:
                losses += 1
                if losses > _MOST_LOSSES:
                    raise EngineError(
                        f"{error} That was the {losses}th time during one call: see the server's log for the "
                        "cause. vLLM with --enable-lora stops at prompt log-probabilities."
                    ) from error
                if not self.client.wait_until_healthy(self.wait):
                    raise self._gone() from error
                if (now := self._describe()) != self.served:
                    raise EngineError(
                        f"{self.client.url} came back with another model, {now} in place of {self.served}: start it "
                        "with the former one."
                    ) from error

    def _gone(self) -> EngineError:
        return EngineError(
            f"{self.client.url}: there has been no vLLM server for wait={self.wait:g} seconds. Start it "
            "(MAX_LORA_RANK=0 scripts/vllm_server.sh MODEL), and start or resume the run."
        )


def _logprobs(reply: Any, ids: list[int], model: str) -> list[float]:
    """Return the log-probability of each token of a request but the first, which has none; 0 in its place."""
    if reply["model"] != model:
        raise ValueError(f"it is of {reply['model']!r}, and {model!r} was asked for")
    (choice,) = reply["choices"]
    if choice["prompt_token_ids"] != ids:
        raise ValueError("its tokens are not those that were sent")
    found = choice["prompt_logprobs"]
    if found is None or len(found) != len(ids):
        raise ValueError(f"{len(ids)} tokens and {0 if found is None else len(found)} prompt_logprobs")
    values = [0.0]
    for i, (token, alternatives) in enumerate(zip(ids[1:], found[1:], strict=True), start=1):
        if str(token) not in alternatives:
            raise ValueError(f"the log-probability of token {token} at position {i} is missing")
        value = float(alternatives[str(token)]["logprob"])
        if not (math.isfinite(value) and _IMPOSSIBLE < value <= _ROUNDING):
            raise ValueError(f"token {token} at position {i} has the log-probability {value}; are the weights damaged?")
        values.append(value)
    return values
