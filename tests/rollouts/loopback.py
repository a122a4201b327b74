"""A server on this machine that speaks vLLM's endpoints over a real tiny model, with switches for what goes wrong.

What vLLM 0.32 was seen to do is imitated: an adapter that is loaded in place is read again at every request, the keys
and values of older weights stay in a cache until it is emptied, an engine that cannot read its adapter dies.
"""

import json
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from falign.models import add_lora, load_adapter, load_model
from falign.rollouts import SamplingParams, TransformersEngine
from tests.models.tiny import fill_adapter


@dataclass
class Switches:
    """What the server does otherwise than a sound one."""

    raw_logprobs: bool = False  # of the distribution before temperature, and says otherwise
    settings: dict = field(default_factory=dict)  # other answers to /server_info, by path
    without: frozenset = frozenset()  # endpoints that are not there
    delay: float = 0.0  # seconds before each completion
    fail: int = 0  # how many completions are answered by status 500, from a server that goes on
    garble: int = 0  # how many replies are no JSON
    truncate: int = 0  # how many replies end half-way
    hang_up: int = 0  # how many completions are answered by closing the connection
    die_after: int | None = None  # completions before the server dies as from kill -9
    forget_after: int | None = None  # completions before all adapters are lost in silence
    ignores_adapters: bool = False
    first_adapter_for_all: bool = False  # a cache by path or name that serves old weights for new ones
    keeps_cache: bool = False  # a reload whose cache is not emptied by /reset_prefix_cache
    changes_prompt: bool = False
    drops_choice: bool = False
    change_reply: object = None  # a function of the reply
    version: str = "0.32.0"


class Loopback:
    """A server that can be stopped, killed and started anew on its port."""

    def __init__(self, model_folder, *, max_rank=8, max_length=256, names=("base",), **switches):
        self.model_folder, self.max_rank, self.max_length = Path(model_folder), max_rank, max_length
        self.names = names  # of the base model
        self.switches = Switches(**switches)
        self.log = []  # method and path of each call, with the body
        self.port, self._server, self._thread = 0, None, None
        self.starts = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def calls(self, path):
        return [body for called, body in self.log if called == path]

    def start(self):
        self.starts += 1
        self.base = AutoModelForCausalLM.from_pretrained(self.model_folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_folder)
        self.cached = None  # weights whose keys and values are in the cache, where these are not the current ones
        self.adapters = {}
        self.dead = self.paused = False
        self.asked = 0
        self.lock = threading.Lock()
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                loopback.answer(self, None)

            def do_POST(self):
                length = int(self.headers.get("Content-Length", 0))
                loopback.answer(self, json.loads(self.rfile.read(length) or "{}"))

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                if not isinstance(sys.exc_info()[1], ConnectionError | ValueError):
                    super().handle_error(request, client_address)  # else the client went away, which tests ask for

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def stop(self):
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def restart_in(self, seconds):
        """Restart the server later, without its loaded versions."""

        def later():
            time.sleep(seconds)
            self.stop()
            self.start()

        thread = threading.Thread(target=later, daemon=True)
        thread.start()
        return thread

    def restart_unseen(self):
        """Lose all weights that were sent, as in a restart that is over before the next request."""
        with self.lock:
            self.starts += 1
            self.base = AutoModelForCausalLM.from_pretrained(self.model_folder).eval()
            self.adapters, self.cached = {}, None

    # -- endpoints

    def answer(self, handler, body):
        path = handler.path.partition("?")[0]
        self.log.append((path, body))
        if self.dead:
            hang_up(handler)
            return
        if path in self.switches.without:
            send(handler, 404, {"detail": "Not Found"})
            return
        status, reply = getattr(self, "on_" + path.strip("/").replace("/", "_"))(body)
        if status is None or (self.dead and status == 200):
            hang_up(handler)
            return
        truncated = garbled = False
        if path == "/v1/completions" and status == 200:
            truncated = self._use_up("truncate")
            garbled = self._use_up("garble")
        send(handler, status, reply, truncated=truncated, garbled=garbled)

    def on_health(self, body):
        return 200, ""

    def on_server_info(self, body):
        info = {
            "vllm_config": {
                "model_config": {
                    "model": str(self.model_folder),
                    "dtype": str(self.base.dtype),
                    "logprobs_mode": "processed_logprobs",
                    "max_model_len": self.max_length,
                },
                "lora_config": {"max_lora_rank": self.max_rank, "max_loras": 2, "max_cpu_loras": 8}
                if self.max_rank
                else None,
                "parallel_config": {"data_parallel_size": 1},
                "instance_id": str(self.starts),
            },
            "vllm_env": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": True},
        }
        for place, value in self.switches.settings.items():
            *outer, last = place.split(".")
            target = info
            for name in outer:
                target = target[name]
            target[last] = value
        return 200, info

    def on_v1_models(self, body):
        bases = ({"id": name, "parent": None} for name in self.names)
        cards = [*bases, *({"id": name, "parent": "base"} for name in self.adapters)]
        shared = {"root": str(self.model_folder), "max_model_len": self.max_length}
        return 200, {"data": [shared | card for card in cards]}

    def on_version(self, body):
        return 200, {"version": self.switches.version}

    def on_tokenize(self, body):
        return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}

    def on_detokenize(self, body):
        return 200, {"prompt": self.tokenizer.decode(body["tokens"])}

    def on_v1_load_lora_adapter(self, body):
        folder = Path(body["lora_path"])
        if body["lora_name"] in self.adapters and not body["load_inplace"]:
            return 400, {"error": {"message": f"The lora adapter {body['lora_name']} has already been loaded"}}
        if not (folder / "adapter_config.json").is_file():
            return 404, {"error": {"message": f"No adapter found for {folder}"}}
        again = bool(body["load_inplace"])
        with self.lock:
            first = next(iter(self.adapters.values()), None)
            stale = self.switches.first_adapter_for_all and first is not None
            model = first[0] if stale else self._adapted(folder)
            self.adapters[body["lora_name"]] = (model, folder, again)
        return 200, "Success"

    def on_v1_unload_lora_adapter(self, body):
        if self.adapters.pop(body["lora_name"], None) is None:
            return 404, {"error": {"message": f"The lora adapter {body['lora_name']} cannot be found."}}
        return 200, "Success"

    def on_pause(self, body):
        self.paused = True
        return 200, {"status": "paused"}

    def on_resume(self, body):
        self.paused = False
        return 200, {"status": "resumed"}

    def on_collective_rpc(self, body):
        assert self.paused, "weights were exchanged while requests may run"
        assert body["method"] == "reload_weights"
        with self.lock:
            self.cached = self.cached or self.base
            self.base = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
        return 200, {"results": [None]}

    def on_reset_prefix_cache(self, body):
        if not self.switches.keeps_cache:
            self.cached = None
        return 200, ""

    def on_v1_completions(self, body):
        time.sleep(self.switches.delay)
        with self.lock:
            self.asked += 1
            if self.switches.die_after is not None and self.asked > self.switches.die_after:
                self.switches.die_after, self.dead = None, True
            if self.switches.forget_after is not None and self.asked > self.switches.forget_after:
                self.switches.forget_after = None
                self.adapters.clear()
        if self.dead or self._use_up("hang_up"):
            return None, None
        if self._use_up("fail"):
            return 500, {"error": {"message": "Internal Server Error"}}
        if body["model"] not in (*self.names, *self.adapters):
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if (largest := max(map(max, body["prompt"]))) >= self.base.config.vocab_size:
            return 400, {"error": {"message": f"Token id {largest} is out of vocabulary"}}
        with self.lock:
            try:
                reply = self._scores(body) if "stop_token_ids" not in body else self._completions(body)
            except FileNotFoundError:
                self.dead = True
                return 500, {"error": {"message": "EngineCore encountered an issue (EngineDeadError)"}}
        if self.switches.change_reply is not None:
            reply = self.switches.change_reply(reply)
        return 200, reply

    # -- the model

    def _adapted(self, folder):
        if not folder.is_dir():
            raise FileNotFoundError(folder)
        base = AutoModelForCausalLM.from_pretrained(self.model_folder)
        return load_adapter(base, folder, trainable=False).eval()

    def _model(self, name):
        if name in self.names:
            return self.cached or self.base
        model, folder, again = self.adapters[name]
        if again:
            model = self._adapted(folder)
        return model.get_base_model() if self.switches.ignores_adapters else model

    def _completions(self, body):
        model = self._model(body["model"])
        params = SamplingParams(
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            top_k=body["top_k"],
            top_p=body["top_p"],
            stop_token_ids=frozenset(body["stop_token_ids"]),
        )
        without = self.switches.ignores_adapters and isinstance(self.adapters.get(body["model"], [0])[0], PeftModel)
        context = self.adapters[body["model"]][0].disable_adapter() if without else nothing()
        with torch.no_grad(), context:
            engine = TransformersEngine(model, pad_token_id=0)
            engine.publish(model, 0)
            rollouts = engine.sample(body["prompt"], body["n"], params, version=0, seed=body["seed"])
            choices = [self._choice(i, rollout, model, body) for i, rollout in enumerate(rollouts)]
        return {"model": body["model"], "choices": choices[1:] if self.switches.drops_choice else choices}

    def _scores(self, body):
        """Answer a request for log-probabilities of the prompt, each token's beside that of the likeliest one."""
        choices = []
        for index, ids in enumerate(body["prompt"]):
            with torch.no_grad():
                rows = self._model(body["model"])(torch.tensor([ids])).logits[0].log_softmax(-1).tolist()
            scores = [
                {str(other): {"logprob": row[other], "rank": 1} for other in (row.index(max(row)), token)}
                for row, token in zip(rows, ids[1:], strict=False)
            ]
            sent = [0, *ids] if self.switches.changes_prompt else ids
            choices.append({"index": index, "prompt_token_ids": sent, "prompt_logprobs": [None, *scores]})
        return {"model": body["model"], "choices": choices[1:] if self.switches.drops_choice else choices}

    def _choice(self, index, rollout, model, body):
        logprobs = list(rollout.logprobs)
        if self.switches.raw_logprobs or body["temperature"] == 0:
            ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
            rows = model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
            logprobs = rows.gather(-1, torch.tensor(rollout.completion_ids)[:, None])[:, 0].tolist()
        prompt_ids = list(rollout.prompt_ids)
        return {
            "index": index,
            "finish_reason": rollout.finish_reason,
            "token_ids": list(rollout.completion_ids),
            "prompt_token_ids": [0, *prompt_ids] if self.switches.changes_prompt else prompt_ids,
            "logprobs": {"token_logprobs": logprobs},
        }

    def _use_up(self, name):
        left = getattr(self.switches, name)
        setattr(self.switches, name, max(left - 1, 0))
        return left > 0

    def change(self, **switches):
        self.switches = replace(self.switches, **switches)


@contextmanager
def nothing():
    yield


def send(handler, status, reply, *, truncated=False, garbled=False):
    content = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
    content = b"<html>" + content if garbled else content
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2] if truncated else content)


def hang_up(handler):
    handler.close_connection = True
    handler.connection.close()


def policy_of(server, seed=5):
    model = add_lora(load_model(server.model_folder, dtype="float32"), r=4, alpha=8, seed=0)
    return fill_adapter(model, seed=seed, scale=0.3)
