"""The losses of the installed TRL, run on log-probabilities without a model.

Each function calls TRL's own method on a stand-in for the trainer, which has only the settings that the method reads;
so a change in TRL changes the audit. Where the formula stands inside a method that samples, it is written out here, and
the function says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["dpo", "gkd_jsd", "grpo_kl", "rloo_kl"]


class _OneProcess:
    """The collective operations of an accelerator, in one process."""

    device = torch.device("cpu")
    sync_gradients = True
    num_processes = 1

    def gather(self, values: Tensor) -> Tensor:
        return values

    def gather_for_metrics(self, values: Tensor) -> Tensor:
        return values

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        return values


def grpo_kl(loss_type: str = "dapo", *, bias_correction: bool = False) -> Callable[..., Tensor]:
    """Return the loss of ``GRPOTrainer`` with β = 1 and advantages of 0, so that only its KL term is left.

    Args:
        loss_type: TRL's ``loss_type``. Of ``"dapo"``, its default, the sum over tokens is divided by 1 in place of the
            number of tokens of the generation batch.
        bias_correction: TRL's ``use_bias_correction_kl``.

    Source:
        ``trl.GRPOTrainer._compute_loss``, called.
    """

    def loss(
        logprobs: Float[Tensor, "N T"],
        reference_logprobs: Float[Tensor, "N T"],
        old_logprobs: Float[Tensor, "N T"],
        mask: Bool[Tensor, "N T"],
    ) -> Float[Tensor, ""]:
        from trl.trainer.grpo_trainer import GRPOTrainer

        trainer: Any = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
            _metrics=defaultdict(lambda: defaultdict(list)),
            _entropy_bonus_enabled=False,
            accelerator=_OneProcess(),
            args=SimpleNamespace(use_bias_correction_kl=bias_correction, delta=None, steps_per_generation=1),
            aux_loss_enabled=False,
            beta=1.0,
            current_gradient_accumulation_steps=1,
            epsilon_high=0.2,
            epsilon_low=0.2,
            importance_sampling_level="token",
            loss_type=loss_type,
            model=SimpleNamespace(training=True),
            off_policy_mask_threshold=None,
            top_entropy_quantile=1.0,
            use_vllm=False,
        )
        ids, one = torch.zeros(mask.shape, dtype=torch.long), mask.long()
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": one[:, :1],
            "completion_ids": ids,
            "completion_mask": one,
            "advantages": torch.zeros(len(mask), dtype=logprobs.dtype),
            "old_per_token_logps": old_logprobs,
            "ref_per_token_logps": reference_logprobs,
            "num_items_in_batch": torch.ones((), dtype=logprobs.dtype),
        }
        return GRPOTrainer._compute_loss(trainer, None, inputs)

    return loss


def dpo(
    loss_type: str = "sigmoid", *, f_divergence: str = "reverse_kl", coefficient: float = 0.5
) -> Callable[..., Tensor]:
    """Return the loss of ``DPOTrainer`` with β = 0.4, a mean over pairs.

    Args:
        loss_type: TRL's ``loss_type``.
        f_divergence: TRL's ``f_divergence_type``.
        coefficient: TRL's ``f_alpha_divergence_coef``; falign's ``alpha`` is 1 minus it. This branch of TRL knows no
            float64, so it is given float32.

    Source:
        ``trl.DPOTrainer._compute_loss``, called with a stand-in model that returns the log-probabilities.
    """

    def loss(
        chosen_logprobs: Float[Tensor, "P T"],
        rejected_logprobs: Float[Tensor, "P T"],
        reference_chosen_logprobs: Float[Tensor, "P T"],
        reference_rejected_logprobs: Float[Tensor, "P T"],
        chosen_mask: Bool[Tensor, "P T"],
        rejected_mask: Bool[Tensor, "P T"],
    ) -> Float[Tensor, ""]:
        from trl.trainer.dpo_trainer import DPOTrainer

        dtype = torch.float32 if f_divergence == "alpha_divergence" else chosen_logprobs.dtype
        policy = torch.cat([chosen_logprobs, rejected_logprobs]).to(dtype)
        reference = torch.cat([reference_chosen_logprobs, reference_rejected_logprobs]).to(dtype)
        mask = torch.cat([chosen_mask, rejected_mask])
        nothing = torch.zeros_like(reference)

        def model(**_: Any) -> Any:
            return SimpleNamespace(
                log_probs=policy, entropy=nothing, mean_logits=nothing, is_top1=torch.zeros_like(mask)
            )

        trainer: Any = SimpleNamespace(
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
            _tp_size=1,
            accelerator=_OneProcess(),
            aux_loss_enabled=False,
            beta=0.4,
            f_alpha_divergence_coef=coefficient,
            f_divergence_type=f_divergence,
            label_smoothing=0.15,
            ld_alpha=None,
            loss_types=[loss_type],
            loss_weights=[1.0],
            model=SimpleNamespace(training=True),
            precompute_ref_logps=True,
            use_weighting=False,
        )
        # TRL's rows begin with a prompt token, whose position the shifted mask drops.
        with_prompt = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1).long()
        chosen, rejected = reference.sum(dim=1).chunk(2)
        inputs = {
            "input_ids": torch.zeros_like(with_prompt),
            "attention_mask": with_prompt,
            "completion_mask": with_prompt,
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }
        return DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False).to(chosen_logprobs.dtype)

    return loss


def gkd_jsd(beta: float) -> Callable[..., Tensor]:
    """Return the loss of ``GKDTrainer``, whose β = 0 is the forward and β = 1 the reverse KL.

    Args:
        beta: TRL's ``beta``; falign's ``generalized_js`` has 1 minus it as its parameter.

    Source:
        ``trl.experimental.gkd.GKDTrainer.generalized_jsd_loss``, called.
    """

    def loss(
        vocabulary_logprobs: Float[Tensor, "N T V"], reference_vocabulary_logprobs: Float[Tensor, "N T V"]
    ) -> Float[Tensor, "N T"]:
        from trl.experimental.gkd import GKDTrainer

        per_token = GKDTrainer.generalized_jsd_loss(
            vocabulary_logprobs, reference_vocabulary_logprobs, beta=beta, reduction="none"
        )
        return per_token.sum(dim=-1)

    return loss


def rloo_kl(old_logprobs: Float[Tensor, "N T"], reference_logprobs: Float[Tensor, "N T"]) -> Float[Tensor, " N"]:
    """Return what ``RLOOTrainer`` subtracts from the reward of a completion, with β = 1.

    Source:
        Written out from ``trl.RLOOTrainer._generate_and_score_completions``, which samples before it computes this.
    """
    return (old_logprobs - reference_logprobs).sum(dim=-1)
