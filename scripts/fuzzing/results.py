"""What commands left: partial evaluations, caches and run folders of which one file is spoilt; and command lines."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzzing.run_files import local_runs, spoilt_text
from fuzzing.weights import PartialOutputError, fresh, spoil_one_file, trained_run

Attempt = Callable[[Random], None]


def partial_results(folder: Path) -> Attempt:
    """Half a file of scores, half a pre-sampling, a cache of log-probabilities: gone on with."""
    from falign.data import DataSource, Window
    from falign.evaluation import ScoreOutput, TreeStream, score_trees
    from falign.json_lines import sealed
    from falign.references.store import CacheKey, LogprobStore, entry_digest
    from falign.rollouts.presampling_journal import PresamplingJournal
    from tests.evaluation.scoring import tiny_scorer
    from tests.models.tiny import tiny_tokenizer
    from tests.training.pairs import write_pairs

    source, scorer = DataSource(str(write_pairs(folder / "pairs.jsonl", n=3)), chat=False), tiny_scorer()
    out, key = (
        folder / "partial" / "scores.jsonl",
        CacheKey(weights="w", config="c", vocabulary=260, tokenizer="t", dtype="d", attention="a"),
    )
    out.parent.mkdir()

    def score() -> None:
        trees = TreeStream(source, tiny_tokenizer(), stop_token_ids={1}, window=Window(64))
        with ScoreOutput(out, record={"policy": "x"}) as output:
            score_trees(trees, scorer, output, tokens_per_batch=64)

    score()
    rows = out.read_bytes().splitlines(keepends=True)
    out.unlink()
    (out.parent / ".scores.jsonl.partial.jsonl").write_bytes(b"".join(rows[:4]))
    sums = "".join(sha256(row.rstrip()).hexdigest() + "\n" for row in rows[:4])
    (out.parent / ".scores.jsonl.partial.sha256").write_text(sums)
    (out.parent / ".scores.jsonl.partial.json").write_text(json.dumps({"policy": "x"}))
    finding = {"num_correct": 1, "rehearsal": {"prompt_ids": [1], "completion_ids": [2], "logprobs": [-1.0]}}
    lines = [{"policy": "x"}, finding, {"num_correct": 0, "rehearsal": None}]
    (out.parent / "journal.jsonl").write_text("".join(map(sealed, lines)))
    entry = entry_digest([1], [2, 3])
    LogprobStore(out.parent / "cache", key=key).append({entry: torch.tensor([-1.0, -2.0])})
    original = folder / "original"
    out.parent.rename(original)

    def attempt(random: Random) -> None:
        copy = fresh(original, out.parent)
        what = random.choice((".scores*", "journal*", "cache/*"))
        spoil_one_file(random, copy, only=(what,))
        try:
            match what:
                case ".scores*":
                    score()
                case "journal*":
                    PresamplingJournal(copy / "journal.jsonl", record={"policy": "x"}, chunk_size=1, num_prompts=2)
                case _:
                    store = LogprobStore(copy / "cache", key=key)
                    if entry in store:
                        store.read([entry])
        except BaseException:
            if out.exists():
                raise PartialOutputError(f"{out} is there, though it was refused") from None
            raise

    return attempt


def reports(folder: Path) -> Attempt:
    """Run folders with one spoilt file, as ``falign report`` reads them."""
    from falign.report.runs import read_runs
    from falign.report.sections import SECTIONS
    from falign.report.writing import made_of, write_report
    from tests.report.summaries import rewards_summary, samples_summary

    runs = [trained_run(folder, number)[0] for number in (0, 7)]
    for run in runs:
        for name, summary in (("rewards", rewards_summary()), ("samples", samples_summary())):
            (run / "evaluation" / name).mkdir(parents=True)
            (run / "evaluation" / name / "summary.json").write_text(json.dumps(summary))

    def attempt(random: Random) -> None:
        copy = fresh(random.choice(runs), folder / "spoilt")
        spoil_one_file(random, copy, only=("*.json", "*.jsonl", "run.yaml"))
        if random.random() < 0.1:
            write_report([copy], copy / "report")
        else:
            made_of(random.choice(SECTIONS), read_runs([copy]))  # each draws its plots, which takes a while

    return attempt


def command_lines(folder: Path) -> Attempt:
    """Whole command lines: an exit status and a message, and never a traceback."""
    from falign.cli import main

    runs, spoilt = local_runs(folder), folder / "spoilt.yaml"
    run, _ = trained_run(folder, 0)
    pairs, model = str(folder / "pairs.jsonl"), str(folder / "tiny")

    def arguments(random: Random) -> list[str]:
        spoilt.write_bytes(spoilt_text(random, runs))
        copy = fresh(run, folder / "copy")
        spoil_one_file(random, copy, only=("run.yaml", "manifest.json", "adapter/*", "*.jsonl"))
        line = random.choice(
            (
                ["train", str(spoilt), "training.max_steps=1", "training.unknown=1"],
                ["data", "check", pairs, "--columns", "{prompt: chosen}", "--format", "auto"],
                ["data", "check", str(spoilt)],
                ["soup", str(copy), str(run), "--weights", "0.5", "0.5", "--out", str(folder / "soup")],
                ["export", str(copy), "--format", "adapter", "--out", str(folder / "export")],
                ["divergences", "alpha(0.5)"],
                ["report", str(copy), "--out", str(folder / "report")],
                ["score", str(copy), pairs, "--out", str(folder / "scores.jsonl")],
                ["evaluate", "rewards", str(copy), "--benchmark", "preferences", "--file", pairs, "--resamples", "2"],
                ["evaluate", "rewards", model, "--reference", model, "--benchmark", "llmbar", "--file", pairs],
            )
        )
        if random.random() < 0.6:
            position = random.randrange(len(line))
            near = (
                line[position][:-1],
                line[position] + "x",
                "",
                "²",
                "nan",
                "-1",
                "[red]",
                "--unknown",
                "\udcff",
                "1e999",
            )
            line[position] = random.choice(near)
        return line

    def attempt(random: Random) -> None:
        line = arguments(random)
        for name in ("soup", "export", "report"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "scores.jsonl").unlink(missing_ok=True)
        printed, before = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace"), sys.argv
        status: Any = 0
        try:
            sys.argv = ["falign", *line]
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                main()
        except SystemExit as stopped:
            status = stopped.code or 0
        finally:
            sys.argv = before
        printed.flush()
        text = printed.buffer.getvalue().decode()  # pyright: ignore[reportAttributeAccessIssue]
        if status not in (0, 2) or "Traceback" in text or not text.strip():
            raise AssertionError(f"falign {line} ended with {status} and {text[-300:]!r}")
        wrote = [path for path in (folder / "soup", folder / "export", folder / "scores.jsonl") if path.exists()]
        if status and wrote:
            raise PartialOutputError(f"falign {line} was refused, and left {wrote}")

    return attempt
