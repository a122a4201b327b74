"""The gap between a sampler's log-probabilities and the model's, and the perturbation that shows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from falign.errors import ConfigError, EngineError
from falign.models.structure import adapter_matrix, base_of, linear_modules, lora_layers, without_adapters
from falign.rollouts.base import Engine, SampledCompletion, SamplingParams
from falign.rollouts.decoding import process_logits
from falign.scoring import PromptTree, completion_distribution, evaluation_mode, pad

__all__ = ["EXACT", "Canary", "Gap", "measure_gap", "perturbed", "recomputed_logprobs"]


EXACT = 1e-3
"""Bound of the mean gap per token if both compute in float32, in nats; rounding causes about a hundredth of it."""


class Gap(NamedTuple):
    """Absolute differences of log-probabilities, per token, nats.

    Attributes:
        mean: Mean over all tokens.
        max: Largest difference.
        num_tokens: Number of tokens.
    """

    mean: float
    max: float
    num_tokens: int


def measure_gap(model: nn.Module, rollouts: Sequence[SampledCompletion], params: SamplingParams) -> Gap:
    """Return the gap between the log-probabilities that a sampler recorded and those of a model."""
    gaps = [
        abs(said - is_)
        for rollout, row in zip(rollouts, recomputed_logprobs(model, rollouts, params), strict=True)
        for said, is_ in zip(rollout.logprobs, row, strict=True)
    ]
    return Gap(sum(gaps) / len(gaps), max(gaps), len(gaps))


class Canary:
    """A test of each version on a few sampled tokens, to see that its weights reached the sampler.

    Args:
        prompt_ids: Long prompts, because short ones leave nothing in a server's cache.
        params: Sampling parameters of the run.
        bound: Largest allowed mean gap per token, nats.
    """

    def __init__(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, bound: float) -> None:
        self.prompt_ids, self.params, self.bound = prompt_ids, params, bound

    def check(self, engine: Engine, model: nn.Module, version: int) -> None:
        """Refuse a version if its samples do not come from the model's distribution.

        Raises:
            EngineError: The mean gap is above the bound; the message has both.
        """
        rollouts = engine.sample(self.prompt_ids, 1, self.params, version=version, seed=0)
        gap = measure_gap(model, rollouts, self.params)
        if not gap.mean <= self.bound:
            raise EngineError(
                f"Version {version}: the sampler's log-probabilities of {gap.num_tokens} tokens are {gap.mean:.2g} "
                f"nats off on average and {gap.max:.2g} at most, and {self.bound:.2g} is allowed on average: it does "
                "not sample these weights. Restart the server and resume the run; if the error comes back, see "
                "docs/vllm.md."
            )


@torch.no_grad()
def recomputed_logprobs(
    model: nn.Module, rollouts: Sequence[SampledCompletion], params: SamplingParams
) -> list[list[float]]:
    """Return the model's log-probability of each token, under the distribution that ``params`` make of its logits.

    Args:
        model: The policy, with the weights of the rollouts' version.
        rollouts: Completions; all logits of one of them are in memory at once.
        params: Sampling parameters of the rollouts; the temperature is above 0.
    """
    rows = []
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for rollout in rollouts:
            batch = pad([PromptTree(rollout.prompt_ids, (rollout.completion_ids,))], pad_token_id=0).to(device)
            hidden, head = completion_distribution(model, batch)
            logits = process_logits(head.logits(head.embeddings(hidden)), params)
            targets = batch.completion_ids[batch.completion_mask]
            rows.append(logits.log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0].tolist())
    return rows


_SHARE = 0.1  # size of the change relative to the weights
_USUAL_STD = 0.02  # assumed for packed weights, where it cannot be computed


@contextmanager
def perturbed(policy: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Perturb some of the trained weights, and restore them bit for bit on exit.

    At the start of a run B = 0 and the policy equals its base, so a sampler without the adapter would pass the test.
    With adapters, noise is added to all B; without, to the last linear layer before the head.

    Args:
        policy: The model in training.

    Raises:
        ConfigError: The policy has neither LoRA nor a linear layer that trains.
    """
    changes = list(_changes(policy))
    if not changes:
        raise ConfigError(
            "The policy has no LoRA and no linear layer that trains, so no sampler can be tested with it."
        )
    before = [weight.detach().clone() for weight, _ in changes]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for weight, std in changes:
                weight.copy_(weight + std * torch.randn(weight.shape, generator=generator).to(weight))
        yield
    finally:
        with torch.no_grad():
            for (weight, _), old in zip(changes, before, strict=True):
                weight.copy_(old)


def _changes(policy: PreTrainedModel | PeftModel) -> Iterator[tuple[Tensor, float]]:
    """Yield the weights to change, each with the standard deviation of its noise."""
    if isinstance(policy, PeftModel):
        name = policy.active_adapters[0]
        for layer in lora_layers(policy, name).values():
            down, up = adapter_matrix(layer.lora_A, name).detach(), adapter_matrix(layer.lora_B, name)
            std = _std(layer)
            # ΔW = scaling · B A sums r products per entry, so noise of std s in B gives one of s · size in ΔW.
            size = layer.scaling[name] * layer.r[name] ** 0.5 * float(down.float().std())
            yield up, _SHARE * std / max(size, 1e-8)
        return
    base = base_of(policy)
    inner = [module for module in linear_modules(base).values() if module is not base.get_output_embeddings()]
    for module in inner[-1:]:
        assert isinstance(module.weight, Tensor)
        yield module.weight, 3 * _SHARE * float(module.weight.detach().float().std())


def _std(layer: LoraLayer) -> float:
    """Return the standard deviation of the base weights under an adapter's layer, experts included."""
    assert isinstance(layer, nn.Module)
    own = [weight for weight in without_adapters(layer).parameters(recurse=False) if weight.ndim > 1]
    weights = [weight.detach().float() for weight in own if not {"quant_state", "SCB"} & vars(weight).keys()]
    return max((float(weight.std()) for weight in weights), default=_USUAL_STD)
