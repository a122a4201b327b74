"""A server on this machine that speaks the requests of an upload to the Hub, and keeps what it was sent."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN, READER = "hf_" + "w" * 30, "hf_" + "r" * 30
SMALL = 4096
"""Files up to this size are sent in the commit, larger ones by LFS."""


class Hub:
    def __init__(self):
        self.repositories, self.files, self.large, self.requests = {}, {}, {}, []


@contextmanager
def hub():
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, body, status=200):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def body(self):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def refused(self):
            token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
            state.requests.append((self.command, self.path, token))
            if token not in (TOKEN, READER):
                self.body()
                self.answer({"error": "Invalid credentials"}, 401)
                return True
            return False

        def do_GET(self):
            if self.refused():
                return
            if self.path != "/api/whoami-v2":
                name = self.path.removeprefix("/api/models/")
                known = name in state.repositories
                self.answer({"id": name} if known else {"error": "Repository not found"}, 200 if known else 404)
                return
            role = "read" if READER in self.headers["authorization"] else "write"
            orgs = [{"name": "lab"}, {"name": "closed"}]
            self.answer({"name": "ann", "orgs": orgs, "auth": {"accessToken": {"role": role}}})

        def do_PUT(self):
            state.large[self.path.rpartition("/")[2]] = self.body()
            self.answer({})

        def do_POST(self):
            if self.refused():
                return
            place = f"http://{self.headers['Host']}"
            if self.path == "/api/repos/create":
                asked = json.loads(self.body())
                owner = asked.get("organization") or "ann"
                if owner == "closed":
                    self.answer({"error": "You don't have the rights to create a model under closed"}, 403)
                    return
                name = f"{owner}/{asked['name']}"
                if name in state.repositories:
                    self.answer({"error": "You already created this model repo", "url": f"{place}/{name}"}, 409)
                    return
                state.repositories[name] = asked
                self.answer({"url": f"{place}/{name}", "name": name, "id": name})
            elif self.path == "/api/validate-yaml":
                json.loads(self.body())
                self.answer({"warnings": [], "errors": []})
            elif "/preupload/" in self.path:
                files = json.loads(self.body())["files"]
                mode = {file["path"]: "lfs" if file["size"] > SMALL else "regular" for file in files}
                self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in mode.items()]})
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(self.body())["objects"]
                self.answer(
                    {
                        "transfer": "basic",
                        "objects": [
                            {**each, "actions": {"upload": {"href": f"{place}/store/{each['oid']}", "header": {}}}}
                            for each in objects
                        ],
                    }
                )
            elif "/commit/" in self.path:
                name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
                for line in self.body().splitlines():
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "file":
                        state.files[name, value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "lfsFile":
                        state.files[name, value["path"]] = state.large[value["oid"]]
                self.answer({"commitUrl": f"{place}/{name}/commit/abc", "commitOid": "a" * 40, "success": True})
            else:
                self.body()
                self.answer({"error": f"unknown: {self.path}"}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
