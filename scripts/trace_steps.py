"""Package files and functions that one optimizer step enters: an f-DPO step with LoRA, and an online step.

    python scripts/trace_steps.py
    python scripts/trace_steps.py --list --steps online

Each step is one of a run of `falign train` on a tiny random Llama with LoRA: offline f-DPO; online a policy gradient
with a penalty, the engine in process and a reward function. After two steps everything between the end of one optimizer
step and the end of the next is traced, in all threads: reading the data (online: sampling, rewards, scores),
`training_step`, the update. The traced step has no logging, evaluation or checkpoint, and what callbacks do after it is
left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = str(ROOT / "falign") + os.sep
WARM_UP = 2
TARGETS = {"offline": 25, "online": 45}
"""Most files that a reader should have to open to follow a step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=sorted(TARGETS), default=["offline", "online"])
    parser.add_argument("--list", action="store_true", help="also the files, with the functions entered in each")
    parser.add_argument("--worker", choices=sorted(TARGETS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(sorted(entered(args.worker))))
        return
    print(report({step: in_own_process(step) for step in args.steps}, listed=args.list))


def report(found: dict[str, set[tuple[str, str]]], *, listed: bool = False) -> str:
    """Return the table of counts, and where asked for the files of each step with their numbers of functions."""
    lines = [f"{'step':8} {'files':>6} {'target':>7} {'functions':>10}"]
    for step, functions in found.items():
        files = {file for file, _ in functions}
        lines.append(f"{step:8} {len(files):6} {TARGETS[step]:7} {len(functions):10}")
    for step, functions in found.items() if listed else ():
        lines += ["", step]
        lines += [f"  {count:3}  {file}" for file, count in sorted(Counter(file for file, _ in functions).items())]
    return "\n".join(lines)


def in_own_process(step: str) -> set[tuple[str, str]]:
    command = [sys.executable, __file__, "--worker", step]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the {step} run failed with status {done.returncode}:\n{done.stderr}")
    return {(file, function) for file, function in json.loads(done.stdout.splitlines()[-1])}


def entered(step: str) -> set[tuple[str, str]]:
    """Return file and qualified name of each function of the package that one step of a run enters."""
    sys.path.insert(0, str(ROOT))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import torch

    from falign.cli import main as command_line

    torch.set_num_threads(1)
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, traced_step() as codes:
        run_file = Path(folder, "run.yaml")
        run_file.write_text(json.dumps(RUNS[step](Path(folder))), encoding="utf-8")
        sys.argv = ["falign", "train", str(run_file)]
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                command_line()
            except SystemExit as ended:
                status = ended.code
    if status:
        sys.exit(printed.getvalue())
    # A lambda or comprehension is part of the function that holds it.
    return {(code.co_filename.removeprefix(PACKAGE), code.co_qualname.split(".<locals>")[0]) for code in codes}


@contextmanager
def traced_step() -> Iterator[set[CodeType]]:
    """Collect the package's code that runs between the ends of two optimizer steps, in any thread."""
    from transformers.trainer_callback import CallbackHandler

    codes: set[CodeType] = set()
    ends, tracing = 0, False
    step_end = CallbackHandler.on_step_end

    def profile(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if not tracing or event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        if code.co_name not in ("<module>", "<genexpr>"):
            codes.add(code)

    def on_step_end(handler, *arguments):
        nonlocal ends, tracing
        tracing = False  # not while callbacks look at a step that is over
        result = step_end(handler, *arguments)
        ends += 1
        tracing = ends == WARM_UP
        sys.setprofile(profile if tracing else None)
        return result

    # Threads that the run starts have it too.
    threading.setprofile(profile)
    CallbackHandler.on_step_end = on_step_end
    try:
        yield codes
    finally:
        CallbackHandler.on_step_end = step_end
        threading.setprofile(None)
        sys.setprofile(None)
    if ends <= WARM_UP:
        sys.exit(f"the run had {ends} steps, and {WARM_UP + 1} are needed")


def offline_run(folder: Path) -> dict:
    rows = [{"prompt": f"question {i}: ", "chosen": "please" + "!" * i, "rejected": "no"} for i in range(16)]
    return {
        **shared_sections(folder),
        "data": {"train": [{"path": write(folder, rows), "chat": False}], "eval_size": 2, "max_length": 64},
        "objective": {"divergence": "reverse_kl", "beta": 0.1},
    }


def online_run(folder: Path) -> dict:
    rows = [{"prompt": f"question {i}: "} for i in range(16)]
    return {
        **shared_sections(folder),
        "prompts": {"train": [{"path": write(folder, rows), "chat": False}], "eval_size": 2, "max_length": 64},
        "rollout": {"prompts": 2, "completions": 2, "max_new_tokens": 4},
        "rewards": [{"kind": "function", "function": "trace_steps:letters"}],
        "objective": {"kind": "policy_gradient", "divergence": "reverse_kl", "beta": 0.1},
    }


RUNS = {"offline": offline_run, "online": online_run}


def letters(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """A reward."""
    return [float(sum(map(str.isalpha, text))) for text in completions]


def write(folder: Path, rows: list[dict]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def shared_sections(folder: Path) -> dict:
    return {
        "output_dir": str(folder / "run"),
        "model": {"path": save_tiny_model(folder / "model")},
        "adapter": {"r": 4, "alpha": 8},
        "training": {
            "learning_rate": 0.01,
            "per_device_train_batch_size": 4,
            "max_steps": WARM_UP + 2,
            "logging_steps": 100,
            "eval_steps": 100,
            "save_steps": 100,
        },
    }


def save_tiny_model(folder: Path) -> str:
    """Save a random Llama with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
