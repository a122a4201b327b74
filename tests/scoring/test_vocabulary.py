import math
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from falign import divergences
from falign.errors import ConfigError
from falign.objectives import DivergenceTo, Entropy
from falign.scoring import Distribution, Head, token_scores
from tests.scoring.test_model_parts import LargestTensor

FAMILIES = [
    *(name for name in divergences.names() if name not in ("alpha", "generalized_js")),
    "alpha(0.3)",
    "alpha(-0.5)",
    "generalized_js(0.3)",
    "standardized(jensen_shannon)",
    "dual(chi2_kl)",
    "mine",
]
M, H, V = 7, 5, 11


def family(name):
    if name == "mine":
        return divergences.from_generator(lambda u: u * torch.log(u) + (u - 1) ** 2, name="mine")
    return divergences.get(name)


def to_reference(divergence, reference):
    return {"measures": {"divergence": DivergenceTo(divergence)}, "references": {"reference": reference}}


def world(seed=0, *, bias=True, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.nn.Linear(H, V, bias=bias, dtype=torch.float64) for _ in range(2)]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data = spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    hidden = [torch.randn(M, H, generator=generator, dtype=torch.float64) for _ in range(2)]
    return layers, hidden, torch.randint(V, (M,), generator=generator)


def dense(divergence, layers, hidden, targets, *, softcap=None):
    """The same from whole logits, in probabilities: Σ q f(p/q) by the generator's own f."""
    logits = [0.7 * layer(states) for layer, states in zip(layers, hidden, strict=True)]
    if softcap is not None:
        logits = [softcap * torch.tanh(each / softcap) for each in logits]
    log_p, log_q = (log_softmax(each, -1) for each in logits)
    return log_p[range(M), targets], (log_q.exp() * divergence.f(log_p - log_q)).sum(-1), log_q[range(M), targets]


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_values_and_gradients_are_those_of_dense_logits(name, trained_head, softcap):
    divergence = family(name)
    layers, (hidden, reference_hidden), targets = world()
    layers[0].requires_grad_(trained_head)
    hidden.requires_grad_()
    leaves = [hidden, *(layers[0].parameters() if trained_head else ())]
    generator = torch.Generator().manual_seed(1)
    of_logprob, of_divergence = torch.randn(2, M, generator=generator, dtype=torch.float64)

    wanted = dense(divergence, layers, (hidden, reference_hidden), targets, softcap=softcap)
    expected = torch.autograd.grad((of_logprob * wanted[0] + of_divergence * wanted[1]).sum(), leaves)
    heads = [Head(embeddings=layer, scale=0.7, softcap=softcap) for layer in layers]
    scores = token_scores(
        Distribution(hidden, heads[0]),
        targets,
        **to_reference(divergence, Distribution(reference_hidden, heads[1])),
        chunk_tokens=3,
    )
    loss = (of_logprob * scores.logprobs + of_divergence * scores.measures["divergence"]).sum()
    torch.testing.assert_close(scores.logprobs, wanted[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.measures["divergence"], wanted[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scores.references["reference"], wanted[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_output_has_its_own_gradient(name):
    layers, (hidden, reference_hidden), targets = world(2)
    layers[0].requires_grad_(False)
    hidden.requires_grad_()
    scores = token_scores(
        Distribution(hidden, Head(embeddings=layers[0], scale=0.7)),
        targets,
        **to_reference(family(name), Distribution(reference_hidden, Head(embeddings=layers[1], scale=0.7))),
    )
    wanted = dense(family(name), layers, (hidden, reference_hidden), targets)
    for mine, other in ((scores.logprobs, wanted[0]), (scores.measures["divergence"], wanted[1])):
        gradients = [torch.autograd.grad(value.sum(), hidden, retain_graph=True)[0] for value in (mine, other)]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)
    assert not scores.entropy.requires_grad
    assert not scores.references["reference"].requires_grad


def test_equal_distributions_have_no_divergence_and_no_gradient_of_it():
    layers, (hidden, _), targets = world()
    layers[0].requires_grad_(False)
    hidden.requires_grad_()
    head = Head(embeddings=layers[0])
    policy = Distribution(hidden, head)
    for name in FAMILIES:
        scores = token_scores(policy, targets, **to_reference(family(name), Distribution(hidden, head)))
        assert scores.measures["divergence"].abs().max() < 1e-12, name
        (gradient,) = torch.autograd.grad(scores.measures["divergence"].sum(), hidden)
        assert gradient.abs().max() < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_everything_is_finite_where_the_models_exclude_each_other(name, dtype):
    layers, (hidden, reference_hidden), targets = world(spread=300.0)
    head, other = (Head(embeddings=layer.to(dtype).requires_grad_(False)) for layer in layers)
    hidden = hidden.to(dtype).requires_grad_()
    scores = token_scores(
        Distribution(hidden, head),
        targets,
        **to_reference(family(name), Distribution(reference_hidden.to(dtype), other)),
    )
    (gradient,) = torch.autograd.grad(scores.measures["divergence"].sum(), hidden)
    assert scores.measures["divergence"].isfinite().all()
    assert (scores.measures["divergence"] >= 0).all()
    assert gradient.isfinite().all()


def test_blocks_of_the_cache_change_nothing(monkeypatch):
    layers, (hidden, reference_hidden), targets = world()
    layers[0].requires_grad_(False)
    hidden.requires_grad_()

    def gradients():
        scores = token_scores(
            Distribution(hidden, Head(embeddings=layers[0])),
            targets,
            **to_reference(divergences.get("forward_kl"), Distribution(reference_hidden, Head(embeddings=layers[1]))),
        )
        total = (scores.logprobs + 2 * scores.measures["divergence"]).sum()
        return [*scores, *torch.autograd.grad(total, hidden)]

    whole = gradients()
    monkeypatch.setattr("falign.scoring.vocabulary._CACHED_LOGITS", 2 * V)
    torch.testing.assert_close(gradients(), whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("trained_head", [False, True])
def test_no_tensor_of_tokens_by_vocabulary_exists_with_a_divergence(trained_head):
    num_tokens, vocabulary, chunk_tokens = 64, 1000, 4
    layers = [torch.nn.Linear(8, vocabulary).requires_grad_(trained_head) for _ in range(2)]
    hidden = torch.randn(num_tokens, 8, requires_grad=True)
    policy, reference = (Distribution(hidden, Head(embeddings=layer)) for layer in layers)
    with LargestTensor() as largest:
        scores = token_scores(
            policy,
            torch.randint(vocabulary, (num_tokens,)),
            **to_reference(divergences.get("jensen_shannon"), reference),
            chunk_tokens=chunk_tokens,
        )
        (scores.logprobs + scores.measures["divergence"]).sum().backward()
    assert largest.numel == 8 * vocabulary


def test_a_reference_that_a_measure_reads_is_missed():
    policy = Distribution(torch.zeros(1, 4), Head(embeddings=torch.nn.Identity()))
    with pytest.raises(ValueError, match="A measure reads the reference 'teacher', which is missing"):
        token_scores(policy, torch.tensor([0]), measures={"to_teacher": DivergenceTo(family("alpha(0.3)"), "teacher")})


@dataclass(frozen=True)
class MeanTeacherLogit:
    """``Σ_v q(v) z_v``, whose gradient reaches the logits past the log-probabilities."""

    references = frozenset({"teacher"})

    def __call__(self, at):
        return (at.reference("teacher").exp() * at.logits).sum(dim=-1)


@dataclass(frozen=True)
class ConfidenceAtTarget:
    """``log p(y) · max_v log p(v)``: reads the target, and its gradient is sparse."""

    references = frozenset()

    def __call__(self, at):
        return at.logprobs.gather(-1, at.targets[:, None])[:, 0] * at.logprobs.amax(dim=-1)


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("trained_head", [False, True])
def test_several_measures_of_two_references_are_those_of_dense_logits_in_value_and_gradient(trained_head, softcap):
    layers, (hidden, reference_hidden), targets = world()
    generator = torch.Generator().manual_seed(7)
    teacher = torch.nn.Linear(H, V, dtype=torch.float64).requires_grad_(False)
    teacher_hidden = torch.randn(M, H, generator=generator, dtype=torch.float64)
    layers[0].requires_grad_(trained_head)
    hidden.requires_grad_()
    leaves = [hidden, *(layers[0].parameters() if trained_head else ())]
    measures = {
        "chi2": DivergenceTo(family("pearson_chi2")),
        "js": DivergenceTo(family("jensen_shannon"), "teacher"),
        "mine": DivergenceTo(family("mine"), "teacher"),
        "soft": DivergenceTo(family("forward_kl"), "teacher", temperature=2.5),
        "entropy": Entropy(),
        "logit": MeanTeacherLogit(),
        "confidence": ConfidenceAtTarget(),
    }
    weights = torch.randn(len(measures) + 1, M, generator=generator, dtype=torch.float64)

    heads = [Head(embeddings=layer, scale=0.7, softcap=softcap) for layer in (*layers, teacher)]
    z, z_reference, z_teacher = (
        head.logits(head.embeddings(states))
        for head, states in zip(heads, (hidden, reference_hidden, teacher_hidden), strict=True)
    )
    p, q, r = (log_softmax(each, -1) for each in (z, z_reference, z_teacher))

    def between(name, p, q):
        return (q.exp() * family(name).f(p - q)).sum(-1)

    wanted = {
        "chi2": between("pearson_chi2", p, q),
        "js": between("jensen_shannon", p, r),
        "mine": between("mine", p, r),
        "soft": between("forward_kl", log_softmax(z / 2.5, -1), log_softmax(z_teacher / 2.5, -1)),
        "entropy": -(p.exp() * p).sum(-1),
        "logit": (r.exp() * z).sum(-1),
        "confidence": p[range(M), targets] * p.amax(-1),
    }
    loss = sum((weight * value).sum() for weight, value in zip(weights, wanted.values(), strict=False))
    expected = torch.autograd.grad(loss + (weights[-1] * p[range(M), targets]).sum(), leaves)

    scores = token_scores(
        Distribution(hidden, heads[0]),
        targets,
        measures=measures,
        references={
            "reference": Distribution(reference_hidden, heads[1]),
            "teacher": Distribution(teacher_hidden, heads[2]),
        },
        chunk_tokens=3,
    )
    loss = sum((weight * scores.measures[name]).sum() for weight, name in zip(weights, wanted, strict=False))
    torch.testing.assert_close(scores.measures, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scores.references["teacher"], r[range(M), targets], rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.references["reference"], q[range(M), targets], rtol=0, atol=1e-12)
    actual = torch.autograd.grad(loss + (weights[-1] * scores.logprobs).sum(), leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def test_a_measure_that_is_no_value_per_position_is_refused():
    class Whole:
        references = frozenset()

        def __call__(self, at):
            return at.logprobs.sum()

    policy = Distribution(torch.zeros(2, 4), Head(embeddings=torch.nn.Identity()))
    with pytest.raises(ValueError, match=r"measure 'whole' returned shape \(\) for 2 positions"):
        token_scores(policy, torch.tensor([0, 1]), measures={"whole": Whole()})


def test_a_closed_form():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL(q‖p) = ln 2 - H(q).
    policy = Distribution(torch.zeros(1, 2), Head(embeddings=torch.nn.Identity()))
    reference = Distribution(torch.tensor([[0.0, math.log(3)]]), Head(embeddings=torch.nn.Identity()))
    scores = token_scores(policy, torch.tensor([0]), **to_reference(divergences.get("forward_kl"), reference))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert scores.measures["divergence"].item() == pytest.approx(math.log(2) - entropy, abs=1e-6)
    assert scores.references["reference"].item() == pytest.approx(math.log(0.25), abs=1e-6)


@dataclass(frozen=True)
class Own:
    """A measure that returns what a function gives."""

    function: Any
    references = frozenset()

    def __call__(self, at):
        return self.function(at)


@pytest.mark.parametrize("trained_head", [False, True])
def test_a_measure_that_is_a_constant_carries_no_gradient(trained_head):
    layers, (hidden, _), targets = world()
    layers[0].requires_grad_(trained_head)
    measures = {
        "constant": Own(lambda at: at.logprobs[:, 3].detach()),
        "counts": Own(lambda at: (at.logprobs > -2).sum(-1)),
        "live": Own(lambda at: at.logprobs[:, 3]),
    }
    policy = Distribution(hidden.requires_grad_(), Head(embeddings=layers[0]))
    found = token_scores(policy, targets, measures=measures, chunk_tokens=3).measures
    assert {name: value.requires_grad for name, value in found.items()} == {
        "constant": False,
        "counts": False,
        "live": True,
    }
    gradient = torch.autograd.grad((found["live"] + found["constant"]).sum(), hidden)
    alone = token_scores(policy, targets, measures={"live": measures["live"]}).measures["live"]
    torch.testing.assert_close(gradient, torch.autograd.grad(alone.sum(), hidden))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda at: 1.0, "measure 'own' returned a float; it must return a tensor of real numbers"),
        (lambda at: at.logprobs[:, 0] + 0j, "measure 'own' returned dtype torch.complex128"),
        (lambda at: at.logprobs.mean(), r"measure 'own' returned shape \(\) for 7 positions"),
        (
            lambda at: torch.where(at.targets == 5, at.logprobs[:, 0], torch.nan),
            r"measure 'own' returned NaN at \d of 7 positions where all distributions are numbers: avoid",
        ),
        (lambda at: at.logprobs[:, 0] - at.logprobs[:, 0].mean(), "measure 'own' mixes positions"),
        (lambda at: at.logprobs[:, 0].cumsum(0), "measure 'own' mixes positions"),
        (lambda at: at.logprobs[:, 0].flip(0).cumsum(0).flip(0), "measure 'own' mixes positions"),
        (
            lambda at: at.reference("teacher")[:, 0],
            "reads the distribution of the reference 'teacher' but does not list",
        ),
    ],
)
@pytest.mark.parametrize("trained_head", [False, True])
def test_a_measure_that_returns_no_number_per_position_is_refused(returned, message, trained_head):
    layers, (hidden, _), targets = world()
    layers[0].requires_grad_(trained_head)
    policy = Distribution(hidden.requires_grad_(), Head(embeddings=layers[0]))
    with pytest.raises(ConfigError, match=message):
        token_scores(policy, targets, measures={"own": Own(returned)})


@dataclass(frozen=True)
class Centered:
    """``log p(0)`` minus its mean over a block of positions."""

    block: int
    references = frozenset()

    def __call__(self, at):
        return at.logprobs[:, 0] - at.logprobs[:, 0].mean()


@pytest.mark.parametrize("cached_rows", [1, 100])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 5, 100])
@pytest.mark.parametrize("trained_head", [False, True])
def test_a_measure_that_mixes_positions_gets_whole_blocks(trained_head, chunk_tokens, cached_rows, monkeypatch):
    monkeypatch.setattr("falign.scoring.vocabulary._CACHED_LOGITS", cached_rows * V)
    layers, (hidden, _), targets = world()
    layers[0].requires_grad_(trained_head)
    leaves = [hidden.requires_grad_(), *(layers[0].parameters() if trained_head else ())]
    weights = torch.randn(2, M, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    scores = token_scores(
        Distribution(hidden, Head(embeddings=layers[0])),
        targets,
        measures={"two": Centered(2), "three": Centered(3), "entropy": Entropy()},
        chunk_tokens=chunk_tokens,
    )
    first = log_softmax(layers[0](hidden), -1)[:, 0]
    wanted = {
        name: torch.cat([part - part.mean() for part in first.split(block)])
        for name, block in (("two", 2), ("three", 3))
    }
    for name, value in wanted.items():
        torch.testing.assert_close(scores.measures[name], value, rtol=0, atol=1e-12)
    losses = [(weights[0] * each["two"] + weights[1] * each["three"]).sum() for each in (scores.measures, wanted)]
    found, expected = (torch.autograd.grad(loss, leaves) for loss in losses)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_block_without_positions_is_refused():
    policy = Distribution(torch.zeros(2, 4), Head(embeddings=torch.nn.Identity()))
    with pytest.raises(ValueError, match=r"Centered.block is 0; it must be a positive integer"):
        token_scores(policy, torch.tensor([0, 1]), measures={"own": Centered(0)})


def test_equal_measures_are_computed_once():
    calls = []

    @dataclass(frozen=True)
    class Counted:
        power: int
        references = frozenset()

        def __call__(self, at):
            if len(at.targets) > 1:  # not the comparison with single positions
                calls.append(self.power)
            return at.logprobs[:, 0] ** self.power

    layers, (hidden, _), targets = world()
    layers[0].requires_grad_(False)
    measures = {"a": Counted(1), "b": Counted(2), "c": Counted(1)}
    policy = Distribution(hidden.requires_grad_(), Head(embeddings=layers[0]))
    scores = token_scores(policy, targets, measures=measures)
    assert calls == [1, 2]
    assert list(scores.measures) == ["a", "b", "c"]
    torch.testing.assert_close(scores.measures["a"], scores.measures["c"])
    alone = token_scores(policy, targets, measures={"a": Counted(1)}).measures["a"]
    both = torch.autograd.grad((scores.measures["a"] + scores.measures["c"]).sum(), hidden)
    torch.testing.assert_close(both, torch.autograd.grad(2 * alone.sum(), hidden))


def test_a_measure_that_cannot_be_hashed_is_computed():
    @dataclass
    class Chosen:
        ids: list
        references = frozenset()

        def __call__(self, at):
            return at.logprobs[:, self.ids].logsumexp(-1)

    layers, (hidden, _), targets = world()
    policy = Distribution(hidden, Head(embeddings=layers[0]))
    found = token_scores(policy, targets, measures={"a": Chosen([1, 2]), "b": Chosen([1, 2])}).measures
    torch.testing.assert_close(found["a"], found["b"])


@pytest.mark.parametrize("trained", [True, False])
def test_no_graph_of_a_measure_outlives_its_step(trained):
    kept = []

    class Saved:
        """Its exponential keeps its own output for the backward pass."""

        references = frozenset()

        def __init__(self, block):
            self.block = block

        def __call__(self, at):
            likely = at.logprobs.exp()
            kept.append(weakref.ref(likely))
            return likely.square().sum(-1)

    embeddings = torch.nn.Linear(4, 7, bias=False).requires_grad_(trained)
    hidden = torch.randn(6, 4, requires_grad=True)
    scores = token_scores(
        Distribution(hidden, Head(embeddings=embeddings)),
        torch.tensor([0, 1, 2, 3, 4, 5]),
        measures={"saved": Saved(1 if trained else 2)},
        chunk_tokens=4,
    )
    scores.measures["saved"].sum().backward()
    assert len(kept) > 2
    assert hidden.grad.abs().sum() > 0
    del scores
    assert [each() for each in kept] == [None] * len(kept)
