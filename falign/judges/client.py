"""HTTP to an OpenAI-compatible endpoint: one chat completion, with a deadline, retries and backoff."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from typing_extensions import override

from falign.errors import JudgeError, one_line, without_secrets
from falign.judges.endpoint import Endpoint

__all__ = ["ChatClient", "ChatReply", "RefusedRequestError", "StoppedAskingError"]

_AGAIN = frozenset({408, 409, 425, 429, *range(500, 600)})
_OF_THE_REQUEST = frozenset({400, 413, 422})
_NEVER_AGAIN = "insufficient_quota"  # OpenAI's code of a 429 that waiting does not lift
_THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1"})
_LONGEST_WAIT = 60.0  # seconds between two attempts, unless the service says more
_LONGEST_RETRY_AFTER = 600.0
_LONGEST_REPLY = 1 << 26  # bytes
_TOLD = 300  # characters of a reply in a message
_PART = 512  # bytes between two checks of the deadline


class RefusedRequestError(JudgeError):
    """The service does not accept this request, though it may accept others."""


class StoppedAskingError(JudgeError):
    """A request that was not repeated, because another one has failed."""


class _AgainError(Exception):
    """An attempt that may succeed if repeated, after some seconds if the service said so."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class _Bearer(AuthBase):
    """The key, given as authentication: otherwise requests would replace it by an entry of ~/.netrc."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    @override
    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            r.headers["Authorization"] = f"Bearer {self._key}"
        return r


class ChatReply(NamedTuple):
    """A chat completion.

    Attributes:
        content: The answer; ``""`` if there is none, as at a refusal.
        finish_reason: The service's reason for its end.
        model: The model that the service names.
        prompt_tokens: Tokens of the messages; None if the service does not count.
        completion_tokens: Tokens of the answer, hidden thoughts included; None likewise.
    """

    content: str
    finish_reason: str
    model: str
    prompt_tokens: int | None
    completion_tokens: int | None


class ChatClient:
    """A client of one endpoint, for several threads.

    Args:
        endpoint: The endpoint; its key is read now.

    Raises:
        ConfigError: The environment has no key.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._key = endpoint.key()
        self._session = requests.Session()
        self._session.auth = _Bearer(self._key)
        # A proxy of the environment is for other machines.
        self._session.trust_env = urlsplit(endpoint.url).hostname not in _THIS_MACHINE
        # Cookies are the one state of a session that its threads would share.
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=endpoint.concurrency))

    def models(self) -> dict[str, Any] | None:
        """Return the description of the model that the service lists; None if the service has no list.

        Raises:
            JudgeError: The service is unreachable, refuses the key, or lists other models.
        """
        endpoint = self.endpoint
        status, reply = self._retried(lambda: self._attempt("GET", "/models", None))
        if status in (401, 403):
            raise JudgeError(f"{endpoint.url}/models: status {status}: {self._said(reply)}{_hint(status)}")
        if status != 200 or not isinstance(reply, dict) or not isinstance(reply.get("data"), list):
            return None
        listed = {each["id"]: each for each in reply["data"] if isinstance(each, dict) and "id" in each}
        if listed and endpoint.model not in listed:
            raise JudgeError(
                f"{endpoint.url}: there is no model {endpoint.model!r}; it has {', '.join(sorted(listed)[:20])}."
            )
        return listed.get(endpoint.model)

    def complete(self, body: dict[str, Any], *, stop: threading.Event) -> ChatReply:
        """Return the completion of one request.

        Args:
            body: The JSON of the request.
            stop: Ends the wait before a further attempt.

        Raises:
            RefusedRequestError: The service does not accept this request.
            JudgeError: The service does not answer, or does not speak the protocol.
        """
        status, reply = self._retried(lambda: self._attempt("POST", "/chat/completions", body), stop)
        if status in _OF_THE_REQUEST:
            raise RefusedRequestError(f"{self.endpoint.url}: status {status}: {self._said(reply)}")
        if status != 200:
            raise JudgeError(
                f"{self.endpoint.url}/chat/completions: status {status}: {self._said(reply)}{_hint(status)}"
            )
        try:
            return _reply(reply)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise JudgeError(
                f"{self.endpoint.url}/chat/completions: the reply is not a chat completion "
                f"({type(error).__name__}: {error}): {self._said(reply)}. Is this an OpenAI-compatible endpoint?"
            ) from error

    def _retried(self, attempt: Callable[[], tuple[int, Any]], stop: threading.Event | None = None) -> tuple[int, Any]:
        endpoint, failures = self.endpoint, 0
        while True:
            try:
                return attempt()
            except _AgainError as error:
                failures += 1
                if failures > endpoint.retries:
                    raise JudgeError(
                        f"{endpoint.url}: {failures} attempts failed, the last one by: {error}. Repeat the call later; "
                        "or raise timeout, retries or backoff, or lower concurrency."
                    ) from error
                doubled = min(endpoint.backoff * 2 ** (failures - 1), _LONGEST_WAIT)
                wait = doubled if error.after is None else min(error.after, _LONGEST_RETRY_AFTER)
                if stop is None:
                    time.sleep(wait)
                elif stop.wait(wait):
                    raise StoppedAskingError(f"{endpoint.url}: stopped while waiting after: {error}.") from error

    def _attempt(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        """Return status and JSON of a reply; text that is not JSON as text.

        Raises:
            _AgainError: Another attempt may succeed.
            JudgeError: None will.
        """
        endpoint = self.endpoint
        end = time.monotonic() + endpoint.timeout
        late = f"no answer within timeout={endpoint.timeout:g} seconds"
        try:
            with self._session.request(
                method,
                endpoint.url + path,
                json=body,
                timeout=endpoint.timeout,
                stream=True,
                allow_redirects=False,
            ) as response:
                content = bytearray()
                # The timeout of requests begins again with each byte; this is one for the whole reply.
                for part in response.iter_content(_PART):
                    content += part
                    if time.monotonic() > end:
                        raise _AgainError(late)
                    if len(content) > _LONGEST_REPLY:
                        raise JudgeError(f"{endpoint.url}{path}: the reply has more than {_LONGEST_REPLY:,} bytes.")
                status, headers = response.status_code, response.headers
        except requests.Timeout as error:
            raise _AgainError(late) from error
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise JudgeError(f"url={endpoint.url!r} is invalid: {error}.") from error
        except requests.RequestException as error:
            raise _AgainError(f"no connection, or a broken one ({self._masked(one_line(error))})") from error
        text = content.decode("utf-8", errors="replace")
        try:
            reply = json.loads(text)
        except (ValueError, RecursionError) as error:
            if status == 200:
                raise _AgainError(f"a reply that is not JSON: {self._said(text)}") from error
            reply = text
        if 300 <= status < 400:
            raise JudgeError(
                f"{endpoint.url}{path}: status {status}: redirects are not followed, because the key would be sent on; "
                "give the final address."
            )
        if status in _AGAIN:
            if _NEVER_AGAIN in text:
                raise JudgeError(f"{endpoint.url}: {self._said(reply)} Raise the quota, then repeat the call.")
            raise _AgainError(f"status {status}: {self._said(reply)}", _retry_after(headers.get("Retry-After")))
        return status, reply

    def _said(self, reply: Any) -> str:
        """Return a service's error message, or the beginning of its reply."""
        error = reply.get("error", reply) if isinstance(reply, dict) else reply
        said = error.get("message", error) if isinstance(error, dict) else error
        text = " ".join((said if isinstance(said, str) else json.dumps(said)).split())
        return self._masked(text)[:_TOLD]

    def _masked(self, text: str) -> str:
        return without_secrets(text if self._key is None else text.replace(self._key, "***"))


def _reply(reply: Any) -> ChatReply:
    choice = reply["choices"][0]
    message, usage = choice["message"], reply.get("usage") or {}
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise TypeError(f"the content is a {type(content).__name__}")
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    if not all(count is None or (type(count) is int and count >= 0) for count in counts):
        raise ValueError(f"the usage is {usage!r}")
    return ChatReply(content or "", str(choice.get("finish_reason") or ""), str(reply.get("model") or ""), *counts)


def _hint(status: int) -> str:
    if status in (401, 403):
        return " Name the environment variable with a valid key in api_key_env."
    return " Does the url end in /v1, and does the model exist there?" if status in (404, 405) else ""


def _retry_after(given: str | None) -> float | None:
    """Return the seconds of a ``Retry-After``, which is a number or a date; None if there is none."""
    if given is None:
        return None
    try:
        return max(float(given), 0.0)
    except ValueError:
        pass  # a date
    try:
        date = parsedate_to_datetime(given)
    except ValueError:
        return None
    zoned = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return max((zoned - datetime.now(UTC)).total_seconds(), 0.0)
