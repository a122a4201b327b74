"""An online step in falign and in TRL's GRPOTrainer: the same prompts, model, adapter, lengths and precision, in turn.

    python scripts/benchmark_online.py
    python scripts/benchmark_online.py --data ../shared/data/hh-rlhf/helpful-base-test.jsonl.gz --dtype bfloat16
    python scripts/benchmark_online.py --random-model qwen2-0.5b --device cuda --prompts 8 --new-tokens 256

A step samples `--completions` completions of each of `--prompts` prompts, rewards them, scores them under the reference
(the policy with its adapter off, for a reverse KL of weight `--beta`), and makes `--updates` updates. Stop tokens are
ordinary tokens here, so that every completion has exactly `--new-tokens`. Each side runs in a process of its own, side
after side, round after round. TRL has its best settings: no gradient checkpointing, its fused head, autocast where
weights are 16-bit, the prompts' token ids given. falign's side is a plain loop over its engine, references and
objective.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmark_offline import (
    RANDOM_MODELS,
    ROOT,
    Clock,
    annotations_without_jaxtyping,
    in_own_process,
    pairs,
    spread,
    tokenizer_of,
    trainer_arguments,
    with_adapter,
)

PARTS = ("generation", "scoring", "update")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="preference data, of which the prompts are taken; else random tokens")
    add("--prompt-tokens", type=int, default=110, help="of random prompts")
    add("--max-length", type=int, default=512)
    add("--model", default="demo:smollm2-135m-instruct")
    add("--random-model", choices=sorted(RANDOM_MODELS))
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--prompts", type=int, default=2, help="per step")
    add("--completions", type=int, default=8, help="per prompt")
    add("--new-tokens", type=int, default=96)
    add("--updates", type=int, default=1, help="per rollout")
    add("--beta", type=float, default=0.04)
    add("--steps", type=int, default=4)
    add("--warmup", type=int, default=1, help="steps that are not counted")
    add("--rounds", type=int, default=1)
    add("--loop", default="trainer", choices=["trainer", "bare"], help="falign's: its trainer, or a plain loop")
    add("--layout", default="auto", choices=["auto", "tree", "padded"], help="falign's")
    add("--r", type=int, default=16)
    add("--sides", nargs="+", choices=["trl", "falign"], default=["trl", "falign"])
    add("--threads", type=int)
    add("--worker", choices=["trl", "falign"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch = args.prompts  # as the offline benchmark calls it
    return args


def main() -> None:
    args = arguments()
    if args.worker:
        print(json.dumps(run(args)))
        return
    print(f"{args.random_model or args.model}, LoRA r={args.r}, {args.dtype}, {args.device}, {args.prompts} prompts x "
          f"{args.completions} completions x {args.new_tokens} tokens, {args.updates} update(s)")  # fmt: skip
    print(f"{'round':>5} {'side':7} {'s/step':>8} {' '.join(f'{part:>11}' for part in PARTS)} {'peak MiB':>9}  lengths")
    results: dict[str, list[dict]] = {side: [] for side in args.sides}
    for number in range(1, args.rounds + 1):
        for side in args.sides:
            result = in_own_process(side, script=__file__)
            results[side].append(result)
            parts = " ".join(f"{result[part]:11.3f}" for part in PARTS)
            print(f"{number:5} {side:7} {result['seconds']:8.3f} {parts} {result['peak_mib']:9.0f}  "
                  f"{result['lengths'][0]} to {result['lengths'][1]}", flush=True)  # fmt: skip
    if len(args.sides) == 2:
        both = list(zip(results["trl"], results["falign"], strict=True))
        compared = {"whole step": ("seconds",), **{part: (part,) for part in PARTS}, "scoring and update": PARTS[1:]}
        for label, names in compared.items():
            ratios = [sum(trl[name] for name in names) / sum(own[name] for name in names) for trl, own in both]
            print(f"{label}: TRL's time over falign's: {spread(ratios)}")
        memory = [own["peak_mib"] / trl["peak_mib"] for trl, own in both]
        print(f"falign's peak memory over TRL's: {spread(memory)}")


def run(args: argparse.Namespace) -> dict:
    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.path.insert(0, str(ROOT))
    annotations_without_jaxtyping()
    import torch

    torch.set_num_threads(args.threads or torch.get_num_threads())
    model, clock = with_adapter(args), StepClock(args.device)
    tokenizer = tokenizer_of(args)
    prompts = prompts_of(args, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        SIDES[args.worker, args.loop](args, model, tokenizer, prompts, clock, Path(folder))
    counted = slice(args.warmup, None)
    parts = {name: statistics.fmean(clock.parts[name][counted]) for name in PARTS}
    return {
        "seconds": statistics.fmean(clock.seconds[counted]),
        **parts,
        "peak_mib": clock.peak_mib(),
        "lengths": [min(clock.lengths), max(clock.lengths)],
    }


def prompts_of(args: argparse.Namespace, vocabulary: int) -> list[tuple[int, ...]]:
    """The prompts of all steps, in the order of the run."""
    if args.data:
        return [tree.prompt_ids for tree in pairs(args)[0]]
    rng = random.Random(0)
    return [tuple(rng.randrange(3, vocabulary) for _ in range(args.prompt_tokens))
            for _ in range(args.prompts * args.steps)]  # fmt: skip


class StepClock(Clock):
    """Also the seconds of each part of a step, and how long the completions were."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.lengths: set[int] = set()
        self.inner = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the step, less the parts inside it."""
        self.wait()
        start, before = time.perf_counter(), self.inner
        yield
        self.wait()
        spent = time.perf_counter() - start
        self.parts[name].append(spent - (self.inner - before))
        self.inner = before + spent

    def last_update(self, updates: int):
        """End a step of the clock with the last update of a rollout; what is no other part was updates."""
        from transformers import TrainerCallback

        clock = self

        class LastUpdate(TrainerCallback):
            def on_step_end(self, args, state, *_, **__) -> None:
                if state.global_step % updates == 0:
                    clock.end()
                    others = clock.parts["generation"][-1] + clock.parts["scoring"][-1]
                    clock.parts["update"].append(clock.seconds[-1] - others)

        return LastUpdate()

    def wait(self) -> None:
        import torch

        if self.device != "cpu":
            torch.cuda.synchronize()


def reward(completions: list[str], **_) -> list[float]:
    return [len(set(text)) / max(len(text), 1) for text in completions]


def run_trl(args, model, tokenizer, prompts, clock, folder) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Timed(GRPOTrainer):
        def _tokenize_prompts(self, prompts):
            return [list(token_ids[int(prompt)]) for prompt in prompts], None, {}

        def _generate(self, prompts):
            with clock.part("generation"):
                generated = super()._generate(prompts)
            clock.lengths |= set(map(len, generated[1]))
            return generated

        def _generate_and_score_completions(self, inputs):
            clock.begin()
            with clock.part("scoring"):
                return super()._generate_and_score_completions(inputs)

    token_ids = prompts
    config = GRPOConfig(
        **{
            **trainer_arguments(args, folder),
            "per_device_train_batch_size": args.prompts * args.completions,
            "max_steps": args.steps * args.updates,
        },
        bf16=args.dtype == "bfloat16",
        gradient_checkpointing=False,
        num_generations=args.completions,
        steps_per_generation=1,
        num_iterations=args.updates,
        max_completion_length=args.new_tokens,
        generation_kwargs={"eos_token_id": None},
        top_k=0,
        beta=args.beta,
        loss_type="grpo",
        shuffle_dataset=False,
    )
    dataset = Dataset.from_list([{"prompt": str(i)} for i in range(len(prompts))])
    trainer = Timed(
        model, reward, config, dataset, processing_class=tokenizer, callbacks=[clock.last_update(args.updates)]
    )
    trainer.eos_token_ids = [-1]  # none ends a completion
    trainer.train()


def own_parts(args, model, tokenizer, prompts) -> tuple:
    """falign's objective, reference, scorer, engine and how it samples."""
    from falign import divergences
    from falign.models.tokenizers import pad_token_id
    from falign.objectives import PolicyGradient
    from falign.references import AdapterOff
    from falign.rollouts import SamplingParams, TransformersEngine
    from falign.scoring import PromptTree, Scorer, choose_layout

    objective = PolicyGradient(
        divergences.get("reverse_kl"),
        beta=args.beta,
        advantage="group_normalised",
        clip_low=0.2,
        clip_high=0.2,
        importance="token",
        level="token",
        reduction="sequence_mean",
    )
    pad = pad_token_id(tokenizer)
    probes = [PromptTree(ids, (ids[-8:], ids[:5])) for ids in prompts[:2]]
    layout = choose_layout(model, probes, pad_token_id=pad, wanted=args.layout).layout
    engine = TransformersEngine(model, pad_token_id=pad)
    return objective, AdapterOff(), Scorer(layout, pad), engine, SamplingParams(args.new_tokens)


class InOrder:
    """Prompts in the order in which TRL has them."""

    position = 0

    def take(self, count: int) -> range:
        self.position += count
        return range(self.position - count, self.position)


def run_falign(args, model, tokenizer, prompts, clock, folder) -> None:
    from transformers import PrinterCallback, TrainingArguments

    from falign.data import PromptRow
    from falign.rewards import RewardSum, WeightedReward
    from falign.runfile.prompts_config import RolloutConfig
    from falign.training.online.groups import DividedSampler, GroupSampler
    from falign.training.online.metrics import CompletionsTable
    from falign.training.online.trainer import OnlineTrainer

    class TimedSampler(DividedSampler):
        def sample(self, rows, **options):
            with clock.part("generation"):
                draw = super().sample(rows, **options)
            clock.lengths |= {len(rollout.completion_ids) for group in draw.groups for rollout in group.rollouts}
            return draw

    class Timed(OnlineTrainer):
        def _roll_out(self):
            clock.begin()
            with clock.part("scoring"):
                return super()._roll_out()

    objective, reference, scorer, engine, sampling = own_parts(args, model, tokenizer, prompts)
    rewards = RewardSum((WeightedReward("letters", lambda prompts, completions: reward(completions)),))
    sampler = TimedSampler(GroupSampler(engine, rewards, tokenizer, sampling, completions=args.completions, seed=0))
    settings = {**trainer_arguments(args, folder), "max_steps": args.steps * args.updates}
    trainer = Timed(
        model,
        references={"reference": reference},
        objective=objective,
        args=TrainingArguments(**settings, remove_unused_columns=False, label_names=[]),
        sampler=sampler,
        evaluation_sampler=sampler,
        prompts=[PromptRow(str(i), ids) for i, ids in enumerate(prompts)],
        eval_prompts=[],
        rollout=RolloutConfig(
            prompts=args.prompts,
            completions=args.completions,
            max_new_tokens=args.new_tokens,
            updates=args.updates,
            ignore_stop=True,
        ),
        scorer=scorer,
        table=CompletionsTable(None),
        processing_class=tokenizer,
        callbacks=[clock.last_update(args.updates)],
    )
    trainer.source.order = InOrder()
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def run_falign_bare(args, model, tokenizer, prompts, clock, folder) -> None:
    import torch

    from falign.references import objective_inputs
    from falign.scoring import PromptTree

    objective, reference, scorer, engine, sampling = own_parts(args, model, tokenizer, prompts)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    model.train()
    for step in range(args.steps):
        clock.begin()
        chosen = prompts[step * args.prompts : (step + 1) * args.prompts]
        with clock.part("generation"):
            engine.publish(model, step)
            rollouts = engine.sample(chosen, args.completions, sampling, version=step, seed=step)
            texts = tokenizer.batch_decode([list(rollout.completion_ids) for rollout in rollouts])
        clock.lengths |= {len(rollout.completion_ids) for rollout in rollouts}
        with clock.part("scoring"):
            groups = [rollouts[i : i + args.completions] for i in range(0, len(rollouts), args.completions)]
            trees = [PromptTree(group[0].prompt_ids, tuple(each.completion_ids for each in group)) for group in groups]
            batch = scorer.lay_out(trees, model=model)
            known = {
                "rewards": torch.tensor(reward(texts), device=args.device),
                "reference_logprobs": reference.logprobs(model, batch),
                "old_logprobs": batch.scatter(
                    torch.tensor([value for each in rollouts for value in each.logprobs], device=args.device)
                ),
            }
        with clock.part("update"):
            for _ in range(args.updates):
                completions = objective_inputs(
                    model, batch, references={"reference": reference}, objective=objective, columns=known
                ).completions
                if completions.advantages is None:
                    completions = objective.prepare(completions)
                    known["advantages"] = completions.advantages
                objective(completions).mean().backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        clock.end()


SIDES = {
    ("trl", "trainer"): run_trl,
    ("trl", "bare"): run_trl,
    ("falign", "trainer"): run_falign,
    ("falign", "bare"): run_falign_bare,
}

if __name__ == "__main__":
    main()
