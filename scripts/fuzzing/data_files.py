"""Rows of every layout in every file type, and the published rows of every benchmark."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzzing import mutations
from tests.evaluation.benchmarks import samples
from tests.models.tiny import tiny_tokenizer

Attempt = Callable[[Random], None]
USER, ANSWER, OTHER = (
    {"role": role, "content": text} for role, text in (("user", "Hi?"), ("assistant", "Yes."), ("assistant", "No."))
)
LAYOUTS: dict[str, dict[str, Any]] = {
    "preference": {"prompt": "Hi? ", "chosen": "Yes.", "rejected": "No."},
    "turns": {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER], "system": "Be kind."},
    "implicit": {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    "words": {"chosen": "Hi there? Yes.", "rejected": "Hi there? No."},
    "hh": {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."},
    "alpaca": {"instruction": "Hi?", "input": "", "history": [["a", "b"]], "chosen": "Yes.", "rejected": "No."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi?"}], "chosen": {"from": "gpt", "value": "Yes."},
                 "rejected": {"from": "gpt", "value": "No."}},
    "ranked": {"prompt": "Hi? ", "completions": ["Yes.", "No.", "So."], "scores": [2.0, 1.0, 0.5]},
    "ranks": {"prompt": [USER], "completions": [[ANSWER], [OTHER]], "ranks": [1, 2]},
    "unpaired": {"prompt": "Hi? ", "completion": "Yes.", "label": True},
    "completion": {"messages": [USER, ANSWER]},
    "rehearsal": {"prompt": "Hi?", "prompt_ids": [4, 5], "completion_ids": [6, 7, 1], "logprobs": [-1.0, -0.5, -0.1]},
}  # fmt: skip
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".parquet")


def encoded(rows: Any, suffix: str) -> bytes:
    """Return rows as a file's content; what a type has no place for is written as JSON under its name."""
    text = json.dumps(rows)
    if suffix.startswith(".jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows) if isinstance(rows, list) else text
    if suffix.endswith(".gz"):
        return gzip.compress(text.encode("utf-8", "surrogatepass"), mtime=0)
    tabular = isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    if suffix == ".csv" and tabular:
        lines = io.StringIO()
        writer = csv.writer(lines)
        writer.writerow(rows[0])
        writer.writerows([row.values() for row in rows])
        return lines.getvalue().encode("utf-8", "surrogatepass")
    if suffix == ".parquet" and tabular:
        import pyarrow
        import pyarrow.parquet

        sink = io.BytesIO()
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError):
            return text.encode("utf-8", "surrogatepass")
        return sink.getvalue()
    return text.encode("utf-8", "surrogatepass")


def spoilt(random: Random, rows: list[dict[str, Any]], suffix: str) -> bytes:
    changed = mutations.tree(random, rows) if random.random() < 0.7 else rows
    content = encoded(changed, suffix)
    if changed is rows or random.random() < 0.1:
        if suffix.endswith(".gz") and random.random() < 0.5:
            return gzip.compress(mutations.content(random, gzip.decompress(content)))
        return mutations.content(random, content)
    return content


def data_rows(folder: Path) -> Attempt:
    """Preference data, prompts and rehearsal files, read as a run does, and as ``falign data check``."""
    from falign.data import DataSource, PromptSource, Window, check, load_preferences, load_prompts
    from falign.errors import ConfigError
    from falign.training.online.rehearsal_file import read_rehearsal

    tokenizer = tiny_tokenizer()
    templates = (
        None,
        "{prompt}",
        "{answer} {prompt[0]}",
        "{",
        "{prompt.x}",
        "{0}",
        "{prompt:d}",
        "{prompt!q}",
        "{prompt[role]}",
    )

    def attempt(random: Random) -> None:
        layout, suffix = random.choice(list(LAYOUTS)), random.choice(SUFFIXES)
        file = folder / f"rows{suffix}"
        file.write_bytes(spoilt(random, [LAYOUTS[layout]] * random.choice((1, 2, 5)), suffix))
        bad_rows: Any = random.choice(("error", "skip"))
        if layout == "rehearsal":
            read_rehearsal(str(file), num_tokens=260)
        elif random.random() < 0.25:
            template = random.choice(templates)
            source = PromptSource(
                str(file), template=template, chat=random.choice((True, False)), system=random.choice((None, "Be."))
            )
            load_prompts([source], tokenizer, max_length=64, long_prompt="cut", bad_rows=bad_rows)
        else:
            formats = (
                "auto",
                "auto",
                "auto",
                layout if layout not in ("turns", "words", "ranks") else "auto",
                "nonsense",
            )
            columns = random.choice(({}, {}, {}, {"prompt": "chosen"}, {"x": "y"}, {"chosen": "missing"}))
            try:
                source = DataSource(
                    str(file), format=random.choice(formats), columns=columns, chat=random.random() < 0.2
                )
            except ConfigError:
                return
            window = Window(64, None, random.choice(("error", "cut", "drop")), "cut")
            if random.random() < 0.3:
                check(source, tokenizer=tokenizer, stop_token_ids={1}, window=window)
            else:
                load_preferences([source], tokenizer, stop_token_ids={1}, window=window, bad_rows=bad_rows)

    return attempt


def benchmark_rows() -> dict[str, list[dict[str, Any]]]:
    return {
        "rewardbench": [samples.rewardbench_row("alpacaeval-easy", n) for n in range(3)],
        "rewardbench2": [samples.rewardbench2_row("Factuality", str(n)) for n in range(2)]
        + [samples.rewardbench2_row("Ties", "ref:0", 2, 2)],
        "rm_bench": [samples.rm_bench_row(n) for n in range(2)],
        "judgebench": [samples.judgebench_row("mmlu-pro-law", "A>B", n) for n in range(2)],
        "llmbar": [samples.llmbar_row(label, subset="Natural") for label in (1, 2)],
        "preferences": [LAYOUTS["preference"]] * 3,
    }


def benchmark_files(folder: Path) -> Attempt:
    """Files of reward benchmarks, read, tokenized and summarized under made-up scores."""
    from falign.data import BadRows, Window
    from falign.evaluation import ItemStream, benchmarks, read_items

    all_rows, tokenizer = benchmark_rows(), tiny_tokenizer()

    def attempt(random: Random) -> None:
        name, suffix = random.choice(list(all_rows)), random.choice(SUFFIXES)
        file = folder / f"rows{suffix}"
        file.write_bytes(spoilt(random, all_rows[name], suffix))
        benchmark = benchmarks.get(name if random.random() < 0.9 else random.choice(list(all_rows)))
        bad_rows = BadRows(random.choice(("error", "skip")))
        subsets = random.choice(((), (), (), ("Natural",), ("unknown",)))
        split = random.choice((None, None, "test", "anthropic_helpful", "\x00"))
        items = read_items(benchmark, str(file), split=split, subsets=subsets, bad_rows=bad_rows)
        long_items: Any = random.choice(("skip", "cut"))
        stream = ItemStream(
            items,
            tokenizer,
            stop_token_ids={1},
            window=Window(96, None, "cut", "cut"),
            long_items=long_items,
            bad_rows=bad_rows,
        )
        scored = [item for item, _ in stream]
        outcomes = [
            benchmark.outcome(item, [random.choice((0.0, 1.0, -2.0)) for _ in item.completions]) for item in scored
        ]
        if scored:
            benchmark.summarize([item.subset for item in scored], outcomes)

    return attempt
