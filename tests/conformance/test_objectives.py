"""One battery that every objective passes; a new objective is one row of ROWS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from falign import CompletionBatch, divergences
from falign.objectives import (
    Anchored,
    BaseObjective,
    BinaryConstraint,
    Cloning,
    Constant,
    Dads,
    DifficultyKernel,
    Discriminative,
    Distillation,
    DistributionMatching,
    DivergenceTo,
    Entropy,
    EntropyGap,
    ExponentialReward,
    Hybrid,
    Listwise,
    Measure,
    Objective,
    ObjectiveOutput,
    Pairwise,
    PolicyGradient,
    RankedRewardModel,
    Rehearsal,
    RewardModel,
    Selected,
    SequenceMatching,
    Sum,
    Supervised,
    Term,
    TokenPairwise,
    TrustRegion,
    Unpaired,
    ace,
    complete,
    field_of,
    quantile_filter,
    stcr,
)
from falign.runfile.objective_config import OBJECTIVES
from falign.testing import objectives as battery
from tests.runfile.test_every_field import BUILT_ALONE


@dataclass(frozen=True)
class OfTeacher:
    """A user's own class without a base: cross-entropy to a second reference, with its entropy as a bonus."""

    needs: ClassVar = frozenset({"references.teacher", "token_weights.activations"})
    measures: ClassVar[dict[str, Measure]] = {"mine": Entropy()}

    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        gap = (batch.logprobs - batch.require("references.teacher")).masked_fill(~batch.completion_mask, 0.0)
        weights = batch.require("token_weights").masked_fill(~batch.completion_mask, 0.0)
        bonus = batch.require("measures.mine").masked_fill(~batch.completion_mask, 0.0)
        terms = Term(gap.abs(), weights, name="teacher"), Term(-bonus, weights, 0.1, "entropy")
        return ObjectiveOutput(terms, {"gap": gap.sum(dim=-1).detach()})


JS, KL = divergences.get("jensen_shannon"), divergences.get("forward_kl")
RLOO = PolicyGradient(KL, 0.2)
ROWS = {
    "f-DPO": Pairwise(JS, beta=0.3),
    "reward model": RewardModel(0.1, "conservative(0.1)", "data"),
    "reward model, ranked": RankedRewardModel(0.1),
    "anchor": Anchored(JS, 0.3, 0.2, "data"),
    "f-DPO, weights": Pairwise(JS, beta=0.3, weighting="data"),
    "IPO": Pairwise(divergences.get("reverse_kl"), "ipo", beta=0.3),
    "robust, by token": Pairwise(divergences.get("chi2_kl"), "robust(0.1)", 0.1, "token"),
    "Plackett-Luce": Listwise(divergences.get("alpha(0.4)"), beta=0.3),
    "H-DPO": Pairwise(divergences.get("chi2_kl"), beta=0.3, entropy_weight=0.8),
    "f-SFT, bounded": Supervised(divergences.get("squared_hellinger"), 0.5, max_weight=10.0),
    "best of n": Cloning("best", weights=[DifficultyKernel(pass_reward=0.4)]),
    "OREAL, failed": Cloning("failed", 0.4, "leave_one_out", reduction="sequence_mean"),
    "DisCO-b": Discriminative("ratio", pass_reward=0.4),
    "DisCO": Sum({"scores": Discriminative(tau=0.5, pass_reward=0.4), "trust": TrustRegion(JS, 10.0, 0.01)}),
    "trust region": TrustRegion(divergences.get("reverse_kl"), 3.0, 0.01, "sequence"),
    "SequenceMatch": SequenceMatching(0.7, 0.9),
    "KTO": Unpaired(divergences.get("reverse_kl"), 0.3, 1.5, 0.5),
    "KTO, samples": Unpaired(JS, 0.3, 1.5, 0.5, "samples"),
    "KTO, vocabulary": Unpaired(divergences.get("chi2_kl"), 0.3, reference_point="vocabulary"),
    "TDPO1": TokenPairwise(KL, beta=0.3, variant=1, weighting="mapo"),
    "TDPO2": TokenPairwise(JS, beta=0.3),
    "RLOO": RLOO,
    "GRPO": PolicyGradient(JS, 0.2, "group_normalised", 0.2, 0.3, "token", "token", "returns", "sequence_mean"),
    "PPO": PolicyGradient(JS, 0.2, "gae", 0.2, 0.3, "token", reduction="token_mean"),
    "vocabulary": PolicyGradient(divergences.get("pearson_chi2"), 0.2, level="vocabulary", credit="returns"),
    "ACE, weights": PolicyGradient(
        *(KL, 0.2, ["group_normalised", ace(alpha=0.7), stcr(rate=0.1, pass_reward=0.5)]),
        level="vocabulary",
        weights=[DifficultyKernel(0.5, 2.0, pass_reward=0.5), quantile_filter("entropy", 0.4), EntropyGap("teacher")],
        penalty_weights=[Dads(pass_reward=0.5)],
    ),
    "RLAD": PolicyGradient(
        JS, 0.2, "group_normalised", 0.2, 0.3, "token", importance_reference="teacher", old_exponent=0.4
    ),
    "f-DPG": DistributionMatching(JS, ExponentialReward(0.5)),
    "f-DPG, constraint": DistributionMatching(KL, BinaryConstraint(), "constant"),
    "rehearsal": Rehearsal(JS),
    "rehearsal, whole": Rehearsal(divergences.get("total_variation"), "sequence"),
    "DPH-RL": Hybrid(PolicyGradient(JS, 0.1, "gae", importance="token"), Rehearsal(KL), 0.5),
    "SFT": Supervised(),
    "f-SFT": Supervised(divergences.get("pearson_chi2"), 0.5),
    "distillation": Distillation(JS),
    "distillation, returns": Distillation(KL, "tutor", credit="returns", temperature=2.0, reduction="sequence_mean"),
    "distillation, tokens": Distillation(
        KL, level="token", importance="token", weights=(DifficultyKernel(pass_reward=0.5),)
    ),
    "distillation, sequences": Distillation(JS, level="sequence"),
    "distillation, measure": Distillation(Entropy()),
    "chosen alone": Selected(Supervised(), "chosen"),
    "rejected alone": Selected(Distillation(JS, level="token", credit="returns"), "rejected"),
    "f-DPO + SFT": Sum({"dpo": Pairwise(JS, beta=0.3), "sft": (Selected(Supervised(), "chosen"), 0.2)}),
    "GRPO + distillation": Sum(
        {
            "grpo": PolicyGradient(JS, 0.2, "group_normalised", 0.2, 0.3, "token"),
            "teacher": (Distillation(KL, level="sequence"), 0.5),
            "entropy": (Distillation(Entropy()), -0.1),
        }
    ),
    "sum of sums": Sum(
        {
            "online": (Sum({"ppo": PolicyGradient(JS, 0.2, "gae"), "old": Hybrid(RLOO, Rehearsal(KL), 0.5)}), 2.0),
            "fdpg": DistributionMatching(JS, ExponentialReward(0.5)),
        }
    ),
    "own": OfTeacher(),
}
READ_BY_WEIGHTS = {"measures.entropy", "measures.entropy_teacher", "measures.score"}
"""Measures from which token weights are made, which are constants."""
PROMPTS = torch.tensor([0, 0, 1, 1, 1, 2, 2])
LENGTHS = torch.tensor([5, 3, 4, 1, 5, 2, 4])


@pytest.fixture(params=ROWS)
def objective(request) -> BaseObjective:
    return complete(ROWS[request.param])


def test_every_kind_of_a_run_file_has_a_row():
    sections = [section for kind, section in OBJECTIVES.members.items() if kind != "python"]
    built = {type(section.model_validate(BUILT_ALONE[section.__name__].base).build()) for section in sections}
    assert built <= {type(row) for row in ROWS.values()}


def batch_for(objective: Objective, *, far: float = 1.0) -> CompletionBatch:
    """Just what the objective reads, of seven completions of three prompts; the last prompt's are the reference's."""
    generator = torch.Generator().manual_seed(11)
    mask = torch.arange(5) < LENGTHS[:, None]

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.rand(*shape, generator=generator, dtype=torch.float64)

    def signs(*shape: int) -> Tensor:
        return 1.0 if far == 1.0 else torch.randn(*shape, generator=generator, dtype=torch.float64).sign()

    fields = {
        "reference_logprobs": -draw(7, 5, scale=far) * signs(7, 5),
        "references.teacher": -draw(7, 5, scale=far),
        "references.tutor": -draw(7, 5, scale=far),
        "old_logprobs": -draw(7, 5, scale=far) * signs(7, 5),
        "preference": torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0, 0.0, 1.0]).double(),
        "rewards": draw(7),
        "from_reference": PROMPTS == 2,
        "token_weights": draw(7, 5),
        "features": torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]).double()[:, None],
        "log_partition": -draw(7),
        "values": draw(7, 5).requires_grad_(),
        "old_values": draw(7, 5),
        "learned_rewards": draw(7).requires_grad_(),
        "margin": draw(7),
    }
    needs = {name if name.startswith("references.") else field_of(name) for name in objective.needs}
    logprobs = (-draw(7, 5, scale=far) * signs(7, 5)).requires_grad_()
    measures = {
        f"measures.{name}": draw(7, 5, scale=far).requires_grad_(not isinstance(measure, Constant))
        for name, measure in objective.measures.items()
    }
    fields |= {f"step_means.{name}": torch.full((7,), 0.4).double() for name in complete(objective).step_means}
    needs |= {name for name in fields if name.startswith("step_means")}
    always = {"logprobs": logprobs, "completion_mask": mask, "prompt_index": PROMPTS}
    return CompletionBatch.of({**always, **{name: fields[name] for name in needs}, **measures})


def moving(batch: CompletionBatch) -> dict[str, Tensor]:
    """What carries the gradient, by name."""
    return {name: value for name, value in batch.tensors().items() if value.requires_grad}


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def test_every_row_is_an_objective_with_terms_of_different_names_whose_gradient_reaches_the_policy(objective):
    assert isinstance(objective, Objective)
    assert isinstance(objective, BaseObjective)
    batch = batch_for(objective)
    output = objective(batch)
    assert len({term.name for term in output.terms}) == len(output.terms)
    assert all(term.losses.shape == term.weights.shape for term in output.terms)
    slopes = gradients(output.mean(), moving(batch))
    of_measures = {name: slope for name, slope in slopes.items() if name.startswith("measures.")}
    if objective in (ROWS["distillation"], ROWS["distillation, measure"]):  # they are means of a measure
        slopes = of_measures
    if not objective.reads_logprobs:
        assert slopes.pop("logprobs").abs().max() == 0
    assert {name for name, slope in slopes.items() if slope.abs().max() > 0} == slopes.keys() - READ_BY_WEIGHTS


# What a user's own objective is checked for, too.
PUBLIC = {
    "padding": battery.padding,
    "the order of rows": battery.order_of_rows,
    "micro-batches": battery.micro_batches,
    "the contract": battery.contract,
    "half precision": battery.half_precision,
    "missing fields": battery.missing_fields,
}


@pytest.mark.parametrize("check", PUBLIC)
def test_the_public_battery_passes(objective, check):
    PUBLIC[check](objective, batch_for(objective))


def test_losses_gradients_and_metrics_are_finite_to_ten_thousand_nats(objective):
    battery.finite(objective, batch_for(objective, far=1e4))


def test_an_objective_that_answers_more_than_is_asked_of_a_plain_class_must_say_so():
    class Prepares(OfTeacher):
        def prepare(self, batch):
            return batch

    with pytest.raises(TypeError, match=r"Prepares defines prepare, which would never be called.*BaseObjective"):
        complete(Prepares())
    with pytest.raises(TypeError, match=r"Term has no needs and no measures|parameter 'objective'"):
        complete(Term(torch.zeros(1), torch.zeros(1)))  # pyright: ignore[reportArgumentType]
    assert complete(OfTeacher()).measures == {"mine": Entropy()}
    with pytest.raises(TypeError, match="defines no implicit reward"):
        complete(OfTeacher()).completion_rewards(batch_for(OfTeacher()))


def test_the_reference_has_one_name_in_two_places():
    batch = batch_for(ROWS["f-DPO"])
    assert batch.references["reference"] is batch.reference_logprobs
    named = CompletionBatch.of(
        {
            **{name: value for name, value in batch.tensors().items() if name != "reference_logprobs"},
            "references.reference": batch.require("reference_logprobs"),
        }
    )
    assert torch.equal(named.require("reference_logprobs"), batch.require("reference_logprobs"))
    other = replace(batch, reference_logprobs=batch.logprobs * 2)
    assert torch.equal(other.references["reference"], batch.logprobs * 2)
    assert not other.references["reference"].requires_grad
    with pytest.raises(ValueError, match="give one of them"):
        replace(batch, references={"reference": batch.logprobs})


def test_equal_measures_are_equal():
    assert DivergenceTo(JS, "teacher") == DivergenceTo(divergences.get("js"), "teacher")
