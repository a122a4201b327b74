"""What `falign evaluate rewards` wrote, computed again with transformers alone: one completion at a time, full logits.

    falign evaluate rewards ./policy rm_bench code_filtered.jsonl.gz --reference ./base --dtype float32 --out checked
    python scripts/check_benchmark.py checked code_filtered.jsonl.gz

Reads files of RM-Bench and LLMBar; both models are folders that transformers reads, such as `falign export` writes, and
`--limit 20` is enough for a first look. Exits with 1 where the benchmark's scores differ by more than 1e-6
(`--tolerance`), or log-probabilities by more than the rounding of 32 bits, 5e-5 nats per token (`--rounding`).
"""

import argparse
import gzip
import json
import math
import sys
from itertools import takewhile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

F_PRIME = {"reverse_kl": lambda x: x, "jensen_shannon": lambda x: math.log(2) - math.log1p(math.exp(-x))}


def token_ids(tokenizer, prompt, completions):
    user = [{"role": "user", "content": prompt}]
    texts = [tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)]
    for completion in completions:
        turns = [*user, {"role": "assistant", "content": completion}]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    start = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*ids, strict=False))))
    ends = [len(row) - row[::-1].index(tokenizer.eos_token_id) for row in ids[1:]]
    return start, [row[:end] for row, end in zip(ids[1:], ends, strict=True)]


def logprob(model, ids, start):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None]).double().sum().item()


def rm_bench(values):
    cells = [[right > wrong for wrong in values[3:]] for right in values[:3]]
    where = {"easy": lambda i, j: i > j, "normal": lambda i, j: i == j, "hard": lambda i, j: i < j}
    return {k: sum(cells[i][j] for i in range(3) for j in range(3) if f(i, j)) / 3 for k, f in where.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-6)
    parser.add_argument("--rounding", type=float, default=5e-5)
    args = parser.parse_args()
    summary = json.loads((args.results / "summary.json").read_text())
    items = map(json.loads, filter(None, (args.results / "items.jsonl").read_text(encoding="utf-8").split("\n")))
    found = {Path(row["place"]).name: row for row in items}
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(summary[name], dtype=torch.float32).eval()
        for name in ("model", "reference")
    )
    tokenizer = AutoTokenizer.from_pretrained(summary["model"])
    beta, f_prime = summary["beta"], F_PRIME[summary["divergence"]]
    worst, outcomes = 0.0, {name: [] for name in ("implicit_reward", "length_normalised", "log_ratio", "logprob")}
    with (gzip.open if args.file.suffix == ".gz" else open)(args.file, "rt", encoding="utf-8") as lines:
        rows = {f"{args.file.name}:{number}": json.loads(line) for number, line in enumerate(lines, start=1)}
    for place, row in rows.items():
        if place not in found:
            continue
        pairs = "output_1" in row
        texts = [row["output_1"], row["output_2"]] if pairs else [*row["chosen"], *row["rejected"]]
        start, sequences = token_ids(tokenizer, row["input" if pairs else "prompt"], texts)
        scores = {name: [] for name in outcomes}
        for i, ids in enumerate(sequences):
            n, log_pi = len(ids) - start, logprob(policy, ids, start)
            log_ratio = log_pi - logprob(reference, ids, start)
            values = (beta * f_prime(log_ratio), beta * f_prime(log_ratio / n), log_ratio, log_pi)
            for name, value in zip(scores, values, strict=True):
                scores[name].append(value)
                mine = found[place]["scores"][name][i]
                worst = max(worst, abs(value - mine) / (1 if name == "length_normalised" else n))
        for name, values in scores.items():
            right = row.get("label", 1) - 1
            outcomes[name].append({"correct": values[right] > values[1 - right]} if pairs else rm_bench(values))
    scored = len(outcomes["logprob"])
    if not scored:
        sys.exit(f"{args.results} has no row of {args.file}: give the file that was scored.")
    print(f"{scored} items: scores per token differ by at most {worst:.2g}")
    wrong = worst > args.rounding or scored != summary["num_items"]
    for name, items in outcomes.items():
        mean = sum(sum(item.values()) / len(item) for item in items) / len(items)
        theirs = summary["scorers"][name]["scores"]["accuracy"]["value"]
        print(f"{name:18} {mean:.6f} here, {theirs:.6f} there")
        wrong |= abs(mean - theirs) > args.tolerance
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
