"""Combinations of references as references: what runs, what is read, and what is refused."""

from dataclasses import replace

import pytest
import torch

from falign import divergences
from falign.errors import ConfigError
from falign.objectives import DistributionMatching, ExponentialReward, Measure, PolicyGradient, get_measure
from falign.references import (
    AdapterOff,
    Cached,
    FrozenModel,
    Geometric,
    Mixture,
    MovingAverage,
    MovingReference,
    ReferenceScores,
    objective_inputs,
    read_whole,
    with_members,
)
from falign.scoring import pad
from falign.training.trainer import _require_members
from tests.conformance.test_references import KEY
from tests.references.spy import ForwardSpy
from tests.scoring.models import TREES, tiny_model, with_lora

BATCH = pad(TREES, pad_token_id=2)


class Reading:
    """An objective that reads given references."""

    def __init__(self, *needs: str, **measures: str) -> None:
        self.needs = frozenset(needs)
        self.measures: dict[str, Measure] = {name: get_measure(text) for name, text in measures.items()}

    def __call__(self, batch):
        raise NotImplementedError


def world():
    teacher, base = FrozenModel(tiny_model(seed=5), weights="t"), FrozenModel(tiny_model(seed=6), weights="b")
    return tiny_model(), {"teacher": teacher, "base": base}


def whole(policy, reference):
    """Probabilities of all tokens at each completion token, from whole logits of one row at a time."""
    with torch.no_grad():
        rows = [
            reference.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double().softmax(-1)
            for prompt, completion in BATCH.token_ids()
        ]
    return torch.cat(rows)


def of_targets(probabilities):
    tokens = BATCH.completion_ids[BATCH.completion_mask]
    return BATCH.scatter(probabilities[range(len(tokens)), tokens].log().float())


def test_log_probabilities_are_those_of_the_combined_whole_distributions():
    policy, members = world()
    teacher, base = (whole(policy, each) for each in members.values())
    mixture = Mixture(members, {"teacher": 0.7, "base": 0.3})
    torch.testing.assert_close(mixture.logprobs(policy, BATCH), of_targets(0.7 * teacher + 0.3 * base))
    product = teacher**1.25 / base**0.25
    geometric = Geometric(members, {"teacher": 1.25, "base": -0.25}, chunk_tokens=4)
    normal = of_targets(product / product.sum(-1, keepdim=True))
    torch.testing.assert_close(geometric.logprobs(policy, BATCH), normal, rtol=1e-5, atol=1e-5)
    sequence = Geometric(members, {"teacher": 1.25, "base": -0.25}, level="sequence")
    torch.testing.assert_close(sequence.logprobs(policy, BATCH), of_targets(product), rtol=1e-5, atol=1e-5)


def test_each_member_runs_once_for_all_combinations_and_for_the_objective():
    policy, members = world()
    target = Geometric(members, {"teacher": 1.25, "base": -0.25})
    mixed = Mixture({"target": target, "base": members["base"]}, {"target": 0.5, "base": 0.5})
    references = {"mixed": mixed, "target": target, **members}
    spies = [ForwardSpy(each.model) for each in members.values()]
    objective = Reading(
        "references.base", "references.target", "references.mixed", d="divergence_to(forward_kl, target)"
    )
    found = objective_inputs(policy, BATCH, references=references, objective=objective).completions
    assert [len(spy) for spy in spies] == [1, 1]
    for name in ("base", "target", "mixed"):
        torch.testing.assert_close(found.references[name], references[name].logprobs(policy, BATCH))
    spies = [ForwardSpy(each.model) for each in members.values()]
    scores = ReferenceScores(policy, BATCH).all_logprobs(references)
    assert [len(spy) for spy in spies] == [1, 1]
    torch.testing.assert_close(scores["mixed"], found.references["mixed"])


def test_the_identity_changes_with_weights_members_and_level():
    _, members = world()
    swapped = {"teacher": members["base"], "base": members["teacher"]}
    made = [
        Geometric(members, {"teacher": 1.25, "base": -0.25}),
        Geometric(members, {"teacher": 1.5, "base": -0.5}),
        Geometric(swapped, {"teacher": 1.25, "base": -0.25}),
        Geometric(members, {"teacher": 1.25, "base": -0.25}, level="sequence"),
        Mixture(members, {"teacher": 0.5, "base": 0.5}),
    ]
    assert len({each.identity()["weights"] for each in made}) == len(made)
    unknown = Mixture({"a": FrozenModel(tiny_model())}, {"a": 1.0})
    assert unknown.identity()["weights"] is None


@pytest.mark.parametrize(
    ("kind", "weights", "message"),
    [
        (Mixture, {"teacher": 0.7, "base": 0.2}, r"mixture\.weights=.* sum to 0\.9, .* sum to 1: divide each by 0\.9"),
        (Mixture, {"teacher": 1.25, "base": -0.25}, r"mixture\.weights\.base=-0\.25: .* use kind geometric"),
        (Mixture, {"teacher": 1.0}, "give one weight for each member"),
        (Geometric, {"teacher": 1.25, "base": 0.0}, r"sum to 1\.25, .* add the base .* with the weight -0\.25"),
        (Geometric, {"teacher": float("nan"), "base": 1.0}, r"geometric\.weights\.teacher=nan: must be finite"),
    ],
)
def test_weights_that_give_no_distribution_are_refused(kind, weights, message):
    with pytest.raises(ConfigError, match=message):
        kind(world()[1], weights)


def test_a_geometric_combination_of_completions_is_refused_where_probabilities_are_read():
    policy, members = world()
    target = Geometric(members, {"teacher": 1.25, "base": -0.25}, level="sequence")
    with pytest.raises(ConfigError, match="member 'target' is known only up to a factor"):
        Mixture({"target": target, "base": members["base"]}, {"target": 0.5, "base": 0.5})
    for read in (Reading("reference_logprobs"), PolicyGradient(divergences.get("reverse_kl"), 0.1)):
        with pytest.raises(ConfigError, match="reads the probabilities of the reference 'reference'"):
            objective_inputs(policy, BATCH, references={"reference": target}, objective=read)
    matching = DistributionMatching(divergences.get("reverse_kl"), ExponentialReward(1.0))
    n, t = BATCH.completion_mask.shape
    columns = {"features": torch.zeros(n, 1), "log_partition": torch.zeros(n), "old_logprobs": torch.zeros(n, t)}
    found = objective_inputs(
        policy, BATCH, references={"reference": target}, objective=matching, columns={**columns}
    ).completions
    torch.testing.assert_close(found.reference_logprobs, target.logprobs(policy, BATCH))
    with pytest.raises(ConfigError, match="level 'sequence' has no next-token distributions"):
        target.states(policy, BATCH)


def test_a_trainer_refuses_members_that_it_would_not_know_of_and_takes_replaced_ones(tmp_path):
    policy, members = world()
    mixed = Mixture(members, {"teacher": 0.5, "base": 0.5})
    with pytest.raises(ConfigError, match="has the member 'base', which is not among the references"):
        _require_members({"mixed": mixed, "teacher": members["teacher"]})
    expected = mixed.logprobs(policy, BATCH)
    store = Cached(members["teacher"], directory=tmp_path, key=replace(KEY, weights="t"))
    store.logprobs(policy, BATCH)
    made = with_members({**members, "teacher": Cached(None, directory=tmp_path, key=store.store.key), "mixed": mixed})
    _require_members(made)
    spy = ForwardSpy(members["teacher"].model)
    torch.testing.assert_close(made["mixed"].logprobs(policy, BATCH), expected)
    assert len(spy) == 0
    target = Geometric(members, {"teacher": 1.25, "base": -0.25})
    assert read_whole({**members, "target": target}) == {"teacher", "base", "target"}
    assert read_whole({**members, "mixed": mixed}) == frozenset()


def test_a_combination_with_a_moving_member_is_not_cached(tmp_path):
    policy = with_lora(tiny_model())
    moving = MovingReference.beside(policy, rule=MovingAverage(alpha=0.3, every=2), weights="w")
    mixed = Mixture({"a": moving, "b": AdapterOff(weights="w")}, {"a": 0.5, "b": 0.5})
    with pytest.raises(ConfigError, match="A moving reference gives other log-probabilities after every move"):
        Cached(mixed, directory=tmp_path, key=KEY)
