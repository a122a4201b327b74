"""Mixtures and geometric combinations of references, against dense formulas of probabilities."""

import pytest
import torch
from torch.nn.functional import log_softmax

from falign.errors import ConfigError
from falign.objectives import DivergenceTo, Entropy
from falign.scoring import Distribution, Head, Reading, TopTokens, token_scores
from falign.scoring.combinations import GeometricPredictions, MixturePredictions
from falign.scoring.vocabulary import target_logprobs
from tests.scoring.test_vocabulary import FAMILIES, H, M, V, family

HALVES, BEYOND = {"teacher": 0.7, "base": 0.3}, {"teacher": 1.25, "base": -0.25}
KINDS = {"mixture": (MixturePredictions, HALVES), "geometric": (GeometricPredictions, BEYOND)}


def world(seed=0, positions=M):
    """Three models: the policy, and two references."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.nn.Linear(H, V, dtype=torch.float64) for _ in range(3)]
    for layer in layers:
        layer.weight.data = torch.randn(V, H, generator=generator, dtype=torch.float64)
        layer.requires_grad_(False)
    hidden = [torch.randn(positions, H, generator=generator, dtype=torch.float64) for _ in range(3)]
    return layers, hidden, torch.randint(V, (positions,), generator=generator)


def members_of(layers, hidden):
    pairs = zip(("teacher", "base"), layers[1:], hidden[1:], strict=True)
    return {name: Distribution(states, Head(embeddings=layer)) for name, layer, states in pairs}


def dense(kind, layers, hidden):
    """``p`` of the combination, from probabilities."""
    teacher, base = (layer(states).softmax(-1) for layer, states in zip(layers[1:], hidden[1:], strict=True))
    if kind == "mixture":
        return 0.7 * teacher + 0.3 * base
    product = teacher**1.25 / base**0.25
    return product / product.sum(-1, keepdim=True)


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_divergence_to_a_combination_has_the_value_and_gradient_of_the_dense_formula(kind, name, trained_head):
    divergence, (predictions, weights) = family(name), KINDS[kind]
    layers, hidden, targets = world()
    layers[0].requires_grad_(trained_head)
    hidden[0].requires_grad_()
    leaves = [hidden[0], *(layers[0].parameters() if trained_head else ())]
    q = dense(kind, layers, hidden)
    log_p = log_softmax(layers[0](hidden[0]), -1)
    wanted = (q * divergence.f(log_p - q.log())).sum(-1)
    scores = token_scores(
        Distribution(hidden[0], Head(embeddings=layers[0])),
        targets,
        measures={"divergence": DivergenceTo(divergence, "target")},
        references={"target": predictions(members_of(layers, hidden), weights)},
        chunk_tokens=3,
    )
    torch.testing.assert_close(scores.measures["divergence"], wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scores.references["target"], q[range(M), targets].log(), rtol=0, atol=1e-12)
    pull = torch.arange(1.0, M + 1, dtype=torch.float64)
    found = torch.autograd.grad((pull * scores.measures["divergence"]).sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad((pull * wanted).sum(), leaves), rtol=1e-8, atol=1e-8)


def test_a_model_in_several_combinations_is_read_once_in_a_chunk():
    layers, hidden, targets = world()
    members, calls = members_of(layers, hidden), []
    layers[1].register_forward_hook(lambda *_: calls.append("teacher"))
    nested = MixturePredictions(
        {"a": GeometricPredictions(members, BEYOND), "teacher": members["teacher"]}, {"a": 0.5, "teacher": 0.5}
    )
    references = {"nested": nested, "mixed": MixturePredictions(members, HALVES), **members}
    policy = Distribution(hidden[0], Head(embeddings=layers[0]))
    scores = token_scores(policy, targets, measures={"entropy": Entropy()}, references=references, chunk_tokens=4)
    assert len(calls) == 2, "7 tokens are two chunks"
    expected = 0.5 * dense("geometric", layers, hidden) + 0.5 * layers[1](hidden[1]).softmax(-1)
    torch.testing.assert_close(scores.references["nested"].exp(), expected[range(M), targets], rtol=0, atol=1e-12)
    alone = target_logprobs(references, targets, chunk_tokens=3)
    torch.testing.assert_close(alone, scores.references, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_every_member_excludes_are_excluded_and_the_rest_is_normal(kind):
    logits = torch.zeros(1, 4)
    logits[0, 3] = -torch.inf
    member = Distribution(logits, Head(embeddings=torch.nn.Identity()))
    predictions, weights = KINDS[kind]
    both = {"target": predictions({"teacher": member, "base": member}, weights)}
    policy = Distribution(torch.zeros(1, 4), Head(embeddings=torch.nn.Identity()))
    measures = {"divergence": DivergenceTo(family("forward_kl"), "target")}
    scores = token_scores(policy, torch.tensor([2]), measures=measures, references=both)
    torch.testing.assert_close(scores.references["target"], torch.tensor([1 / 3]).log())
    torch.testing.assert_close(scores.measures["divergence"], torch.tensor([4 / 3]).log())
    assert target_logprobs(both, torch.tensor([3]), chunk_tokens=1)["target"] < -1e6


def test_one_member_of_weight_one_is_the_member_bit_for_bit():
    layers, hidden, targets = world()
    teacher = members_of(layers, hidden)["teacher"]
    for kind in (MixturePredictions, GeometricPredictions):
        found = target_logprobs({"target": kind({"teacher": teacher}, {"teacher": 1.0})}, targets, chunk_tokens=3)
        expected = target_logprobs({"target": teacher}, targets, chunk_tokens=3)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-15 if kind is GeometricPredictions else 0)


def test_a_member_of_which_only_the_most_likely_tokens_are_known_is_refused():
    class Stored:
        inputs = (torch.zeros(1),)

        @property
        def sources(self):
            return (self,)

        def read(self, of):
            return of(self)

        def prepare(self, *inputs):
            return inputs

        def at(self, prepared, rows, targets):
            return Reading(torch.zeros(1), top=TopTokens(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long)))

    with pytest.raises(ConfigError, match="of 'teacher' only the most likely tokens are stored"):
        target_logprobs(
            {"a": MixturePredictions({"teacher": Stored()}, {"teacher": 1.0})}, torch.tensor([0]), chunk_tokens=1
        )
