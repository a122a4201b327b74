"""A run that is killed again and again, by `kill -9`, ends as the one that was left alone: same logs, same adapter.

    python scripts/kill_and_resume.py configs/quickstart.yaml --moments 20 training.max_steps=8 training.save_steps=2

The run file is first run to its end. Then it is run by `falign train` in a child process that is killed at a random
moment (in a training step, while a checkpoint is written, in an evaluation, in a rollout, while reference
log-probabilities are cached, or anywhere), goes on by `--resume`, is killed again, and so on. What both leave behind is
compared bit for bit: all logged metrics but those of time, the adapter, the completions, the summary. Moments are drawn
from `--seed`. The exit status is 1 where anything differs. A moving reference, a cache, an online run: whatever the run
file has is what is tried.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from falign.json_lines import read_journal

ANYWHERE = "anywhere"
PLACES = {
    "training step": ("falign.training.trainer:AlignmentTrainer.training_step",),
    "checkpoint": ("falign.training.trainer:AlignmentTrainer._save_checkpoint",),
    "evaluation": (
        "falign.training.trainer:AlignmentTrainer.evaluate",
        "falign.training.online.trainer:OnlineTrainer.evaluate",
    ),
    "rollout": ("falign.training.online.trainer:OnlineTrainer._roll_out",),
    "cache write": ("falign.references.store:LogprobStore.append",),
}


class Moment(NamedTuple):
    """When a process is killed: so far into the count-th time that it does something."""

    place: str
    count: int
    delay: float

    def __str__(self) -> str:
        return f"{self.place} {self.count}, after {self.delay * 1000:.1f} ms"


class Visit(NamedTuple):
    """What a process did: its exit status, and the seconds that each thing took each time."""

    status: int
    seconds: dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--moments", type=int, default=20, help="kills in all")
    parser.add_argument("--per-run", type=int, default=5, help="kills of one run, before it is left to end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the runs are kept; a temporary folder if left out")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        trial = Trial(arguments.run_file, arguments.overrides, arguments.out or Path(temporary))
        differences = trial.kill(arguments.moments, per_run=arguments.per_run, seed=arguments.seed)
    sys.exit(1 if differences else 0)


class Trial:
    """One run file, run once to its end and then killed."""

    def __init__(self, run_file: str, overrides: list[str], out: Path) -> None:
        self.run_file, self.overrides, self.out = run_file, overrides, out
        from falign.runfile import load_run_file

        self.cached = load_run_file(run_file, overrides).reference.cache is not None

    def kill(self, moments: int, *, per_run: int, seed: int) -> int:
        """Run, kill, compare and tell; return how many runs differ from the one that was left alone."""
        whole = self.visit("whole", None)
        if whole.status != 0:
            sys.exit(f"The run fails by itself, with exit status {whole.status}.")
        print(
            "left alone: " + ", ".join(f"{place} {len(times)}x" for place, times in whole.seconds.items()), flush=True
        )
        drawn, waiting = self.draw(whole, random.Random(seed)), None
        done = differences = runs = 0
        counts: dict[str, int] = defaultdict(int)
        while done < moments:
            runs += 1
            name, killed = f"killed-{runs}", 0
            while killed < per_run and done < moments:
                moment, waiting = waiting or next(drawn), None
                visit = self.visit(name, moment)
                if visit.status == 0:  # it was over before; the next run begins with this moment
                    waiting = moment
                    break
                if visit.status != -signal.SIGKILL:
                    sys.exit(f"{name}: exit status {visit.status} instead of the kill.")
                killed, done = killed + 1, done + 1
                counts[moment.place] += 1
                print(f"{done:3d}  {name}  killed in {moment}", flush=True)
            else:
                last = self.visit(name, None)
                if last.status != 0:
                    sys.exit(f"{name}: exit status {last.status} after its last --resume.")
            found = compare(self.out / "whole", self.out / name)
            differences += bool(found)
            print(f"     {name}  after {killed} kills: {'; '.join(found) or 'the same, bit for bit'}", flush=True)
            if killed == 0:
                sys.exit(f"{name} was never killed: the run is too short for {waiting}.")
        told = ", ".join(f"{place} {count}" for place, count in sorted(counts.items()))
        print(f"{done} kills ({told}) of {runs} runs; {differences} of them differ from the one left alone.")
        return differences

    def draw(self, whole: Visit, generator: random.Random) -> Iterator[Moment]:
        """Yield moments, each place once before any comes again."""
        while True:
            places = list(whole.seconds)
            generator.shuffle(places)
            for place in places:
                times = whole.seconds[place]
                count = generator.randint(1, max(1, len(times) // 2))
                yield Moment(place, count, generator.random() * times[count - 1])

    def visit(self, name: str, moment: Moment | None) -> Visit:
        """Start or resume a run, and kill it at a moment, or let it end."""
        folder = self.out / name
        if folder.exists() and not (folder / "run.yaml").is_file():
            shutil.rmtree(folder)  # killed before it had a name
        resume = ["--resume"] if folder.exists() else []
        cache = [f"reference.cache={self.out / f'{name}-cache'}"] if self.cached else []
        reading, writing = os.pipe()
        script, stop = str(Path(__file__).resolve()), moment and moment[:2]
        code = f"import runpy; runpy.run_path({script!r})['child']({writing}, {stop})"
        command = [sys.executable, "-c", code, "train", self.run_file, *self.overrides, f"output_dir={folder}", *cache]
        log = self.out / f"{name}.log"
        self.out.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen([*command, *resume], pass_fds=[writing], stdout=output, stderr=output)
        os.close(writing)
        with os.fdopen(reading) as reports:
            return follow(process, reports, moment)


def follow(process: subprocess.Popen[bytes], reports: Any, moment: Moment | None) -> Visit:
    """Read what a process reports until it ends, and kill it at the moment."""
    seconds: dict[str, list[float]] = {}
    begun: dict[str, float] = {}
    entered: dict[str, int] = defaultdict(int)
    for line in reports:
        at, what, place = line.rstrip("\n").split(" ", 2)
        if what == "leave":
            seconds.setdefault(place, []).append(float(at) - begun.pop(place))
            continue
        begun[place] = float(at)
        entered[place] += 1
        if moment is not None and (place, entered[place]) == (moment.place, moment.count):
            time.sleep(moment.delay)
            process.kill()
    status = process.wait()
    seconds[ANYWHERE] = [time.monotonic() - begun[ANYWHERE]]
    return Visit(status, seconds)


def compare(whole: Path, other: Path) -> list[str]:
    """Return what differs between two finished runs."""
    found = []
    left, right = metrics(whole), metrics(other)
    if left != right:
        steps = [log["step"] for log, twin in zip(left, right, strict=False) if log != twin]
        found.append(f"metrics.jsonl differs (step {steps[0] if steps else 'of one more or less'})")
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors", "completions.jsonl", "summary.json"):
        files = [folder / name for folder in (whole, other)]
        contents = [file.read_bytes() if file.is_file() else None for file in files]
        found += [] if contents[0] == contents[1] else [f"{name} differs"]
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return all that was logged but what depends on time."""
    logs = list(read_journal(folder / "metrics.jsonl"))
    timed = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
    timeless = [{key: log[key] for key in log if key not in timed} for log in logs]
    return [log for log in timeless if log.keys() - {"step", "epoch"}]


def child(pipe: int, stop: tuple[str, int] | None) -> None:
    """Be `falign`, and report to a pipe what is being done; what the parent kills in does not end before it."""
    from importlib import import_module

    def report(what: str, place: str) -> None:
        os.write(pipe, f"{time.monotonic()} {what} {place}\n".encode())

    def reporting(place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        count = 0

        def reported(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            number = count
            report("enter", place)
            value = function(*args, **kwargs)
            if stop == (place, number):
                time.sleep(600)
            report("leave", place)
            return value

        return reported

    report("enter", ANYWHERE)
    from falign.cli.foreign_output import quiet
    from falign.cli.main import main as falign

    quiet()
    for place, names in PLACES.items():
        for name in names:
            module, _, path = name.partition(":")
            owner, attribute = path.split(".")
            cls = getattr(import_module(module), owner)
            setattr(cls, attribute, reporting(place, getattr(cls, attribute)))
    falign()


if __name__ == "__main__":
    main()
