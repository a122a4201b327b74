"""Memory of each GPU and time of a step for large models, from a cost model: nothing here was measured on a GPU.

    python scripts/scaling.py --gpu h200 --prompt-tokens 512 --completion-tokens 512
    python scripts/scaling.py --check

Units are bytes, operations (one multiplication and one addition are two) and seconds. `--check` prints the model's
figures beside those that were measured on a CPU. docs/scaling.md says what each formula leaves out.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

GIB, MIB = 2**30, 2**20
FLOAT32, BFLOAT16 = 4, 2
# One byte of scale per 64 weights and one float32 per 256 of these scales (double quantization), besides four bits.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like model, as its configuration has them."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def kv(self) -> int:
        """Width of keys, and of values."""
        return self.hidden // self.heads * self.kv_heads

    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of one block: q, k, v, o, gate, up, down."""
        h, i, kv = self.hidden, self.intermediate, self.kv
        return [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]

    def linear_parameters(self) -> int:
        """Weights of all blocks' linear layers, which NF4 quantizes and LoRA adapts."""
        return self.layers * sum(n * m for n, m in self.linears())

    def other_parameters(self) -> int:
        """Embeddings, head and norms, which stay in 16 bits."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden

    def parameters(self) -> int:
        """All weights."""
        return self.linear_parameters() + self.other_parameters()

    def lora_parameters(self, rank: int) -> int:
        """A (r × in) and B (out × r) on every linear layer of every block."""
        return self.layers * sum(rank * (n + m) for n, m in self.linears())


SHAPES = {
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 49_152, tied=True),
    "8b": Shape(32, 4096, 14_336, 32, 8, 128_256),  # Llama 3.1 8B
    "70b": Shape(80, 8192, 28_672, 64, 8, 128_256),  # Llama 3.1 70B
}


@dataclass(frozen=True)
class Gpu:
    """What the vendor publishes of one GPU and of what connects it."""

    memory: float
    operations: float
    bandwidth: float
    inside: float
    """Bytes per second in one direction between GPUs of one machine of 8."""
    outside: float
    """The same between machines."""


# NVIDIA's data sheets of H100 SXM and H200 SXM: dense bfloat16 (half of the figure with sparsity), HBM, NVLink 900 GB/s
# for both directions together. Between machines one 400 Gbit/s port for each GPU, as in NVIDIA's DGX H100.
GPUS = {
    "h100": Gpu(80e9, 989.5e12, 3.35e12, 450e9, 50e9),
    "h200": Gpu(141e9, 989.5e12, 4.8e12, 450e9, 50e9),
}


@dataclass(frozen=True)
class Step:
    """One optimizer step of one GPU: prompts with completions each, and how they are computed."""

    prompts: int = 1
    completions: int = 2
    prompt_tokens: int = 512
    completion_tokens: int = 512
    tree: bool = True
    checkpointing: bool = True
    live_reference: bool = True
    chunk_tokens: int = 256

    @property
    def tokens(self) -> int:
        """Tokens that reach the blocks: a tree has its prompt once, rows of their own have it once each."""
        read = 1 if self.tree else self.completions
        return self.prompts * (read * self.prompt_tokens + self.completions * self.completion_tokens)

    @property
    def scored(self) -> int:
        """Tokens that reach the vocabulary."""
        return self.prompts * self.completions * self.completion_tokens

    @property
    def passes(self) -> int:
        """Passes through the blocks that cost as much as a forward pass.

        Forward; backward to the inputs alone, because weights are frozen; the reference; what is computed again.
        """
        return 2 + self.live_reference + self.checkpointing


@dataclass(frozen=True)
class Cost:
    """Bytes of one GPU, and seconds of one step."""

    weights: float
    gathered: float
    adapter: float
    activations: float
    head: float
    compute: float
    unpacking: float
    exchange: float

    @property
    def memory(self) -> float:
        """All bytes."""
        return self.weights + self.gathered + self.adapter + self.activations + self.head

    @property
    def seconds(self) -> float:
        """Weights are gathered while others are computed, so the longer of the two counts."""
        return max(self.compute + self.unpacking, self.exchange)


def weight_bytes(shape: Shape, *, nf4: bool) -> float:
    """Bytes of the frozen base."""
    return shape.linear_parameters() * (NF4 if nf4 else BFLOAT16) + shape.other_parameters() * BFLOAT16


def adapter_bytes(shape: Shape, rank: int) -> int:
    """Bytes of the adapter in float32: weights, gradients and AdamW's two moments."""
    return 4 * FLOAT32 * shape.lora_parameters(rank)


def block_activation(shape: Shape, width: int) -> int:
    """Bytes that one block keeps of one token for the backward pass.

    Six vectors of the hidden size (both norms' inputs and outputs, the attention's output, the residual), queries, keys
    and values before and after the rotation, and four of the intermediate size (gate, its activation, up, product).
    """
    return width * (6 * shape.hidden + 2 * (shape.hidden + 2 * shape.kv) + 4 * shape.intermediate)


def activation_bytes(shape: Shape, step: Step, width: int = BFLOAT16) -> int:
    """Bytes kept for the backward pass: of all blocks, or their inputs and one block's at a time."""
    if not step.checkpointing:
        return step.tokens * shape.layers * block_activation(shape, width)
    return step.tokens * (shape.layers * width * shape.hidden + block_activation(shape, width))


def head_bytes(shape: Shape, step: Step) -> int:
    """Bytes of the vocabulary's tiles: logits and their exponentials in float32, one chunk at a time."""
    return 2 * FLOAT32 * min(step.chunk_tokens, step.scored) * shape.vocabulary


def attention_operations(shape: Shape, step: Step) -> float:
    """Operations of attention in one pass: scores and their sums over what each token sees.

    A token of the prompt sees half of it in the mean; one of a completion the prompt and half of the completion.
    """
    p, c = step.prompt_tokens, step.completion_tokens
    of_prompts = p * p / 2 * (1 if step.tree else step.completions)
    of_completions = step.completions * (p * c + c * c / 2)
    return 4 * shape.layers * shape.hidden * step.prompts * (of_prompts + of_completions)


def block_operations(shape: Shape, step: Step) -> float:
    """Operations of one pass through all blocks."""
    return 2 * shape.linear_parameters() * step.tokens + attention_operations(shape, step)


def head_operations(shape: Shape, step: Step) -> float:
    """Operations of the head: logits and their gradient in one visit, and the reference's logits."""
    return 2 * shape.vocabulary * shape.hidden * step.scored * (2 + step.live_reference)


def adapter_operations(shape: Shape, rank: int, step: Step) -> float:
    """Operations of A and B: forward, and backward to inputs and to weights; again where a block is computed again."""
    return 2 * shape.lora_parameters(rank) * step.tokens * (3 + step.checkpointing)


def step_operations(shape: Shape, step: Step, *, rank: int) -> float:
    """Operations of one step on one GPU."""
    blocks = block_operations(shape, step) * step.passes
    return blocks + head_operations(shape, step) + adapter_operations(shape, rank, step)


def cost(
    shape: Shape, gpu: Gpu, step: Step, *, nf4: bool, rank: int, num_gpus: int, sharded: bool, utilization: float
) -> Cost:
    """Return what a step costs each GPU.

    Args:
        shape: The model.
        gpu: As published.
        step: Of each GPU.
        nf4: QLoRA, or LoRA over 16 bits.
        rank: Of the adapter.
        num_gpus: In machines of 8.
        sharded: FSDP2, each GPU holding its share, or DDP, each holding all.
        utilization: Share of the published operations that matrix products reach, an assumption.
    """
    whole, trained = weight_bytes(shape, nf4=nf4), adapter_bytes(shape, rank)
    shares = num_gpus if sharded else 1
    link = gpu.inside if num_gpus <= 8 else gpu.outside
    away = (num_gpus - 1) / num_gpus
    # All-reduce of the adapter's float32 gradients passes them twice; a gather passes the base once a pass.
    reduced = 2 * away * FLOAT32 * shape.lora_parameters(rank)
    gathered = away * whole * step.passes if sharded else 0.0
    # NF4 weights are read, written in 16 bits and read again by the product.
    unpacked = step.passes * shape.linear_parameters() * (NF4 + 2 * BFLOAT16) if nf4 else 0.0
    return Cost(
        weights=whole / shares,
        gathered=2 * whole / shape.layers if sharded and num_gpus > 1 else 0.0,  # one block in use and the next
        adapter=trained / shares,
        activations=activation_bytes(shape, step),
        head=head_bytes(shape, step),
        compute=step_operations(shape, step, rank=rank) / (gpu.operations * utilization),
        unpacking=unpacked / gpu.bandwidth,
        exchange=(reduced + gathered) / link,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpu", choices=sorted(GPUS), default="h100")
    add("--models", nargs="+", choices=sorted(SHAPES), default=["8b", "70b"])
    add("--gpus", type=int, nargs="+", default=[1, 8, 64])
    add("--prompts", type=int, default=4, help="prompts of one GPU's micro-batch")
    add("--completions", type=int, default=2)
    add("--prompt-tokens", type=int, default=512)
    add("--completion-tokens", type=int, default=512)
    add("--rank", type=int, default=16)
    add("--utilization", type=float, default=0.4, help="share of the published operations per second, an assumption")
    add("--check", action="store_true", help="the model beside what was measured on a CPU")
    args = parser.parse_args()
    if args.check:
        check()
        return
    step = Step(args.prompts, args.completions, args.prompt_tokens, args.completion_tokens)
    padded = Step(args.prompts, args.completions, args.prompt_tokens, args.completion_tokens, tree=False)
    print(f"tokens of a micro-batch: {step.tokens:,} in trees, {padded.tokens:,} in rows of their own\n")
    print(row(*COLUMNS))
    print("|" + "|".join("---" for _ in COLUMNS) + "|")
    for model in args.models:
        for nf4 in (True, False):
            for num_gpus in args.gpus:
                for sharded in (False, True) if num_gpus > 1 else (False,):
                    how = {"nf4": nf4, "rank": args.rank, "num_gpus": num_gpus, "sharded": sharded}
                    print(table_row(model, GPUS[args.gpu], step, padded, how, args.utilization))


COLUMNS = (
    "model",
    "base",
    "GPUs",
    "spread",
    "weights",
    "adapter",
    "activations",
    "head",
    "GiB",
    "fits",
    "s",
    "s padded",
)


def row(*cells: object) -> str:
    """Return a line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def table_row(model: str, gpu: Gpu, step: Step, padded: Step, how: dict, utilization: float) -> str:
    """Return what a step costs each GPU, in GiB and seconds; seconds also without trees."""
    each, other = (cost(SHAPES[model], gpu, which, **how, utilization=utilization) for which in (step, padded))
    parts = (each.weights + each.gathered, each.adapter, each.activations, each.head, each.memory)
    return row(
        *(model, "NF4" if how["nf4"] else "16 bits", how["num_gpus"]),
        "FSDP2" if how["sharded"] else "DDP" if how["num_gpus"] > 1 else "–",
        *(f"{part / GIB:.1f}" for part in parts),
        "yes" if each.memory < USABLE * gpu.memory else "no",
        *(f"{which.seconds:.2f}" for which in (each, other)),
    )


USABLE = 0.9
"""Share of a GPU's memory that is left by the allocator's gaps and the libraries, an assumption."""

MEMORY_LAYERS, MEMORY_SLOPE = 2, 105.0
"""docs/performance.md, Memory: MiB per 1,024 tokens of a row of 16,384, two blocks of SmolLM2-135M's width, float32."""


def check() -> None:
    """Print the model's figures beside measured ones."""
    small = SHAPES["smollm2-135m"]
    print(row("what", "model", "measured", "difference"))
    print("|---|---|---|---|")
    slope = 1024 * MEMORY_LAYERS * block_activation(small, FLOAT32) / MIB
    print(beside("MiB of activations for 1,024 more tokens", slope, MEMORY_SLOPE))
    for tokens, measured in MEASURED_MEMORY.items():
        print(beside(f"MiB beyond the model, {tokens:,} tokens", memory_of_the_benchmark(tokens), measured))
    print(beside("milliseconds of a step, at the rate of one product", 1e3 * step_seconds(), 1e3 * STEP_SECONDS))


def beside(what: str, predicted: float, measured: float) -> str:
    """Return a line with a figure of the model, what was measured, and how far they are apart."""
    return row(what, f"{predicted:,.0f}", f"{measured:,.0f}", f"{predicted / measured - 1:+.0%}")


MEASURED_MEMORY = {1024: 214.0, 2048: 309.0, 4096: 497.0, 8192: 874.0, 16_384: 1687.0}
"""docs/performance.md, Memory: MiB over the tokens of a row."""
STEP = Step(4, 2, 120, 47, checkpointing=False)
"""docs/performance.md, The step: 4 pairs of 858 tokens in trees, 379 of which are scored; these are 856 and 376."""
STEP_SECONDS, CPU_RATE = 5.09, 189e9
"""The same page: float32, live reference; operations per second of one large product, which is all that the CPU can."""


def step_seconds() -> float:
    """Seconds of the measured step if all of it were matrix products at the rate of a single large one."""
    return step_operations(SHAPES["smollm2-135m"], STEP, rank=16) / CPU_RATE


def memory_of_the_benchmark(tokens: int) -> float:
    """MiB of scripts/benchmark_memory.py: trees of 1,024 tokens, two blocks of SmolLM2-135M's width, float32."""
    small = SHAPES["smollm2-135m"]
    blocks = Shape(MEMORY_LAYERS, small.hidden, small.intermediate, small.heads, small.kv_heads, small.vocabulary, True)
    step = Step(tokens // 1024, 2, 512, 256, checkpointing=False)
    gradients = FLOAT32 * blocks.lora_parameters(16)
    return (activation_bytes(blocks, step, FLOAT32) + head_bytes(blocks, step) + gradients) / MIB


if __name__ == "__main__":
    main()
