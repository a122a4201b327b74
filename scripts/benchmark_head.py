"""The head alone, over vocabulary and length: seconds and memory of log-probabilities, and of a divergence.

    python scripts/benchmark_head.py --vocabulary 49152 131072 --tokens 1024 8192

Each cell runs forward and backward in a process of its own, for a head that does not train: falign's (`falign`, and
`forward_kl` with the divergence of two heads over the whole vocabulary at each token), TRL's chunked function (`trl`)
and a log-softmax of the whole logits (`dense`, where they fit into --dense-gib). Memory is what the resident size grew
by, or on a GPU what was allocated, beyond inputs and weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmark_offline import ROOT, annotations_without_jaxtyping


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--vocabulary", type=int, nargs="+", default=[49152, 131072])
    add("--tokens", type=int, nargs="+", default=[1024, 8192])
    add("--hidden", type=int, default=576)
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--device", default="cpu")
    add("--repeats", type=int, default=2)
    add("--chunk-tokens", type=int)
    add("--methods", nargs="+", default=["falign", "trl", "dense", "forward_kl"])
    add("--dense-gib", type=float, default=4.0)
    add("--worker", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker:
        method, vocabulary, tokens = args.worker
        print(json.dumps(run(args, method, int(vocabulary), int(tokens))))
        return
    print(f"hidden {args.hidden}, {args.dtype}, {args.device}")
    print(f"{'vocabulary':>10} {'tokens':>7} {'method':11} {'seconds':>8} {'MiB':>7}")
    for vocabulary in args.vocabulary:
        for tokens in args.tokens:
            for method in args.methods:
                if method == "dense" and 16 * vocabulary * tokens > args.dense_gib * 2**30:
                    continue
                command = [sys.executable, __file__, *sys.argv[1:], "--worker", method, str(vocabulary), str(tokens)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                cell = json.loads(done.stdout.splitlines()[-1])
                print(f"{vocabulary:10} {tokens:7} {method:11} {cell['seconds']:8.3f} {cell['mib']:7.0f}", flush=True)


def run(args: argparse.Namespace, method: str, vocabulary: int, tokens: int) -> dict:
    sys.path.insert(0, str(ROOT))
    annotations_without_jaxtyping()
    import torch

    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    layers = [
        torch.nn.Linear(args.hidden, vocabulary, bias=False, device=args.device, dtype=dtype).requires_grad_(False)
        for _ in range(2)
    ]
    hidden = torch.randn(tokens, args.hidden, device=args.device, dtype=dtype)
    targets = torch.randint(vocabulary, (tokens,), device=args.device)
    # A step on few tokens first: torch imports parts of itself in a first backward pass, which would count as memory.
    METHODS[method](layers, hidden[:8].clone().requires_grad_(), hidden[:8] + 0.1, targets[:8], args)()
    step = METHODS[method](layers, hidden.clone().requires_grad_(), hidden + 0.1, targets, args)
    begin = memory(args.device)
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        step()
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "mib": memory(args.device, peak=True) - begin}


def memory(device: str, *, peak: bool = False) -> float:
    import torch

    if device != "cpu":
        if not peak:
            torch.cuda.reset_peak_memory_stats()
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    name = "VmHWM:" if peak else "VmRSS:"
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) / 2**10


def falign_step(layers, hidden, other, targets, args):
    from falign.scoring import DEFAULT_CHUNK_TOKENS, Distribution, Head, token_scores

    policy, chunk_tokens = Distribution(hidden, Head(embeddings=layers[0])), args.chunk_tokens or DEFAULT_CHUNK_TOKENS
    return lambda: token_scores(policy, targets, chunk_tokens=chunk_tokens).logprobs.sum().backward()


def divergence_step(layers, hidden, other, targets, args):
    from falign import divergences
    from falign.objectives import DivergenceTo
    from falign.scoring import DEFAULT_CHUNK_TOKENS, Distribution, Head, token_scores

    policy, reference = Distribution(hidden, Head(embeddings=layers[0])), Distribution(other, Head(layers[1]))
    measures, references = {"divergence": DivergenceTo(divergences.get("forward_kl"))}, {"reference": reference}
    chunk_tokens = args.chunk_tokens or DEFAULT_CHUNK_TOKENS

    def step() -> None:
        scores = token_scores(policy, targets, measures=measures, references=references, chunk_tokens=chunk_tokens)
        (scores.logprobs + scores.measures["divergence"]).sum().backward()

    return step


def trl_step(layers, hidden, other, targets, args):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    # What its DPO trainer asks for beside the log-probabilities.
    outputs = ("entropy", "mean_logits", "is_top1")

    def step() -> None:
        logprobs = ChunkedLogProbFunction.apply(
            hidden, layers[0].weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
        )[0]
        logprobs.sum().backward()

    return step


def dense_step(layers, hidden, other, targets, args):
    def step() -> None:
        logprobs = layers[0](hidden).float().log_softmax(dim=-1)
        logprobs.gather(-1, targets[:, None]).sum().backward()

    return step


METHODS = {"falign": falign_step, "forward_kl": divergence_step, "trl": trl_step, "dense": dense_step}

if __name__ == "__main__":
    main()
