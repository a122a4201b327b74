"""A short run through falign, for scripts/test_bounds.sh: imports, training, resuming, adapter references, exports."""

import importlib
import json
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[1]


def main() -> None:
    sys.path.insert(0, str(ROOT))  # tests.models.tiny makes the model
    import falign

    for module in pkgutil.walk_packages(falign.__path__, "falign."):
        if module.name not in ("falign.__main__", "falign.rewards.worker"):
            importlib.import_module(module.name)
    from falign.runfile import parse_run
    from falign.training import train
    from tests.models.tiny import save_tiny

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_tiny(folder / "tiny")
        rows = [{"prompt": f"question {i}: ", "chosen": "good", "rejected": "bad"} for i in range(16)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        offline = {
            "output_dir": str(folder / "first"),
            "model": {"path": str(model)},
            "data": {"train": [{"path": str(folder / "pairs.jsonl"), "chat": False}], "eval_size": 4, "max_length": 64},
            "training": {"max_steps": 2, "gradient_checkpointing": True, "save_steps": 1},
            "sampling": {"prompts": ["question 1: "], "max_new_tokens": 4},
        }
        console = Console(quiet=True)
        train(parse_run(offline), console=console)
        train(parse_run(offline), console=console, resume=True)
        second = {
            **offline,
            "output_dir": str(folder / "second"),
            "adapter": {"init": str(folder / "first")},
            "reference": {"kind": "adapter", "path": str(folder / "first"), "cache": str(folder / "cache")},
        }
        train(parse_run(second), console=console)
        online = {
            "output_dir": str(folder / "online"),
            "model": {"path": str(model)},
            "prompts": {"train": [{"texts": ["question 1: ", "question 2: "], "chat": False}]},
            "rollout": {"prompts": 2, "completions": 4, "max_new_tokens": 4},
            "rewards": [{"kind": "regex", "pattern": "(a)"}],
            "objective": {"kind": "policy_gradient", "divergence": "reverse_kl", "beta": 0.1},
            "training": {"max_steps": 1},
        }
        train(parse_run(online), console=console)
        for kind in ("adapter", "merged"):
            command = [sys.executable, "-m", "falign", "export", str(folder / "first"), "--format", kind]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print("smoke: imports, training, resuming, an adapter as reference, an online step, exports")


if __name__ == "__main__":
    main()
