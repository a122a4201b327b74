"""Records of rollouts: rewards, pass rates, lengths, diversity, divergences, and the completions themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from falign import divergences
from falign.divergences import estimators
from falign.durable import append
from falign.metrics.ngrams import distinct
from falign.references import REFERENCE, Reference
from falign.rewards.groups import best_of_n, pass_at_k, powers_of_two
from falign.rollouts import SampledCompletion
from falign.scoring import PromptTree, Scorer
from falign.training.online.groups import Draw
from falign.training.processes import Means, is_writer, own_batches
from falign.training.trl_metrics import length_metrics, reward_metrics

__all__ = ["CompletionsTable", "draw_values", "evaluation_metrics", "rollout_metrics"]


def rollout_metrics(draw: Draw, *, pass_reward: float, outcome: str | None = None) -> dict[str, Tensor]:
    """Return the metrics of a rollout, each with one value per completion, per prompt, or for the whole rollout.

    ``outcome`` names the reward that decides whether a completion passes; None means the sum.
    ``pass@k`` and ``reward/best_of_k`` are unbiased estimates from the whole group, for k = 1, 2, 4 ... up to its size.
    Without rewards there are only those of the completions themselves.
    """
    groups = draw.groups
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    metrics = {
        "completions/length": torch.tensor([len(rollout.completion_ids) for rollout in rollouts]),
        "completions/clipped": torch.tensor([rollout.finish_reason == "length" for rollout in rollouts]),
        "rollout/prompts_sampled": torch.tensor([draw.num_sampled]),
        **length_metrics(
            [len(rollout.completion_ids) for rollout in rollouts],
            [rollout.finish_reason != "length" for rollout in rollouts],
        ),
    }
    rewards, passed = torch.tensor([group.rewards for group in groups]), None
    if rewards.numel():
        passed = torch.tensor([group.num_passed(pass_reward, outcome=outcome) for group in groups])
        metrics |= {
            "reward": rewards.flatten(),
            "groups/all_pass": passed == rewards.shape[1],
            "groups/all_fail": passed == 0,
            "groups/zero_variance": rewards.amax(dim=1) == rewards.amin(dim=1),
            "rollout/prompts_unfit": torch.tensor([draw.num_unfit]),
            "reward/timeouts": torch.tensor([draw.timeouts]),
            "reward/errors": torch.tensor([draw.errors]),
        }
    parts = {name: [value for group in groups for value in group.parts[name]] for name in groups[0].parts}
    for name, given in parts.items():
        metrics[f"reward/{name}"] = torch.tensor([value for value in given if value is not None])
    if rewards.numel():
        metrics |= reward_metrics(rewards, parts)
    metrics |= {f"reward/{name}": torch.tensor(found) for name, found in draw.measured.items()}
    values = draw_values(rewards, [list(map(_ids, group.rollouts)) for group in groups], passed=passed)
    metrics |= {"completions/unique" if name == "unique" else name: each for name, each in values.items()}
    # A reward that gave no value to any completion has no mean, so it is left out.
    return {name: values.double() for name, values in metrics.items() if values.numel()}


def draw_values(
    rewards: Float[Tensor, "P G"],
    token_ids: Sequence[Sequence[Sequence[int]]],
    *,
    passed: Int[Tensor, " P"] | None = None,
) -> dict[str, Float[Tensor, " P"]]:
    """Return values of the completions of a prompt as a group, one per prompt.

    ``reward/best_of_k`` and ``pass@k`` are unbiased estimates for k = 1, 2, 4 ... up to the size of the group;
    ``distinct-1`` and ``distinct-2`` are the shares of distinct tokens and token pairs, ``unique`` that of completions.

    Args:
        rewards: Rewards of G completions per prompt; of shape (P, 0) without rewards.
        token_ids: Token ids of each prompt's completions.
        passed: Number of completions that pass; None leaves ``pass@k`` out.
    """
    size = len(token_ids[0])
    values = {f"reward/best_of_{k}": best_of_n(rewards, k) for k in (powers_of_two(size) if rewards.numel() else ())}
    if passed is not None:
        values |= {f"pass@{k}": pass_at_k(size, passed, k) for k in powers_of_two(size)}
    for n in (1, 2):
        values[f"distinct-{n}"] = torch.tensor([distinct(group, n) for group in token_ids], dtype=torch.float64)
    unique = [len(set(map(tuple, group))) / size for group in token_ids]
    return {**values, "unique": torch.tensor(unique, dtype=torch.float64)}


def evaluation_metrics(
    draw: Draw,
    *,
    policy: nn.Module,
    references: Mapping[str, Reference],
    pass_reward: float,
    outcome: str | None,
    temperature: float,
    batch_size: int,
    scorer: Scorer,
) -> dict[str, float]:
    """Return means over held-out prompts, with the policy's entropy and its divergences from the references.

    Those from the reference named ``reference`` have their plain names, the others begin with the reference's name, as
    in ``teacher/divergence/reverse_kl``. The divergences are estimates for whole completions, in nats. They are left
    out at temperatures other than 1, because the samples are then not from the policy's own distribution.

    Args:
        draw: The held-out completions.
        policy: The policy that sampled them.
        references: The references by name.
        pass_reward: Reward that a completion needs to pass.
        outcome: Name of the reward that decides whether it passes; None for the sum.
        temperature: Sampling temperature.
        batch_size: Prompts per forward pass.
        scorer: Scorer with a layout that the model can read.
    """
    means = Means()
    if is_writer():  # every process has the whole draw
        means.add(rollout_metrics(draw, pass_reward=pass_reward, outcome=outcome))
    for groups, counted in own_batches(draw.groups, batch_size):
        trees = [
            PromptTree(group.row.prompt_ids, tuple(map(_ids, group.rollouts)), place=group.row.place)
            for group in groups
        ]
        batch = scorer.lay_out(trees, model=policy)
        scores = scorer.scores(policy, batch)
        found = {name: reference.logprobs(policy, batch) for name, reference in references.items()}
        if not counted:
            continue
        means.add({"entropy": scores.entropy[batch.completion_mask]})
        for name, logprobs in found.items():
            whole = (scores.logprobs - logprobs).masked_fill(~batch.completion_mask, 0.0).sum(dim=-1)
            prefix = "" if name == REFERENCE else f"{name}/"
            means.add({f"{prefix}{metric}": values for metric, values in _divergences(whole, temperature).items()})
    return means.take()


def _divergences(log_ratio: Float[Tensor, " N"], temperature: float) -> dict[str, Tensor]:
    """Return the log-ratios of whole completions, and divergences if they were sampled at temperature 1."""
    kinds = ("reverse_kl", "jensen_shannon", "total_variation") if temperature == 1 else ()
    values = {f"divergence/{kind}": estimators.value_from_policy(divergences.get(kind), log_ratio) for kind in kinds}
    return {"logratios/policy": log_ratio, **values}


def _ids(rollout: SampledCompletion) -> tuple[int, ...]:
    return tuple(rollout.completion_ids)


class CompletionsTable:
    """File with a line per completion and the step before which it was sampled, or first used if drawn ahead.

    Args:
        path: The file; None writes nothing.

    Attributes:
        tell: Also called with the rows, and whether they are held out; None by default.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.tell: Callable[[list[dict[str, Any]], bool], None] | None = None

    def write(self, step: int, draw: Draw, *, held_out: bool = False) -> None:
        """Append the completions of a rollout."""
        if self.path is None:
            return
        rows = [
            {
                "step": step,
                "held_out": held_out,
                "place": group.row.place,
                "prompt": group.row.prompt,
                "completion": text,
                "reward": group.rewards[i] if group.rewards else None,
                "parts": {name: values[i] for name, values in group.parts.items()},
                "tokens": len(rollout.completion_ids),
                "finish_reason": rollout.finish_reason,
            }
            for group in draw.groups
            for i, (rollout, text) in enumerate(zip(group.rollouts, group.texts, strict=True))
        ]
        append(self.path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
        if self.tell is not None:
            self.tell(rows, held_out)
