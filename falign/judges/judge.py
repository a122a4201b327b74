"""A judge: questions to an endpoint, several at once, and their verdicts."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from falign.errors import JudgeError
from falign.judges.cache import AnswerCache, request_key
from falign.judges.client import ChatClient, ChatReply, RefusedRequestError, StoppedAskingError
from falign.judges.cost import CostCounter, Usage
from falign.judges.endpoint import Endpoint
from falign.judges.prompts import JudgeTemplate
from falign.judges.verdicts import MalformedError, VerdictForm

__all__ = ["Judge", "Judgment"]

Messages = list[dict[str, str]]


class Judgment(NamedTuple):
    """A verdict, or the reason why there is none.

    Attributes:
        value: The verdict; None if there is none.
        answer: The text of the last answer.
        problem: Why there is no verdict; ``""`` if there is one.
        prompt_tokens: Tokens of the messages that were paid for, all attempts together.
        completion_tokens: Tokens of the answers that were paid for.
    """

    value: Any
    answer: str
    problem: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class _Known:
    """Properties of the service that its answers so far have shown.

    Attributes:
        with_schema: Whether to ask with the schema.
        schema_works: Whether the service has accepted it.
        answers_as: The model that it names in its answers; None before the first one.
        lock: Held by the thread that compares it.
    """

    with_schema: bool
    schema_works: bool
    answers_as: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Judge:
    """A model behind an endpoint that gives verdicts of one form.

    Equal questions of one call are asked once. A malformed answer is answered by the reason and a request for another
    one; after :attr:`Endpoint.reasks` of these it is a failure, which has no value.

    Args:
        endpoint: The model, its options and the limits.
        template: The messages; its placeholders have been checked.
        form: The form of a verdict.

    Raises:
        ConfigError: The key is missing, or the cache cannot be used.
    """

    def __init__(self, endpoint: Endpoint, template: JudgeTemplate, form: VerdictForm) -> None:
        self.endpoint, self.template, self.form = endpoint, template, form
        endpoint.key()

    @cached_property
    def _known(self) -> _Known:
        return _Known(self.endpoint.answer != "text", self.endpoint.answer == "schema")

    @cached_property
    def _client(self) -> ChatClient:
        return ChatClient(self.endpoint)

    @cached_property
    def _cache(self) -> AnswerCache | None:
        return None if self.endpoint.cache is None else AnswerCache(self.endpoint.cache)

    @cached_property
    def _counter(self) -> CostCounter:
        return CostCounter(self.endpoint, self._cache)

    @property
    def usage(self) -> Usage:
        """Cost of this judge in this process."""
        return self._counter.usage

    @property
    def spent(self) -> Usage:
        """Cost of all answers of this model in the cache, whoever paid; without a cache, :attr:`usage`."""
        if self._cache is None:
            return self.usage
        tokens = self._cache.spent(self.endpoint.url, self.endpoint.model)
        return Usage(0, 0, *tokens, cost=self.endpoint.cost(*tokens))

    @property
    def answers_as(self) -> str:
        """The model that the service names in its answers; ``""`` before the first one."""
        return self._known.answers_as or ""

    def require_version(self, model: str) -> None:
        """Refuse answers of another model from now on.

        Args:
            model: The model that the service named in earlier answers.
        """
        self._known.answers_as = model

    def served(self) -> dict[str, Any]:
        """Ask the service what it serves, so that a wrong address or name is found before anything is judged.

        Returns:
            ``root``, the path or repository of the model, where the service tells it.

        Raises:
            JudgeError: The service is unreachable, refuses the key, or has no such model.
        """
        found = self._client.models() or {}
        return {"root": found["root"]} if isinstance(found.get("root"), str) else {}

    def identity(self) -> dict[str, Any]:
        """Return everything that a verdict depends on, besides the question."""
        return {**self.endpoint.identity(), "template": self.template.identity(), "form": self.form.schema()}

    def ask(self, questions: Sequence[Mapping[str, Any]]) -> list[Judgment]:
        """Return one judgment per question.

        Args:
            questions: A value for each placeholder of the template but ``{form}``.

        Raises:
            JudgeError: The service does not answer, another version of the model answers, or the budget is spent. The
                answers so far are in the cache, if there is one.
        """
        filled = [self.template.messages({**each, "form": self.form.instruction()}) for each in questions]
        keys = [request_key("", {"messages": messages}) for messages in filled]
        once = dict(zip(keys, filled, strict=True))
        # Made here, because threads would make several.
        client, _, _, stop = self._client, self._counter, self._known, threading.Event()
        with ThreadPoolExecutor(self.endpoint.concurrency, thread_name_prefix="falign-judge") as pool:
            asked = {key: pool.submit(self._judge_or_stop, client, messages, stop) for key, messages in once.items()}
            try:
                wait(asked.values(), return_when=FIRST_EXCEPTION)
            finally:
                # After an error or Ctrl-C, requests under way end, and no other begins.
                stop.set()
                pool.shutdown(cancel_futures=any(not future.done() for future in asked.values()))
        failed = [error for future in asked.values() if not future.cancelled() and (error := future.exception())]
        if failed:
            raise next((error for error in failed if not isinstance(error, StoppedAskingError)), failed[0])
        paid: set[str] = set()
        found = []
        for key in keys:
            judgment = asked[key].result()
            found.append(judgment._replace(prompt_tokens=0, completion_tokens=0) if key in paid else judgment)
            paid.add(key)
        return found

    def _judge_or_stop(self, client: ChatClient, messages: Messages, stop: threading.Event) -> Judgment:
        try:
            return self._judge(client, messages, stop)
        except BaseException:
            stop.set()  # here, because this thread would send the next question before another one sees the error
            raise

    def _judge(self, client: ChatClient, messages: Messages, stop: threading.Event) -> Judgment:
        tokens, answer, problem = [0, 0], "", ""
        for _ in range(self.endpoint.reasks + 1):
            try:
                reply, paid = self._answer(client, messages, stop)
            except RefusedRequestError as error:
                return Judgment(None, "", f"the service refuses the question: {error}", *tokens)
            tokens = [before + new for before, new in zip(tokens, paid, strict=True)]
            answer = reply.content
            try:
                return Judgment(self.form.read(answer), answer, "", *tokens)
            except MalformedError as error:
                problem = str(error)
                if reply.finish_reason == "length":
                    problem += f"; it was cut at max_tokens={self.endpoint.max_tokens}"
            again = f"This answer cannot be read: {problem}. Judge again. {self.form.instruction()}"
            messages = [
                *messages,
                {"role": "assistant", "content": answer or "(empty)"},
                {"role": "user", "content": again},
            ]
        return Judgment(None, answer, f"the answer is malformed: {problem}", *tokens)

    def _answer(
        self, client: ChatClient, messages: Messages, stop: threading.Event
    ) -> tuple[ChatReply, tuple[int, int]]:
        """Return an answer and the tokens that were paid for it."""
        known = self._known
        with_schema = known.with_schema
        try:
            found = self._cached_or_new(client, messages, stop, with_schema=with_schema)
        except RefusedRequestError:
            if not with_schema or known.schema_works:
                raise
            # The service may not know response_format. If it accepts the same question without, it does not.
            found = self._cached_or_new(client, messages, stop, with_schema=False)
            known.with_schema = False
        else:
            known.schema_works = known.schema_works or with_schema
        return found

    def _cached_or_new(
        self, client: ChatClient, messages: Messages, stop: threading.Event, *, with_schema: bool
    ) -> tuple[ChatReply, tuple[int, int]]:
        endpoint, cache = self.endpoint, self._cache
        body = endpoint.body(messages, self.form.schema() if with_schema else None)
        key = request_key(endpoint.url, body)
        reply = None if cache is None else cache.get(key)
        cached = reply is not None
        if reply is None:
            if stop.is_set():
                raise StoppedAskingError(f"{endpoint.url}: another request has failed.")
            self._counter.require_budget()
            reply = client.complete(body, stop=stop)
            if cache is not None:
                cache.put(key, endpoint.url, endpoint.model, reply)
        self._require_same_version(reply)
        self._counter.add(reply, cached=cached)
        return reply, (0, 0) if cached else (reply.prompt_tokens or 0, reply.completion_tokens or 0)

    def _require_same_version(self, reply: ChatReply) -> None:
        known = self._known
        with known.lock:
            if known.answers_as is None:
                known.answers_as = reply.model
            elif known.answers_as != reply.model:
                raise JudgeError(
                    f"{self.endpoint.url}: answers for model={self.endpoint.model!r} came from {known.answers_as!r}, "
                    f"and now from {reply.model!r}, and verdicts of two judges are not mixed: name one version in "
                    "model; with a cache, the earlier ones may be in it."
                )
