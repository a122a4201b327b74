"""What is quick to find is told before anything slow is imported."""

import json
import subprocess
import sys

import pytest

SLOW = ("torch", "numpy", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "matplotlib")
CALL = """
import json, sys
from typer.testing import CliRunner
from falign.cli.main import app

told = []
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments)
    told.append(str(result.exception or result.output))
print(json.dumps({"told": told, "loaded": sorted(set(sys.modules) & set(json.loads(sys.argv[2])))}))
"""


def called(*commands):
    """What each command line told, and which slow modules a fresh process has loaded for all of them."""
    arguments = [json.dumps([list(command) for command in commands]), json.dumps(SLOW)]
    done = subprocess.run([sys.executable, "-c", CALL, *arguments], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    return result["told"], set(result["loaded"])


def test_help_needs_none_of_the_slow_modules():
    commands = ["train", "report", "sample", "score", "export", "soup", "divergences", "data", "evaluate"]
    told, loaded = called(["--help"], *([name, "--help"] for name in commands))
    assert all("Usage" in each for each in told)
    assert loaded == set()


@pytest.fixture
def run_file(tmp_path):
    def write(name, *, model="demo:smollm2-135m-instruct", data="demo:polite-preference", more=""):
        file = tmp_path / f"{name}.yaml"
        head = f"output_dir: {tmp_path}/run\nmodel: {{path: '{model}'}}\n"
        file.write_text(f"{head}data: {{train: [{{path: '{data}', chat: true}}]}}\n{more}")
        return str(file)

    return write


def test_a_mistake_in_a_run_file_needs_torch_at_most(run_file, tmp_path):
    prompts = tmp_path / "online.yaml"
    prompts.write_text(
        f"output_dir: {tmp_path}/run\nmodel: {{path: demo:smollm2-135m-instruct}}\n"
        "prompts: {train: [{path: demo:one-digit-arithmetic}]}\nobjective: {kind: policy_gradient}\n"
        f"rewards: [{{kind: lexicon, path: {tmp_path}/words.txt}}]\n"
    )
    commands = [
        ["train", run_file("key", more="training: {learning_rte: 1}")],
        ["train", run_file("data", data=f"{tmp_path}/pairs.jsonl")],
        ["train", run_file("model", model=f"{tmp_path}/model")],
        ["train", run_file("gguf", model=f"{tmp_path}/model.gguf")],
        ["train", run_file("adapter", more=f"adapter: {{init: {tmp_path}/adapter}}")],
        ["train", run_file("reference", more=f"reference: {{kind: frozen, path: {tmp_path}/reference}}")],
        ["train", str(prompts)],
        ["train", str(tmp_path / "absent.yaml")],
    ]
    told, loaded = called(*commands)
    for each, words in zip(
        told,
        [
            "unknown key 'training.learning_rte': did you mean training.learning_rate?",
            "pairs.jsonl: no such file or folder",
            "/model does not exist",
            "/model.gguf does not exist: give the path of a .gguf file",
            "/adapter does not exist",
            "/reference does not exist",
            "words.txt: no such file or folder",
            "No run file at",
        ],
        strict=True,
    ):
        assert words in each
    assert loaded <= {"torch", "numpy"}
