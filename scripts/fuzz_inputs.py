"""Malformed inputs of every kind, made from valid ones: each is read, or refused by an error of falign's own.

    python scripts/fuzz_inputs.py --inputs 10000 --seed 0

An input counts as failed where it raises anything else, runs into the deadline, or leaves something unfinished under a
final name. Every input depends on the seed, its family and its number alone: it is repeated by

    python scripts/fuzz_inputs.py --seed 0 --family run_files --only 17
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SHARES = {
    "run_files": 0.19,
    "overrides": 0.12,
    "data_rows": 0.12,
    "rendered_rows": 0.02,
    "chat_templates": 0.03,
    "configurations": 0.07,
    "tokenizer_settings": 0.05,
    "checksums": 0.02,
    "benchmark_files": 0.14,
    "adapters": 0.06,
    "checkpoints": 0.06,
    "partial_results": 0.06,
    "reports": 0.02,
    "command_lines": 0.02,
    "whole_runs": 0.01,
}
"""What part of all inputs a family has: those that are soon tried have more."""


class Failure(NamedTuple):
    """An input that was neither read nor refused as it should be."""

    family: str
    number: int
    told: str


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--inputs", type=int, default=10_000)
    add("--seed", type=int, default=0)
    add("--family", choices=sorted(SHARES), action="append", help="only these; may be given several times")
    add("--only", type=int, help="only the input of this number")
    add("--deadline", type=float, default=30.0, help="seconds of one input")
    add("--memory", type=float, default=12.0, help="GiB of address space beyond what the libraries take")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    prepare(args.memory)
    print(f"{'family':16} {'inputs':>7} {'read':>7} {'refused':>8} {'failed':>7} {'seconds':>8}")
    total: Counter[str] = Counter()
    for family in args.family or SHARES:
        count = max(1, round(args.inputs * SHARES[family])) if args.family is None else args.inputs
        numbers = range(count) if args.only is None else [args.only]
        begin = time.perf_counter()
        counts, failed = run(family, numbers, seed=args.seed, deadline=args.deadline)
        total += counts
        show(family, counts, time.perf_counter() - begin)
        tell(failed, args.seed)
    show("all", total, time.process_time())
    sys.exit(bool(total["failed"]))


def tell(failures: list[Failure], seed: int) -> None:
    """Show one of each kind of failure, and how to repeat it."""
    alike: dict[str, list[Failure]] = {}
    for failure in failures:
        alike.setdefault(failure.told.partition("\n")[0], []).append(failure)
    for first, *others in alike.values():
        print(f"  {1 + len(others)} like --family {first.family} --seed {seed} --only {first.number}: {first.told}")


def prepare(memory: float | None = None) -> None:
    """Keep the libraries quiet and off the network, and this process from taking all of the machine."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "160",
    }
    sys.path.insert(0, str(ROOT))
    import torch

    from falign.cli.foreign_output import quiet

    quiet()
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if memory is not None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + int(memory * 2**30),) * 2)


def run(family: str, numbers: Any, *, seed: int, deadline: float) -> tuple[Counter[str], list[Failure]]:
    """Try the inputs of a family, in a folder of their own."""
    from fuzzing import chat_templates, data_files, model_files, results, run_files, weights

    modules = (run_files, data_files, chat_templates, model_files, weights, results)
    prepare_family = next(getattr(module, family) for module in modules if hasattr(module, family))
    counts: Counter[str] = Counter()
    failures: list[Failure] = []
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.chdir(folder)  # what an input names may be relative
        try:
            with silence():
                attempt = prepare_family(Path(folder))
            for number in numbers:
                told = outcome(attempt, Random(f"{seed} {family} {number}"), deadline)
                counts[told if told in ("read", "refused") else "failed"] += 1
                if told not in ("read", "refused"):
                    failures.append(Failure(family, number, told))
        finally:
            os.chdir(before)
    return counts, failures


def outcome(attempt: Any, random: Random, deadline: float) -> str:
    from falign.errors import FalignError

    try:
        with silence(), limited(deadline):
            attempt(random)
    except FalignError as error:
        if not str(error).strip() or len(str(error)) > 20_000:
            return f"a message of {len(str(error))} characters: {str(error)[:500]}"
        return "refused"
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        return told_of(error)
    return "read"


def told_of(error: BaseException) -> str:
    """Return what was raised, and where in falign and outside of it."""
    frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if f"{ROOT}/falign" in frame.filename]
    place = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else "outside of falign"
    return f"{type(error).__name__} at {place} (from {frames[-1]})\n    {str(error)[:300]}"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


class DeadlineError(BaseException):
    """One input took too long."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise DeadlineError(f"not done after {seconds:g} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def show(family: str, counts: Counter[str], seconds: float) -> None:
    numbers = [sum(counts.values()), counts["read"], counts["refused"], counts["failed"]]
    print(f"{family:16} {numbers[0]:7} {numbers[1]:7} {numbers[2]:8} {numbers[3]:7} {seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main()
