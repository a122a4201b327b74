"""Runs of the real trainer on tiny models, and everything about them that two runs can be compared by."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from typing_extensions import override

from falign.models import add_lora
from falign.objectives import Objective
from falign.references import Reference
from falign.scoring import Layout, PromptTree, Scorer
from falign.training.trainer import AlignmentTrainer
from tests.scoring.models import VOCABULARY, tiny_model

PAD = 2
# Fewer positions than a batch has. Policy and reference share it, as in a run: other chunks round otherwise.
CHUNK = 7


def trees(number: int, *, seed: int = 0) -> list[PromptTree]:
    """Pairs whose completions are from 1 to 24 tokens long, neighbors and the two of a pair very differently so."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())

    lengths = [(1, 24), (17, 2), (3, 3), (24, 9), (2, 1), (8, 20), (1, 1), (12, 4), (5, 15)]
    return [
        PromptTree(tokens(1 + 3 * n % 7), (tokens(chosen), tokens(rejected)), (1.0, 0.0), place=f"pair {n}")
        for n, (chosen, rejected) in enumerate((lengths * number)[:number])
    ]


def lora_policy(*, dropout: float = 0.0, trained: bool = False, **overrides):
    """A tiny llama with an adapter; ``trained``: one that already differs from its base, by log-ratios below about 1.

    Under ``forward_kl`` a loss multiplies the rounding of log π, 1e-6 for a completion of 24 tokens, by 1/u.
    """
    if trained:
        overrides = {"initializer_range": 0.1, **overrides}
    policy = add_lora(tiny_model("llama", **overrides), r=4, alpha=8, seed=1, dropout=dropout)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in policy.named_parameters():
        if trained and "lora_B" in name:
            parameter.data = 0.03 * torch.randn(parameter.shape, generator=generator)
    return policy


def lora_weights(policy: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}


def alignment_trainer(
    folder,
    policy: nn.Module,
    reference: Reference,
    objective: Objective,
    *,
    train: list[PromptTree],
    held_out: list[PromptTree] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    layout: Layout = "tree",
    **settings,
) -> AlignmentTrainer:
    """Return a trainer that takes the rows in order, logs every step, neither clips nor decays, and saves nothing."""
    constant = {
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
    }
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=[],
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **(constant | settings),
    )
    return AlignmentTrainer(
        policy,
        reference=reference,
        objective=objective,
        args=args,
        train_trees=train,
        eval_trees=held_out or [],
        scorer=Scorer(layout, PAD, CHUNK),
        callbacks=callbacks,
    )


class Gradients(TrainerCallback):
    """The gradient of every trainable parameter, as the optimizer gets it, at each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    @override
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append({name: weight.grad.clone() for name, weight in lora_weights(kwargs["model"]).items()})


class Run(NamedTuple):
    gradients: list[dict[str, Tensor]]
    logs: list[dict[str, float]]
    weights: dict[str, Tensor]


def run(folder, policy, reference, objective, **settings) -> Run:
    """Train, and return what happened at each step and the weights at the end."""
    seen = Gradients()
    trainer = alignment_trainer(folder, policy, reference, objective, callbacks=[seen], **settings)
    trainer.train()
    weights = {name: weight.detach().clone() for name, weight in lora_weights(policy).items()}
    return Run(seen.steps, [log for log in trainer.state.log_history if "loss" in log], weights)


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return ``‖a - b‖/max(‖b‖, 1)`` over all parameters together.

    The gradients of a pair's two sides are of size 1 and mostly cancel, so below 1 their rounding is absolute.
    """
    assert a.keys() == b.keys()
    gap, norm = torch.cat([(a[name] - b[name]).flatten() for name in b]), torch.cat([b[name].flatten() for name in b])
    return (gap.norm() / norm.norm().clamp(min=1.0)).item()
