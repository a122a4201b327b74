import math

import pytest
import torch
from torch.nn.functional import log_softmax

from falign import divergences
from falign.scoring import Distribution, Head, token_scores
from tests.scoring.test_head import LargestTensor

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
        divergence=divergence,
        reference=Distribution(reference_hidden, heads[1]),
        chunk_tokens=3,
    )
    loss = (of_logprob * scores.logprobs + of_divergence * scores.divergence).sum()
    torch.testing.assert_close(scores.logprobs, wanted[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.divergence, wanted[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scores.reference_logprobs, wanted[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_output_has_its_own_gradient(name):
    layers, (hidden, reference_hidden), targets = world(2)
    layers[0].requires_grad_(False)
    hidden.requires_grad_()
    scores = token_scores(
        Distribution(hidden, Head(embeddings=layers[0], scale=0.7)),
        targets,
        divergence=family(name),
        reference=Distribution(reference_hidden, Head(embeddings=layers[1], scale=0.7)),
    )
    wanted = dense(family(name), layers, (hidden, reference_hidden), targets)
    for mine, other in ((scores.logprobs, wanted[0]), (scores.divergence, wanted[1])):
        gradients = [torch.autograd.grad(value.sum(), hidden, retain_graph=True)[0] for value in (mine, other)]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)
    assert not scores.entropy.requires_grad
    assert not scores.reference_logprobs.requires_grad


def test_equal_distributions_have_no_divergence_and_no_gradient_of_it():
    layers, (hidden, _), targets = world()
    layers[0].requires_grad_(False)
    hidden.requires_grad_()
    head = Head(embeddings=layers[0])
    policy = Distribution(hidden, head)
    for name in FAMILIES:
        scores = token_scores(policy, targets, divergence=family(name), reference=Distribution(hidden, head))
        assert scores.divergence.abs().max() < 1e-12, name
        (gradient,) = torch.autograd.grad(scores.divergence.sum(), hidden)
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
        divergence=family(name),
        reference=Distribution(reference_hidden.to(dtype), other),
    )
    (gradient,) = torch.autograd.grad(scores.divergence.sum(), hidden)
    assert scores.divergence.isfinite().all()
    assert (scores.divergence >= 0).all()
    assert gradient.isfinite().all()


def test_blocks_of_the_cache_change_nothing(monkeypatch):
    layers, (hidden, reference_hidden), targets = world()
    layers[0].requires_grad_(False)
    hidden.requires_grad_()

    def gradients():
        scores = token_scores(
            Distribution(hidden, Head(embeddings=layers[0])),
            targets,
            divergence=divergences.get("forward_kl"),
            reference=Distribution(reference_hidden, Head(embeddings=layers[1])),
        )
        total = (scores.logprobs + 2 * scores.divergence).sum()
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
            divergence=divergences.get("jensen_shannon"),
            reference=reference,
            chunk_tokens=chunk_tokens,
        )
        (scores.logprobs + scores.divergence).sum().backward()
    assert largest.numel == 8 * vocabulary


def test_one_of_divergence_and_reference_alone_is_refused():
    policy = Distribution(torch.zeros(1, 4), Head(embeddings=torch.nn.Identity()))
    with pytest.raises(ValueError, match="belong together"):
        token_scores(policy, torch.tensor([0]), divergence=divergences.get("forward_kl"))


def test_a_closed_form():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL(q‖p) = ln 2 - H(q).
    policy = Distribution(torch.zeros(1, 2), Head(embeddings=torch.nn.Identity()))
    reference = Distribution(torch.tensor([[0.0, math.log(3)]]), Head(embeddings=torch.nn.Identity()))
    scores = token_scores(policy, torch.tensor([0]), divergence=divergences.get("forward_kl"), reference=reference)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert scores.divergence.item() == pytest.approx(math.log(2) - entropy, abs=1e-6)
    assert scores.reference_logprobs.item() == pytest.approx(math.log(0.25), abs=1e-6)
