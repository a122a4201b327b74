"""Time rollouts of a vLLM server beside those of the engine in process, one after the other, several times.

usage: scripts/vllm_server.sh MODEL &     (MAX_LORA_RANK as --r)
       python scripts/benchmark_rollouts.py --model MODEL --url http://127.0.0.1:8000 [--rounds 3]
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="the one that the server has")
    add("--url", default="http://127.0.0.1:8000")
    add("--prompts", type=int, default=32)
    add("--prompt-tokens", type=int, default=45)
    add("--new-tokens", type=int, default=64)
    add("--dtype", default="float32")
    add("--r", type=int, default=8)
    add("--rounds", type=int, default=3)
    add("--weights", nargs="+", choices=["adapter", "merged"], default=["merged", "adapter"])
    return parser.parse_args()


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(ROOT))
    import torch

    from falign.models import add_lora, load_model, load_tokenizer
    from falign.models.tokenizers import pad_token_id
    from falign.rollouts import SamplingParams, TransformersEngine, VLLMEngine

    base, tokenizer = load_model(args.model, dtype=args.dtype), load_tokenizer(args.model)
    vocabulary, params = base.config.vocab_size, SamplingParams(args.new_tokens)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, vocabulary) for _ in range(args.prompt_tokens)] for _ in range(args.prompts)]
    tokens = args.prompts * args.new_tokens
    print(f"{args.model}, {args.dtype}, {args.prompts} prompts x {args.new_tokens} tokens, {torch.get_num_threads()} "
          "threads in process; tokens per second")  # fmt: skip
    with tempfile.TemporaryDirectory() as shared:
        for weights in args.weights:
            model = add_lora(load_model(args.model, dtype=args.dtype), r=args.r, alpha=2 * args.r, seed=0)
            if weights == "merged":
                model = base
            engines = {
                "in process": TransformersEngine(model, pad_token_id=pad_token_id(tokenizer)),
                "vllm": VLLMEngine(args.url, shared_dir=shared, vocabulary=vocabulary, sync=weights),
            }
            rates: dict[str, list[float]] = {name: [] for name in engines}
            published: dict[str, list[float]] = {name: [] for name in engines}
            for number in range(args.rounds + 1):  # the first one warms up
                for name, engine in engines.items():
                    start = time.perf_counter()
                    engine.publish(model, number)
                    middle = time.perf_counter()
                    engine.sample(prompts, 1, params, version=number, seed=number)
                    end = time.perf_counter()
                    engine.retire(number)
                    if number:
                        rates[name].append(tokens / (end - middle))
                        published[name].append(middle - start)
            for name, engine in engines.items():
                engine.close()
                print(f"{weights:8} {name:11} {statistics.median(rates[name]):7.1f}  "
                      f"({min(rates[name]):.1f} to {max(rates[name]):.1f}), "
                      f"publish {statistics.median(published[name]):.3f} s", flush=True)  # fmt: skip
            ratios = [server / own for own, server in zip(rates["in process"], rates["vllm"], strict=True)]
            print(f"{weights:8} vllm over in process: {statistics.median(ratios):.2f} "
                  f"({min(ratios):.2f} to {max(ratios):.2f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
