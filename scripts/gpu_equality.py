"""Equalities that a GPU could break, one per process: what two ways of computing the same thing differ by.

    python scripts/gpu_equality.py tree --dtypes float32 --device cuda
    python scripts/gpu_equality.py head --dtypes float32 bfloat16 --device cuda
    python -m torch.distributed.run --standalone --nproc-per-node 2 scripts/gpu_equality.py ddp --device cpu

`tree`: prompt trees (on a GPU by FlexAttention) against padded rows, log-probabilities and gradients of LoRA, with full
and with sliding-window attention. `head`: the chunked visit to the vocabulary against whole logits, log-probabilities,
entropy, a divergence and gradients. `ddp`: the gradient of several processes against that of one with all pairs.
The last line is JSON: checks with error and allowed error, and figures. scripts/gpu_check.sh runs all of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from functools import partial
from typing import NamedTuple

from benchmark_offline import ROOT, annotations_without_jaxtyping, with_adapter

SIZES = {  # of the tree's model; of the head; of the pairs of several processes
    False: {
        "layers": 4, "hidden": 512, "prompts": (700, 64, 9), "completions": (200, 33, 1, 80),
        "vocabulary": 151_936, "width": 896, "tokens": 1024, "chunk": 256,
        "model": "qwen2-0.5b", "pairs": 8, "prompt": 512, "completion": 128,
    },
    True: {
        "layers": 2, "hidden": 64, "prompts": (90, 17, 3), "completions": (70, 8, 1, 20),
        "vocabulary": 1003, "width": 32, "tokens": 50, "chunk": 16,
        "model": "tiny", "pairs": 4, "prompt": 24, "completion": 8,
    },
}  # fmt: skip
LORA_SCALE = 0.05
"""Of the matrix B, in place of training: at 0 the adapter would change nothing."""


class Check(NamedTuple):
    """One equality."""

    name: str
    error: float
    allowed: float

    def as_json(self) -> dict:
        passed = self.error <= self.allowed  # False for nan
        return {"name": self.name, "error": self.error, "allowed": self.allowed, "passed": passed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("equality", choices=sorted(EQUALITIES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    parser.add_argument("--perturb", type=float, default=0.0, help="break one side of each equality by so much")
    args = parser.parse_args()
    args.sizes = argparse.Namespace(**SIZES[args.dry_run])
    sys.path.insert(0, str(ROOT))
    annotations_without_jaxtyping()
    checks, figures = [], {}
    for dtype in args.dtypes:
        args.dtype = dtype
        found, measured = EQUALITIES[args.equality](args)
        checks += [check._replace(name=f"{dtype}: {check.name}") for check in found]
        figures |= measured
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"checks": [check.as_json() for check in checks], **figures}))


def tree(args: argparse.Namespace) -> tuple[list[Check], dict]:
    import torch

    checks = []
    for kind in ("qwen2", "mistral"):  # full attention; a sliding window
        exact = tree_model(args, kind, torch.float32)
        trees = prompt_trees(args)
        truth, truth_gradient = scored(exact, trees, "padded", args.device)
        if args.dtype == "float32":
            found, gradient = scored(exact, trees, "tree", args.device)
            found = found + args.perturb
            checks += [
                Check(f"{kind}: log-probabilities, nats", largest(found - truth), 1e-4),
                Check(f"{kind}: gradient, relative", relative(gradient, truth_gradient), 1e-3),
            ]
            continue
        # Rounding to 16 bits is an error of both layouts; the tree's may not be larger than that of padded rows.
        rounded = tree_model(args, kind, torch.bfloat16)
        padded, padded_gradient = scored(rounded, trees, "padded", args.device)
        found, gradient = scored(rounded, trees, "tree", args.device)
        found = found + args.perturb
        checks += [
            Check(f"{kind}: mean error, nats", mean(found - truth), 1.5 * mean(padded - truth) + 1e-3),
            Check(f"{kind}: largest error, nats", largest(found - truth), 2 * largest(padded - truth) + 1e-2),
            Check(
                f"{kind}: gradient, relative",
                relative(gradient, truth_gradient),
                1.5 * relative(padded_gradient, truth_gradient) + 1e-2,
            ),
        ]
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if args.device != "cpu" and not compiled:
        raise SystemExit("trees were scored on a GPU, and FlexAttention was not compiled")
    return checks, {"flex_attention_graphs": compiled}


def tree_model(args: argparse.Namespace, kind: str, dtype):
    """A random model with an adapter that has an effect; of the same weights in each type."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from falign.models.adapters import add_lora

    sizes = args.sizes
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=2000, hidden_size=sizes.hidden, intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers, num_attention_heads=8 if sizes.hidden > 64 else 4, num_key_value_heads=2,
        initializer_range=0.06, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        **({"sliding_window": 48} if kind == "mistral" else {}),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(torch.bfloat16)
    model = add_lora(model.to(args.device, dtype), r=8, alpha=16, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            noise = LORA_SCALE * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise.to(torch.bfloat16))
    return model.train()


def prompt_trees(args: argparse.Namespace) -> list:
    from falign.scoring import PromptTree

    rng = random.Random(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 2000) for _ in range(length))

    return [PromptTree(ids(length), tuple(map(ids, args.sizes.completions))) for length in args.sizes.prompts]


def scored(model, trees: list, layout: str, device: str) -> tuple:
    """Return log-probabilities of all completion tokens, and the gradient of their weighted sum by the adapter."""
    import torch

    from falign.scoring import LAYOUTS, completion_scores

    batch = LAYOUTS[layout](trees, pad_token_id=0).to(device)
    logprobs = completion_scores(model, batch).logprobs[batch.completion_mask]
    weights = torch.linspace(-1, 1, len(logprobs), device=device)
    (logprobs * weights).sum().backward()
    return logprobs.detach().float(), taken_gradient(model)


def taken_gradient(model):
    """Return the gradient of all trained parameters as one vector, and clear it."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = torch.cat([parameter.grad.flatten().float() for parameter in trained])
    model.zero_grad()
    return gradient


def head(args: argparse.Namespace) -> tuple[list[Check], dict]:
    import torch
    from torch.nn.functional import linear

    from falign import divergences
    from falign.objectives import DivergenceTo
    from falign.scoring import Distribution, Head, token_scores

    sizes = args.sizes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0):
        return (scale * torch.randn(shape, generator=generator)).to(torch.bfloat16).to(args.device)

    weights = [draw(sizes.vocabulary, sizes.width, scale=2 * sizes.width**-0.5) for _ in range(2)]
    hidden = draw(sizes.tokens, sizes.width)
    other = hidden + draw(sizes.tokens, sizes.width, scale=0.1)
    targets = torch.randint(sizes.vocabulary, (sizes.tokens,), generator=generator).to(args.device)
    measures = {"forward_kl": DivergenceTo(divergences.get("forward_kl"))}

    def dense(dtype) -> dict:
        state = hidden.clone().to(dtype).requires_grad_()
        policy, reference = (
            (states @ weight.to(dtype).T).float().log_softmax(dim=-1)
            for states, weight in zip((state, other.to(dtype)), weights, strict=True)
        )
        logprobs = policy.gather(-1, targets[:, None])[:, 0]
        divergence = (reference.exp() * (reference - policy)).sum(dim=-1)
        (logprobs + divergence).sum().backward()
        entropy = -(policy.exp() * policy).sum(dim=-1)
        values = {"log-probabilities, nats": logprobs, "entropy, nats": entropy, "forward KL, nats": divergence}
        return {name: value.detach() for name, value in values.items()} | {"gradient, relative": state.grad.float()}

    def chunked(dtype) -> dict:
        state = hidden.clone().to(dtype).requires_grad_()
        policy, reference = (
            Distribution(states, Head(embeddings=partial(linear, weight=weight.to(dtype))))
            for states, weight in zip((state, other.to(dtype)), weights, strict=True)
        )
        references = {"reference": reference}
        scores = token_scores(policy, targets, measures=measures, references=references, chunk_tokens=sizes.chunk)
        divergence = scores.measures["forward_kl"]
        (scores.logprobs + divergence).sum().backward()
        values = (scores.logprobs + args.perturb, scores.entropy, divergence)
        names = ("log-probabilities, nats", "entropy, nats", "forward KL, nats")
        found = dict(zip(names, (value.detach() for value in values), strict=True))
        return found | {"gradient, relative": state.grad.float()}

    truth, dtype = dense(torch.float32), getattr(torch, args.dtype)
    found = chunked(dtype)
    # In 16 bits both round; the chunked pass may not be further from the truth than whole logits of the same type.
    alike = dense(dtype) if dtype == torch.bfloat16 else None
    checks = []
    for name, value in truth.items():
        difference = relative if "relative" in name else lambda one, two: largest(one - two)
        allowed = 1e-4 if alike is None else 1.5 * difference(alike[name], value) + 1e-3
        checks.append(Check(name, difference(found[name], value), allowed))
    return checks, {}


def ddp(args: argparse.Namespace) -> tuple[list[Check], dict]:
    """The loss of several processes as the trainer computes it: terms over global weights, gradients averaged."""
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    from falign.methods import FDPO
    from falign.objectives import reduce_terms, total_weights
    from falign.references import AdapterOff, objective_inputs
    from falign.scoring import LAYOUTS, PromptTree

    backend = "gloo" if args.device == "cpu" else "nccl"
    distributed.init_process_group(backend)
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    device = "cpu" if args.device == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}"
    if device != "cpu":
        torch.cuda.set_device(device)
    sizes, rng = args.sizes, random.Random(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 1000) for _ in range(length))

    pairs = [
        # Of unequal lengths, so that a mean of the processes' means would be another number.
        PromptTree(ids(sizes.prompt), (ids(sizes.completion), ids(1 + sizes.completion // (1 + i))), (1.0, 0.0))
        for i in range(sizes.pairs * processes + 1)
    ]
    named = {"random_model": sizes.model, "model": None, "dtype": args.dtype, "device": device, "r": 8}
    model = with_adapter(argparse.Namespace(**named))
    objective, references = FDPO(beta=0.1), {"reference": AdapterOff()}

    def step(rows: list, wrapped) -> float:
        batch = LAYOUTS["tree"](rows, pad_token_id=0).to(device)
        scored = objective_inputs(model, batch, references=references, objective=objective, wrapped=wrapped)
        terms = objective(scored.completions).terms
        totals = total_weights(terms)
        if wrapped is not None:
            distributed.all_reduce(totals)
        loss = reduce_terms(terms, totals) * (1 if wrapped is None else processes)
        loss.backward()
        return loss.item()

    step(pairs, None)
    whole = taken_gradient(model)
    parallel = DistributedDataParallel(model, device_ids=None if device == "cpu" else [rank])
    own = pairs[rank::processes]
    step(own, parallel)
    together = taken_gradient(model)
    together = together + args.perturb * together.norm() / len(together) ** 0.5
    checks = [Check(f"gradient of {processes} processes against one, relative", relative(together, whole), 1e-3)]
    seconds = []
    for _ in range(3):
        distributed.barrier()
        start = time.perf_counter()
        step(own, parallel)
        taken_gradient(model)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    # The last to hold the group must not be DDP: it ends gloo's thread while that thread waits for Python's lock.
    del parallel
    gc.collect()
    distributed.destroy_process_group()
    return checks, {"backend": backend, "processes": processes, "seconds_per_step": min(seconds)}


def largest(difference) -> float:
    return difference.abs().max().item()


def mean(difference) -> float:
    return difference.abs().mean().item()


def relative(found, truth) -> float:
    return ((found - truth).norm() / truth.norm()).item()


EQUALITIES = {"tree": tree, "head": head, "ddp": ddp}

if __name__ == "__main__":
    main()
