"""The public batteries pass members that keep their contract, and name the rule that a broken one breaks."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from falign import divergences, testing
from falign.audit.truth import registry
from falign.divergences import ReverseKL
from falign.errors import CheckError, FalignError
from falign.objectives import (
    ObjectiveOutput,
    Pairwise,
    PolicyGradient,
    Supervised,
    Term,
    get_measure,
)
from falign.objectives.measures import MEASURES


@pytest.mark.parametrize("divergence", registry(), ids=lambda each: each.name)
def test_every_family_passes(divergence):
    testing.check_divergence(divergence)


def test_a_divergence_of_a_generator_passes():
    testing.check_divergence(divergences.from_generator(lambda u: (u - 1) ** 2 / (u + 1) + (u - 1) ** 2, name="mine"))


class Shifted(ReverseKL):
    def _f_prime(self, log_u):
        return log_u + 1


class OtherSlope(ReverseKL):
    """u f'(u) is twice the derivative of f."""

    def _f_prime(self, log_u):
        return 2 * log_u


class Detached(ReverseKL):
    def _f_prime(self, log_u):
        return log_u.detach()


class Silent(ReverseKL):
    def f_prime(self, log_u):
        return None


class Overflowing(ReverseKL):
    def _f(self, log_u):
        return log_u.exp() * log_u - log_u.expm1()


class Falling(ReverseKL):
    def _f_prime(self, log_u):
        return torch.where(log_u > 20, 40 - log_u, log_u)


class OwnDual(ReverseKL):
    def dual(self):
        return self


class WrongLimit(ReverseKL):
    f_prime_at_infinity = 3.0


class WrongCurvature(ReverseKL):
    second_derivative_at_one = 2.0


class WrongInverse(ReverseKL):
    def _f_prime_inverse(self, y):
        return y.exp()


class WrongConjugate(ReverseKL):
    def _conjugate_at(self, log_u, y):
        return log_u.exp()


class Negative(ReverseKL):
    def _f(self, log_u):
        return super()._f(log_u) - 1e-3 * log_u.square()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Shifted, r"f'\(1\) is 1; in normal form it is 0"),
        (OtherSlope, r"the derivative of f by log u is not u f'\(u\): .* instead of .* at log u = "),
        (Detached, "f' has no gradient by log u: do not detach it"),
        (Silent, "f_prime returned a NoneType; it must return a tensor"),
        (Overflowing, r"f is (inf|nan) at log u = .* in torch\.float32"),
        (Falling, r"f' falls near log u = 2\d"),
        (OwnDual, r"dual\(\) is not u f\(1/u\): .* at log u = "),
        (WrongLimit, "f_prime_at_infinity is stated as 3"),
        (WrongCurvature, r"second_derivative_at_one is stated as 2, and f''\(1\) is 1"),
        (WrongInverse, r"f_prime_inverse\(f'\(u\)\) is"),
        (WrongConjugate, r"conjugate\(.*\) is .*, and sup u y - f\(u\) is"),
        (Negative, r"f is -.* at log u = "),
    ],
)
def test_a_broken_divergence_is_told_what_is_wrong(broken, message):
    with pytest.raises(CheckError, match=message):
        testing.check_divergence(broken())
    assert issubclass(CheckError, AssertionError)
    assert issubclass(CheckError, FalignError)


@dataclass(frozen=True)
class Own:
    """A plain objective whose parts can be broken."""

    needs: ClassVar = frozenset({"reference_logprobs"})
    measures: ClassVar = {}

    def gap(self, batch):
        return batch.log_ratio

    def weights(self, batch):
        return batch.completion_mask.to(batch.logprobs.dtype)

    def metrics(self, batch):
        return {"gap": batch.log_ratio.sum(dim=-1).detach()}

    def __call__(self, batch):
        return ObjectiveOutput((Term(self.gap(batch), self.weights(batch), name="own"),), self.metrics(batch))


class Padded(Own):
    def gap(self, batch):
        return (batch.logprobs - batch.require("reference_logprobs")) * batch.completion_mask


class FirstRow(Own):
    def gap(self, batch):
        return batch.log_ratio * batch.log_ratio[0].sum().detach()


class OfMicroBatch(Own):
    def gap(self, batch):
        return batch.log_ratio - batch.log_ratio.mean()


class Weighted(Own):
    def weights(self, batch):
        return super().weights(batch) * batch.logprobs.detach().exp()


class Overflow(Own):
    def gap(self, batch):
        return batch.log_ratio.exp().masked_fill(~batch.completion_mask, 0.0)


class Detached(Own):
    def gap(self, batch):
        return batch.log_ratio.detach()


class Plausible(Own):
    def gap(self, batch):
        if batch.reference_logprobs is None:
            return batch.logprobs.masked_fill(~batch.completion_mask, 0.0)
        return batch.log_ratio

    def metrics(self, batch):
        return {}


class MeanMetric(Own):
    def metrics(self, batch):
        return {"gap": batch.log_ratio.mean().detach()}


class Unknown(Own):
    needs: ClassVar = frozenset({"reference_logprobs", "baseline"})


def test_objectives_that_keep_the_contract_pass():
    testing.check_objective(Own())
    testing.check_objective(Pairwise(divergences.get("jensen_shannon"), beta=0.3))
    testing.check_objective(PolicyGradient(divergences.get("le_cam"), 0.2, level="vocabulary"))
    batch = testing.example_batch(Supervised())
    testing.check_objective(Supervised(), replace(batch, prompt_index=torch.tensor([3, 3, 1, 1, 1, 0, 0])))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Padded, "padding, or values outside the mask, change the loss: nan instead of"),
        (FirstRow, "the order of the rows changes the loss: .* instead of"),
        (OfMicroBatch, "do not add up to the loss of the batch|padding, or values"),
        (Weighted, r"weights of a term must not depend|the weights of term own"),
        (Overflow, "is NaN or infinite in torch.float32 with log-probabilities up to 9951 nats"),
        (Detached, "the gradient by logprobs is 0; losses must not be detached"),
        (Plausible, "it names reference_logprobs in needs or measures, and without it returns a loss"),
        (MeanMetric, r"the metric 'gap' of the objective has shape \(\)"),
        (Unknown, "needs 'baseline', which has no example: give it in fields"),
    ],
)
def test_a_broken_objective_is_told_what_is_wrong(broken, message):
    with pytest.raises(CheckError, match=message):
        testing.check_objective(broken())


def test_fields_without_an_example_can_be_given():
    batch = testing.example_batch(Unknown(), fields={"baseline": torch.zeros(7)})
    assert batch.baseline is not None


OF_FALIGN = {
    "entropy": "value",
    "divergence_to(jensen_shannon, teacher, 2)": "value",
    "log_normalizer": "value",
    "entropy_of(teacher)": "none",
    "divergence_between(forward_kl, teacher, base)": "none",
    "top_k(forward_kl, 4, teacher)": "value",
    "rank_top_k(3, teacher)": "value",
    "expected(teacher, base)": "value",
    "expected_cost": "value",
    "surprisal": "value",
    "balanced(divergence_to(forward_kl, teacher), entropy)": "stopped",
    "standardized(divergence_to(forward_kl, teacher))": "value",
    "target_split(forward_kl, teacher)": "value",
    "sinkhorn(6, teacher)": "value",
}


@pytest.mark.parametrize("name", OF_FALIGN)
def test_measures_of_falign_pass(name):
    testing.check_measure(get_measure(name), gradient=OF_FALIGN[name])


def test_every_measure_has_a_row():
    assert {name.partition("(")[0] for name in OF_FALIGN} == set(MEASURES.names())


@dataclass(frozen=True)
class Confidence:
    references: ClassVar = frozenset()

    def __call__(self, at):
        return at.logprobs.exp().square().sum(dim=-1)


class Whole(Confidence):
    def __call__(self, at):
        return super().__call__(at).sum()


class Mixing(Confidence):
    def __call__(self, at):
        return super().__call__(at) - super().__call__(at).mean()


class HalfDetached(Confidence):
    def __call__(self, at):
        return (at.logprobs.exp().detach() * at.logprobs).sum(dim=-1)


class NotFinite(Confidence):
    def __call__(self, at):
        return 1 / at.logprobs.exp().amin(dim=-1)


class Constant(Confidence):
    def __call__(self, at):
        return super().__call__(at).detach()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Whole, r"returned torch.float64 of shape \(\) for 12 positions"),
        (Mixing, "position 0 has another value beside others than alone"),
        (HalfDetached, "the gradient is not that of its value"),
        (NotFinite, "nearly one-hot, in float32; it must be finite"),
        (Constant, "has no gradient, and gradient='value'"),
    ],
)
def test_a_broken_measure_is_told_what_is_wrong(broken, message):
    testing.check_measure(Confidence())
    with pytest.raises(CheckError, match=message):
        testing.check_measure(broken())
    with pytest.raises(CheckError, match="is not a measure"):
        testing.check_measure(broken)


def test_a_constant_measure_can_be_meant():
    testing.check_measure(Constant(), gradient="none")
    testing.check_measure(HalfDetached(), gradient="stopped")


PROMPTS, TEXTS = ["1 + 1 = ?", "2 + 2 = ?", "2 + 2 = ?"], ["It is 2.", "4", "It is five."]


def length(prompts, completions):
    return [float(len(each)) for each in completions]


def shares(prompts, completions):
    return [len(each) / max(1, sum(map(len, completions))) for each in completions]


def shorter(prompts, completions):
    return length(prompts, completions)[1:]


def infinite(prompts, completions):
    return [math.inf if not each else 1.0 for each in completions]


def crashing(prompts, completions):
    return [float(each.split()[0] == "It") for each in completions]


def changing(prompts, completions):
    completions.sort()
    return length(prompts, completions)


CALLS = []


def counting(prompts, completions):
    CALLS.append(1)
    return [float(len(CALLS))] * len(completions)


@pytest.mark.parametrize(
    ("reward", "options", "message"),
    [
        (length, {}, None),
        (shares, {"compares": True}, None),
        (shares, {}, r"becomes 1.0 alone \(set compares=True"),
        (shorter, {}, "returned 2 values for 3 completions"),
        (infinite, {}, r"the value is inf(.|\n)*completions \['', 'It is 2\.'\]"),
        (crashing, {}, r"IndexError(.|\n)*completions \[''"),
        (changing, {}, "changed the lists that it was given"),
        (counting, {}, "becomes 2.0 in a second call"),
    ],
)
def test_a_broken_reward_is_told_what_is_wrong(reward, options, message):
    if message is None:
        testing.check_reward(reward, PROMPTS, TEXTS, **options)
        return
    with pytest.raises(CheckError, match=message):
        testing.check_reward(reward, PROMPTS, TEXTS, **options)


def test_columns_reach_the_reward():
    def exact(prompts, completions, answer):
        return [float(a in text) for a, text in zip(answer, completions, strict=True)]

    testing.check_reward(exact, PROMPTS, TEXTS, columns={"answer": ["2", "4", "4"]})
    with pytest.raises(CheckError, match="give two or more"):
        testing.check_reward(exact, PROMPTS[:1], TEXTS[:1])


def test_a_reward_may_be_async():
    async def length(prompts, completions):
        return [float(len(each)) for each in completions]

    testing.check_reward(length, PROMPTS, TEXTS)
