"""A tiny online run: a random llama with a byte tokenizer, and a reward for a letter."""

import json
import os
import time
from pathlib import Path

VOWELS = "aeiou"


def vowels(prompts, completions, **columns):
    """How many vowels there are: dense enough for a random model to learn from."""
    return [float(sum(letter in VOWELS for letter in text)) for text in completions]


def has_a_vowel(prompts, completions, **columns):
    return [float(any(letter in VOWELS for letter in text)) for text in completions]


def short(prompts, completions, **columns):
    return [1.0 if len(text) < 6 else 0.0 for text in completions]


def nothing(prompts, completions, **columns):
    return [0.0 for _ in completions]


def not_a_number(prompts, completions, **columns):
    return [float("nan") for _ in completions]


def that_fails_on_an_e(prompts, completions, **columns):
    if any("e" in text for text in completions):
        raise LookupError("there is an e")
    return vowels(prompts, completions)


def that_always_fails(prompts, completions, **columns):
    raise LookupError("no such word")


def one_too_few(prompts, completions, **columns):
    return [0.0 for _ in completions][1:]


def one_too_few_in_the_second_process(prompts, completions, **columns):
    return [0.0 for _ in completions][os.environ.get("RANK") == "1" :]


def that_waits(prompts, completions, **columns):
    """Say that it was called, and do not come back."""
    Path(os.environ["FALIGN_TEST_WAITING"]).touch()
    time.sleep(600)


def write_prompts(path, n=12):
    rows = [{"prompt": f"question {i}: ", "answer": i} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def online_data(model, prompts, output_dir, /, reward="vowels", **changes):
    """A run file as plain values; ``section={...}`` updates a section, other values replace."""
    run = {
        "output_dir": str(output_dir),
        "seed": 1,
        "model": {"path": str(model)},
        "adapter": {"r": 4, "alpha": 8},
        "prompts": {"train": [{"path": str(prompts), "chat": False}], "eval_size": 4, "max_length": 64},
        "rollout": {"prompts": 4, "completions": 4, "max_new_tokens": 8, "evaluation": {"completions": 16}},
        "rewards": [{"kind": "function", "function": f"tests.training.prompts:{reward}"}],
        "objective": {"kind": "policy_gradient", "advantage": "leave_one_out"},
        "training": {"learning_rate": 0.02, "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 1},
    }
    for name, value in changes.items():
        updates = isinstance(value, dict) and name != "objective"  # which is of one kind or of another
        run[name] = {**run.get(name, {}), **value} if updates else value
    return run
