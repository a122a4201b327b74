"""A small policy and three references in float64, to compare a measure of the visit with a formula on whole logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from falign import divergences
from falign.scoring import Distribution, Head, token_scores

M, H, V = 9, 5, 11
PADDING = 3
SCALE = 0.7

FAMILIES = [
    *(name for name in divergences.names() if name not in ("alpha", "generalized_js")),
    "alpha(0.3)",
    "generalized_js(0.3)",
]
"""All twelve families of the registry."""


def term(name, p, q):
    """``q f(p/q)`` of probabilities, from the families' table in docs/divergences.md."""
    u = p / q
    forms = {
        "reverse_kl": lambda: u * u.log() - u + 1,
        "forward_kl": lambda: -u.log() + u - 1,
        "jensen_shannon": lambda: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "alpha(0.3)": lambda: (u**0.7 - 0.7 * u - 0.3) / (0.3 * -0.7),
        "jeffreys": lambda: (u - 1) * u.log(),
        "squared_hellinger": lambda: (u.sqrt() - 1) ** 2,
        "pearson_chi2": lambda: (u - 1) ** 2,
        "neyman_chi2": lambda: (1 - u) ** 2 / u,
        "chi2_kl": lambda: 0.5 * (u - 1) ** 2 + u * u.log() - u + 1,
        "total_variation": lambda: 0.5 * (u - 1).abs(),
        "le_cam": lambda: (u - 1) ** 2 / (u + 1),
        "generalized_js(0.3)": lambda: 0.3 * u * (u / (0.3 * u + 0.7)).log() - 0.7 * (0.3 * u + 0.7).log(),
    }
    return q * forms[name]()


@dataclass(frozen=True)
class Whole:
    """Whole logits, of which the formula under test is written: policy with gradient, references without."""

    logits: Tensor
    references: dict[str, Tensor]
    targets: Tensor
    embeddings: Tensor

    def p(self, temperature=1.0):
        return torch.softmax(self.logits / temperature, -1)

    def q(self, name="reference", temperature=1.0):
        return torch.softmax(self.references[name] / temperature, -1)


def assert_exact(measure, formula, *, trained_head=False, padded=False, chunk_tokens=4, seed=0, spread=1.0):
    """Assert that a measure has the value and gradient of ``formula(Whole) -> (M,)`` by hidden states and head."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    names = ["policy", "reference", "teacher", "other"]
    layers = {name: torch.nn.Linear(H, V + PADDING * padded, bias=False, dtype=torch.float64) for name in names}
    for layer in layers.values():
        layer.weight.data = spread * randn(*layer.weight.shape)
        layer.requires_grad_(False)
        if padded:  # as `share_head` cuts a head to the ids that two models share
            layer.register_forward_hook(lambda module, inputs, logits: logits[..., :V])
    layers["policy"].requires_grad_(trained_head)
    hidden = {name: randn(M, H) for name in names}
    hidden["policy"].requires_grad_()
    targets, weights = torch.randint(V, (M,), generator=generator), randn(M)
    leaves = [hidden["policy"], *(layers["policy"].parameters() if trained_head else ())]

    logits = {name: SCALE * layers[name](hidden[name]) for name in names}
    whole = Whole(
        logits["policy"],
        {name: value.detach() for name, value in logits.items() if name != "policy"},
        targets,
        layers["policy"].weight.detach()[:V],
    )
    wanted = formula(whole)
    expected = torch.autograd.grad((weights * wanted).sum(), leaves)

    distributions = {name: Distribution(hidden[name], Head(embeddings=layers[name], scale=SCALE)) for name in names}
    found = token_scores(
        distributions.pop("policy"),
        targets,
        measures={"measured": measure},
        references={name: each for name, each in distributions.items() if name in measure.references},
        chunk_tokens=chunk_tokens,
    ).measures["measured"]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad((weights * found).sum(), leaves), expected, rtol=1e-8, atol=1e-10)
