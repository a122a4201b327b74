"""Folders of adapters, models, runs and checkpoints of which one file is spoilt."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save

from fuzzing import mutations
from fuzzing.run_files import local_runs
from tests.models.tiny import fill_adapter, save_tiny, tiny_tokenizer

Attempt = Callable[[Random], None]


class PartialOutputError(AssertionError):
    """Something was refused, and yet lies under its final name."""


def require_nothing_at(target: Path) -> None:
    left = [target, *target.parent.glob(f".{target.name}.*")]
    if there := [path for path in left if path.exists()]:
        raise PartialOutputError(f"{there} is there, though it was refused")


def spoil_one_file(random: Random, folder: Path, *, only: tuple[str, ...] = ("*",)) -> None:
    """Spoil a file of a folder: its plain values, its tensors, its bytes, or its being there."""
    files = sorted({file for pattern in only for file in folder.rglob(pattern) if file.is_file()})
    file = random.choice(files)
    mutations.path(random, file, spoilt(random, file))


def spoilt(random: Random, file: Path) -> bytes:
    original = file.read_bytes()
    if random.random() < 0.35:
        return mutations.content(random, original)
    if file.suffix == ".json":
        return json.dumps(mutations.tree(random, json.loads(original))).encode("utf-8", "surrogatepass")
    if file.suffix == ".jsonl":
        lines = [json.loads(line) for line in original.splitlines()]
        changed = mutations.tree(random, lines)
        rows = changed if isinstance(changed, list) else [changed]
        return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    if file.suffix == ".safetensors":
        return spoilt_tensors(random, file)
    if file.suffix in (".pt", ".pth", ".bin"):
        return spoilt_pickle(random, file)
    return mutations.content(random, original)


def spoilt_tensors(random: Random, file: Path) -> bytes:
    original, tensors = file.read_bytes(), load_file(file)
    name = random.choice(sorted(tensors))
    kind = random.choice(("header", "shape", "type", "name", "drop", "empty", "transpose"))
    if kind == "header":  # lengths, offsets and types stand there
        length = int.from_bytes(original[:8], "little")
        header = mutations.tree(random, json.loads(original[8 : 8 + length]))
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + original[8 + length :]
    if kind == "shape":
        tensors[name] = torch.zeros(random.choice(((), (0,), (3,), (2, 3, 4), (1, 1))))
    elif kind == "type":
        tensors[name] = tensors[name].to(random.choice((torch.int64, torch.bool, torch.float64, torch.bfloat16)))
    elif kind == "name":
        tensors[random.choice(("x", f"{name}.y", name.upper(), ""))] = tensors.pop(name)
    elif kind == "drop":
        del tensors[name]
    elif kind == "empty":
        tensors = {}
    elif kind == "transpose":
        tensors[name] = tensors[name].T.contiguous() if tensors[name].dim() == 2 else tensors[name]
    return save(tensors)


def spoilt_pickle(random: Random, file: Path) -> bytes:
    sink = io.BytesIO()
    try:
        kept = torch.load(file, weights_only=True)
        torch.save(mutations.tree(random, kept), sink)
    except Exception:  # what is no plain value is spoilt as bytes
        return mutations.content(random, file.read_bytes())
    return sink.getvalue()


def fresh(original: Path, copy: Path) -> Path:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original, copy)
    return copy


def trained_run(folder: Path, number: int, **training: Any) -> tuple[Path, Any]:
    """Train one of the local runs for a few steps, and return its folder and run file."""
    from falign.runfile import parse_run
    from falign.training import train

    run = local_runs(folder)[number]
    run |= {"output_dir": str(folder / f"run-{number}")}
    run["training"] |= {"max_steps": 3, **training}
    config = parse_run(run)
    train(config, console=Console(file=io.StringIO()))
    return config.output_dir, config


def adapters(folder: Path) -> Attempt:
    """Adapters, checkpoints and runs given to ``falign export``, ``score`` and ``soup``, and as a start."""
    from falign.evaluation.loading import load_run
    from falign.models import (
        add_lora,
        export_adapter,
        export_merged,
        load_adapter,
        load_model,
        load_tokenizer,
        write_soup,
    )
    from falign.models.adapters import start_from_adapter
    from falign.runs import RunFolder
    from falign.runs.loading import load_trained

    base = save_tiny(folder / "base")
    run, _ = trained_run(folder, 0)
    for seed in (1, 2):
        adapted = fill_adapter(add_lora(load_model(base), r=2 * seed, alpha=8, seed=seed))
        export_adapter(adapted, tiny_tokenizer(), folder / f"adapter-{seed}")

    def attempt(random: Random) -> None:
        target = folder / "out"
        shutil.rmtree(target, ignore_errors=True)
        what = random.choice(
            ("load", "start", "soup", "soup", "checkpoint", "checkpoints", "export", "merged", "score", "tokenizer")
        )
        if what in ("export", "merged", "score"):
            copy = fresh(run, folder / "spoilt")
            spoil_one_file(random, copy, only=("run.yaml", "manifest.json", "adapter/adapter*"))
        else:
            copy = fresh(
                base if what in ("checkpoint", "checkpoints", "tokenizer") else folder / "adapter-1", folder / "spoilt"
            )
            only = {
                "tokenizer": ("token*", "chat*"),
                "checkpoint": ("config.json", "*.safetensors", "generation*"),
            }.get(what, ("*",))
            spoil_one_file(random, copy, only=only)
        try:
            match what:
                case "load":
                    load_adapter(load_model(base), copy, trainable=random.random() < 0.5)
                case "start":
                    start_from_adapter(load_model(base), copy)
                case "checkpoint":
                    load_model(copy)
                case "tokenizer":
                    load_tokenizer(copy)
                case "score":
                    load_run(str(copy), max_length=None)
                case "export":
                    model, tokenizer, *_ = load_trained(RunFolder.open(copy))
                    export_adapter(model, tokenizer, target)  # pyright: ignore[reportArgumentType]
                case "merged":
                    model, tokenizer, *_ = load_trained(RunFolder.open(copy))
                    export_merged(model, tokenizer, target)
                case _:
                    other = base if what == "checkpoints" else folder / "adapter-2"
                    members = random.choice(([copy, other], [other, copy]))
                    write_soup(members, target, weights=random.choice((None, [0.25, 0.75], [1.0, 0.0])))
        except BaseException:
            require_nothing_at(target)
            raise

    return attempt


def checkpoints(folder: Path) -> Attempt:
    """Checkpoints of an offline run, a moving reference and PPO, taken up by their own trainer."""
    from falign.training.offline import offline_trainer
    from falign.training.online.run import online_trainer
    from falign.training.parts import load_language

    trainers: list[tuple[Any, Path]] = []
    for number in (0, 1, 6, 7):
        run, config = trained_run(folder, number, save_steps=2, save_total_limit=1)
        assemble: Any = online_trainer if config.prompts is not None else offline_trainer
        trainer, _ = assemble(
            config, load_language(config), config.check(), callbacks=[], console=Console(file=io.StringIO())
        )
        trainer.create_optimizer_and_scheduler(3)
        trainer._tr_loss = torch.zeros(())  # the loop has it, which does not run here
        trainers.append((trainer, max(run.glob("checkpoint-*"))))

    def attempt(random: Random) -> None:
        trainer, checkpoint = random.choice(trainers)
        copy = fresh(checkpoint, folder / "spoilt" / checkpoint.name)
        spoil_one_file(
            random,
            copy,
            only=("adapter*", "optimizer*", "scheduler*", "rng*", "trainer_state*", "rollout*", "value*", "reference*"),
        )
        trainer.state_at(copy)
        trainer.load_finished(copy)
        trainer._load_optimizer_and_scheduler(str(copy))
        trainer._load_rng_state(str(copy))

    return attempt
