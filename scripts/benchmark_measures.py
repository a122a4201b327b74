"""Measures over a large vocabulary: the memory of a step beyond its models, and what a second measure costs.

    python scripts/benchmark_measures.py --vocabulary 131072 --tokens 8192
    python scripts/benchmark_measures.py --tokens 1024 --pairs 5 --measures "expected_cost" "sinkhorn(16)"

One process runs steps (forward and backward, a head that does not train unless --trained-head) in turn with the first
measure alone and with all of them, so that each pair of times has the same conditions. Memory is the peak beyond the
weights of the heads and the hidden states, of the larger step. Measures read the reference `reference`.
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
    add("--trained-head", action="store_true")
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
    like = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    layers = [torch.nn.Linear(args.hidden, args.vocabulary, bias=False, **like).requires_grad_(False) for _ in range(2)]
    layers[0].requires_grad_(args.trained_head)
    hidden = torch.randn(args.tokens, args.hidden, **like)
    targets = torch.randint(args.vocabulary, (args.tokens,), device=args.device)
    one, all_of_them = (step(args, layers, hidden, targets, args.measures[:n]) for n in (1, len(args.measures)))
    for warm in (one, all_of_them):  # torch imports parts of itself in a first backward pass
        warm(8)
    begin, times = memory(args.device), []
    for _ in range(args.pairs):
        times.append([seconds(each, args) for each in (one, all_of_them)])
        print(f"  {times[-1][0]:8.2f} s, {times[-1][1]:8.2f} s: {times[-1][1] / times[-1][0]:.2f} times", flush=True)
    ratio = statistics.median(both / first for first, both in times)
    print(f"{args.tokens} tokens, vocabulary {args.vocabulary}, hidden {args.hidden}, {args.dtype}, {args.device}")
    print(f"{' and '.join(args.measures)}: {ratio:.2f} times {args.measures[0]} (median of {args.pairs} pairs)")
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
