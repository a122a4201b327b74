"""A tiny run: a random llama with a byte tokenizer, and pairs that differ in one word."""

import json

PLEASANT, RUDE = ["please", "kindly", "thanks", "gladly"], ["shut up", "whatever", "go away", "no way"]


def write_pairs(path, n=24):
    rows = [
        {
            "prompt": f"question {i}: ",
            "chosen": PLEASANT[i % 4] + "!" * (i % 3),
            "rejected": RUDE[(i * 3) % 4] + "." * (i % 2),
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_data(model, data, output_dir, /, **changes):
    """A run file as plain values; ``section={...}`` updates a section, other values replace."""
    run = {
        "output_dir": str(output_dir),
        "seed": 1,
        "model": {"path": str(model)},
        "adapter": {"r": 4, "alpha": 8},
        "data": {"train": [{"path": str(data), "chat": False}], "eval_size": 6, "max_length": 64},
        "objective": {"divergence": "jensen_shannon", "beta": 0.5},
        "training": {"learning_rate": 0.01, "per_device_train_batch_size": 4, "max_steps": 8, "logging_steps": 1},
        "sampling": {"prompts": ["question 1: "], "max_new_tokens": 4},
    }
    for name, value in changes.items():
        run[name] = {**run.get(name, {}), **value} if isinstance(value, dict) else value
    return run
