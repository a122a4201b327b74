"""Plain HTTP to a rollout server: a limit of time on every call, and errors that say what kind of fault it was."""

from __future__ import annotations

import json
import time
from typing import Any

import requests

from falign.errors import EngineError

__all__ = ["HTTPClient", "RefusedError", "ServerLostError"]

_HEALTH_TIMEOUT = 5.0  # seconds; a server that answers does so at once
_POLL = 0.5  # seconds between two looks for a server that is away


class ServerLostError(EngineError):
    """The server is not there, or went away during the call; all that it held is lost."""


class RefusedError(EngineError):
    """The server is there and says no.

    Args:
        message: What is told.
        status: Of the reply.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class HTTPClient:
    """Calls one server. It is safe to be used by several threads.

    Args:
        url: Of the server, without a path.
        timeout: Seconds that any call may take before its first, or between two parts of its reply.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout

    def get(self, path: str) -> Any:
        """Return the JSON that a path answers with."""
        return self._json(path, self._call("GET", path))

    def post(self, path: str, body: dict[str, Any] | None = None) -> str:
        """Return the text that a path answers with."""
        return self._call("POST", path, body).text

    def post_json(self, path: str, body: dict[str, Any]) -> Any:
        """Return the JSON that a path answers with."""
        return self._json(path, self._call("POST", path, body))

    def is_healthy(self) -> bool:
        """Return whether the server says that it can work."""
        try:
            return self._send("GET", "/health", None, min(_HEALTH_TIMEOUT, self.timeout)).status_code == 200
        except requests.RequestException:
            return False  # which is the answer to the question

    def wait_until_healthy(self, seconds: float) -> bool:
        """Return whether the server could work at some time during the next seconds."""
        end = time.monotonic() + seconds
        while not self.is_healthy():
            if time.monotonic() >= end:
                return False
            time.sleep(min(_POLL, max(end - time.monotonic(), 0.0)))
        return True

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> requests.Response:
        place = f"{method} {self.url}{path}"
        try:
            reply = self._send(method, path, body, self.timeout)
        except requests.ReadTimeout as error:
            raise EngineError(
                f"{place}: no answer within timeout={self.timeout:g} seconds. Look at the server's log; if it works "
                "but is slow, raise the timeout, or ask for fewer or shorter completions."
            ) from error
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            raise ServerLostError(f"{place}: the server is not there, or went away while it answered.") from error
        if reply.status_code == 200:
            return reply
        said = " ".join(reply.text.split())[:300]
        # vLLM answers 500 from a dead engine and then exits.
        if reply.status_code >= 500 and not self.is_healthy():
            raise ServerLostError(f"{place}: status {reply.status_code}, and the server can work no more: {said}")
        raise RefusedError(f"{place}: status {reply.status_code}: {said}", reply.status_code)

    def _send(self, method: str, path: str, body: dict[str, Any] | None, timeout: float) -> requests.Response:
        with requests.Session() as session:
            session.trust_env = False  # the server is near; a proxy of the environment is not meant for it
            return session.request(method, self.url + path, json=body, timeout=timeout)

    def _json(self, path: str, reply: requests.Response) -> Any:
        try:
            return json.loads(reply.content)
        except ValueError as error:
            raise EngineError(
                f"{self.url}{path}: the reply is no JSON ({reply.text[:100]!r}): is another program at this address?"
            ) from error
