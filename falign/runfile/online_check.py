"""Reject online settings that cannot work or have no effect."""

from __future__ import annotations

from collections.abc import Sequence

from falign.errors import ConfigError
from falign.objectives import BaseObjective, Objective, complete
from falign.objectives.batch import WORTH
from falign.runfile.objective_config import ObjectiveConfig
from falign.runfile.prompts_config import RolloutConfig
from falign.runfile.reward_config import RewardConfig

__all__ = ["check_samples", "check_without_rewards"]

OF_REWARDS = ("difficulty", "outcome", "pass_reward", "ranked")
"""Fields of ``rollout`` that have an effect only on rewards."""


def check_samples(
    rollout: RolloutConfig, chosen: ObjectiveConfig, rewards: Sequence[RewardConfig], objective: Objective
) -> None:
    """Refuse an objective that learns nothing from samples, groups that it cannot compare, and fields without effect.

    Raises:
        ConfigError: One of these is found; the message names the fields.
    """
    whole = complete(objective)
    if not whole.learns_from_samples:
        raise ConfigError(_learns_nothing(whole, chosen))
    if any(mean.rows == "mismatched" for mean in whole.step_means.values()):
        raise ConfigError(
            f"objective.kind={chosen.kind} estimates its reference point from prompts with the completions of other "
            "rows of data, and here completions are sampled: set objective.reference_point=samples."
        )
    _check_groups(rollout, chosen, objective)
    _check_correction(rollout, chosen, whole)
    _check_effects(rollout, chosen, rewards, objective)


def _learns_nothing(objective: BaseObjective, chosen: ObjectiveConfig) -> str:
    terms = [name for name, part in objective.summands.items() if not part.learns_from_samples]
    place = f"objective.terms.{terms[0]}" if terms else f"objective.kind={chosen.kind}"
    remedy = (
        "leave the term out, or, if it has the field completions, set it to chosen: the best samples of each prompt"
    )
    return (
        f"{place} reads no reward, and would learn from the policy's own samples as they are: "
        f"{remedy if terms else 'give data in place of prompts, rollout and rewards'}."
    )


def check_without_rewards(rollout: RolloutConfig, chosen: ObjectiveConfig, objective: Objective) -> None:
    """Refuse a run without rewards whose objective or rollouts read them.

    Raises:
        ConfigError: They do; the message names the fields.
    """
    if read := sorted(objective.needs & WORTH):
        raise ConfigError(
            f"rewards is empty, and objective.kind={chosen.kind} reads {', '.join(read)} of completions: give at least "
            "one reward."
        )
    fields = RolloutConfig.model_fields
    if given := [name for name in OF_REWARDS if getattr(rollout, name) != fields[name].default]:
        raise ConfigError(
            f"rollout.{given[0]}={getattr(rollout, given[0])} without rewards, which it is about: leave it out, or "
            "give rewards."
        )


def _check_correction(rollout: RolloutConfig, chosen: ObjectiveConfig, objective: BaseObjective) -> None:
    if rollout.correction is not None and objective.correction_level is None:
        raise ConfigError(
            f"rollout.correction bounds importance weights π/π_old, and objective.kind={chosen.kind} has none of a "
            "single unit: leave it out, or give all terms of a sum the same importance."
        )


def _check_groups(rollout: RolloutConfig, chosen: ObjectiveConfig, objective: Objective) -> None:
    if rollout.completions > 1:
        return
    if "pairs" in complete(objective).preference_kinds:
        raise ConfigError(
            f"rollout.completions=1 with objective.kind={chosen.kind}, which compares completions of one prompt: "
            "sample two or more."
        )
    if (compared := chosen.compares) is None:
        return
    among, field = compared
    if among == "group" or rollout.prompts == 1:
        raise ConfigError(
            f"rollout.completions=1 with {field}, which compares a completion with others: sample two or more, or "
            "choose batch_mean (with two or more prompts), gae or none."
        )


def _check_effects(
    rollout: RolloutConfig, chosen: ObjectiveConfig, rewards: Sequence[RewardConfig], objective: Objective
) -> None:
    # A resolved run file has all fields, so a field counts as given if it differs from its default.
    fields = RolloutConfig.model_fields
    if rollout.ranked != fields["ranked"].default and "pairs" not in complete(objective).preference_kinds:
        raise ConfigError(
            f"rollout.ranked={rollout.ranked} applies only to preference objectives, and objective.kind="
            f"{chosen.kind} learns from rewards: leave it out."
        )
    counting = [reward for reward in rewards if reward.weight != 0]
    if rollout.difficulty is not None and len(counting) > 1 and rollout.outcome is None:
        raise ConfigError(
            f"rollout.difficulty with {len(counting)} rewards: their sum does not say whether a prompt is solved. "
            "Set rollout.outcome to the name of the reward that decides it."
        )
    if rollout.fit_samples != fields["fit_samples"].default and not chosen.needs_samples:
        raise ConfigError(
            f"rollout.fit_samples={rollout.fit_samples} has no effect, because nothing is fitted: leave it out. It "
            "applies to objective.target.moments without lambdas."
        )
    transformed = [i for i, reward in enumerate(rewards) if reward.transform is not None]
    if chosen.num_rewards is not None and transformed:
        raise ConfigError(
            f"rewards.{transformed[0]}.transform has no effect: a target reads each reward by itself, before "
            "transforms. Leave it out."
        )
    for i in transformed:
        stated = rewards[i].model_dump()["transform"]
        for field, beta in chosen.penalties() if stated["kind"] in ("best_of_n", "worst_of_n") else ():
            if stated["beta"] != beta:
                raise ConfigError(
                    f"rewards.{i}.transform.beta={stated['beta']:g} and objective.{field}={beta:g}: the transform is "
                    "solved for the β of the penalty; set both to the same number."
                )
    weighted = [i for i, reward in enumerate(rewards) if reward.weight != 1]
    if chosen.num_rewards is not None and weighted:
        raise ConfigError(
            f"rewards.{weighted[0]}.weight={rewards[weighted[0]].weight:g}: a target reads each reward by "
            "itself, before weights: leave it out, and set its influence in objective.target."
        )
