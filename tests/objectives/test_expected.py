import pytest
import torch
import torch.nn.functional as F

from falign.errors import ConfigError
from falign.objectives import TopTokens, Vocabulary, get_measure
from falign.objectives.expected import Balanced, Expected, ExpectedCost, Surprisal
from falign.scoring import Distribution, Head, token_scores
from tests.scoring.measure_world import V, assert_exact
from tests.scoring.test_model_parts import LargestTensor


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("smallest", [1e-7, 0.05])
def test_the_expected_advantage_of_two_references(trained_head, smallest):
    def formula(whole):
        advantage = whole.q("teacher").clamp(min=smallest).log() - whole.q("other").clamp(min=smallest).log()
        return (whole.p() * advantage).sum(-1)

    measure = Expected("teacher", "other", smallest=smallest)
    assert_exact(measure, formula, trained_head=trained_head, padded=True)


def test_of_the_most_likely_tokens_only_the_others_count_as_improbable():
    def formula(whole):
        parts = []
        for name in ("teacher", "other"):
            q = whole.q(name)
            parts.append(torch.where(q >= q.sort(descending=True).values[:, 2:3], q, 1e-7).log())
        return (whole.p() * (parts[0] - parts[1])).sum(-1)

    assert_exact(Expected("teacher", "other", k=3), formula)


def test_stored_top_tokens_suffice():
    generator = torch.Generator().manual_seed(0)
    p, q, r = (torch.randn(4, V, generator=generator).log_softmax(-1) for _ in range(3))
    targets = torch.zeros(4, dtype=torch.long)
    stored = {"a": TopTokens(*q.topk(4)), "b": TopTokens(*r.topk(6))}
    measure = Expected("a", "b", k=4)
    found = measure(Vocabulary(p, targets, tops=stored))
    torch.testing.assert_close(found, measure(Vocabulary(p, targets, {"a": q, "b": r})))


def cost(whole):
    e = whole.embeddings
    cosines = torch.stack([F.cosine_similarity(e, e[y][None]) for y in whole.targets])
    return 1 - (whole.p() * cosines).sum(-1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("slice_size", [4, 100])
def test_the_expected_cost_of_embeddings(trained_head, padded, slice_size, monkeypatch):
    monkeypatch.setattr("falign.objectives.vocabulary.SLICE", slice_size)
    monkeypatch.setattr("falign.scoring.vocabulary._CACHED_LOGITS", 3 * V)
    assert_exact(ExpectedCost(), cost, trained_head=trained_head, padded=padded)
    with_target = lambda whole: cost(whole) + whole.p().detach().gather(-1, whole.targets[:, None])[:, 0]  # noqa: E731
    assert_exact(ExpectedCost(plus_target=True), with_target, trained_head=trained_head, padded=padded)


def surprisal(whole):
    return -whole.p().gather(-1, whole.targets[:, None])[:, 0].log()


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("largest", [None, 1.5])
def test_emo_balances_surprisal_and_cost_per_token(trained_head, largest):
    def first_variant(whole):
        ratio = (surprisal(whole) / cost(whole)).detach()
        return 0.5 * (surprisal(whole) + (ratio if largest is None else ratio.clamp(max=largest)) * cost(whole))

    def second_variant(whole):
        return (cost(whole) / surprisal(whole)).detach() * surprisal(whole) + cost(whole)

    assert_exact(Balanced(Surprisal(), ExpectedCost(), largest), first_variant, trained_head=trained_head)
    if largest is None:
        second = lambda whole: second_variant(whole) / 2  # noqa: E731
        assert_exact(Balanced(ExpectedCost(), Surprisal()), second, trained_head=trained_head)


def test_without_a_bound_the_value_is_that_of_the_first():
    at = Vocabulary(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([0]), embeddings=torch.eye(3))
    torch.testing.assert_close(Balanced(Surprisal(), ExpectedCost())(at), Surprisal()(at))


def test_no_tensor_is_larger_than_a_chunk():
    vocabulary, size, chunk = 1000, 8, 4
    head = torch.nn.Linear(size, vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(64, size, requires_grad=True)
    with LargestTensor() as largest:
        scores = token_scores(
            Distribution(hidden, Head(embeddings=head)),
            torch.randint(vocabulary, (64,)),
            measures={"cost": ExpectedCost()},
            chunk_tokens=chunk,
        )
        scores.measures["cost"].sum().backward()
    assert largest.numel <= size * vocabulary


def test_a_head_that_is_no_matrix_is_refused():
    policy = Distribution(torch.zeros(2, 4), Head(embeddings=torch.nn.Identity()))
    with pytest.raises(ConfigError, match="its head is not one matrix: leave the head out of adapter"):
        token_scores(policy, torch.tensor([0, 1]), measures={"cost": ExpectedCost()})


def test_names_and_refusals():
    assert get_measure("expected(teacher, base, k=50)") == Expected("teacher", "base", k=50)
    assert get_measure("balanced(surprisal, expected_cost, 3)") == Balanced(Surprisal(), ExpectedCost(), 3.0)
    for wrong, message in (
        (lambda: Expected("teacher", smallest=0.0), r"smallest=0.0 must be a probability in \(0, 1\)"),
        (lambda: Expected("teacher", k=0), "k=0 must be at least 1, or None"),
        (lambda: Expected("reference"), "reference and base are both 'reference'"),
        (lambda: Balanced(Surprisal(), Surprisal(), 0.0), "largest=0.0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
