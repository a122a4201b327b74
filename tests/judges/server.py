"""A judge on this machine that speaks OpenAI's protocol and decides by a rule, with switches for what goes wrong."""

import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PART = r"\[Beginning of the {0}\]\n(.*?)\n\[End of the {0}\]"
POLITE = re.compile(r"\b(please|thanks?|glad|happy|sorry|appreciate|kindly|would)\b", re.IGNORECASE)


def part(name, message):
    found = re.search(PART.format(name), message, re.DOTALL)
    return None if found is None else found[1]


def longer(message):
    """The verdict, or the score from 1 to 10, of the longer answer."""
    return by(len, message, lambda length: min(10, 1 + length // 20))


def polite(message):
    return by(lambda text: len(POLITE.findall(text)), message, lambda count: 10 if count else 1)


def by(worth, message, grade):
    if (answer := part("answer", message)) is not None:
        return {"score": grade(worth(answer))}
    a, b = (worth(part(f"answer of {name}", message)) for name in "AB")
    if '"A>>B"' in message:
        return {"verdict": "A=B" if a == b else ("A>" if a > b else "B>") + (">" * (abs(a - b) > 100)) + "AB"[a > b]}
    return {"verdict": "tie" if a == b else "A" if a > b else "B"}


class JudgeServer:
    """Replies by ``rule``, a function of the first user's message that returns a mapping (sent as JSON) or a text."""

    def __init__(self, rule, **switches):
        self.rule, self.log, self.headers, self.statuses = rule, [], [], []
        self.knows_schema, self.usage, self.delay, self.model = True, True, 0.0, "judge-1"
        self.bodies = []  # raw replies in place of completions, used up one by one
        self.retry_after = None
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        for name, value in switches.items():
            assert name in vars(self), name
            setattr(self, name, value)

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.send(self, 200, {"data": [{"id": "judge", "root": "/models/judge"}]})

            def do_POST(self):
                server.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # clients that gave up, which tests ask for

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler, body):
        with self.counted():
            self.log.append(body)
            self.headers.append(dict(handler.headers))
            time.sleep(self.delay)
            if self.statuses and (status := self.statuses.pop(0)) != 200:
                if status == "hang up":
                    handler.close_connection = True
                    return
                if status == "late":
                    time.sleep(1.0)
                    handler.close_connection = True
                    return
                code, said = status if isinstance(status, tuple) else (status, "try later")
                self.send(handler, code, {"error": {"message": said, "code": said}})
                return
            if "response_format" in body and not self.knows_schema:
                self.send(handler, 400, {"error": {"message": "unknown field response_format"}})
                return
            if self.bodies:
                self.send(handler, 200, self.bodies.pop(0))
                return
            self.send(handler, 200, self.completion(body))

    def completion(self, body):
        verdict = self.rule(next(each["content"] for each in body["messages"] if each["role"] == "user"))
        content = verdict if isinstance(verdict, str) else json.dumps({"reason": "by the rule", **verdict})
        words = sum(len(each["content"].split()) for each in body["messages"])
        usage = {"prompt_tokens": words, "completion_tokens": 7} if self.usage else None
        choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        return {"model": self.model, "choices": [choice], "usage": usage}

    @contextmanager
    def counted(self):
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1

    def send(self, handler, status, reply):
        content = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        if self.retry_after is not None and status == 429:
            handler.send_header("Retry-After", self.retry_after)
        handler.end_headers()
        handler.wfile.write(content)
