"""TRL's GRPO with the penalty ``β D_f(π‖π_ref)`` of any divergence in place of its KL term."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from typing_extensions import override

from falign.divergences import Divergence, get, resolve
from falign.divergences.estimators import value_from_policy
from falign.divergences.powers import power
from falign.errors import ConfigError
from falign.objectives import CompletionBatch
from falign.objectives.base import Importance
from falign.objectives.penalty import Credit, Level, Penalty

__all__ = ["FGRPOTrainer"]

# Settings under which completions are not samples of the policy that is scored, and the values that leave it alone.
FREE_SAMPLING = {"top_p": (1.0, None), "top_k": (0, None), "min_p": (0.0, None), "repetition_penalty": (1.0, None)}
SCALED_BY_TOKENS_OF_A_STEP = ("cispo", "dapo", "vespo")


class FGRPOTrainer(GRPOTrainer):
    """``trl.GRPOTrainer`` whose KL term is replaced by ``β D_f(π‖π_ref)`` with the gradient of ``D_f``.

    Rewards, advantages, sampling, vLLM, tools, loss types, clipping and importance correction are TRL's. The penalty's
    gradient at token t is ``β c_t ∇log π(y_t|s_t)``, with ``c_t`` of
    :func:`falign.divergences.estimators.penalty_from_policy`: a score function, so the mean over samples of the policy
    is the gradient of the divergence that was named. Like TRL's KL term it is not clipped, is summed over tokens by
    ``loss_type`` and needs ``π_ref``, which TRL makes as for ``beta > 0``.

    Args:
        model: As for ``GRPOTrainer``, like all arguments that are not named here.
        reward_funcs: As for ``GRPOTrainer``.
        args: As for ``GRPOTrainer``; ``args.beta`` is β unless ``beta`` is given.
        divergence: f, or its name.
        beta: β, positive.
        level: ``"token"``: the sum over tokens of ``D_f`` between next-token distributions, where TRL's KL term is
            too. ``"sequence"``: ``D_f`` of whole completions; the mean of ``f'(u)`` over the other completions of the
            micro-batch is subtracted from each, which reduces the variance. See :class:`falign.objectives.Penalty`.
        credit: At token level, ``"returns"`` adds a token's effect on later prefixes.
        importance: Where completions are used for more than one step: ``"sequence"`` weights by ``π/π_old`` of whole
            prefixes, exactly; ``"token"`` by that of single tokens, whose variance does not grow with the length.

    Attributes:
        penalty: The divergence and its estimator.

    Raises:
        ConfigError: A setting of ``args`` cannot carry the penalty, β is missing or given twice, or the divergence is
            unknown.
        ValueError: The level, the credit and the importance do not go together.

    Source:
        docs/trl.md. With ``"reverse_kl"``, ``level="token"`` and ``importance="token"`` the gradient is that of TRL's
        KL term with ``use_bias_correction_kl=True``.
    """

    _tag_names = ["trl", "grpo", "falign"]  # noqa: RUF012 - TRL declares it so

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *others: Any,
        divergence: Divergence | str,
        beta: float | None = None,
        level: Level = "token",
        credit: Credit = "fixed_prefix",
        importance: Importance = "sequence",
        **options: Any,
    ) -> None:
        if level == "vocabulary":
            raise ConfigError(
                "level='vocabulary': TRL keeps the log-probs of the sampled tokens only, not whole distributions; set "
                "level='token' (the same divergence from samples), or use falign.train."
            )
        self.penalty = Penalty(resolve(divergence), level, credit, importance=importance)
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = GRPOConfig(f"{name.rstrip('/').split('/')[-1]}-GRPO")
        args = copy.copy(args)  # the caller's stays as it was
        args.beta = _checked_beta(beta, args)
        _refuse_what_bends_the_penalty(args)
        self._policy_logprobs: Tensor | None = None
        super().__init__(model, reward_funcs, args, *others, **options)

    @override
    def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
        scores = super()._get_per_token_logps_and_entropies(*args, **options)
        self._policy_logprobs = scores[0]  # of the policy, after TRL's loss: it scores nothing else there
        return scores

    @override
    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        beta, self.beta = self.beta, 0.0  # TRL's own KL term is left out
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        logprobs, self._policy_logprobs = self._policy_logprobs, None
        assert logprobs is not None, "GRPOTrainer._compute_loss did not score the completions"
        return loss + beta * self._penalty_of(logprobs, inputs)

    def _penalty_of(self, logprobs: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Return the divergence, with its gradient, as TRL reduces a loss of tokens to one of the micro-batch."""
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        batch = CompletionBatch(
            # The gradient of each token is multiplied by TRL's correction of the sampler's distribution.
            logprobs=_with_gradient_times(inputs.get("importance_sampling_ratio"), logprobs),
            completion_mask=mask,
            # One group, the micro-batch, without the completions that `mask_truncated_completions` has emptied.
            prompt_index=mask.any(dim=-1).long(),
            reference_logprobs=inputs["ref_per_token_logps"],
            old_logprobs=inputs.get("old_per_token_logps"),
        )
        baseline = self.penalty.baseline(batch) if self.penalty.level == "sequence" else None
        surrogate = self.penalty.loss(replace(batch, baseline=baseline))
        value = self.penalty.value(batch)
        self._log_divergence(batch, value)
        # Its value means nothing: the loss that is logged has the estimate of the divergence in its place.
        return ((surrogate - surrogate.detach() + value) / self._denominators(batch.num_tokens, inputs)).sum()

    def _denominators(self, lengths: Tensor, inputs: dict[str, Any]) -> Tensor | float | int:
        """Return by how much ``loss_type`` divides the sum over the tokens of each completion, shape (N,) or ()."""
        rows, training = len(lengths), self._in_training
        # Both are numbers while a trainer trains; in an evaluation nothing is accumulated.
        parts = cast(int, self.current_gradient_accumulation_steps) if training else 1
        batches = cast(int, self._settings.steps_per_generation) if training else 1
        if self.loss_type in SCALED_BY_TOKENS_OF_A_STEP:
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            return tokens * parts / batches
        denominators: dict[str, Tensor | int] = {
            "grpo": rows * lengths.clamp(min=1),
            "sapo": rows * lengths.clamp(min=1),
            "bnpo": lengths.sum().clamp(min=1),
            "dr_grpo": rows * cast(int, self.max_completion_length),
            "luspo": rows,
        }
        return parts * denominators[self.loss_type]

    @property
    def _settings(self) -> GRPOConfig:
        return cast(GRPOConfig, self.args)

    @property
    def _in_training(self) -> bool:
        assert self.model is not None
        return self.model.training

    @torch.no_grad()
    def _log_divergence(self, batch: CompletionBatch, value: Tensor) -> None:
        """Add means over all processes: of completions for the divergence, of tokens for TRL's ``kl``."""
        log_ratio, mask = batch.log_ratio, batch.completion_mask
        kl = value_from_policy(get("reverse_kl"), log_ratio)  # k3
        if self._settings.use_bias_correction_kl:
            importance = batch.importance_log_ratio
            if self.importance_sampling_level == "sequence":
                importance = (importance.sum(dim=-1) / mask.sum(dim=-1).clamp(min=1))[:, None]
            kl = kl * power(importance)
        sums = [value.sum(), batch.sequence_sum(log_ratio).sum(), batch.sequence_sum(kl).sum()]
        counts = [mask.any(dim=-1).sum().to(value.dtype), mask.sum().to(value.dtype)]
        reduced: Any = self.accelerator.reduce(torch.stack(sums + counts), reduction="sum")
        *totals, rows, tokens = reduced.tolist()
        names = (self.penalty.metric, "logratios/policy", "kl")
        metrics = self._metrics["train" if self._in_training else "eval"]
        for name, total, count in zip(names, totals, (rows, rows, tokens), strict=True):
            metrics[name].append(total / max(count, 1.0))


def _checked_beta(beta: float | None, args: GRPOConfig) -> float:
    """Return β from the trainer's argument or from ``args``, which must not differ."""
    if beta is None:
        beta = args.beta
    elif args.beta not in (0.0, beta):
        raise ConfigError(f"beta={beta!r} and args.beta={args.beta!r}: give one of them.")
    if not 0 < beta < float("inf"):
        raise ConfigError(
            f"beta={beta!r} must be positive and finite: it is the strength of the penalty. Give beta=0.04, say, "
            "or use trl.GRPOTrainer, which has no penalty at beta=0."
        )
    return beta


def _refuse_what_bends_the_penalty(args: GRPOConfig) -> None:
    """Refuse settings under which the penalty's mean gradient is not that of the divergence."""
    known = ("grpo", "sapo", "bnpo", "dr_grpo", "luspo", *SCALED_BY_TOKENS_OF_A_STEP)
    if args.loss_type not in known:
        raise ConfigError(
            f"args.loss_type={args.loss_type!r}: how it averages over tokens is not known here; choose one of "
            f"{', '.join(known)}."
        )
    if not args.use_bias_correction_kl:
        raise ConfigError(
            "args.use_bias_correction_kl=False gives TRL's KL term the gradient of the forward KL; the penalty here "
            "has that of the divergence named: leave it out, and set divergence='forward_kl' if that is meant."
        )
    further: Any = args.generation_kwargs or {}  # a dict by now: only the command line gives text
    of_generation = {name: getattr(args, name) for name in FREE_SAMPLING} | further
    for name, neutral in FREE_SAMPLING.items():
        if of_generation[name] not in neutral:
            raise ConfigError(
                f"args.{name}={of_generation[name]!r}: completions are then not samples of the policy, and the "
                "penalty's gradient is not that of the divergence; leave it out. `temperature` may be set: "
                "policy and reference are both scored at it."
            )


def _with_gradient_times(factor: Tensor | None, values: Tensor) -> Tensor:
    """Return the values, through which the gradient is multiplied by a constant factor of each."""
    if factor is None:
        return values
    fixed = values.detach()
    return fixed + factor.detach() * (values - fixed)
