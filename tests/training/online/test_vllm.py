"""Whole online runs that sample from a server on this machine."""

import json
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from falign.errors import ConfigError, EngineError
from falign.runfile import parse_run
from falign.training import train
from falign.training.online.trainer import OnlineTrainer
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
    with pytest.raises(EngineError, match="start or resume the run"):
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
    with pytest.raises(ConfigError, match=r"rollout.correction bounds importance weights"):
        start("pairs", objective={"kind": "pairwise", "beta": 0.1}, rollout={"correction": {"cap": 2.0}})


def test_full_fine_tuning_runs_from_the_server_too(start, server, tiny):
    summary = start(adapter=None, training={"learning_rate": 1e-3})
    assert all(log["sampler/logprob_gap"] < 1e-5 for log in training_logs(summary))
    assert not server.calls("/v1/load_lora_adapter")
    assert len(server.calls("/collective_rpc")) == 1 + 1 + 3 + 1 + 1  # trial, before, steps, after, and back


AHEAD = {"objective": {"kind": "policy_gradient", "advantage": "leave_one_out"}, "training": {"max_steps": 6}}


def ahead(start, name, training=(), rollout=(), **options):
    training = {**AHEAD["training"], **dict(training)}
    rollout = {"ahead": True, "updates": 2, **dict(rollout)}
    return start(name, objective=AHEAD["objective"], training=training, rollout=rollout, **options)


def test_a_rollout_is_drawn_ahead_from_weights_that_are_one_rollout_old_and_weighted_for_that(start, server):
    summary = ahead(start, "run", training={"learning_rate": 3e-2, "logging_steps": 1})
    logs = training_logs(summary)
    first = [log for log in logs if "sampler/staleness" in log]
    assert [log["sampler/staleness"] for log in first] == [0, 2, 2]
    assert first[0]["sampler/logprob_gap"] < 1e-5
    assert all(log["sampler/logprob_gap"] > 1e-3 for log in first[1:])
    # Weights are to the law that sampled, which the policy has left by now.
    assert first[0]["importance_weight"] == pytest.approx(1, abs=1e-5)
    assert all(abs(log["importance_weight"] - 1) > 1e-4 for log in first[1:])
    # Versions 0 and 1 are published before the first update on rollout 0, 2 before that on rollout 1, and no fourth.
    loads = [load["lora_name"].rpartition("-v")[2] for load in server.calls("/v1/load_lora_adapter")]
    assert loads == ["-1000000001", "-1", "0", "1", "2", "-7"]
    assert server.adapters == {}


def test_sampling_goes_on_while_the_policy_learns(start, server, monkeypatch):
    seen = []
    server.change(delay=0.3)
    step = OnlineTrainer.training_step

    def watched(self, *args, **kwargs):
        seen.append(self.source.ahead.is_underway)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(OnlineTrainer, "training_step", watched)
    ahead(start, "run", training={"max_steps": 4})
    assert any(seen[:2])
    assert not any(seen[2:]), "nothing is drawn that no step would learn from"


def test_the_correction_bounds_the_weights_of_what_was_drawn_ahead(start):
    summary = ahead(start, "run", training={"learning_rate": 3e-2}, rollout={"correction": {"cap": 1.05}})
    assert any(log.get("sampler/truncated", 0) > 0 for log in training_logs(summary))
    assert all(log["importance_weight"] < 1.05 + 1e-6 for log in training_logs(summary) if "sampler/truncated" in log)


@pytest.mark.parametrize("save_steps", [1, 2])
def test_a_run_that_draws_ahead_goes_on_from_a_checkpoint_bit_for_bit(start, save_steps, tmp_path, monkeypatch):
    training = {"save_steps": save_steps, "learning_rate": 1e-2, "logging_steps": 1}
    whole = ahead(start, "whole", training=training)
    real = OnlineTrainer.training_step

    def stopped(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(OnlineTrainer, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            ahead(start, "broken", training=training)
    resumed = ahead(start, "broken", training=training, resume=True)
    assert same(whole, resumed)
    assert resumed.after == whole.after
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
    logs = [
        [{k: v for k, v in log.items() if k not in timed} for log in summary.folder.metrics()]
        for summary in (whole, resumed)
    ]
    assert logs[0] == logs[1]
    rows = [summary.folder.completions_file.read_text(encoding="utf-8") for summary in (whole, resumed)]
    assert rows[0] == rows[1]


def asked_until_ahead(server):
    """Completions that a run asks for before the first ones that it draws ahead."""
    models = [call["model"] for call in server.calls("/v1/completions")]
    return next(i for i, name in enumerate(models) if name.endswith("-v1"))


def test_a_server_that_goes_away_while_it_samples_ahead_costs_nothing(start, server):
    whole = ahead(start, "whole")
    server.change(die_after=server.asked + asked_until_ahead(server) + 4)
    thread = server.restart_in(2.0)
    broken = ahead(start, "broken")
    thread.join()
    assert server.starts == 2
    assert same(whole, broken)


def test_a_server_that_stays_away_while_it_samples_ahead_leaves_a_run_that_goes_on(start, server):
    ahead(start, "whole", training={"max_steps": 4})
    server.change(die_after=server.asked + asked_until_ahead(server) + 4)
    with pytest.raises(EngineError, match="start or resume the run"):
        ahead(start, "broken", engine={"wait": 0.5})
    server.stop()
    server.start()
    resumed = ahead(start, "broken", resume=True)
    steps = [log["step"] for log in training_logs(resumed)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 6


def test_pairs_are_drawn_ahead_too(start):
    summary = start(objective={"kind": "pairwise", "beta": 0.1}, rollout={"ahead": True}, training={"max_steps": 3})
    assert [log["step"] for log in training_logs(summary)] == [1, 2, 3]


def test_nothing_is_drawn_ahead_in_process(tiny, tmp_path):
    data = write_prompts(tmp_path / "prompts.jsonl")
    with pytest.raises(ConfigError, match="use an engine of kind vllm"):
        parse_run(online_data(tiny, data, tmp_path / "run", rollout={"ahead": True}))
