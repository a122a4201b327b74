"""The cost counter of a judge: requests, tokens and money, and the limit at which it stops."""

from __future__ import annotations

import threading
from typing import NamedTuple

from falign.errors import JudgeError
from falign.judges.cache import AnswerCache
from falign.judges.client import ChatReply
from falign.judges.endpoint import Endpoint

__all__ = ["CostCounter", "Usage"]


class Usage(NamedTuple):
    """Cost of a judge in this process.

    Attributes:
        requests: Answers that were paid for.
        cached: Answers from the cache.
        prompt_tokens: Tokens of the messages that were paid for.
        completion_tokens: Tokens of the answers that were paid for.
        uncounted: Answers whose tokens the service did not count.
        cost: Their price; None without prices.
    """

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    cost: float | None = None


class CostCounter:
    """A counter that threads share.

    Args:
        endpoint: Has the prices and the budget.
        cache: Its answers of the same model count towards the budget, whoever paid for them.
    """

    def __init__(self, endpoint: Endpoint, cache: AnswerCache | None) -> None:
        self._endpoint, self._cache, self._lock = endpoint, cache, threading.Lock()
        self._usage = Usage()

    @property
    def usage(self) -> Usage:
        """Requests and tokens that this process has paid for so far."""
        found = self._usage
        return found._replace(cost=self._endpoint.cost(found.prompt_tokens, found.completion_tokens))

    def add(self, reply: ChatReply, *, cached: bool) -> None:
        """Count an answer.

        Raises:
            JudgeError: There is a budget, and the service does not count tokens.
        """
        counted = reply.prompt_tokens is not None and reply.completion_tokens is not None
        if not counted and self._endpoint.budget is not None:
            raise JudgeError(
                f"{self._endpoint.url}: the answers have no usage.prompt_tokens and usage.completion_tokens, so a "
                "budget cannot be kept: leave budget out, or ask another endpoint."
            )
        with self._lock:
            now = self._usage
            if cached:
                self._usage = now._replace(cached=now.cached + 1)
                return
            self._usage = now._replace(
                requests=now.requests + 1,
                prompt_tokens=now.prompt_tokens + (reply.prompt_tokens or 0),
                completion_tokens=now.completion_tokens + (reply.completion_tokens or 0),
                uncounted=now.uncounted + (not counted),
            )

    def require_budget(self) -> None:
        """Refuse a further request once the budget is spent; those under way are completed.

        Raises:
            JudgeError: The message has what was spent.
        """
        endpoint = self._endpoint
        if endpoint.budget is None:
            return
        now = self._usage
        tokens = now.prompt_tokens, now.completion_tokens
        if self._cache is not None:
            tokens = self._cache.spent(endpoint.url, endpoint.model)
        cost = endpoint.cost(*tokens)
        assert cost is not None, "a budget has prices"
        if cost >= endpoint.budget:
            kept = "" if self._cache is None else f" All answers so far are in {self._cache.path}."
            raise JudgeError(
                f"the budget of the judge {endpoint.model!r} is spent: {cost:.4f} of {endpoint.budget:g}, for "
                f"{tokens[0]:,} prompt tokens and {tokens[1]:,} completion tokens.{kept} To continue, raise budget and "
                "repeat the call."
            )
