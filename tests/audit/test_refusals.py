"""A loss that cannot be enumerated is refused, with its place and the remedy."""

import pytest
import torch

import falign
from falign.errors import ConfigError, FalignError
from falign.objectives import (
    Distillation,
    DistributionMatching,
    ExponentialReward,
    Listwise,
    Rehearsal,
    Supervised,
    Unpaired,
    get_measure,
)

JS = falign.divergences.get("jensen_shannon")


def of_the_batch(logprobs, reference_logprobs):
    gap = logprobs - reference_logprobs
    return gap * gap.mean().detach()


def mean_in_the_gradient(logprobs, reference_logprobs):
    gap = logprobs - reference_logprobs
    return gap.square() + gap.mean() - gap.mean().detach()


def root_of_the_mean(logprobs, reference_logprobs):
    return (logprobs - reference_logprobs).square().mean().sqrt()


def of_neighbors(logprobs, reference_logprobs):
    """A baseline of two rows, as of two completions of a prompt."""
    gap = (logprobs - reference_logprobs).sum(dim=-1).view(-1, 2)
    return (gap - gap.detach().mean(dim=-1, keepdim=True)).square().view(-1)


def mean_of_neighbors(logprobs, reference_logprobs):
    return of_neighbors(logprobs, reference_logprobs).mean()


def any_names(**arguments):
    return arguments["logprobs"]


def noisy(logprobs, reference_logprobs):
    return logprobs * torch.randn_like(logprobs) + reference_logprobs


def infinite(logprobs, reference_logprobs):
    return (1e4 * (reference_logprobs - logprobs).abs()).exp()


def transposed(logprobs, mask):
    return logprobs.T


def single(logprobs):
    return (logprobs**2).float()


def detached(logprobs, reference_logprobs):
    return (logprobs - reference_logprobs).detach()


def a_number(logprobs):
    return logprobs.sum().item()


def fixed(reference_logprobs):
    return reference_logprobs


def misspelled(logprobs, refrence_logprobs):
    return logprobs


def over_the_vocabulary(vocabulary_logprobs):
    return vocabulary_logprobs.exp().square().sum(-1)


def raising(logprobs):
    raise KeyError("advantages")


def on_the_reference(logprobs, reference_logprobs):
    return (logprobs - reference_logprobs).square() / 2


def of_pairs(chosen_logprobs, rejected_logprobs):
    return rejected_logprobs - chosen_logprobs


def by_position(logprobs, /):
    return -logprobs


def hidden_infinity(logprobs, reference_logprobs, mask):
    """Masks after the formula: 0 · inf is NaN."""
    return (1 / torch.where(mask, logprobs, 0.0)) * mask


REFUSED = [
    (of_the_batch, {}, "depends on the other rows"),
    (mean_in_the_gradient, {}, "depends on the other rows"),
    (root_of_the_mean, {}, "neither the mean nor the sum"),
    (of_the_batch, {"use": "reward"}, "depends on the other rows"),
    (of_neighbors, {}, "depends on the other rows"),
    (of_neighbors, {"use": "reward"}, "depends on the other rows"),
    (mean_of_neighbors, {}, "neither the mean nor the sum"),
    (any_names, {}, r"\*\*kwargs name none: write them out"),
    (noisy, {}, "differs between two calls"),
    (noisy, {"use": "reward"}, "differs between two calls"),
    (infinite, {}, r"its loss is NaN or infinite \(row"),
    (infinite, {"use": "reward"}, "NaN or infinite"),
    (transposed, {}, r"returned shape \(3, 40\) for 40 rows of 3 tokens"),
    (transposed, {"use": "reward"}, r"returned shape \(3, 40\)"),
    (single, {}, r"returned torch\.float32 .* do not cast"),
    (detached, {}, "without a gradient: nothing is minimized.*use='reward'"),
    (a_number, {}, "returned a float; it must return a tensor"),
    (fixed, {}, "asks for none of .*logprobs"),
    (misspelled, {}, "asks for 'refrence_logprobs'; did you mean 'reference_logprobs'"),
    (over_the_vocabulary, {"level": "sequence"}, "whole completions do not have: set level='token'"),
    (raising, {}, r"raising raised KeyError: 'advantages'(.|\n)*It was given logprobs \(40, 3\)"),
    (of_pairs, {"samples": "policy"}, "is a loss of pairs; set samples='pairs'"),
    (detached, {"samples": "pairs"}, "reads no pairs; choose 'policy'"),
    (of_pairs, {"use": "reward"}, "pairs have no rewards"),
    (by_position, {}, "by position only"),
    (detached, {"samples": "polcy"}, "samples='polcy' is unknown.*did you mean 'policy'"),
    (detached, {"credit": "returns"}, "credit='returns' with use='loss'"),
    (detached, {"divergence": "kl"}, "'kl' does not say which"),
    (Rehearsal, {}, "is a class: give an instance"),
    (Rehearsal(JS), {"level": "token"}, "is an objective, which reads tokens; leave it out"),
    (Rehearsal(JS), {"use": "reward"}, "is an objective, which gives losses"),
    (DistributionMatching(JS, ExponentialReward(1.0), "constant"), {}, "depend on the completions of other prompts"),
    (Distillation(get_measure("sinkhorn(6)")), {}, "mixes positions of a batch"),
    (Unpaired(JS, 0.3), {}, "reads labels, not pairs"),
    (on_the_reference, {"reference": "techer"}, "reference='techer' is unknown; choose one of .'reference', 'old'"),
    (on_the_reference, {"reference": "policy"}, "reference='policy' is unknown"),
    (of_pairs, {"reference": "teacher"}, "reference='teacher': pairs are compared with the one that they read"),
    (3, {}, "is a int: give a function|is an int: give a function"),
    ("trl:fdpo_js_divergenc", {}, "did you mean 'trl:fdpo_js_divergence'"),
    ("grpo", {}, "is no known loss.*--list"),
    ("tests.audit.own_losses:k4", {}, "no attribute 'k4'|has no attribute"),
]


@pytest.mark.parametrize(("loss", "options", "message"), REFUSED)
def test_what_cannot_be_enumerated_is_refused(loss, options, message):
    with pytest.raises(FalignError, match=message):
        falign.audit(loss, **options)


def test_the_random_state_is_left_as_it_was():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with pytest.raises(ConfigError):
        falign.audit(noisy)
    assert torch.equal(torch.rand(2), expected)


def test_an_unknown_need_of_an_objective_is_named():
    class Odd(Supervised):
        needs = frozenset({"baseline"})

    with pytest.raises(FalignError, match="needs 'baseline', which the audit has no value for"):
        falign.audit(Odd())


def test_a_plot_of_nothing_and_an_unknown_row_are_refused(tmp_path):
    zero = falign.audit("kl:k1_loss")
    with pytest.raises(ConfigError, match="is zero and has no direction"):
        zero.plot(tmp_path / "zero.png")
    result = falign.audit(Listwise(JS, 0.3))
    with pytest.raises(ConfigError, match="one of the suffixes"):
        result.plot(tmp_path / "plot.txt")
    with pytest.raises(ConfigError, match="has no row for 'reverse_kl', level 'token'"):
        result.row("reverse_kl", "token")
