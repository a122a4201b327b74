"""Run files and overrides: read, checked, and built as far as no weight is needed; a few of them are run."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml
from rich.console import Console

from fuzzing import mutations
from tests.models.tiny import save_tiny
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

ROOT = Path(__file__).resolve().parents[2]
Attempt = Callable[[Random], None]


def bombs() -> tuple[str, ...]:
    """Texts that are small and become large, or have no end."""
    laughs = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)
    ]
    return (
        "\n".join(laughs),
        "model: &a {path: *a}\noutput_dir: x",
        "model: &a\n  path: x\n  inner: *a\noutput_dir: x",
        "output_dir: x\nmodel: {path: x}\nadapter: &a [*a]",
        "\n".join([*laughs, "output_dir: x", "model: {path: *a8}"]),
        "\n".join([*laughs, "output_dir: x", "model: *a8"]),
        "output_dir: x\nmodel: {path: x}\nreference: &r {kind: *r}",
        "output_dir: x\nmodel: {path: x}\ndata: {train: &t [*t]}",
        "output_dir: x\nmodel: {path: x}\nseed: " + "9" * 5000,
        "output_dir: x\nmodel: {path: x}\nseed: 1e999",
        "output_dir: x\nmodel: {path: x}\n? {a: b}\n: c",
        "[" * 5000,
        "{a: " * 3000,
        "\ufeff" * 3,
    )


def offline_kinds() -> list[dict[str, Any]]:
    return [
        {"objective": {"divergence": "alpha(0.5)", "beta": 0.2, "margin_loss": "robust(0.1)"}},
        {"objective": {"kind": "listwise"}, "reference": {"kind": "moving_average", "alpha": 0.5, "every": 2}},
        {"objective": {"kind": "token_pairwise", "alpha": 0.5}, "reference": {"kind": "frozen"}, "adapter": None},
        {"objective": {"kind": "supervised"}, "reference": {"kind": "adapter_off"}},
        {"reference": {"kind": "periodic_reset", "every": 2, "reset_optimizer": True}},
        {"reference": {"kind": "auto", "cache": "cache"}, "training": {"tokens_per_batch": 200, "optim": "sgd"}},
    ]


def online_kinds() -> list[dict[str, Any]]:
    verifiers = [
        {"kind": "math", "answer": "answer", "weight": 0.5},
        {"kind": "number", "name": "n"},
        {"kind": "regex", "pattern": "a+", "name": "r"},
        {"kind": "choice", "letters": "AB"},
        {"kind": "sections", "tags": ["think"]},
        {"kind": "words", "words": ["a"], "mode": "any"},
    ]
    product = {"kind": "product", "targets": [{"kind": "binary"}, {"kind": "exponential", "beta": 1.0}]}
    return [
        {
            "objective": {
                "kind": "policy_gradient",
                "advantage": "gae",
                "gamma": 0.9,
                "divergence": "reverse_kl",
                "beta": 0.1,
            }
        },
        {"objective": {"kind": "pairwise"}, "rollout": {"ranked": "all", "minibatches": 2}},
        {"rewards": verifiers, "rollout": {"difficulty": {"low": 0.0, "high": 1.0}}},
        {"objective": {"kind": "distribution_matching", "target": product}, "rewards": verifiers[2:4]},
        {
            "objective": {
                "kind": "distribution_matching",
                "target": {"kind": "moments", "moments": [0.5], "lambdas": [0.1]},
            }
        },
    ]


def local_runs(folder: Path) -> list[dict[str, Any]]:
    """Return valid run files of every kind, over a tiny model and a few rows."""
    model, pairs, prompts = (
        save_tiny(folder / "tiny"),
        write_pairs(folder / "pairs.jsonl", 12),
        write_prompts(folder / "prompts.jsonl", 8),
    )
    short = {"max_steps": 1, "per_device_train_batch_size": 2}
    offline = [run_data(model, pairs, folder / "run", **changes) for changes in offline_kinds()]
    online = [online_data(model, prompts, folder / "run", **changes) for changes in online_kinds()]
    for run in offline + online:
        run["training"] = {**run["training"], **short}
        if "rollout" in run:
            run["rollout"] |= {"prompts": 2, "completions": 2, "max_new_tokens": 4, "evaluation": {"completions": 2}}
    return offline + online


def build(config: Any, tokenizer: Any) -> None:
    """Build what needs no weights."""
    from falign.runfile.reward_config import build_rewards

    config.check()
    config.training.build(config.output_dir, seed=config.seed)
    sources = [*(config.data.train if config.data else []), *(config.prompts.train if config.prompts else [])]
    if any(source.path and not Path(source.path).is_file() for source in sources):
        return  # a name of the Hub, which is not asked
    if config.data is not None:
        config.data.build(tokenizer, stop_token_ids=frozenset({1}), seed=config.seed, preferences=False)
    if config.prompts is not None:
        config.prompts.build(tokenizer, seed=config.seed)
        if not any(reward.kind in ("classifier", "implicit", "sql") for reward in config.rewards):
            build_rewards(config.rewards)


def spoilt_text(random: Random, runs: list[dict[str, Any]]) -> bytes:
    chance, run = random.random(), random.choice(runs)
    if chance < 0.03:
        return random.choice(bombs()).encode()
    if chance < 0.75:
        changed = mutations.tree(random, run, yaml=True)
        try:
            return yaml.safe_dump(changed, allow_unicode=random.random() < 0.5).encode("utf-8", "surrogatepass")
        except (RecursionError, yaml.YAMLError, UnicodeEncodeError):
            return repr(changed).encode("utf-8", "surrogatepass")
    return mutations.content(random, yaml.safe_dump(run, default_flow_style=random.random() < 0.3).encode())


def run_files(folder: Path) -> Attempt:
    """Run files of every kind with changed values, keys, structure and bytes."""
    from falign.runfile import load_run_file
    from tests.models.tiny import tiny_tokenizer

    runs = local_runs(folder) + [yaml.safe_load(file.read_text()) for file in sorted(ROOT.glob("configs/*.yaml"))]
    tokenizer, file = tiny_tokenizer(), folder / "spoilt.yaml"

    def attempt(random: Random) -> None:
        file.write_bytes(spoilt_text(random, runs))
        build(load_run_file(file), tokenizer)

    return attempt


def overrides(folder: Path) -> Attempt:
    """``section.field=value`` with wrong paths and wrong values."""
    from falign.runfile import load_run_file
    from falign.runfile.reading import valid_paths
    from tests.models.tiny import tiny_tokenizer

    runs, known, tokenizer, file = local_runs(folder), list(valid_paths()), tiny_tokenizer(), folder / "run.yaml"
    texts = (
        "",
        "null",
        "[",
        "{a: b}",
        "[1, 2]",
        "1e400",
        "-1",
        "2001-99-99",
        "&a [*a]",
        "*a",
        "9" * 5000,
        "[" * 3000,
        "!!set {a}",
    )
    steps = ("0", "-1", "99", "²", "٣", "", "kind", "unknown", "9" * 5000, "\x00", "\ud800", "lr", "train", "00")

    def one(random: Random) -> str:
        parts = random.choice(known).split(".")
        if random.random() < 0.3:
            parts.insert(random.randrange(len(parts) + 1), random.choice(steps))
        if random.random() < 0.2:
            parts[random.randrange(len(parts))] = random.choice(steps)
        text = random.choice(texts) if random.random() < 0.5 else str(mutations.value(random, yaml=True))
        return ".".join(parts) + random.choice(("=", "=", "=", "=", "", "==", ":", " = ")) + text

    def attempt(random: Random) -> None:
        file.write_text(json.dumps(random.choice(runs)))
        build(load_run_file(file, [one(random) for _ in range(random.choice((1, 1, 2, 3)))]), tokenizer)

    return attempt


def whole_runs(folder: Path) -> Attempt:
    """Run files with one change, run to their end where they are accepted."""
    from falign.runfile import parse_run
    from falign.training import train

    runs = local_runs(folder)
    large = (10**9, 10**12, 10**30)  # what only takes long is no mistake

    def attempt(random: Random) -> None:
        shutil.rmtree(folder / "run", ignore_errors=True)
        changed = mutations.tree(random, random.choice(runs), yaml=True)
        if isinstance(changed, dict) and not any(
            isinstance(c[k], int | float) and abs(c[k]) in large for c, k in mutations.places(changed)
        ):
            changed["output_dir"] = str(folder / "run")
            if isinstance(changed.get("training"), dict):
                changed["training"]["max_steps"] = 1
            train(parse_run(changed), console=Console(file=io.StringIO()))

    return attempt
