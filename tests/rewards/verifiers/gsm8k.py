"""The real attempts at GSM8K, with their labels."""

import gzip
import json

ATTEMPTS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def rows(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def attempts(shared_data):
    """Return (solution, gold answer, label) of each attempt."""
    answers = {row["question"]: row["answer"] for row in rows(shared_data("gsm8k/test.jsonl.gz"))}
    graded = rows(shared_data("gsm8k/example_model_solutions.jsonl.gz"))
    return [
        (row[name]["solution"], answers[row["question"]], row[name]["is_correct"])
        for row in graded
        for name in ATTEMPTS
    ]
