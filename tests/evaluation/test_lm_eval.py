"""A merged export under the command of lm-eval, on a task that is a YAML file and a JSONL file."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from falign.models import add_lora, export_merged, load_model, load_tokenizer
from falign.scoring import PromptTree, completion_scores, pad
from tests.models.tiny import fill_adapter

TASK = Path(__file__).parent / "lm_eval_task"


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra lm-eval is not installed")
def test_an_export_is_worth_to_lm_eval_what_its_logprobs_say(tiny, tmp_path):
    model, tokenizer = load_model(tiny, dtype="float32"), load_tokenizer(tiny)
    trained = fill_adapter(add_lora(model, r=4, alpha=8, seed=0), scale=0.3).eval()
    export_merged(trained, tokenizer, tmp_path / "merged", dtype="float32")
    shutil.copytree(TASK, tmp_path / "tasks")  # its data file is found from the working folder
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={tmp_path / 'merged'},dtype=float32"]
    command += ["--tasks", "polite_choice", "--include_path", ".", "--batch_size", "2", "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    settings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path / "tasks", env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    samples = next((tmp_path / "out").rglob("samples_polite_choice_*.jsonl")).read_text().splitlines()
    right = 0.0
    for sample in map(json.loads, samples):
        document = sample["doc"]
        prompt = tokenizer(document["question"], add_special_tokens=False)["input_ids"]
        choices = [tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in document["choices"]]
        tree = PromptTree(tuple(prompt), tuple(map(tuple, choices)))
        with torch.no_grad():
            logprobs = completion_scores(trained, pad([tree], pad_token_id=1)).logprobs.sum(dim=1)
        theirs = [float(response[0]) for response in sample["filtered_resps"]]
        assert theirs == pytest.approx(logprobs.tolist(), abs=1e-3)
        right += float(logprobs.argmax().item() == document["label"])
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    assert len(samples) == 5
    assert results["polite_choice"]["acc,none"] == pytest.approx(right / 5)
