"""The real job on real input: QLoRA f-DPO of SmolLM2-135M on HH dialogues, exported and opened by plain PEFT."""

import json
import subprocess
import sys

import pytest
from rich.console import Console

from falign.models import export_adapter, load_adapter, verify_export
from falign.runfile import load_run_file, parse_run
from falign.training import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]

PLAIN_PEFT = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = tokenizer("The best way to learn a language is", return_tensors="pt").input_ids
with torch.no_grad():
    adapted = model(ids).logits
    with model.disable_adapter():
        plain = model(ids).logits
print(json.dumps((adapted - plain).abs().max().item()))
"""


def test_qlora_on_hh_learns_and_its_adapter_opens_in_plain_peft(demo, shared_data, tmp_path):
    run = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": demo, "quantization": "nf4"},
        "adapter": {"r": 8, "alpha": 16},
        "data": {
            "train": [{"path": str(shared_data("hh-rlhf/helpful-base-test.jsonl.gz")), "format": "hh", "limit": 12}],
            "max_length": 96,
            "max_completion_length": 32,
            "long_prompt": "cut",
            "bad_rows": "skip",
        },
        "objective": {"divergence": "jensen_shannon", "beta": 0.5},
        "training": {
            "learning_rate": 3e-4,
            "per_device_train_batch_size": 2,
            "max_steps": 30,  # five times through 12 pairs
            "warmup_steps": 3,
            "logging_steps": 1,
        },
    }
    summary = train(parse_run(run), console=Console(quiet=True))
    losses = [log["loss"] for log in summary.folder.metrics() if "loss" in log]
    assert len(losses) == 30
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert sum(losses[-6:]) / 6 < 0.8 * sum(losses[:6]) / 6
    assert summary.folder.read_json("manifest.json")["model"]["quantization"] == "nf4"

    config = load_run_file(summary.folder.run_file)
    model = load_adapter(config.model.build(), summary.folder.adapter, trainable=False)
    target = export_adapter(model, config.model.build_tokenizer(), tmp_path / "export")
    proof = verify_export(model, target, tokenizer=config.model.build_tokenizer(), kind="adapter")
    assert proof.max_abs_logit_difference == 0.0
    assert proof.max_abs_change_against_base > 0.1

    script = tmp_path / "plain_peft.py"
    script.write_text(PLAIN_PEFT)
    done = subprocess.run([sys.executable, str(script), str(target)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) > 0.1
