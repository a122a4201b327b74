"""Benchmark items scored by falign, and completion by completion in padded batches with transformers, in turn.

    python scripts/benchmark_evaluate.py ../shared/data/rm-bench/code_filtered.jsonl.gz --items 96
    python scripts/benchmark_evaluate.py code_filtered.jsonl rm_bench --dtype bfloat16 --device cuda --items 0

Both sides score the same tokens under a policy and a reference of the same size, in one precision. falign's is what
`falign evaluate rewards` runs: prompt trees of `--tokens-per-batch` tokens in the order of the file. The other one has
its best settings: completions sorted by length over the whole part (`--in-order` leaves that out), padded batches of
the size that was fastest on the first part among `--padded-tokens`, inference mode, logits from the first completion
token of a batch on (`--all-logits` computes all), no copy of the logits. The items are cut into `--parts`; each part is
scored by both sides, the first one taking turns, and only then the next.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from falign import FDPO
from falign.data import Window
from falign.evaluation import (
    ComparedScores,
    CompletionScorer,
    ItemScorer,
    ItemStream,
    ItemTree,
    batches_in_order,
    benchmarks,
    choose_common_layout,
    read_items,
)
from falign.models import load_model, load_tokenizer, stop_token_ids
from falign.models.tokenizers import pad_token_id
from falign.references import FrozenModel
from falign.scoring import Scorer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file")
    add("benchmark", nargs="?", default="rm_bench")
    add("--model", default="demo:smollm2-135m-instruct")
    add("--reference", help="by default the model itself, loaded twice")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--device", default="cpu")
    add("--items", type=int, default=48, help="the first ones that fit; 0 takes all")
    add("--parts", type=int, default=3)
    add("--max-length", type=int, default=2048)
    add("--tokens-per-batch", type=int, default=4096, help="falign's")
    add("--padded-tokens", type=int, nargs="+", default=[2048, 8192], help="the other side's, padding included")
    add("--in-order", action="store_true", help="padded batches in the order of the file, not sorted by length")
    add("--all-logits", action="store_true", help="of the prompts too, as model(...).logits gives them")
    add("--threads", type=int)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.model)
    policy, reference = (
        load_model(name, dtype=args.dtype, device=args.device) for name in (args.model, args.reference or args.model)
    )
    stream = ItemStream(
        read_items(benchmarks.get(args.benchmark), args.file),
        tokenizer,
        stop_token_ids=stop_token_ids(policy, tokenizer),
        window=Window(args.max_length),
        limit=args.items or None,
    )
    items = list(stream)
    parts = [items[start :: args.parts] for start in range(min(args.parts, len(items)))]
    completions = [len(ids) for item in items for ids in item.tree.completion_ids]
    tokens = sum(item.num_tokens for item in items)
    alone = sum(len(item.tree.prompt_ids) * len(item.tree.completion_ids) for item in items) + sum(completions)
    print(f"{args.model}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads")
    print(f"{len(items)} items, {len(completions)} completions, {tokens:,} tokens as trees, {alone:,} one by one")

    pad_id = pad_token_id(tokenizer)
    layout = choose_common_layout([policy, reference], [item.tree for item in items[:4]], pad_token_id=pad_id).layout
    scorer = CompletionScorer(
        policy=policy,
        reference=FrozenModel(reference),
        objective=FDPO("jensen_shannon", 0.1),
        scorer=Scorer(layout, pad_id),
    )
    trees = ItemScorer(names=("implicit_reward", "log_ratio", "logprob"), of_trees=ComparedScores(scorer))

    def falign(part: Sequence[ItemTree]) -> list[float]:
        batches = batches_in_order(part, max_tokens=args.tokens_per_batch)
        return [value for batch in batches for scores in trees.score(batch) for value in scores["logprob"]]

    def padded(part: Sequence[ItemTree], budget: int) -> list[float]:
        rows = [(item.tree.prompt_ids, ids) for item in part for ids in item.tree.completion_ids]
        order = list(range(len(rows)))
        if not args.in_order:
            order.sort(key=lambda i: len(rows[i][0]) + len(rows[i][1]))
        values = torch.zeros(2, len(rows))
        while order:
            longest = [len(rows[i][0]) + len(rows[i][1]) for i in order]
            size = max(n for n in range(1, len(order) + 1) if n == 1 or n * max(longest[:n]) <= budget)
            batch, order = order[:size], order[size:]
            for model, target in zip((policy, reference), values, strict=True):
                target[batch] = sums(model, [rows[i] for i in batch], pad_id, all_logits=args.all_logits)
        return values[0].tolist()

    warm_up = parts[0][:1]
    falign(warm_up), padded(warm_up, args.padded_tokens[0])
    trials = {budget: timed(padded, parts[0], budget)[0] for budget in args.padded_tokens}
    budget = min(trials, key=trials.__getitem__)
    shown = ", ".join(f"{size} tokens {seconds:.1f} s" for size, seconds in trials.items())
    print(f"layout {layout}; padded batches of at most {shown}: {budget} is used")
    print(f"{'part':>4} {'falign s':>9} {'padded s':>9} {'ratio':>6} {'largest difference per token':>29}")
    totals = {"falign": 0.0, "padded": 0.0}
    for number, part in enumerate(parts):
        sides = [("falign", falign, ()), ("padded", padded, (budget,))]
        found = {}
        for name, side, options in sides if number % 2 == 0 else sides[::-1]:
            seconds, found[name] = timed(side, part, *options)
            totals[name] += seconds
            found[f"{name} s"] = seconds
        lengths = [len(ids) for item in part for ids in item.tree.completion_ids]
        apart = max(abs(a - b) / n for a, b, n in zip(found["falign"], found["padded"], lengths, strict=True))
        a, b = found["falign s"], found["padded s"]
        print(f"{number + 1:>4} {a:>9.2f} {b:>9.2f} {b / a:>6.2f} {apart:>29.1e}")
    rates = {name: len(completions) / seconds for name, seconds in totals.items()}
    print(f"completions per second: falign {rates['falign']:.2f}, padded {rates['padded']:.2f}")
    print(f"falign's throughput over padded batches: {rates['falign'] / rates['padded']:.2f}")


def timed(side, part, *options) -> tuple[float, list[float]]:
    start = time.perf_counter()
    values = side(part, *options)
    return time.perf_counter() - start, values


@torch.inference_mode()
def sums(model, rows, pad_id: int, *, all_logits: bool) -> torch.Tensor:
    """Log-probabilities of the completions, summed, as anyone would write it with transformers."""
    lengths = torch.tensor([len(prompt) + len(ids) for prompt, ids in rows])
    starts = torch.tensor([len(prompt) for prompt, _ in rows])
    width = int(lengths.max())
    input_ids = torch.tensor([[*prompt, *ids, *[pad_id] * (width - len(prompt) - len(ids))] for prompt, ids in rows])
    columns = torch.arange(width)
    first = 0 if all_logits else int(starts.min()) - 1
    device = next(model.parameters()).device
    ids = input_ids.to(device)
    mask = (columns < lengths[:, None]).long().to(device)
    logits = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=width - first).logits[:, :-1]
    targets = ids[:, first + 1 :]
    picked = logits.gather(-1, targets[..., None])[..., 0].float()
    logprobs = picked - torch.stack([row.float().logsumexp(-1) for row in logits])
    counted = ((columns >= starts[:, None]) & (columns < lengths[:, None]))[:, first + 1 :].to(device)
    return logprobs.masked_fill(~counted, 0.0).sum(-1).cpu()


if __name__ == "__main__":
    main()
