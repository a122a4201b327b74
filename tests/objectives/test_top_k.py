import itertools

import pytest
import torch

from falign import divergences
from falign.errors import ConfigError
from falign.objectives import DivergenceTo, Measure, TopK, TopTokens, Vocabulary, get_measure
from tests.scoring.measure_world import FAMILIES, V, assert_exact, term

K = 4


def at(seed=0, positions=5, spread=1.0, **fields):
    generator = torch.Generator().manual_seed(seed)
    p, q = (
        (spread * torch.randn(positions, V, generator=generator, dtype=torch.float64)).log_softmax(-1) for _ in range(2)
    )
    return Vocabulary(p, targets=torch.zeros(positions, dtype=torch.long), references={"reference": q}, **fields)


def split(whole, temperature=1.0):
    """Probabilities on the top of the reference, shape (M, K), found by sorting."""
    p, q = whole.p(temperature), whole.q(temperature=temperature)
    ids = torch.tensor([sorted(range(V), key=lambda v: -row[v])[:K] for row in q.tolist()])
    return p.gather(-1, ids), q.gather(-1, ids), ids


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_bucket_for_all_other_tokens_gives_a_divergence(name, trained_head):
    def formula(whole):
        p, q, _ = split(whole, 1.7)
        return term(name, p, q).sum(-1) + term(name, 1 - p.sum(-1), 1 - q.sum(-1))

    measure = TopK(divergences.get(name), K, temperature=1.7)
    assert_exact(measure, formula, trained_head=trained_head, padded=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_renormalized_is_the_divergence_given_the_top(name):
    def formula(whole):
        p, q, _ = split(whole)
        return term(name, p / p.sum(-1, True), q / q.sum(-1, True)).sum(-1)

    assert_exact(TopK(divergences.get(name), K, tail="renormalized"), formula)


@pytest.mark.parametrize("trained_head", [False, True])
def test_star_is_the_partial_forward_kl_and_the_mass_that_strays(trained_head):
    def formula(whole):
        p, q, ids = split(whole)
        partial = (q * (q / p).log()).sum(-1)
        mass = []
        for row, top in zip(whole.p(), ids.tolist(), strict=True):
            own = sorted(range(V), key=lambda v: -row[v].item())[:3]
            mass.append(sum((row[v] for v in own if v not in top), torch.zeros((), dtype=torch.float64)))
        return partial + 10 * torch.stack(mass)

    star = TopK(divergences.get("forward_kl"), K, tail="none", linear=1.0, stray=10.0, stray_top=3)
    assert_exact(star, formula, trained_head=trained_head, padded=True)


def test_the_partial_reverse_kl_as_published_can_be_negative_and_that_of_the_normal_form_cannot():
    q = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    p = torch.tensor([[0.25, 0.15, 0.6]], dtype=torch.float64).log()
    place = Vocabulary(p, torch.tensor([0]), {"reference": q})
    reverse = divergences.get("reverse_kl")
    published = TopK(reverse, 2, tail="none", linear=-1.0)(place)
    torch.testing.assert_close(published, (p.exp() * (p - q))[:, :2].sum(-1))
    assert published < 0
    assert TopK(reverse, 2, tail="none")(place) > 0


@pytest.mark.parametrize("tail", ["bucket", "none", "renormalized"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_top_of_all_tokens_is_the_whole_divergence(name, tail):
    divergence = divergences.get(name)
    linear = 1.0 if tail == "none" else 0.0
    top = TopK(divergence, V, tail=tail, linear=linear, stray=5.0)
    torch.testing.assert_close(top(at()), DivergenceTo(divergence)(at()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bucket_bounds_the_divergence_from_below_and_grows_with_k(name):
    divergence = divergences.get(name)
    values = [TopK(divergence, k)(at()) for k in range(1, V + 1)]
    for smaller, larger in itertools.pairwise(values):
        assert (smaller <= larger + 1e-12).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_finite_where_the_models_exclude_each_other(name):
    place = at(spread=3000.0)
    leaf = place.logprobs.clone().requires_grad_()
    for tail in ("bucket", "none", "renormalized"):
        value = TopK(divergences.get(name), K, tail=tail, stray=1.0)(Vocabulary(leaf, place.targets, place.references))
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), leaf)[0].isfinite().all()


def test_stored_top_tokens_give_the_same_as_whole_distributions():
    place = at()
    q = place.reference()
    stored = Vocabulary(place.logprobs, place.targets, tops={"reference": TopTokens(*q.topk(6))})
    for k in (2, 6):
        measure = TopK(divergences.get("forward_kl"), k)
        torch.testing.assert_close(measure(stored), measure(place), rtol=1e-10, atol=1e-12)
    with pytest.raises(ConfigError, match="reads the 7 most likely tokens of the reference 'reference', of which 6"):
        TopK(divergences.get("forward_kl"), 7)(stored)
    with pytest.raises(ConfigError, match="whole distribution of the reference 'reference', of which only the 6"):
        DivergenceTo(divergences.get("forward_kl"))(stored)


def test_the_rest_of_stored_tokens_that_are_all_is_the_rounding_error():
    q = torch.tensor([[0.75, 0.25, 0.0]], dtype=torch.float32).log()
    stored = Vocabulary(torch.zeros(1, 3).log_softmax(-1), torch.tensor([0]), tops={"teacher": TopTokens(*q.topk(2))})
    assert -17 < stored.rest("teacher", 2).item() < -15


def test_a_name_with_arguments_gives_it():
    measure = get_measure("top_k(jensen_shannon, 8, teacher, renormalized)")
    assert isinstance(measure, Measure)
    assert measure == TopK(divergences.get("jensen_shannon"), 8, "teacher", tail="renormalized")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"linear": 1.0}, "linear=1.0 has no effect with tail='bucket'"),
        ({"stray": -1.0}, "stray=-1.0 must be at least 0"),
        ({"stray_top": 5}, "stray_top=5 must be at least 1, and stray positive"),
        ({"temperature": 0.0}, r"temperature=0\.0 must be positive"),
    ],
)
def test_settings_without_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TopK(**{"divergence": divergences.get("forward_kl"), "k": 3, **fields})
