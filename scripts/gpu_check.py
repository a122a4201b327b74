"""Everything that needs a GPU, in under 9 minutes on one H200: equalities, speed, memory, an online step, DDP.

    scripts/gpu_check.sh --out gpu.json
    scripts/gpu_check.sh --dry-run                   # the same on a CPU, tiny, in under 2 minutes
    scripts/gpu_check.sh --only "equality/*" "ddp/*"

Each measurement is a process of its own, in a section with a budget of seconds, so that what fails or hangs takes
nothing else with it. gpu.json is written after each one: for each section its status and seconds, for each measurement
status, seconds, figures and the error's text. Models have random weights; the lengths of HH are those of
benchmark_offline.py, drawn from log-normals with HH's medians. TRL's sides run where TRL is installed.

Exit status: 0 if all passed, 1 if an equality does not hold or could not be checked, 2 if a measurement has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
TOTAL_SECONDS = 530
DRY_SECONDS = 300  # of one section, whatever else the CPU is doing
MAIN_PACKAGES = ("torch", "transformers", "peft", "accelerate", "triton", "trl")
DEVICE = """
import json, torch
available = torch.cuda.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if available else []
print(json.dumps({"gpus": names, "cuda": torch.version.cuda, "bfloat16": available and torch.cuda.is_bf16_supported()}))
"""


@dataclass(frozen=True)
class Section:
    """Measurements that share a budget of seconds: labels with a script and its arguments."""

    name: str
    seconds: float
    commands: dict[str, list[str]]
    is_equality: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--dry-run", action="store_true", help="on the CPU with tiny sizes; no figure means anything")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="SECTION/LABEL", help="patterns of measurements")
    parser.add_argument("--perturb", type=float, help="break the equalities by so much, to see that it is reported")
    args = parser.parse_args()
    begin = time.monotonic()
    found = {"dry_run": args.dry_run, "device": device(args.dry_run), "versions": versions(), "sections": {}}
    gpus = len(found["device"]["gpus"])
    if not args.dry_run and not gpus:
        sys.exit("torch finds no GPU here: run it where one is, or with --dry-run on the CPU.")
    for section in sections(dry=args.dry_run, gpus=gpus, perturb=args.perturb):
        chosen = {
            label: command
            for label, command in section.commands.items()
            if any(fnmatch(f"{section.name}/{label}", pattern) for pattern in args.only)
        }
        if not chosen:
            continue
        left = DRY_SECONDS if args.dry_run else min(section.seconds, TOTAL_SECONDS - (time.monotonic() - begin))
        record = found["sections"][section.name] = {"equality": section.is_equality, "measurements": {}}
        start = time.monotonic()
        for label, command in chosen.items():
            measured = measure(command, left - (time.monotonic() - start), one_gpu=section.name != "ddp")
            record["measurements"][label] = {**measured, "dry_run": args.dry_run}
            record["status"] = worst(each["status"] for each in record["measurements"].values())
            record["seconds"] = round(time.monotonic() - start, 1)
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{section.name}/{label}: {measured['status']}", file=sys.stderr, flush=True)
    print(table(found))
    sys.exit(exit_status(found))


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in MAIN_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def device(dry: bool) -> dict:
    if dry:
        return {"gpus": [], "cpus": os.cpu_count()}
    done = subprocess.run([sys.executable, "-c", DEVICE], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def sections(*, dry: bool, gpus: int, perturb: float | None) -> list[Section]:
    """Return what is measured, on a GPU or as a dry run."""
    trl = find_spec("trl") is not None and not dry
    place = ["--device", "cpu" if dry else "cuda"]
    equal = [*place, *(["--dry-run"] if dry else []), *([] if perturb is None else ["--perturb", str(perturb)])]
    types = {"both types": ["float32", "bfloat16"]} if dry else {name: [name] for name in ("float32", "bfloat16")}
    steps = [*place, "--random-model", "tiny" if dry else "qwen2-0.5b", "--dtype", "bfloat16"]
    steps += ["--steps", "2", "--warmup", "1"] if dry else ["--steps", "10", "--warmup", "4"]
    loop = ["--loop", "trainer"]
    own, theirs = ["--worker", "falign"], ["--worker", "trl"]
    hh = ["benchmark_offline.py", *steps, *loop, "--batch", "2" if dry else "16"]
    long = [*hh, "--prompt-tokens", "64" if dry else "1024", "--completion-tokens", "8" if dry else "128"]
    vocabulary, tokens, width = ("1003", "64", "32") if dry else ("151936", "8192", "896")
    on_head = ["benchmark_head.py", *place, "--dtype", "bfloat16", "--hidden", width, "--repeats", "3"]
    methods = ["falign", "dense"] if dry else ["falign", "forward_kl", "dense"]
    layouts = ["padded"] if dry else ["tree", "padded"]  # a dry run has trees with HH's lengths
    rows = [("tree", "1024")]
    if not dry:
        rows += [("tree", "4096"), ("tree", "16384"), ("tree", "32768"), ("padded", "4096"), ("padded", "16384")]
    in_memory = ["benchmark_memory.py", *place, "--dtype", "bfloat16", "--layers", "1" if dry else "8"]
    online = ["benchmark_online.py", *steps[:-4], *loop, "--prompts", "2" if dry else "8", "--completions"]
    online += ["2", "--new-tokens", "4", "--steps", "2"] if dry else ["8", "--new-tokens", "128", "--steps", "3"]
    processes = 2 if dry else gpus
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    equalities = {
        f"{what} {label}": ["gpu_equality.py", what, *equal, "--dtypes", *chosen]
        for what in ("tree", "head")
        for label, chosen in types.items()
    }
    in_parallel = {f"{processes} processes": [*launcher, "gpu_equality.py", "ddp", *equal]}
    long_prompts = {f"falign {layout}": [*long, *own, "--layout", layout] for layout in layouts}
    return [
        Section("equality", 150, equalities, is_equality=True),
        Section("ddp", 50, in_parallel, is_equality=True),
        Section("offline, HH lengths", 75, both(hh, own, theirs, trl)),
        Section("offline, long prompts", 75, {**long_prompts, **({"trl": [*long, *theirs]} if trl else {})}),
        Section("online", 70, both(online, own, theirs, trl)),
        Section(
            "head",
            55,
            {method: [*on_head, "--worker", method, vocabulary, tokens] for method in (*methods, *["trl"] * trl)},
        ),
        Section(
            "memory",
            55,
            {f"{layout} {row}": [*in_memory, "--layout", layout, "--worker", row] for layout, row in rows},
        ),
    ]


def both(command: list[str], own: list[str], theirs: list[str], trl: bool) -> dict[str, list[str]]:
    return {"falign": [*command, *own], **({"trl": [*command, *theirs]} if trl else {})}


def measure(command: list[str], seconds: float, *, one_gpu: bool = True) -> dict:
    """Run one measurement: a script of this folder, or a module; its last line is a JSON figure or object."""
    if seconds < 1:
        return {"status": "no time left", "seconds": 0.0, "error": "the time of this section or of the whole was over"}
    script = command.index(next(part for part in command if part.endswith(".py")))
    arguments = [*command[:script], str(SCRIPTS / command[script]), *command[script + 1 :]]
    environment = {**os.environ}
    if one_gpu:  # transformers would spread a batch over all that it sees
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    start = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # so that a launcher's processes end with it
    )
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out, err = child.communicate()
        spent = round(time.monotonic() - start, 1)
        return {"status": "timed out", "seconds": spent, "error": f"not over after {seconds:.0f} s: {err[-2000:]}"}
    spent = round(time.monotonic() - start, 1)
    if child.returncode:
        return {"status": "failed", "seconds": spent, "error": f"exit status {child.returncode}: {err[-4000:]}"}
    figures = json.loads(out.splitlines()[-1])
    figures = figures if isinstance(figures, dict) else {"mib": figures}
    broken = [check["name"] for check in figures.get("checks", ()) if not check["passed"]]
    if broken:
        return {"status": "unequal", "seconds": spent, "error": "; ".join(broken), "figures": figures}
    return {"status": "passed", "seconds": spent, "figures": figures}


def worst(statuses) -> str:
    order = ["passed", "no time left", "timed out", "failed", "unequal"]
    return max(statuses, key=order.index)


def exit_status(found: dict) -> int:
    bad = [section for section in found["sections"].values() if section["status"] != "passed"]
    return 1 if any(section["equality"] for section in bad) else 2 if bad else 0


def table(found: dict) -> str:
    """Return all figures as lines of text."""
    where = ", ".join(found["device"]["gpus"]) or "CPU"
    named = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    lines = [f"{where}; {named}"]
    mark = ""
    if found["dry_run"]:
        lines.append("DRY RUN on the CPU at tiny sizes: the figures say that the code runs, and nothing of its speed.")
        mark = "  [dry run]"
    for name, section in found["sections"].items():
        lines += ["", f"{name}: {section['status']}, {section['seconds']:.1f} s"]
        for label, measured in section["measurements"].items():
            lines.append(f"  {label:18} {measured['status']:12} {shown(measured.get('figures', {}))}{mark}")
            lines += [f"      {check_line(check)}{mark}" for check in measured.get("figures", {}).get("checks", ())]
            if "error" in measured:
                lines += [f"      {line}" for line in measured["error"].strip().splitlines()[-3:]]
    return "\n".join(lines)


def shown(figures: dict) -> str:
    """Return the figures of a measurement on one line."""
    units = {"seconds": "s", "peak_mib": "MiB peak", "mib": "MiB", "seconds_per_step": "s/step"}
    parts = [
        f"{value:.4g} {units.get(name, name)}" for name, value in figures.items() if isinstance(value, int | float)
    ]
    if "tokens" in figures:
        parts.append(f"{figures['tokens'] / figures['seconds']:.0f} tokens/s")
    return ", ".join(parts)


def check_line(check: dict) -> str:
    sign = "<=" if check["passed"] else "> "
    return f"{check['error']:.2e} {sign} {check['allowed']:.2e}  {check['name']}"


if __name__ == "__main__":
    main()
