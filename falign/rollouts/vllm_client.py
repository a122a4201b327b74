"""Plain HTTP to a rollout server, with a deadline for every call and an error class for each kind of failure."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from falign.errors import EngineError, without_passwords

__all__ = ["HTTPClient", "RefusedError", "ServerLostError", "reply_line"]

_HEALTH_TIMEOUT = 5.0  # seconds; a working server replies at once
_POLL = 0.5  # seconds between two health checks of an unavailable server
_PART = 1 << 20  # bytes read at once
_LONGEST_REPLY = 1 << 30  # bytes
_TOLD = 300  # characters of a reply in a message


def reply_line(reply: str) -> str:
    """Return one line about a reply: a server's error message in full, else the beginning of the body."""
    try:
        value = json.loads(reply)
    except (ValueError, RecursionError):
        value = None
    error = value.get("error", value) if isinstance(value, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    if isinstance(said, str):
        return " ".join(said.split())
    shown = " ".join(reply.split())
    return shown if len(shown) <= _TOLD else f"{shown[:_TOLD]} ... ({len(shown)} characters)"


class ServerLostError(EngineError):
    """The server is unavailable or stopped during the call; the versions that it held are lost."""


class RefusedError(EngineError):
    """The server replied with an error status.

    Args:
        message: The message of the error.
        status: HTTP status of the reply.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Reply(NamedTuple):
    status: int
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", errors="replace")


class _TooLateError(Exception):
    """The deadline of a call has passed."""


class _UnusableError(Exception):
    """The server's reply has the wrong format."""


class HTTPClient:
    """A thread-safe client of one server.

    Args:
        url: Address of the server, without a path.
        timeout: Seconds for each call, from the first byte sent to the last byte of the reply.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout

    def get(self, path: str) -> Any:
        """Return the JSON reply to a GET request."""
        return self._json(path, self._call("GET", path))

    def post(self, path: str, body: dict[str, Any] | None = None) -> str:
        """Return the text of the reply to a POST request."""
        return self._call("POST", path, body).text

    def post_json(self, path: str, body: dict[str, Any]) -> Any:
        """Return the JSON reply to a POST request."""
        return self._json(path, self._call("POST", path, body))

    def is_healthy(self) -> bool:
        """Return whether the server reports that it is healthy."""
        try:
            return self._send("GET", "/health", None, min(_HEALTH_TIMEOUT, self.timeout)).status == 200
        except (OSError, http.client.HTTPException, _TooLateError, _UnusableError):
            return False  # no valid reply means unhealthy

    def wait_until_healthy(self, seconds: float) -> bool:
        """Wait up to some seconds for the server, and return whether it became healthy."""
        end = time.monotonic() + seconds
        while not self.is_healthy():
            if time.monotonic() >= end:
                return False
            time.sleep(min(_POLL, max(end - time.monotonic(), 0.0)))
        return True

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> _Reply:
        place = without_passwords(f"{method} {self.url}{path}")
        try:
            reply = self._send(method, path, body, self.timeout)
        except _TooLateError as error:
            raise EngineError(
                f"{place}: no answer within timeout={self.timeout:g} seconds. See the server's log; if it works but is "
                "slow, raise the timeout, or ask for fewer or shorter completions."
            ) from error
        except (OSError, http.client.IncompleteRead) as error:
            raise ServerLostError(f"{place}: the server is not there, or went away while it answered.") from error
        except (http.client.HTTPException, _UnusableError) as error:
            raise EngineError(
                f"{place}: {error or type(error).__name__}: is another program at this address?"
            ) from error
        if reply.status == 200:
            return reply
        said = reply_line(reply.text)
        # vLLM replies 500 when its engine is dead, and then exits.
        if reply.status >= 500 and not self.is_healthy():
            raise ServerLostError(f"{place}: status {reply.status}, and the server can work no more: {said}")
        raise RefusedError(f"{place}: status {reply.status}: {said}", reply.status)

    def _send(self, method: str, path: str, body: dict[str, Any] | None, timeout: float) -> _Reply:
        """Send a request and read the reply, without proxies, redirects or compression.

        Raises:
            OSError: The connection cannot be made, or breaks.
            HTTPException: The reply is not HTTP, or ends early.
            _TooLateError: The deadline has passed.
            _UnusableError: The reply is a redirect, compressed or too long.
        """
        address = urlsplit(self.url)
        make = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        headers = {"Accept-Encoding": "identity", "Connection": "close"}
        if address.username is not None:
            user = f"{unquote(address.username)}:{unquote(address.password or '')}"
            headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        content = None if body is None else json.dumps(body).encode()
        if content is not None:
            headers["Content-Type"] = "application/json"
        connection = make(address.hostname or "", address.port, timeout=timeout)
        with _Deadline(timeout).of(connection):
            connection.request(method, path, body=content, headers=headers)
            response = connection.getresponse()
            if 300 <= response.status < 400:
                target = without_passwords(str(response.getheader("Location")))[:_TOLD]
                raise _UnusableError(f"status {response.status} leads to {target!r}, and redirects are not followed")
            coding = response.getheader("Content-Encoding", "identity")
            if coding != "identity":
                raise _UnusableError(f"the reply is compressed ({coding[:_TOLD]}), which was not asked for")
            return _Reply(response.status, _content(response))

    def _json(self, path: str, reply: _Reply) -> Any:
        try:
            return json.loads(reply.content)
        except (ValueError, RecursionError) as error:
            raise EngineError(
                f"{without_passwords(self.url)}{path}: the reply is not JSON ({reply.text[:100]!r}): is another "
                "program at this address?"
            ) from error


@dataclass
class _Deadline:
    """A limit on the whole call; a socket's own timeout would start again with each byte received."""

    seconds: float
    has_passed: bool = False

    @contextmanager
    def of(self, connection: http.client.HTTPConnection) -> Iterator[None]:
        """Run a call over a connection.

        Raises:
            _TooLateError: The deadline has passed.
        """
        connection.connect()
        opened = connection.sock

        def end() -> None:
            self.has_passed = True
            with suppress(OSError):  # already closed
                opened.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self.seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            if self.has_passed or isinstance(error, TimeoutError):
                raise _TooLateError from error
            raise
        finally:
            timer.cancel()
            connection.close()


def _content(response: http.client.HTTPResponse) -> bytes:
    content = bytearray()
    while part := response.read(_PART):
        content += part
        if len(content) > _LONGEST_REPLY:
            raise _UnusableError(f"the reply has more than {_LONGEST_REPLY:,} bytes")
    if response.length:
        raise http.client.IncompleteRead(bytes(content[:_TOLD]), response.length)
    return bytes(content)
