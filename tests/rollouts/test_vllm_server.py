"""The engine against a real vLLM server with SmolLM2-135M in float32; a few minutes and 4 GiB."""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from falign.errors import ConfigError
from falign.models import add_lora, load_model, load_tokenizer
from falign.rollouts import PromptScorer, SamplingParams, VLLMEngine, shake_hands
from falign.rollouts.gap import measure_gap
from falign.rollouts.vllm_client import HTTPClient
from tests.models.tiny import fill_adapter

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "vllm_server.sh"
VENV = Path(os.environ.get("VENV", ROOT / ".venv-vllm"))
WAIT = 600.0
PARAMS = SamplingParams(max_new_tokens=24)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.skipif(
        not (VENV / "bin" / "python").exists(),
        reason=f"{VENV} is not there: scripts/vllm_server.sh install makes it (3 GB, some minutes)",
    ),
]


class Server:
    """A vLLM server in a process group of its own."""

    def __init__(self, model, log, rank=8):
        self.model, self.log, self.rank, self.process = model, log, rank, None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self):
        environment = {**os.environ, "PORT": str(self.port), "MAX_LORA_RANK": str(self.rank), "VENV": str(VENV)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(SCRIPT), str(self.model), "--block-size", "32"],
                env={**environment, "HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def resident_mib(self):
        """Of all processes of the group."""
        rows = subprocess.run(["ps", "-eo", "pgid=,rss="], capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        return sum(int(row.split()[1]) for row in rows if row and int(row.split()[0]) == self.process.pid) / 1024


@pytest.fixture(scope="module")
def server(served_folder):
    server = Server(served_folder, served_folder.parent / "server.log")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def connect(server, tmp_path):
    engines = []

    def make(**options):
        options = {"timeout": WAIT, "wait": WAIT, **options}
        engines.append(VLLMEngine(server.url, shared_dir=tmp_path / "shared", vocabulary=49152, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
        assert not engine.folder.exists()


@pytest.fixture(scope="module")
def tokenizer(served_folder):
    return load_tokenizer(str(served_folder))


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """One of them longer than several blocks of the server's cache."""
    texts = ["The capital of France is", "Water boils at " + "a hundred degrees, and " * 30]
    return [tokenizer(text)["input_ids"] for text in texts]


def policy_of(served_folder, seed=1):
    return fill_adapter(add_lora(load_model(str(served_folder), dtype="float32"), r=8, alpha=16, seed=0), seed, 0.02)


def test_logprobs_are_those_of_the_base_and_of_three_versions(connect, served_folder, prompts):
    engine, policy = connect(), policy_of(served_folder)
    fill_adapter(policy, scale=0.0)
    for version, scale in enumerate((0.0, 0.02, 0.02, 0.02)):
        fill_adapter(policy, seed=version, scale=scale)
        engine.publish(policy, version)
        for params in (PARAMS, SamplingParams(24, temperature=0.7, top_k=50, top_p=0.9)):
            rollouts = engine.sample(prompts, 2, params, version=version, seed=version)
            assert measure_gap(policy, rollouts, params).max < 1e-3
    with policy.disable_adapter():
        assert measure_gap(policy, rollouts, params).mean > 1e-2


def test_the_handshake_agrees(connect, served_folder, prompts, tokenizer):
    policy = policy_of(served_folder)
    found = shake_hands(
        connect(),
        policy,
        encode=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        prompt_ids=prompts,
        params=SamplingParams(64, temperature=0.8),
        longest=500,
    )
    assert (found.sync, found.dtype, found.bound) == ("adapter", "float32", 1e-3)
    assert found.gap.max < 1e-3


def test_a_seed_repeats_a_call_and_stop_tokens_end_a_completion(connect, served_folder, prompts):
    engine, policy = connect(), policy_of(served_folder)
    engine.publish(policy, 0)
    stops = frozenset({28, 30, 253})  # a comma, a full stop, " the"
    params = SamplingParams(40, stop_token_ids=stops)
    rollouts = engine.sample(prompts, 4, params, version=0, seed=5)
    assert [r.completion_ids for r in engine.sample(prompts, 4, params, version=0, seed=5)] == [
        r.completion_ids for r in rollouts
    ]
    assert "stop" in {rollout.finish_reason for rollout in rollouts}
    for rollout in rollouts:
        assert not stops & set(rollout.completion_ids[:-1])
        assert (rollout.completion_ids[-1] in stops) == (rollout.finish_reason == "stop")


def test_two_versions_in_flight_are_both_exact(connect, served_folder, prompts):
    engine, old, new = connect(), policy_of(served_folder, 1), policy_of(served_folder, 2)
    engine.publish(old, 1)
    found = {}
    params = SamplingParams(96)
    thread = threading.Thread(target=lambda: found.update(old=engine.sample(prompts, 2, params, version=1, seed=0)))
    thread.start()
    time.sleep(1.0)
    engine.publish(new, 2)
    engine.retire(1)  # its requests finish
    found["new"] = engine.sample(prompts, 2, params, version=2, seed=0)
    thread.join()
    assert measure_gap(old, found["old"], params).max < 1e-3
    assert measure_gap(new, found["new"], params).max < 1e-3


def test_twenty_versions_come_and_go_without_growth_of_memory(connect, served_folder, prompts, server):
    engine, policy = connect(), policy_of(served_folder)
    short, sizes = SamplingParams(2), []
    for version in range(20):
        engine.publish(fill_adapter(policy, seed=version, scale=0.02), version)
        engine.sample(prompts[:1], 1, short, version=version, seed=0)
        engine.retire(version)
        sizes.append(server.resident_mib())
    assert max(sizes[10:]) < max(sizes[:10]) + 50  # an adapter has 10 MiB
    assert [card["id"] for card in HTTPClient(server.url, timeout=WAIT).get("/v1/models")["data"]] == ["base"]


def test_whole_weights_are_exact_after_each_reload_and_the_base_comes_back(connect, served_folder, prompts):
    engine, policy = connect(sync="merged"), policy_of(served_folder)
    for version in (1, 2):
        fill_adapter(policy, seed=version, scale=0.02)
        engine.publish(policy, version)
        rollouts = engine.sample(prompts, 2, PARAMS, version=version, seed=0)
        assert measure_gap(policy, rollouts, PARAMS).max < 1e-3  # the long prompt's cache is not the last version's
    engine.close()
    again = connect()
    again.publish(policy, 0)
    assert measure_gap(policy, again.sample(prompts, 2, PARAMS, version=0, seed=0), PARAMS).max < 1e-3


def test_a_server_killed_half_way_and_started_anew_loses_nothing(connect, served_folder, prompts, server):
    engine, policy = connect(), policy_of(served_folder)
    engine.publish(policy, 0)
    params = SamplingParams(200)
    killed = threading.Timer(3.0, lambda: (server.kill(), server.start()))
    killed.start()
    rollouts = engine.sample(prompts, 4, params, version=0, seed=0)
    killed.join()
    assert measure_gap(policy, rollouts, params).max < 1e-3
    assert len(rollouts) == 8


@pytest.mark.parametrize("ahead", [False, True])
def test_an_online_run_goes_on_after_kill_9(demo, served_folder, server, tmp_path, ahead):
    from rich.console import Console

    from falign.runfile import parse_run
    from falign.training import train
    from tests.training.prompts import online_data, write_prompts

    data = write_prompts(tmp_path / "prompts.jsonl", n=8)
    run = online_data(
        served_folder,
        data,
        tmp_path / "run",
        adapter={"r": 8, "alpha": 16},
        prompts={"eval_size": 2},
        rollout={
            "prompts": 2,
            "completions": 2,
            "max_new_tokens": 32,
            "ahead": ahead,
            "engine": {"kind": "vllm", "url": server.url, "shared_dir": str(tmp_path / "shared"), "wait": WAIT},
            "evaluation": {"completions": 2},
        },
        training={"max_steps": 4, "learning_rate": 1e-3},
    )
    killed = threading.Thread(target=lambda: kill_in_the_run(tmp_path / "run", server))
    killed.start()
    summary = train(parse_run(run), console=Console(quiet=True))
    killed.join()
    logs = [log for log in summary.folder.metrics() if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    on_policy = logs[:1] if ahead else logs
    assert all(log["sampler/logprob_gap"] < 1e-3 for log in on_policy)
    if ahead:
        assert [log["sampler/staleness"] for log in logs] == [0, 1, 1, 1]
    shutil.rmtree(tmp_path / "shared")


def kill_in_the_run(folder, server):
    metrics = folder / "metrics.jsonl"
    while not (metrics.is_file() and '"loss"' in metrics.read_text()):  # after the first step
        time.sleep(0.2)
    server.kill()
    server.start()


def test_a_server_with_adapters_is_refused_as_a_scorer(server, connect):
    connect()
    with pytest.raises(ConfigError, match="serves adapters"):
        PromptScorer(server.url, timeout=WAIT, wait=WAIT)
