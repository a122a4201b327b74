"""Two processes train as one does, in both layouts, with pairs and labels and a moving reference."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integrations.trl.two_processes import run
from tests.models.tiny import tiny_tokenizer

# TRL 1.16 and PEFT 0.21 read an attribute that Transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    cases = [{"kind": "pairs", "layout": "tree"}, {"kind": "labels", "layout": "trl"}]
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
    for case in cases:
        run(case, tmp_path / "1", 4, str(tmp_path / "tokenizer"))
    plan = {"cases": cases, "folder": str(tmp_path / "2"), "batch": 2, "tokenizer": str(tmp_path / "tokenizer")}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "-m", run.__module__, str(tmp_path / "plan.json")],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for case in cases:
        name = f"{case['kind']}-{case['layout']}"
        one, two = (torch.load(tmp_path / f"{number}/{name}.pt") for number in (1, 2))
        for parameter, value in one.items():
            torch.testing.assert_close(two[parameter], value, rtol=0, atol=1e-6, msg=f"{name}: {parameter}")
        logs = [json.loads((tmp_path / f"{number}/{name}.json").read_text()) for number in (1, 2)]
        for alone, both in zip(*logs, strict=True):
            shared = {"loss", "entropy", "rewards/margins", "rewards/chosen", "logps/chosen", "num_tokens"}
            for metric in alone.keys() & shared:
                assert both[metric] == pytest.approx(alone[metric], abs=2e-4), (name, metric)
