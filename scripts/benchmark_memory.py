"""Peak memory of a step over the tokens of one row: 1k to 16k, as a table and a plot.

    python scripts/benchmark_memory.py --out docs/images/memory.png
    python scripts/benchmark_memory.py --device cuda --dtype bfloat16 --layers 8

Each point is a process of its own: one prompt tree with completions of a quarter of its tokens, LoRA on a model of
SmolLM2-135M's width with fewer layers, scored under policy and reference, forward and backward. Memory is what the
resident size grew by at its peak, or on a GPU what was allocated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmark_head import memory
from benchmark_offline import ROOT, annotations_without_jaxtyping


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    add("--layers", type=int, default=2)
    add("--tree-tokens", type=int, default=1024, help="tokens of one tree; a row is packed with as many as fit")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--layout", default="tree", choices=["tree", "padded"])
    add("--out", type=Path)
    add("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker:
        print(json.dumps(run(args, args.worker)))
        return
    print(f"{'tokens':>7} {'MiB':>7} {'MiB per 1k tokens':>18}")
    points = []
    for tokens in args.tokens:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(tokens)]
        # What is freed goes back at once, whatever its size, so that the peak is what was in use.
        given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        mib = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=given_back).stdout)
        points.append((tokens, mib))
        print(f"{tokens:7} {mib:7.0f} {1024 * mib / tokens:18.0f}", flush=True)
    if args.out:
        plot(points, args.out)


def run(args: argparse.Namespace, tokens: int) -> float:
    sys.path.insert(0, str(ROOT))
    annotations_without_jaxtyping()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from falign import FDPO, CompletionBatch
    from falign.models import add_lora
    from falign.references import AdapterOff
    from falign.scoring import LAYOUTS, PromptTree, completion_scores

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=args.layers,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=tokens, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype))
    policy = add_lora(model, r=16, alpha=32, seed=0).train()
    prompt, completion = args.tree_tokens // 2, args.tree_tokens // 4
    tree = PromptTree((7,) * prompt, ((8,) * completion, (9,) * completion), (1.0, 0.0))
    trees = [tree] * (tokens // tree.num_tokens)
    batch = LAYOUTS[args.layout](trees, pad_token_id=0).to(args.device)
    begin = memory(args.device)
    reference = AdapterOff().logprobs(policy, batch)
    output = FDPO()(
        CompletionBatch(
            logprobs=completion_scores(policy, batch).logprobs,
            completion_mask=batch.completion_mask,
            prompt_index=batch.prompt_index,
            reference_logprobs=reference,
            preference=batch.preference,
        )
    )
    output.mean().backward()
    return memory(args.device, peak=True) - begin


def plot(points: list[tuple[int, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    tokens, mib = zip(*points, strict=True)
    ends = [(tokens[0], mib[0]), (tokens[-1], mib[-1])]
    axis.plot(*zip(*ends, strict=True), color="#c9c9c9", linewidth=1.2, label="straight from the first to the last")
    axis.plot(tokens, mib, marker="o", color="#0b7a75", label="measured")
    axis.set_xlabel("tokens of the row")
    axis.set_ylabel("peak memory beyond the model, MiB")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
