"""An objective whose weights depend on the policy is stopped with the rule, not trained on another loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from typing_extensions import override

from falign.errors import ConfigError, TrainingError
from falign.methods import FDPO
from falign.objectives import BaseObjective, CompletionBatch, Entropy, Measure, Objective, ObjectiveOutput, Term
from falign.references import AdapterOff
from tests.equivalence.runs import lora_policy, run, trees


@dataclass(frozen=True)
class Weighted:
    """f-DPO's losses of completions with weights of the kind that is named."""

    kind: str
    needs = frozenset({"reference_logprobs", "preference"})
    measures: ClassVar[dict[str, Measure]] = {}

    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        log_ratio = batch.sequence_sum(batch.logprobs - batch.require("reference_logprobs"))
        losses = -batch.sequence_sum(batch.logprobs)
        weights = {
            "constant": torch.ones_like(losses),
            "boolean": batch.require("preference") > 0.5,
            "self-normalized": log_ratio.exp() / log_ratio.exp().mean(),
            "detached": log_ratio.detach().exp(),
            "attached, of the same value": torch.ones_like(losses) + 0.0 * losses,
            "softmax": log_ratio.detach().softmax(dim=0),
            "other shape": torch.ones(2 if batch.logprobs.detach().any() else len(losses)),
        }[self.kind]
        terms = (Term(losses, weights),)
        if self.kind == "other shape":
            terms = (Term(losses[: len(weights)], weights),)
        return ObjectiveOutput(terms, {})


@dataclass(frozen=True)
class Broken:
    """f-DPO that breaks one rule of the contract, as named."""

    kind: str
    needs = frozenset({"reference_logprobs", "preference"})
    measures: ClassVar[dict[str, Measure]] = {}

    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        (term,), metrics = FDPO()(batch)
        trained = bool(batch.logprobs.detach().any())
        terms = {
            "another name": (term._replace(name="trained" if trained else "planned"),),
            "one term more": (term, term) if trained else (term,),
            "negative weight": (term._replace(losses=-term.losses, weights=-term.weights),),
            "detached losses": (term._replace(losses=term.losses.detach()),),
        }.get(self.kind, (term,))
        wrong = {"attached metric": term.losses, "mean as metric": term.losses.detach().mean()}.get(self.kind)
        return ObjectiveOutput(terms, metrics if wrong is None else {**metrics, "wrong": wrong})


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("another name", r"the terms \[trained\], and \[planned\] before the forward pass. An objective must return"),
        ("one term more", r"the terms \[pairwise, pairwise\], and \[pairwise\] before"),
        ("negative weight", "term pairwise has a negative weight"),
        ("detached losses", r"no loss of \[pairwise\] carries a gradient"),
        ("attached metric", "the metric 'wrong' of the objective carries a gradient"),
        ("mean as metric", r"the metric 'wrong' of the objective has shape \(\). A metric must be"),
    ],
)
def test_a_broken_contract_is_stopped_with_the_rule(tmp_path, kind, found):
    settings = {"per_device_train_batch_size": 2, "max_steps": 1}
    with pytest.raises(TrainingError, match=rf"Step 1: .*{found}"):
        run(tmp_path, lora_policy(trained=True), AdapterOff(), Broken(kind), train=trees(4), **settings)


@dataclass(frozen=True)
class Returns(BaseObjective):
    """f-DPO whose output is changed, as named."""

    kind: str

    @property
    @override
    def needs(self):
        return frozenset({"reference_logprobs", "preference"})

    @override
    def __call__(self, batch):
        output = FDPO()(batch)
        (term,) = output.terms
        mean = term.losses.detach().mean()
        return {
            "a tensor": term.losses.mean(),
            "a pair": (output.terms, output.metrics),
            "one term": output._replace(terms=term),
            "no terms": output._replace(terms=()),
            "pairs": output._replace(terms=(tuple(term)[:2],)),
            "no weights": output._replace(terms=(term._replace(weights=None),)),
            "complex": output._replace(terms=(term._replace(losses=term.losses + 0j),)),
            "scale of the batch": output._replace(terms=(term._replace(scale=mean),)),
            "scale for each": output._replace(terms=(term._replace(scale=torch.ones(len(term.losses))),)),
            "scale of the policy": output._replace(terms=(term._replace(scale=mean.item()),)),
            "scale of the rows": output._replace(terms=(term._replace(scale=float(batch.completion_mask.sum())),)),
            "no metrics": output._replace(metrics=None),
            "a number": output._replace(metrics={"margin": 1.0}),
            "loss": output._replace(metrics={"loss": term.losses.detach()}),
            "entropy": output._replace(metrics={"entropy": term.losses.detach()}),
        }[self.kind]


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("a tensor", "the objective returned a Tensor. An objective must return ObjectiveOutput"),
        ("a pair", "the objective returned a tuple. An objective must return ObjectiveOutput"),
        ("one term", "the objective returned a Term in place of a tuple of terms"),
        ("no terms", "the objective returned no terms"),
        ("pairs", "the objective returned a tuple among the terms"),
        ("no weights", "the objective returned weights of term pairwise as a NoneType; they must be a real tensor"),
        ("complex", "the objective returned losses of term pairwise of torch.complex64"),
        (
            "scale of the batch",
            "term pairwise with a Tensor as its scale. A scale is a factor of the mean over the whole",
        ),
        ("scale for each", "term pairwise with a Tensor as its scale"),
        ("scale of the policy", r"the scales of the terms are \[.*\], and \[.*\] before the forward pass. A scale"),
        ("scale of the rows", r"the scales of the terms are \[.*\], and \[.*\] in another micro-batch of the step. A"),
        ("no metrics", "the objective returned a NoneType in place of metrics"),
        ("a number", "the objective returned the metric 'margin' as a float"),
        ("loss", "the objective returned a metric named 'loss', which the trainer logs itself: rename it"),
        ("entropy", "the objective returned a metric named 'entropy', which the trainer logs itself: rename it"),
    ],
)
def test_what_an_objective_returns_is_read_or_refused_with_the_rule(tmp_path, kind, found):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    with pytest.raises(TrainingError, match=f"Step 1: .*{found}"):
        run(tmp_path, lora_policy(trained=True), AdapterOff(), Returns(kind), train=trees(8), **settings)


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ({"needs": "preference"}, "needs is 'preference'; it must be a frozenset of names"),
        ({"needs": None}, "needs is None; it must be a frozenset"),
        ({"needs": frozenset({"references"})}, "needs has 'references': give a field"),
        ({"needs": frozenset({"preference.chosen"})}, "needs has 'preference.chosen': give a field"),
        ({"needs": frozenset({"measures.entropy"})}, "needs has 'measures.entropy': .*measures belong in measures"),
        ({"needs": frozenset({"references.reference"})}, "the reference of this name is called 'reference_logprobs'"),
        ({"needs": frozenset({"token_weights.own"})}, "token_weights from own: name one of activations, mapo"),
        ({"measures": None}, "measures is None; it must be a mapping"),
        ({"measures": {"entropy": "entropy"}}, r"measures\['entropy'\] is 'entropy'; it must be a measure"),
        ({"measures": {"entropy": Entropy}}, r"measures\['entropy'\] is <class .*; it must be a measure"),
    ],
)
def test_needs_and_measures_that_would_be_misread_are_refused_before_training(tmp_path, members, found):
    objective = type("Own", (Broken,), members)("none")
    with pytest.raises(ConfigError, match=f"objective: .*{found}"):
        run(tmp_path, lora_policy(), AdapterOff(), objective, train=trees(4), max_steps=1)


def test_a_reference_that_is_not_there_is_named_before_training(tmp_path):
    class OfTeacher(Broken):
        needs = frozenset({"references.teacher"})

    with pytest.raises(
        ConfigError, match=r"reads the reference 'teacher', which is not among the references \(reference\)"
    ):
        run(tmp_path, lora_policy(), AdapterOff(), OfTeacher("none"), train=trees(4), max_steps=1)


def start(tmp_path, kind, *, trained=True, steps=1):
    objective = Weighted(kind)
    assert isinstance(objective, Objective)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": steps}
    return run(tmp_path, lora_policy(trained=trained), AdapterOff(), objective, train=trees(8), **settings)


@pytest.mark.parametrize("kind", ["constant", "boolean"])
def test_weights_of_what_is_given_are_trained_on(tmp_path, kind):
    result = start(tmp_path, kind)
    assert result.logs[0]["loss"] > 0


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("self-normalized", "carry a gradient"),
        ("attached, of the same value", "carry a gradient"),
        ("detached", r"differ by up to [\d.]+ from those before"),
        ("softmax", r"differ by up to 0\.\d+ from"),
        ("other shape", r"have shape \(2,\), and \(4,\) before"),
    ],
)
def test_weights_that_depend_on_the_policy_are_stopped_with_the_rule(tmp_path, kind, found):
    with pytest.raises(TrainingError, match=rf"Step 1: the weights of term loss {found}.*must not depend on log"):
        start(tmp_path, kind)


def test_they_are_looked_at_in_every_step(tmp_path):
    # At the reference all ratios are 1, as with zeros for log-probabilities: only the second step tells.
    with pytest.raises(TrainingError, match="Step 2: the weights of term loss differ by"):
        start(tmp_path, "detached", trained=False, steps=3)


def test_one_weight_for_each_loss():
    with pytest.raises(ValueError, match=r"losses of shape \(3,\) and weights of shape \(3, 1\)"):
        ObjectiveOutput((Term(torch.ones(3), torch.ones(3, 1)),), {}).mean()


def test_half_precision_and_boolean_weights_are_numbers():
    term = Term(torch.full((4,), 3e4, dtype=torch.float16), torch.tensor([True, True, True, False]))
    assert ObjectiveOutput((term,), {}).mean().item() == 3e4


def test_fdpo_is_not_stopped(tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    assert len(run(tmp_path, lora_policy(trained=True), AdapterOff(), FDPO(), train=trees(8), **settings).logs) == 2
