"""Where the time of a DPO step goes, and how far it is from the machine's matrix-multiply limit.

    python scripts/profile_step.py --data ../shared/data/hh-rlhf/helpful-base-test.jsonl.gz --dtype bfloat16

Takes the options of benchmark_offline.py; the step is its plain loop.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import benchmark_offline as benchmark

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"),
    "attention": ("scaled_dot_product",),
    "softmax, exp, log": ("softmax", "aten::exp", "aten::log", "aten::silu", "aten::sigmoid", "logsumexp"),
}


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    args = benchmark.arguments()
    benchmark.sys.path.insert(0, str(benchmark.ROOT))
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(args.threads or torch.get_num_threads())
    trees, pad_token_id, tokenizer = benchmark.pairs(args)
    model = benchmark.with_adapter(args)

    def steps(number: int) -> list[float]:
        args.steps, clock = number, benchmark.Clock(args.device)
        with tempfile.TemporaryDirectory() as folder:
            benchmark.run_falign_bare(args, model, tokenizer, trees, pad_token_id, clock, Path(folder))
        return clock.seconds

    wanted = args.steps
    seconds = statistics.fmean(steps(wanted)[args.warmup :])
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        profiled = steps(1)[0]
    products = [event for event in profiler.key_averages() if event.key in KINDS["matrix products"]]
    flops = sum(event.flops for event in products)
    limit = matrix_multiply_rate(torch, getattr(torch, args.dtype), args.device)
    report(profiler, flops, limit, profiled)
    print(f"mean step, without the profiler: {seconds:.2f} s")


def matrix_multiply_rate(torch, dtype, device: str) -> float:
    """Operations per second of a product of the size of a layer's, at its best of a few."""
    x, w = torch.randn(1024, 576, dtype=dtype, device=device), torch.randn(1536, 576, dtype=dtype, device=device)
    best = 0.0
    for _ in range(20):
        start = time.perf_counter()
        x @ w.T
        if device != "cpu":
            torch.cuda.synchronize()
        best = max(best, 2 * x.numel() * len(w) / (time.perf_counter() - start))
    return best


def report(profiler, flops: int, limit: float, seconds: float) -> None:
    totals: dict[str, float] = {}
    for event in profiler.key_averages():
        kind = next((k for k, names in KINDS.items() if any(name in event.key for name in names)), "everything else")
        totals[kind] = totals.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    whole = sum(totals.values())
    for kind, total in sorted(totals.items(), key=lambda item: -item[1]):
        print(f"{kind:20} {total / whole:6.1%}")
    ideal = flops / limit
    print(f"first step {seconds:.2f} s; its matrix products, {flops / 1e12:.2f} TFLOP, take {ideal:.2f} s at "
          f"the {limit / 1e9:.0f} GFLOP/s that one alone reaches: {ideal / seconds:.0%}")  # fmt: skip


if __name__ == "__main__":
    main()
