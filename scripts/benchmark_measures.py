"""Measures over a large vocabulary: the memory of a step beyond its models, and what a second measure costs.

    python scripts/benchmark_measures.py --vocabulary 131072 --tokens 8192
    python scripts/benchmark_measures.py --tokens 1024 --pairs 5 --measures "expected_cost" "sinkhorn(16)"
    python scripts/benchmark_measures.py --tokens 64 --pairs 5 --threads 1 --alone --measures entropy "rank_top_k(100)"

One process runs steps (forward and backward, a head that does not train unless --trained-head) in turn with the first
measure alone and with all of them, so that each pair of times has the same conditions; with --alone, without measures
and with each by itself. Memory is the peak beyond the weights of the heads and the hidden states, of the larger step.
Measures read the reference `reference`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--vocabulary", type=int, default=131072)
    add("--tokens", type=int, default=8192)
    add("--hidden", type=int, default=576)
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--device", default="cpu")
    add("--pairs", type=int, default=2)
    add("--chunk-tokens", type=int)
    add("--threads", type=int, help="of the processor; by default all")
    add("--trained-head", action="store_true")
    add("--alone", action="store_true", help="time each measure by itself")
    add("--measures", nargs="+", default=["divergence_to(forward_kl)", "divergence_to(jensen_shannon)"])
    return parser.parse_args()


def main() -> None:
    args = arguments()
    sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
    from benchmark_head import memory
    from benchmark_offline import annotations_without_jaxtyping

    annotations_without_jaxtyping()
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    like = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    layers = [torch.nn.Linear(args.hidden, args.vocabulary, bias=False, **like).requires_grad_(False) for _ in range(2)]
    layers[0].requires_grad_(args.trained_head)
    hidden = torch.randn(args.tokens, args.hidden, **like)
    targets = torch.randint(args.vocabulary, (args.tokens,), device=args.device)
    sets = [[], *([name] for name in args.measures)] if args.alone else [args.measures[:1], args.measures]
    steps = [step(args, layers, hidden, targets, names) for names in sets]
    for warm in steps:  # torch imports parts of itself in a first backward pass
        warm(8)
    begin, times = memory(args.device), []
    for _ in range(args.pairs):
        times.append([seconds(each, args) for each in steps])
        print(" ", ", ".join(f"{each:.3f} s" for each in times[-1]), flush=True)
    print(f"{args.tokens} tokens, vocabulary {args.vocabulary}, hidden {args.hidden}, {args.dtype}, {args.device}")
    for number, names in enumerate(sets):
        ratio = statistics.median(each[number] / each[0] for each in times)
        middle = statistics.median(each[number] for each in times)
        print(f"{' and '.join(names) or 'none'}: {middle:.3f} s, {ratio:.2f} times the first (median of {args.pairs})")
    print(f"peak beyond the models: {(memory(args.device, peak=True) - begin) / 1024:.2f} GiB")


def step(args, layers, hidden, targets, names):
    from falign.objectives import get_measure
    from falign.scoring import DEFAULT_CHUNK_TOKENS, Distribution, Head, token_scores

    measures = {name: get_measure(name) for name in names}

    def run(tokens: int = args.tokens) -> None:
        policy = Distribution(hidden[:tokens].clone().requires_grad_(), Head(embeddings=layers[0]))
        scores = token_scores(
            policy,
            targets[:tokens],
            measures=measures,
            references={"reference": Distribution(hidden[:tokens] + 0.1, Head(embeddings=layers[1]))},
            chunk_tokens=args.chunk_tokens or DEFAULT_CHUNK_TOKENS,
        )
        sum(scores.measures.values(), scores.logprobs).sum().backward()

    return run


def seconds(run, args) -> float:
    start = time.perf_counter()
    run()
    if args.device != "cpu":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
