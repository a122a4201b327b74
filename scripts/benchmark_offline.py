"""A DPO step in falign and in TRL's DPOTrainer: the same pairs, model, adapter, batch and precision, in turn.

    python scripts/benchmark_offline.py --data ../shared/data/hh-rlhf/helpful-base-test.jsonl.gz
    python scripts/benchmark_offline.py --data PAIRS.jsonl --dtype bfloat16 --reference cached --rounds 3
    python scripts/benchmark_offline.py --random-model qwen2-0.5b --device cuda --prompt-tokens 1024 \
        --completion-tokens 128
    python scripts/benchmark_offline.py --data PAIRS.jsonl --sides trl inside-rows inside-trees --rounds 3

Each side runs in a process of its own, side after side, round after round. TRL has its best settings: no gradient
checkpointing, the fused head that it ships, autocast where weights are 16-bit, the prompt's and completions' token ids
given, so that both train on the same tokens; `--reference cached` is its precomputed reference. `inside-rows` and
`inside-trees` are falign's FDPOTrainer inside TRL, with layout="trl" and layout="tree". falign's side needs
torch, transformers and peft alone with `--random-model`; where TRL is not installed, it runs without TRL's.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RANDOM_MODELS = {  # model_type and sizes of models that are built from a configuration, with random weights
    "qwen2-0.5b": ("qwen2", {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
                             "tie_word_embeddings": True}),
    "tiny": ("llama", {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "num_key_value_heads": 1, "vocab_size": 1000}),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="preference data that falign reads; else random tokens of HH's lengths, or of these:")
    add("--prompt-tokens", type=int)
    add("--completion-tokens", type=int)
    add("--max-length", type=int, default=512)
    add("--model", default="demo:smollm2-135m-instruct")
    add("--random-model", choices=sorted(RANDOM_MODELS))
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--batch", type=int, default=4, help="pairs per step")
    add("--steps", type=int, default=6)
    add("--warmup", type=int, default=1, help="steps that are not counted")
    add("--rounds", type=int, default=1)
    add("--reference", default="live", choices=["live", "cached"])
    add("--objective", default="fdpo", choices=["fdpo", "tdpo"], help="falign's; TRL has DPO")
    add("--layout", default="auto", choices=["auto", "tree", "padded"], help="falign's")
    add("--loop", choices=["trainer", "bare"], help="falign's: its trainer (default where TRL is), or a plain loop")
    add("--r", type=int, default=16)
    sides = ["trl", "falign", "inside-rows", "inside-trees"]
    add("--sides", nargs="+", choices=sides, help="default: trl and falign, or falign alone where TRL is missing")
    add("--threads", type=int)
    add("--worker", choices=sides, help=argparse.SUPPRESS)
    args = parser.parse_args()
    installed = find_spec("trl") is not None
    args.sides = args.sides or (["trl", "falign"] if installed else ["falign"])
    args.loop = args.loop or ("trainer" if installed else "bare")
    return args


def main() -> None:
    args = arguments()
    if args.worker:
        print(json.dumps(run(args)))
        return
    print(f"{args.random_model or args.model}, LoRA r={args.r}, {args.dtype}, {args.device}, batch {args.batch}, "
          f"{args.reference} reference")  # fmt: skip
    print(f"{'round':>5} {'side':12} {'s/step':>8} {'tokens/s':>9} {'peak MiB':>9}  first losses")
    results: dict[str, list[dict]] = {side: [] for side in args.sides}
    for number in range(1, args.rounds + 1):
        for side in args.sides:
            result = in_own_process(side)
            results[side].append(result)
            losses = " ".join(f"{loss:.4f}" for loss in result["losses"][:4])
            print(f"{number:5} {side:12} {result['seconds']:8.3f} {result['tokens'] / result['seconds']:9.0f} "
                  f"{result['peak_mib']:9.0f}  {losses}", flush=True)  # fmt: skip
    for side in [side for side in args.sides if side != "trl" and "trl" in args.sides]:
        pairs = list(zip(results["trl"], results[side], strict=True))
        speed = [trl["seconds"] / own["seconds"] for trl, own in pairs]
        memory = [own["peak_mib"] / trl["peak_mib"] for trl, own in pairs]
        print(f"{side}'s step rate over TRL's: {spread(speed)}; its peak memory over TRL's: {spread(memory)}")


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)"


def in_own_process(side: str, script: str = __file__) -> dict:
    command = [sys.executable, script, *sys.argv[1:], "--worker", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"the {side} side failed with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def run(args: argparse.Namespace) -> dict:
    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.path.insert(0, str(ROOT))
    annotations_without_jaxtyping()
    import torch

    torch.set_num_threads(args.threads or torch.get_num_threads())
    trees, pad_token_id, tokenizer = pairs(args)
    model = with_adapter(args)
    clock = Clock(args.device)
    with tempfile.TemporaryDirectory() as folder:
        losses = SIDES[args.worker, args.loop](args, model, tokenizer, trees, pad_token_id, clock, Path(folder))
    counted = range(args.warmup, args.steps)
    tokens = [2 * len(t.prompt_ids) + sum(map(len, t.completion_ids)) for t in trees]
    per_step = [sum(tokens[s * args.batch : (s + 1) * args.batch]) for s in counted]
    return {
        "seconds": statistics.fmean(clock.seconds[args.warmup :]),
        "tokens": statistics.fmean(per_step),  # of all completions with their prompts: the same for both sides
        "peak_mib": clock.peak_mib(),
        "losses": losses,
    }


def annotations_without_jaxtyping() -> None:
    """falign's shapes are annotations; where jaxtyping is not installed, any names will do."""
    try:
        import jaxtyping  # noqa: F401
    except ImportError:
        module = types.ModuleType("jaxtyping")
        anything = {"__class_getitem__": lambda cls, item: item[0]}
        vars(module).update({name: type(name, (), anything) for name in ("Bool", "Float", "Int", "Shaped")})
        sys.modules["jaxtyping"] = module


def pairs(args: argparse.Namespace) -> tuple:
    """The pairs of all steps as prompt trees, in the order of the run."""
    from falign.scoring import PromptTree

    count = args.batch * args.steps
    if args.data is None:
        rng, vocabulary = random.Random(0), RANDOM_MODELS[args.random_model][1]["vocab_size"]

        def ids(mean: float, fixed: int | None) -> tuple[int, ...]:
            # HH's lengths are near log-normal: median prompt 110, completion 45 tokens.
            length = fixed or min(int(rng.lognormvariate(mean, 0.8)) + 2, args.max_length // 2)
            return tuple(rng.randrange(3, vocabulary) for _ in range(length))

        trees = [
            PromptTree(
                ids(4.7, args.prompt_tokens), tuple(ids(3.8, args.completion_tokens) for _ in range(2)), (1.0, 0.0)
            )
            for _ in range(count)
        ]
        return trees, 0, None
    from falign.data import DataSource, Window, load_preferences
    from falign.models import load_tokenizer, stop_token_ids
    from falign.models.tokenizers import pad_token_id

    tokenizer = load_tokenizer(args.model)
    window = Window(args.max_length, long_prompt="drop", long_completion="drop")
    stops = stop_token_ids(args.model, tokenizer)
    source = DataSource(args.data, chat=True, limit=20 * count)
    loaded = load_preferences([source], tokenizer, stop_token_ids=stops, window=window, bad_rows="skip")
    trees = [tree for tree in loaded.train if len(tree.completion_ids) == 2]
    random.Random(0).shuffle(trees)
    return trees[:count], pad_token_id(tokenizer), tokenizer


def tokenizer_of(args: argparse.Namespace):
    """The model's tokenizer, or for a random model one whose tokens are numbered words."""
    if not args.random_model:
        from falign.models import load_tokenizer

        return load_tokenizer(args.model)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(RANDOM_MODELS[args.random_model][1]["vocab_size"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="w3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


def with_adapter(args: argparse.Namespace):
    import torch

    if args.random_model:
        from transformers import AutoConfig, AutoModelForCausalLM

        kind, sizes = RANDOM_MODELS[args.random_model]
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    else:
        from falign.models import load_model

        model = load_model(args.model, dtype=args.dtype)
    from falign.models.adapters import add_lora

    return add_lora(model.to(args.device), r=args.r, alpha=2 * args.r, seed=0)


class Clock:
    """Seconds of each optimizer step, and the most memory since the first one began."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, []

    def begin(self) -> None:
        import torch

        if self.device != "cpu":
            torch.cuda.synchronize()
            if not self.seconds:
                torch.cuda.reset_peak_memory_stats()
        elif not self.seconds:
            Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident size starts anew
        self.start = time.perf_counter()

    def end(self) -> None:
        import torch

        if self.device != "cpu":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)

    def peak_mib(self) -> float:
        import torch

        if self.device != "cpu":
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10

    def callback(self, losses: list[float]):
        """The same for both trainers."""
        from transformers import TrainerCallback

        clock = self

        class Callback(TrainerCallback):
            def on_step_begin(self, *_, **__) -> None:
                clock.begin()

            def on_step_end(self, *_, **__) -> None:
                clock.end()

            def on_log(self, args, state, control, logs=None, **_) -> None:
                if logs and "loss" in logs:
                    losses.append(float(logs["loss"]))

        return Callback()


def trainer_arguments(args: argparse.Namespace, folder: Path) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": args.batch,
        "max_steps": args.steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
    }


def run_trl(args, model, tokenizer, trees, pad_token_id, clock, folder) -> list[float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    trainer, further = DPOTrainer, {}
    if args.worker != "trl":
        from falign.integrations.trl import FDPOTrainer

        layout = {"inside-rows": "trl", "inside-trees": "tree"}[args.worker]
        trainer, further = FDPOTrainer, {"objective": objective_of(args), "layout": layout}

    class OnTokenIds(trainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    rows = [{"prompt_ids": t.prompt_ids, "chosen_ids": t.completion_ids[0], "rejected_ids": t.completion_ids[1]}
            for t in trees]  # fmt: skip
    config = DPOConfig(
        **trainer_arguments(args, folder),
        bf16=args.dtype == "bfloat16",
        gradient_checkpointing=False,
        precompute_ref_log_probs=args.reference == "cached",
        max_length=None,
        beta=0.1,
    )
    losses: list[float] = []
    dataset, callbacks = Dataset.from_list(rows), [clock.callback(losses)]
    tokenizer = tokenizer or tokenizer_of(args)  # any: the rows are token ids
    given = {"args": config, "train_dataset": dataset, "processing_class": tokenizer, "callbacks": callbacks}
    OnTokenIds(model=model, **given, **further).train()
    return losses


def objective_of(args):
    from falign.methods import FDPO, TDPO

    return FDPO(beta=0.1) if args.objective == "fdpo" else TDPO(beta=0.1)


def parts(args, model, trees, pad_token_id, folder) -> tuple:
    """falign's reference, objective and scorer."""
    from falign.references import AdapterOff, Cached, CacheKey
    from falign.scoring import Scorer, choose_layout

    longest = sorted(trees, key=lambda tree: tree.num_tokens)[-2:]
    choice = choose_layout(model, longest, pad_token_id=pad_token_id, wanted=args.layout)
    reference, scorer = AdapterOff(), Scorer(choice.layout, pad_token_id)
    if args.reference == "cached":
        key = CacheKey(
            weights="benchmark", config="c", vocabulary=260, tokenizer="benchmark", dtype=args.dtype, attention="sdpa"
        )
        cached = Cached(reference, directory=folder / "cache", key=key)
        cached.precompute(model, trees, scorer=scorer)
        reference = Cached(None, directory=folder / "cache", key=key)
    return reference, objective_of(args), scorer


def run_falign(args, model, tokenizer, trees, pad_token_id, clock, folder) -> list[float]:
    from transformers import PrinterCallback, TrainingArguments

    from falign.training import AlignmentTrainer

    reference, objective, scorer = parts(args, model, trees, pad_token_id, folder)
    losses: list[float] = []
    trainer = AlignmentTrainer(
        model,
        reference=reference,
        objective=objective,
        args=TrainingArguments(**trainer_arguments(args, folder), remove_unused_columns=False, label_names=[]),
        train_trees=trees,
        eval_trees=[],
        scorer=scorer,
        callbacks=[clock.callback(losses)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return losses


def run_falign_bare(args, model, tokenizer, trees, pad_token_id, clock, folder) -> list[float]:
    import torch

    from falign.references import objective_inputs

    reference, objective, scorer = parts(args, model, trees, pad_token_id, folder)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    losses = []
    model.train()
    for step in range(args.steps):
        clock.begin()
        rows = trees[step * args.batch : (step + 1) * args.batch]
        batch = scorer.lay_out(rows, model=model)
        inputs = objective_inputs(model, batch, references={"reference": reference}, objective=objective)
        output = objective(inputs.completions)
        loss = output.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.end()
        losses.append(loss.item())
    return losses


SIDES = {
    **{(side, loop): run_trl for side in ("trl", "inside-rows", "inside-trees") for loop in ("trainer", "bare")},
    ("falign", "trainer"): run_falign,
    ("falign", "bare"): run_falign_bare,
}

if __name__ == "__main__":
    main()
