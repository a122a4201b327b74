import pytest
import torch

from falign import divergences
from falign.objectives import DivergenceTo, Entropy, TopK, Vocabulary, get_measure
from falign.objectives.teacher_transforms import Standardized, TargetSplit
from tests.scoring.measure_world import FAMILIES, V, assert_exact, term


def scores(logits, temperature):
    centered = logits - logits.mean(-1, keepdim=True)
    std = (centered.square().sum(-1, keepdim=True) / (V - 1)).sqrt()
    return torch.softmax(centered / (std + 1e-7) / temperature, -1)


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_divergence_of_standardized_logits(name, trained_head):
    def formula(whole):
        return term(name, scores(whole.logits, 1.5), scores(whole.references["teacher"], 1.5)).sum(-1)

    measure = Standardized(DivergenceTo(divergences.get(name), "teacher"), temperature=1.5)
    assert_exact(measure, formula, trained_head=trained_head, padded=True)


def test_other_measures_may_be_standardized():
    def formula(whole):
        p, q = scores(whole.logits, 1.0), scores(whole.references["teacher"], 1.0)
        ids = q.topk(3).indices
        p, q = p.gather(-1, ids), q.gather(-1, ids)
        return term("forward_kl", p, q).sum(-1) + term("forward_kl", 1 - p.sum(-1), 1 - q.sum(-1))

    assert_exact(Standardized(TopK(divergences.get("forward_kl"), 3, "teacher")), formula)
    name = "standardized(top_k(forward_kl, 3, teacher), 2)"
    assert get_measure(name) == Standardized(TopK(divergences.get("forward_kl"), 3, "teacher"), 2.0)
    assert Standardized(Entropy()).references == frozenset()


def parts(whole, temperature):
    """Target and rest of both, and the distributions of the others."""
    found = []
    for each in (whole.p(temperature), whole.q("teacher", temperature)):
        y = each.gather(-1, whole.targets[:, None])
        others = torch.stack([row[torch.arange(V) != t] for row, t in zip(each, whole.targets, strict=True)])
        found.append((torch.cat([y, 1 - y], -1), others / (1 - y)))
    return found


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_target_and_the_others_are_compared_apart(name, trained_head):
    def formula(whole):
        (p, p_others), (q, q_others) = parts(whole, 1.5)
        return 0.5 * term(name, p, q).sum(-1) + 2 * term(name, p_others, q_others).sum(-1)

    measure = TargetSplit(divergences.get(name), "teacher", 0.5, 2.0, temperature=1.5)
    assert_exact(measure, formula, trained_head=trained_head, padded=True)


@pytest.mark.parametrize("trained_head", [False, True])
def test_nkd_has_a_likelihood_and_a_cross_entropy_of_the_others(trained_head):
    def formula(whole):
        (_, p_others), (_, q_others) = parts(whole, 1.5)
        target = whole.targets[:, None]
        likelihood = -(whole.q("teacher").gather(-1, target) * whole.p().gather(-1, target).log())[:, 0]
        constant = (q_others * q_others.log()).sum(-1)  # of the reference, by which divergence and cross-entropy differ
        return likelihood + 3 * (-(q_others * p_others.log()).sum(-1) + constant)

    nkd = TargetSplit(
        divergences.get("forward_kl"), "teacher", others_weight=3.0, temperature=1.5, target_part="likelihood"
    )
    assert_exact(nkd, formula, trained_head=trained_head)


def test_the_chain_rule_of_the_forward_kl():
    generator = torch.Generator().manual_seed(3)
    p, q = (torch.randn(6, V, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    at = Vocabulary(p, torch.randint(V, (6,), generator=generator), {"reference": q})
    forward = divergences.get("forward_kl")
    binary, others = TargetSplit(forward, others_weight=0.0)(at), TargetSplit(forward, target_weight=0.0)(at)
    rest = 1 - q.gather(-1, at.targets[:, None])[:, 0].exp()
    torch.testing.assert_close(binary + rest * others, DivergenceTo(forward)(at), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_finite_where_the_models_exclude_each_other(name):
    generator = torch.Generator().manual_seed(0)
    p, q = ((3000 * torch.randn(5, V, generator=generator)).log_softmax(-1) for _ in range(2))
    p[0, 0] = -torch.inf
    leaf = p.requires_grad_()
    divergence = divergences.get(name)
    for measure in (TargetSplit(divergence), Standardized(DivergenceTo(divergence))):
        value = measure(Vocabulary(leaf, torch.arange(5), {"reference": q}))
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), leaf)[0].isfinite().all()


def test_settings_without_sense_are_refused():
    forward = divergences.get("forward_kl")
    for wrong, message in (
        (lambda: TargetSplit(forward, target_weight=-1.0), "target_weight=-1.0 must be at least 0"),
        (lambda: TargetSplit(forward, target_weight=0.0, others_weight=0.0), "leave nothing to measure"),
        (lambda: TargetSplit(forward, temperature=0.0), "temperature=0.0 must be positive"),
        (lambda: Standardized(Entropy(), 0.0), "temperature=0.0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
