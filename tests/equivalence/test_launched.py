"""Two processes, under DDP and FSDP2, do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from falign.errors import ConfigError
from falign.runfile import parse_run
from falign.runs import RunFolder
from falign.training import train
from tests.models.tiny import save_tiny
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]

ROOT = Path(__file__).parents[2]
KINDS = ("ddp", "fsdp2")
# Rows are as many as no number of processes divides. Plain gradient descent, because Adam makes a step of full size
# of a gradient that is nothing but rounding.
STEPS = {"max_steps": 20, "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1}
PENALIZED = {"kind": "policy_gradient", "divergence": "reverse_kl", "beta": 0.05, "advantage": "leave_one_out"}
FOLLOWED = {"metric": "ppo/divergence/reverse_kl", "target": 0.5, "start": 0.05, "gain": 0.5, "smoothing": 0.5}
SAMPLES = {
    "policy gradient": {"objective": PENALIZED},
    "critic": {
        "objective": {
            "kind": "sum",
            "terms": {
                "ppo": {
                    **PENALIZED,
                    "beta": {"controller": "target_divergence", **FOLLOWED},
                    "level": "token",
                    "advantage": "gae",
                    "importance": "token",
                },
                "entropy": {"kind": "distillation", "measure": "entropy", "importance": "token"},
            },
            "weights": {"entropy": -0.01},
        },
        "critic": {"heads": 2, "soft_min": 0.3, "polyak": 0.05, "warm_up": 1},
        "training": {"max_steps": 5},
    },
}
PAIRS = {
    "f-dpo": {"objective": {"divergence": "jensen_shannon", "beta": 0.5}},
    "f-dpo by tokens": {"training": {"tokens_per_batch": 90}},
    "tdpo": {"objective": {"kind": "token_pairwise", "alpha": 0.2}},
    "kto": {"objective": {"kind": "unpaired", "divergence": "jensen_shannon", "beta": 0.5}},
    "references": {
        "references": {"reference": {}, "teacher": {"kind": "frozen", "path": "FOLDER/teacher"}},
        "measures": {"away": "divergence_to(forward_kl, teacher)"},
        "training": {"max_steps": 5},
    },
    "sum": {
        "references": {"teacher": {"kind": "frozen", "path": "FOLDER/teacher"}},
        "objective": {
            "kind": "sum",
            "terms": {"taught": {"kind": "distillation"}, "cloned": {"kind": "supervised", "completions": "chosen"}},
            "weights": {"cloned": {"from": 0.5, "to": 0.1, "steps": 4}},
        },
        "training": {"max_steps": 5},
    },
    "full": {"adapter": None, "training": {"max_steps": 5, "learning_rate": 0.05}},
}
COMPARED = [
    *((name, kind) for name in ("f-dpo", "tdpo", "kto", "policy gradient", "critic", "full") for kind in KINDS),
    ("f-dpo by tokens", "ddp"),
    ("references", "fsdp2"),
    ("sum", "fsdp2"),
]
SAVING = {"training": {"max_steps": 10, "save_steps": 5, "optim": "adamw_torch", "learning_rate": 0.01}}
QUANTIZED = {"model": {"quantization": "nf4", "dtype": "bfloat16"}, "training": {"max_steps": 5}}


def offline(folder, name, batch_size, changes):
    training = {**STEPS, "per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size}
    data = {
        "train": [{"path": str(folder / "pairs.jsonl"), "chat": False}],
        "eval": [{"path": str(folder / "held-out.jsonl"), "chat": False}],
    }
    changes = json.loads(json.dumps(changes).replace("FOLDER", str(folder)))
    changes = {**changes, "training": {**training, "eval_steps": 10, **changes.get("training", {})}}
    run = run_data(folder / "tiny", None, folder / name, **changes, data={**data, "eval_size": 0})
    if changes.get("objective", {}).get("kind") == "sum":
        run["objective"] = changes["objective"]  # without the fields of pairs
    return run


def online(folder, name, batch_size, changes):
    prompts = str(folder / "prompts.jsonl")
    training = {**STEPS, "learning_rate": 0.1, "per_device_train_batch_size": batch_size}
    return online_data(
        folder / "tiny",
        prompts,
        folder / name,
        prompts={"train": [{"path": prompts, "chat": False}], "eval_size": 3},
        rollout={"prompts": 9, "max_new_tokens": 6, "evaluation": {"completions": 4}},
        **{**changes, "training": {**training, **changes.get("training", {})}},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The run folders of all runs; those of one process take as many rows at once as the two processes together."""
    path = tmp_path_factory.mktemp("launched")
    save_tiny(path / "tiny")
    save_tiny(path / "teacher", seed=3)
    write_pairs(path / "pairs.jsonl", n=9)
    write_pairs(path / "held-out.jsonl", n=9)
    write_prompts(path / "prompts.jsonl", n=12)
    cases = []
    for kind in KINDS:
        cases.append({"kind": kind, "run": offline(path, f"quantized {kind}", 2, QUANTIZED)})
        cases += [
            {"kind": kind, "run": offline(path, f"{name} {kind}", 2, changes)}
            for name, changes in PAIRS.items()
            if (name, kind) in COMPARED
        ]
        cases += [
            {"kind": kind, "run": online(path, f"{name} {kind}", 3, changes)} for name, changes in SAMPLES.items()
        ]
        saving = offline(path, f"saving {kind}", 2, SAVING)
        cases.append({"kind": kind, "run": saving, "resume": str(path / f"resumed {kind}")})
        cases.append({"kind": kind, "run": offline(path, f"stopped {kind}", 2, SAVING), "stop": 2})
    (path / "cases.json").write_text(json.dumps(cases))
    launch = "-m torch.distributed.run --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:0"
    command = [sys.executable, *launch.split(), "-m", "tests.equivalence.launched", str(path / "cases.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = [offline(path, f"{name} alone", 4, changes) for name, changes in PAIRS.items()]
    alone[1]["training"]["gradient_accumulation_steps"] = 2
    alone.append(offline(path, "quantized alone", 4, QUANTIZED))
    alone += [online(path, f"{name} alone", 9, changes) for name, changes in SAMPLES.items()]
    for run in alone:
        train(parse_run(run), console=Console(quiet=True))
    return path


def logs(run):
    """What metrics.jsonl has, without times."""
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
    return [{name: value for name, value in log.items() if name not in timed} for log in RunFolder(run).metrics()]


def weights(run):
    found = (
        (run / "adapter").glob("*.safetensors") if (run / "adapter").is_dir() else (run / "model").glob("*.safetensors")
    )
    return {name: tensor for file in found for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("name", "kind"), COMPARED)
def test_two_processes_have_the_losses_metrics_and_weights_of_one(folder, name, kind):
    two, one = folder / f"{name} {kind}", folder / f"{name} alone"
    assert weights(two).keys() == weights(one).keys()
    for key, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[key], weight, rtol=0, atol=1e-5)
    assert len(logs(two)) == len(logs(one))
    for a, b in zip(logs(two), logs(one), strict=True):
        assert a.keys() == b.keys()
        for metric in b.keys() - {"epoch"}:  # transformers counts micro-batches
            tolerance = 1e-5 if metric == "loss" else 5e-5
            assert a[metric] == pytest.approx(b[metric], rel=1e-5, abs=tolerance), (metric, b["step"])
    losses = [log["loss"] for log in logs(one) if "loss" in log]
    assert len(losses) == (5 if name in ("full", "references", "sum", "critic") else 20)
    assert max(losses) - min(losses) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_divided_among_processes_is_the_rollout_of_one(folder, kind):
    two, one = (folder / f"policy gradient {name}" / "completions.jsonl" for name in (kind, "alone"))
    assert two.read_text() == one.read_text()
    assert len({json.loads(line)["completion"] for line in one.read_text().splitlines()}) > 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_whole_trained_weights_alone_and_goes_on_bit_for_bit(folder, kind):
    checkpoint = folder / f"saving {kind}" / "checkpoint-5"
    saved = load_file(checkpoint / "adapter_model.safetensors")
    exported = weights(folder / f"saving {kind}")
    assert {key: tensor.shape for key, tensor in saved.items()} == {k: t.shape for k, t in exported.items()}
    size = sum(tensor.nbytes for tensor in saved.values())
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
    moments = sum(tensor.nbytes for state in states for tensor in state.values() if tensor.numel() > 1)
    assert moments == 2 * size
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert logs(folder / f"resumed {kind}") == logs(folder / f"saving {kind}")
    for key, tensor in exported.items():
        assert torch.equal(weights(folder / f"resumed {kind}")[key], tensor), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_to_one_process_stops_all_with_a_checkpoint_and_the_run_goes_on_bit_for_bit(folder, kind):
    stopped, whole = folder / f"stopped {kind}", folder / f"saving {kind}"
    assert logs(stopped) == logs(whole)
    for key, tensor in weights(whole).items():
        assert torch.equal(weights(stopped)[key], tensor), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_learns_in_two_processes_what_it_learns_in_one(folder, kind):
    two, one = folder / f"quantized {kind}", folder / "quantized alone"
    for a, b in zip(logs(two), logs(one), strict=True):
        if "loss" in b:
            assert a["loss"] == pytest.approx(b["loss"], abs=0.02)  # bfloat16 rounds by what is beside a row
    assert any(weight.abs().max() > 0.01 for key, weight in weights(two).items() if "lora_B" in key)
    manifests = [RunFolder(run).read_json("manifest.json") for run in (two, one)]
    for part in ("model", "base_weights"):
        assert manifests[0][part] == manifests[1][part]
    assert [manifest["processes"] for manifest in manifests] == [2, 1]


def test_a_checkpoint_of_two_processes_is_not_taken_up_by_one(folder):
    config = parse_run(offline(folder, "saving ddp", 2, SAVING))
    with pytest.raises(ConfigError, match="checkpoint-10 was written by 2 processes, and this run has 1: resume with"):
        train(config, console=Console(quiet=True), resume=True)
