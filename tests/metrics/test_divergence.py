"""Every estimator, averaged over all completions of an enumerated world under the samples' law, is the divergence."""

import math
from itertools import product

import pytest
import torch

from falign import divergences
from falign.divergences import estimators
from falign.metrics import bootstrap
from falign.metrics.divergence import divergence_estimates, divergence_values

NAMES = [
    *(name for name in divergences.names() if name not in ("alpha", "generalized_js")),
    *("alpha(0.4)", "alpha(-1.3)", "generalized_js(0.3)", "standardized(jensen_shannon)"),
]
V, T = 3, 3
COMPLETIONS = list(product(range(V), repeat=T))


class Law:
    """log-probabilities of the next token after each prefix."""

    def __init__(self, seed, scale=0.8):
        generator = torch.Generator().manual_seed(seed)
        prefixes = [prefix for length in range(T) for prefix in product(range(V), repeat=length)]
        self.next = {
            prefix: (scale * torch.randn(V, generator=generator, dtype=torch.float64)).log_softmax(dim=0)
            for prefix in prefixes
        }

    def rows(self):
        return [[self.next[y[:t]][y[t]].item() for t in range(T)] for y in COMPLETIONS]

    def prefix(self, s):
        return math.exp(sum(self.next[s[:t]][s[t]].item() for t in range(len(s))))

    def sequences(self):
        return torch.tensor([sum(row) for row in self.rows()], dtype=torch.float64)


POLICY, REFERENCE, OLD = Law(0), Law(1), Law(2)
LAWS = {"policy": POLICY, "reference": REFERENCE, "old": OLD}


def exact(f):
    whole = estimators.full_vocabulary(f, POLICY.sequences(), REFERENCE.sequences()).item()
    at = {s: estimators.full_vocabulary(f, POLICY.next[s], REFERENCE.next[s]).item() for s in POLICY.next}
    return whole, sum(POLICY.prefix(s) * value for s, value in at.items()), at


def means(f, samples, **options):
    old = {"old_logprobs": OLD.rows()} if samples == "old" else {}
    values = divergence_values(f, POLICY.rows(), REFERENCE.rows(), samples=samples, **old, **options)
    weights = LAWS[samples].sequences().exp()
    return {name: (weights * value).sum().item() for name, value in values.items()}


@pytest.mark.parametrize("samples", LAWS)
@pytest.mark.parametrize("name", NAMES)
def test_every_estimator_is_unbiased_under_every_law(name, samples):
    f = divergences.get(name)
    whole, per_token, at = exact(f)
    rows = [[at[y[:t]] for t in range(T)] for y in COMPLETIONS]
    estimates = means(f, samples, token_divergences=rows)
    assert estimates["sequence"] == pytest.approx(whole, rel=1e-9)
    assert estimates["token"] == pytest.approx(per_token, rel=1e-9)
    assert estimates["vocabulary"] == pytest.approx(per_token, rel=1e-9)
    assert ("log_ratio" in estimates) == (name in ("reverse_kl", "forward_kl"))
    assert whole != pytest.approx(per_token, rel=1e-3) or name == "reverse_kl"


@pytest.mark.parametrize("samples", LAWS)
def test_the_plain_log_ratio_is_the_kl(samples):
    p, q = POLICY.sequences(), REFERENCE.sequences()
    assert means("reverse_kl", samples)["log_ratio"] == pytest.approx((p.exp() * (p - q)).sum().item())
    assert means("forward_kl", samples)["log_ratio"] == pytest.approx((q.exp() * (q - p)).sum().item())


def test_no_value_of_a_single_completion_is_negative():
    for name in NAMES:
        for samples in ("policy", "reference"):
            values = divergence_values(name, POLICY.rows(), REFERENCE.rows(), samples=samples)
            assert min(values["sequence"].min(), values["token"].min()) >= 0


def test_completions_have_their_own_lengths():
    both = divergence_values("pearson_chi2", [[-1.0], [-1.0, -2.0]], [[-2.0], [-1.5, -1.0]])
    for i, (row, other) in enumerate([([-1.0], [-2.0]), ([-1.0, -2.0], [-1.5, -1.0])]):
        alone = divergence_values("pearson_chi2", [row], [other])
        assert {name: value[i].item() for name, value in both.items()} == pytest.approx(
            {name: value.item() for name, value in alone.items()}
        )


@pytest.mark.parametrize("samples", LAWS)
@pytest.mark.parametrize("far", [-900.0, 900.0])
def test_far_log_ratios_stay_finite(samples, far):
    old = {"old_logprobs": [[-500.0, -500.0]]} if samples == "old" else {}
    for name in NAMES:
        policy, reference = [[min(far, 0.0) - 1.0, -1.0]], [[min(-far, 0.0) - 1.0, -1.0]]
        values = divergence_values(name, policy, reference, samples=samples, **old)
        assert all(torch.isfinite(value).all() for value in values.values())


def test_estimates_are_means_with_intervals_over_completions():
    rows, others = POLICY.rows(), REFERENCE.rows()
    values = divergence_values("forward_kl", rows, others)
    estimates = divergence_estimates("forward_kl", rows, others, level=0.8, seed=4)
    assert list(estimates) == list(values)
    for name, each in values.items():
        column = each.numpy()
        alone = bootstrap(lambda index, column=column: float(column[index].mean()), len(rows), level=0.8, seed=4)
        assert estimates[name] == pytest.approx(alone)


ROW = [[-1.0, -2.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: divergence_values("jensen_shannon", ROW, [[-1.0]]), r"reference_logprobs\[0\] has 1 tokens and logp"),
        (lambda: divergence_values("jensen_shannon", [[]], [[]]), r"logprobs\[0\] has 0 tokens"),
        (lambda: divergence_values("jensen_shannon", [], []), "logprobs has 0 completions"),
        (lambda: divergence_values("jensen_shannon", ROW, ROW * 2), "reference_logprobs has 2 completions"),
        (
            lambda: divergence_values("jensen_shannon", ROW, [[-1.0, -math.inf]]),
            r"reference_logprobs\[0\]\[1\] is -inf",
        ),
        (lambda: divergence_values("jensen_shannon", ROW, ROW, samples="old"), "samples='old' needs old_logprobs"),
        (
            lambda: divergence_values("jensen_shannon", ROW, ROW, old_logprobs=ROW),
            "samples='policy' has no use for old_logprobs",
        ),
        (lambda: divergence_values("kl", ROW, ROW), "reverse_kl"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
