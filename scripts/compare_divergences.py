"""One model, one set of pairs, every divergence, equal budget: f-DPO runs, their evaluations, and a report of them all.

    python scripts/compare_divergences.py configs/compare-polite.yaml --out runs/compare-polite \
        --rewards configs/rewards/polite.yaml
    python scripts/compare_divergences.py configs/compare-hh.yaml --out runs/compare-hh \
        data.train.0.path=helpful-base-test.jsonl.gz

Generators are standardized to f''(1) = 1, so that equal β is equal strength near the reference; ``--own-scale`` leaves
them as their papers have them. Other fields of the objective may be given as overrides, as those of TDPO:

    python scripts/compare_divergences.py configs/compare-hh.yaml --out runs/tdpo2-hh --divergences forward_kl \
        -- data.train.0.path=helpful-base-test.jsonl.gz objective.kind=token_pairwise objective.variant=2

The pairs are split once, into ``train.jsonl`` and ``held-out.jsonl`` of the folder. Every command is printed before it
runs, and can be typed by itself; what is there already is not done again, so that a stopped comparison goes on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from falign import divergences
from falign.data import BadRows, Example, read_examples
from falign.runfile import RunConfig, load_run_file
from falign.runs import RunFolder
from falign.training.parts import load_language

FAMILIES = (
    *("reverse_kl", "forward_kl", "jensen_shannon", "alpha(0.5)", "jeffreys", "squared_hellinger"),
    *("neyman_chi2", "chi2_kl", "generalized_js(0.3)"),
)
"""One of each family with a barrier at 0, which f-DPO needs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", type=Path, help="an f-DPO run file; its divergence is replaced")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="as for falign train")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs and the report")
    parser.add_argument("--divergences", nargs="+", default=list(FAMILIES), metavar="F")
    parser.add_argument("--own-scale", action="store_true", help="do not standardize the generators to f''(1) = 1")
    parser.add_argument("--rewards", type=Path, help="of samples, a YAML file; else the first run's implicit reward")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts that are answered")
    parser.add_argument("--completions", type=int, default=4, help="answers to each")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    arguments = parser.parse_intermixed_args()  # fields may come after options
    config = load_run_file(arguments.run_file, arguments.overrides)
    if config.data is None:
        parser.error(f"{arguments.run_file} has no section data: give the run file of an f-DPO run.")
    try:
        names = generators(arguments.divergences, own_scale=arguments.own_scale)
    except ValueError as error:
        parser.error(f"--divergences: {error}")
    data = split(config, arguments.out)
    sampling: list[Any] = ["--num-completions", arguments.completions, "--max-new-tokens", arguments.max_new_tokens]
    held_out = arguments.out / "held-out.jsonl"
    runs = [arguments.out / name for name in names]
    sampling += ["--rewards", arguments.rewards or runs[0]]
    for name, run in zip(names, runs, strict=True):
        changes = [*arguments.overrides, *data, f"objective.divergence={name}", f"output_dir={run}"]
        if not (run / "summary.json").is_file():
            falign("train", arguments.run_file, *changes, *(["--resume"] if any(run.glob("checkpoint-*")) else []))
        if not (run / "evaluation" / "preferences" / "summary.json").is_file():
            falign("evaluate", "rewards", run, "preferences", held_out, "--long-items", "cut", "--trust-code")
        if not (run / "evaluation" / "samples" / "summary.json").is_file():
            falign(
                "evaluate",
                "samples",
                run,
                "--trust-code",
                "--prompts",
                held_out,
                "--limit",
                arguments.prompts,
                *sampling,
            )
    falign("report", *runs, "--out", arguments.out / "report")
    print(table(runs))


def generators(names: Iterable[str], *, own_scale: bool = False) -> list[str]:
    """Return the names of the divergences, standardized unless they are to keep the scale of their papers."""
    found = [divergences.get(name) for name in names]
    return [(f if own_scale else f.standardized()).name for f in found]


def split(config: RunConfig, out: Path) -> list[str]:
    """Write the pairs to train on and those held out, and return the overrides that name them."""
    data = config.data
    assert data is not None
    files = {"train": out / "train.jsonl", "eval": out / "held-out.jsonl"}
    if not all(file.is_file() for file in files.values()):
        language = load_language(config)
        built = data.build(language.tokenizer, stop_token_ids=language.stop_tokens, seed=config.seed, preferences=True)
        places = {"train": {tree.place for tree in built.train}, "eval": {tree.place for tree in built.eval}}
        bad_rows = BadRows(data.bad_rows)
        out.mkdir(parents=True, exist_ok=True)
        for name, sources in (("train", data.train), ("eval", data.eval or data.train)):
            examples = (found for source in sources for found in read_examples(source.build(), bad_rows=bad_rows))
            rows = [row(example) for example in examples if example.place in places[name]]
            files[name].write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    chat = str(all(source.chat for source in data.train)).lower()
    named = [f"data.{name}=[{{path: {json.dumps(str(file))}, chat: {chat}}}]" for name, file in files.items()]
    return [*named, "data.eval_size=0", "data.eval_fraction=0"]


def row(example: Example) -> dict[str, Any]:
    if example.preference is None or sorted(example.preference) != [0.0, 1.0]:
        raise SystemExit(f"{example.place}: not a pair; this comparison takes pairs.")
    chosen, rejected = (example.completions[example.preference.index(value)] for value in (1.0, 0.0))
    return {"prompt": example.prompt, "chosen": chosen, "rejected": rejected}


def falign(*arguments: Any) -> None:
    """Run a command of falign, and end where it fails."""
    words = list(map(str, arguments))
    print(f"$ {shlex.join(['falign', *words])}", flush=True)
    done = subprocess.run([sys.executable, "-c", "from falign.cli import main; main()", *words], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def table(runs: list[Path]) -> str:
    """Return accuracy, calibration, divergence and diversity of each run, as a table in Markdown."""
    columns = {
        "accuracy": ("preferences", lambda found: found["scorers"]["implicit_reward"]["scores"]["accuracy"]),
        "ECE": ("preferences", lambda found: found["scorers"]["implicit_reward"]["calibration"]["ece"]),
        **{
            label: ("samples", lambda found, name=name: found["metrics"].get(name))
            for label, name in {
                "reward": "reward",
                "KL(π‖π_ref)": "divergence/reverse_kl",
                "entropy": "entropy",
                "distinct-2": "distinct-2",
                "self-BLEU": "self_bleu",
                "length": "length",
            }.items()
        },
    }
    rows = [["divergence", *columns], ["---"] * (len(columns) + 1)]
    for run in runs:
        folder = RunFolder.open(run)
        found = {name: folder.read_json(f"evaluation/{name}/summary.json") for name in ("preferences", "samples")}
        rows.append([run.name, *(shown(value(found[kind])) for kind, value in columns.values())])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    return f"{value:.3f}"


if __name__ == "__main__":
    main()
