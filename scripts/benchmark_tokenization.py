"""Measure the tokenization of a data set: in one process, in several, and from the cache.

    python scripts/benchmark_tokenization.py [--rows N] [--processes N] [--model MODEL]

Rows are those of demo:polite-preference, repeated with a number in each prompt and longer answers.
"""

import argparse
import tempfile
import time
from pathlib import Path

from falign.data import DataSource, InMemory, Processing, Window, load_preferences, read_rows
from falign.models import load_tokenizer


def main() -> None:
    """Print one line per way of tokenizing, and check that all give the same tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    demo = [row.fields for row in read_rows("demo:polite-preference")]
    rows = [
        {
            **demo[i % len(demo)],
            "instruction": f"{i}. {demo[i % len(demo)]['instruction']}",
            "chosen": " ".join([demo[i % len(demo)]["chosen"]] * 8),
            "rejected": " ".join([demo[i % len(demo)]["rejected"]] * 8),
        }
        for i in range(options.rows)
    ]
    source = DataSource("python:rows", rows=InMemory(rows))

    def timed(name: str, processing: Processing):
        start = time.perf_counter()
        data = load_preferences([source], tokenizer, stop_token_ids=(), window=Window(2048), processing=processing)
        seconds = time.perf_counter() - start
        print(f"{name:24} {seconds:7.2f} s  {options.rows / seconds:7.0f} rows/s", flush=True)
        return data

    with tempfile.TemporaryDirectory() as folder:
        plain = timed("one process", Processing())
        same = [
            timed(f"{options.processes} processes", Processing(options.processes)),
            timed("filling the cache", Processing(cache=str(Path(folder)))),
            timed("from the cache", Processing(cache=str(Path(folder)))),
        ]
    assert all(data.train == plain.train for data in same)


if __name__ == "__main__":
    main()
