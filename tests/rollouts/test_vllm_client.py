"""The client against servers that answer anything: raw bytes, one after the other."""

import gzip
import re
import socket
import threading
import time

import pytest

from falign.errors import EngineError
from falign.rollouts import vllm_client
from falign.rollouts.vllm_client import HTTPClient, RefusedError, ServerLostError


@pytest.fixture
def answering():
    """Return the address of a server that sends parts of bytes with a pause after each, and what it was sent."""
    sockets, received = [], []

    def start(parts, pause=0.0):
        listening = socket.create_server(("127.0.0.1", 0))
        sockets.append(listening)

        def serve():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    try:
                        request = connection.recv(65536)
                        head = request.partition(b"\r\n\r\n")[0]
                        length = re.search(rb"Content-Length: (\d+)", head)
                        whole = len(head) + 4 + int(length[1] if length else 0)
                        while len(request) < whole:
                            request += connection.recv(65536)
                        received.append(request)
                        for part in parts:
                            connection.sendall(part)
                            time.sleep(pause)
                    except OSError:
                        pass

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}", received

    yield start
    for each in sockets:
        each.close()


def reply(content, *headers, status="200 OK", length=None):
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content) if length is None else length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + content


def single(content):
    return [content[i : i + 1] for i in range(len(content))]


@pytest.mark.parametrize("part", ["headers", "body", "chunks", "nothing"])
def test_the_timeout_is_of_the_whole_call_however_often_a_byte_comes(answering, part):
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    parts = {
        "headers": single(reply(b"{}", *["X-Filler: y"] * 100)),
        "body": [reply(b"", length=1000), *single(b"x" * 1000)],
        "chunks": [chunked, *[b"1\r\nx\r\n"] * 1000],
        "nothing": [b""] * 1000,
    }[part]
    url, _ = answering(parts, pause=0.05)
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"GET http://.*/x: no answer within timeout=0.5 seconds"):
        HTTPClient(url, timeout=0.5).get("/x")
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/", "http://127.0.0.1:1/", "gopher://x"])
def test_no_redirect_is_followed(answering, target):
    url, received = answering([reply(b"", f"Location: {target}", status="302 Found")])
    with pytest.raises(EngineError, match=r"status 302 leads to .* redirects are not followed") as caught:
        HTTPClient(url, timeout=5.0).get("/x")
    assert target in str(caught.value)
    assert len(received) == 1
    assert not HTTPClient(url, timeout=5.0).is_healthy()


@pytest.mark.parametrize("content", [b"[" * 100_000, b"not json", b"", b"\xff\xfe", b"9" * 5000])
def test_what_is_no_json_is_told(answering, content):
    url, _ = answering([reply(content)])
    with pytest.raises(EngineError, match="the reply is not JSON"):
        HTTPClient(url, timeout=5.0).get("/x")


def test_a_compressed_reply_is_not_taken_apart(answering):
    for content in (gzip.compress(b"{}"), b"\x1f\x8b broken"):
        url, received = answering([reply(content, "Content-Encoding: gzip")])
        with pytest.raises(EngineError, match=r"the reply is compressed \(gzip\), which was not asked for"):
            HTTPClient(url, timeout=5.0).get("/x")
        assert b"Accept-Encoding: identity" in received[-1]


def test_a_reply_without_end_is_left(answering, monkeypatch):
    monkeypatch.setattr(vllm_client, "_LONGEST_REPLY", 10_000)
    monkeypatch.setattr(vllm_client, "_PART", 1000)
    url, _ = answering([reply(b"x" * 20_000)])
    with pytest.raises(EngineError, match="the reply has more than 10,000 bytes"):
        HTTPClient(url, timeout=5.0).get("/x")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"])
def test_a_server_that_goes_away_is_lost(answering, answer):
    url, _ = answering([answer])
    with pytest.raises(ServerLostError, match="went away while it answered"):
        HTTPClient(url, timeout=5.0).get("/x")


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n"])
def test_another_program_at_the_address_is_told(answering, answer):
    url, _ = answering([answer])
    with pytest.raises(EngineError, match="is another program at this address"):
        HTTPClient(url, timeout=5.0).get("/x")


def test_what_is_sent_and_what_comes_back(answering):
    url, received = answering([reply(b'{"a": [1, 2]}')])
    client = HTTPClient(url.replace("://", "://me:s%40cret@"), timeout=5.0)
    assert client.post_json("/v1/x", {"b": "ä"}) == {"a": [1, 2]}
    sent = received[0]
    assert sent.startswith(b"POST /v1/x HTTP/1.1\r\n")
    assert b"Authorization: Basic bWU6c0BjcmV0" in sent
    assert sent.endswith(b'{"b": "\\u00e4"}')
    assert client.post("/v1/x") == '{"a": [1, 2]}'
    assert client.is_healthy()


def test_a_refusal_has_its_status_and_no_password(answering):
    url, _ = answering([reply(b"no such\n adapter", status="404 Not Found")])
    with pytest.raises(RefusedError, match="status 404: no such adapter") as caught:
        HTTPClient(url.replace("://", "://me:secret@"), timeout=5.0).get("/x")
    assert caught.value.status == 404
    assert "secret" not in str(caught.value)
