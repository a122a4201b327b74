"""Whole online runs that sample from a server on this machine."""

import json
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from falign.errors import ConfigError, EngineError
from falign.training import parse_run, train
from tests.rollouts.loopback import Loopback
from tests.training.prompts import online_data, write_prompts

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    # PEFT 0.21 reads an attribute that Transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture
def server(tiny):
    server = Loopback(tiny).start()
    yield server
    server.stop()


@pytest.fixture
def start(server, tiny, tmp_path):
    data = write_prompts(tmp_path / "prompts.jsonl")

    def run(name="run", resume=False, console=None, engine=(), rollout=(), **changes):
        engine = {"kind": "vllm", "url": server.url, "shared_dir": str(tmp_path / "shared"), "wait": 30, **dict(engine)}
        changes["training"] = {"max_steps": 3, **changes.get("training", {})}
        config = parse_run(
            online_data(tiny, data, tmp_path / name, rollout={"engine": engine, **dict(rollout)}, **changes)
        )
        return train(config, console=console or Console(quiet=True), resume=resume)

    return run


def adapter(summary):
    return load_file(summary.folder.adapter / "adapter_model.safetensors")


def training_logs(summary):
    return [log for log in summary.folder.metrics() if "loss" in log]


def same(one, other):
    return all(torch.equal(value, adapter(other)[name]) for name, value in adapter(one).items())


def test_a_run_samples_every_version_from_the_server_and_leaves_it_as_it_was(start, server, tmp_path):
    told = Console(record=True, width=300)
    summary = start(console=told, training={"max_steps": 10})
    assert summary.after["reward"] > summary.before["reward"]
    for log in training_logs(summary):
        assert log["sampler/logprob_gap"] < 1e-5
        assert log["sampler/ratio_outside"] == 0
    names = [load["lora_name"] for load in server.calls("/v1/load_lora_adapter")]
    # The trial, the evaluations before and after, and one for each step.
    assert [name.rpartition("-v")[2] for name in names] == ["-1000000001", "-1", *map(str, range(10)), "-11"]
    assert server.adapters == {}
    assert not any((tmp_path / "shared").iterdir())
    assert "rollouts: http://127.0.0.1" in told.export_text()


def test_a_server_that_is_killed_in_the_run_and_started_anew_changes_nothing(start, server):
    whole = start("whole")
    server.change(die_after=server.asked + 30)
    thread = server.restart_in(4.0)
    broken = start("broken")
    thread.join()
    assert server.starts == 2
    assert same(whole, broken)
    assert broken.after == whole.after


def test_a_run_whose_server_stays_away_ends_with_a_checkpoint_from_which_it_equals_one_that_did_not(start, server):
    whole = start("whole", training={"max_steps": 4})
    served = len(server.calls("/v1/completions")) // 2
    server.change(die_after=server.asked + served)
    with pytest.raises(EngineError, match="--resume"):
        start("broken", training={"max_steps": 4}, engine={"wait": 0.5})
    server.stop()
    server.start()
    resumed = start("broken", training={"max_steps": 4}, resume=True)
    assert same(whole, resumed)
    assert resumed.after == whole.after
    rows = [summary.folder.completions_file.read_text(encoding="utf-8") for summary in (whole, resumed)]
    assert rows[0] == rows[1]


def test_weights_that_go_wrong_on_the_way_end_the_run_before_it_learns_from_them(start, server, tmp_path):
    # The canary is answered by the version itself, and all later requests by the one before.
    def stale(reply):
        for choice in reply["choices"] if len(server.calls("/v1/load_lora_adapter")) > 3 else ():
            choice["logprobs"]["token_logprobs"] = [value - 0.02 for value in choice["logprobs"]["token_logprobs"]]
        return reply

    server.change(change_reply=stale)
    with pytest.raises(EngineError, match=r"is allowed"):
        start()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [log["step"] for log in metrics if "loss" in log] == [1]


def test_the_bound_of_the_gap_can_be_set_and_holds_for_every_step(start, server):
    server.change(change_reply=lambda reply: (time.sleep(0), reply)[1])
    with pytest.raises(ConfigError, match=r"1e-09 is allowed"):
        start(engine={"max_gap": 1e-9})


def test_a_correction_is_counted_and_needs_a_policy_gradient(start):
    objective = {"kind": "policy_gradient", "advantage": "leave_one_out"}
    summary = start(objective=objective, rollout={"correction": {"cap": 1.2}, "temperature": 1.3})
    for log in training_logs(summary):
        assert 0 < log["sampler/truncated"] < 1
        assert log["importance_weight"] <= 1.2 + 1e-6
    with pytest.raises(ConfigError, match=r"rollout.correction weights policy gradients"):
        start("pairs", objective={"kind": "pairwise", "beta": 0.1}, rollout={"correction": {"cap": 2.0}})


def test_full_fine_tuning_runs_from_the_server_too(start, server, tiny):
    summary = start(adapter=None, training={"learning_rate": 1e-3})
    assert all(log["sampler/logprob_gap"] < 1e-5 for log in training_logs(summary))
    assert not server.calls("/v1/load_lora_adapter")
    assert len(server.calls("/collective_rpc")) == 1 + 1 + 3 + 1 + 1  # trial, before, steps, after, and back
