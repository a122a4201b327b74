"""Real benchmark rows under a real model: falign's scores are those of transformers alone."""

import json
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from falign.cli import main
from falign.models import load_model, load_tokenizer

CHECK = Path(__file__).parents[2] / "scripts" / "check_benchmark.py"


def run(monkeypatch, command, *arguments):
    """Return the exit status of a command line."""
    monkeypatch.setattr(sys, "argv", [str(command), *map(str, arguments)])
    start = main if command == "falign" else partial(runpy.run_path, str(command), run_name="__main__")
    with pytest.raises(SystemExit) as stopped:
        start()
    return stopped.value.code or 0


@pytest.fixture(scope="module")
def models(demo, tmp_path_factory):
    """The demonstration model, and a policy near it, as folders that transformers reads."""
    model, tokenizer = load_model(demo, dtype="float32"), load_tokenizer(demo)
    reference, policy = (tmp_path_factory.mktemp("models") / name for name in ("reference", "policy"))
    model.save_pretrained(reference)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std(), alpha=0.01)
    model.save_pretrained(policy)
    for folder in (reference, policy):
        tokenizer.save_pretrained(folder)
    return policy, reference


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "name"),
    [
        ("rm_bench", "rm-bench/safety-response_filtered.jsonl.gz"),
        ("llmbar", "llmbar/llmbar.jsonl.gz"),
    ],
)
def test_scores_are_those_of_transformers_alone(models, shared_data, tmp_path, monkeypatch, benchmark, name):
    (policy, reference), file, out = models, shared_data(name), tmp_path / "out"
    options = ["--reference", reference, "--divergence", "jensen_shannon", "--out", out, "--resamples", 20]
    limit = 2 if benchmark == "rm_bench" else 8
    command = ["evaluate", "rewards", policy, benchmark, file, *options, "--limit", limit]
    assert run(monkeypatch, "falign", *command) == 0
    assert json.loads((out / "summary.json").read_text())["num_items"] == limit
    assert run(monkeypatch, CHECK, out, file) == 0
