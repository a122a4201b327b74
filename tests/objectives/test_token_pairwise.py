import dataclasses
import math

import pytest
import torch

from falign import FDPO, TDPO, CompletionBatch, divergences
from falign.divergences import ForwardKL
from falign.objectives import DivergenceTo, Objective, TokenPairwise

M = [[0.6, 0.9, -0.3], [0.4, -0.8, -0.2]]  # log-ratios per token: m = 1.2 and -0.6
DELTA = [[0.1, 0.3, 0.1], [0.4, 0.2, 0.1]]  # δ = 0.5 and 0.7
WEIGHTS = [[2.0, 0.0, 0.5], [1.0, 0.5, 0.0]]  # m = 1.05 and 0.0; δ = 0.25 and 0.5
VARIANTS = [{"variant": 1}, {"variant": 2, "alpha": 0.3}]


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch_of(log_ratio, delta, weights=None, preference=(1.0, 0.0), mask=None, prompt_index=None) -> CompletionBatch:
    reference = torch.full_like(log_ratio, -1.5)
    return CompletionBatch(
        logprobs=reference + log_ratio,
        reference_logprobs=reference,
        measures={"divergence": delta},
        token_weights=weights,
        completion_mask=torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else mask,
        prompt_index=torch.zeros(len(log_ratio), dtype=torch.long) if prompt_index is None else prompt_index,
        preference=tensor(preference),
    )


def value_and_gradients(objective, weights=None, **kwargs):
    log_ratio, delta = tensor(M).requires_grad_(), tensor(DELTA).requires_grad_()
    output = objective(batch_of(log_ratio, delta, None if weights is None else tensor(weights), **kwargs))
    output.mean().backward()
    return output, log_ratio.grad, delta.grad


def test_variant_1_matches_the_closed_form():
    output, by_ratio, by_delta = value_and_gradients(TDPO(beta=0.4, variant=1))
    logit = 0.4 * ((1.2 + 0.6) - (0.7 - 0.5))
    pull = 0.4 / (1 + math.exp(logit))
    assert output.mean().item() == pytest.approx(math.log1p(math.exp(-logit)))
    torch.testing.assert_close(by_ratio, tensor([[-pull] * 3, [pull] * 3]))
    torch.testing.assert_close(by_delta, tensor([[-pull] * 3, [pull] * 3]))


def test_variant_2_matches_the_closed_form_and_leaves_the_chosen_divergence_alone():
    output, by_ratio, by_delta = value_and_gradients(TDPO(beta=0.4, alpha=0.3))
    logit = 0.4 * ((1.2 + 0.6) - 0.3 * (0.7 - 0.5))
    pull = 0.4 / (1 + math.exp(logit))
    assert output.mean().item() == pytest.approx(math.log1p(math.exp(-logit)))
    torch.testing.assert_close(by_ratio, tensor([[-pull] * 3, [pull] * 3]))
    torch.testing.assert_close(by_delta, tensor([[0.0] * 3, [0.3 * pull] * 3]))


def test_weights_multiply_both_sums_and_their_gradients():
    output, by_ratio, by_delta = value_and_gradients(TDPO(beta=0.4, variant=1, weighting="activations"), WEIGHTS)
    logit = 0.4 * ((1.05 - 0.0) - (0.5 - 0.25))
    pull = 0.4 / (1 + math.exp(logit))
    assert output.mean().item() == pytest.approx(math.log1p(math.exp(-logit)))
    expected = tensor(WEIGHTS) * tensor([[-pull], [pull]])
    torch.testing.assert_close(by_ratio, expected)
    torch.testing.assert_close(by_delta, expected)
    assert output.metrics["divergence/chosen"].item() == pytest.approx(0.25)
    assert output.metrics["logratios/chosen"].item() == pytest.approx(1.2)  # of whole completions, as everywhere


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_of_one_are_no_weights(variant):
    plain = value_and_gradients(TDPO(beta=0.4, **variant))
    weighted = value_and_gradients(TDPO(beta=0.4, weighting="activations", **variant), [[1.0] * 3] * 2)
    torch.testing.assert_close(weighted[0].mean(), plain[0].mean())
    torch.testing.assert_close(weighted[1:], plain[1:])


def test_without_weighting_the_weights_are_not_read():
    output, _, _ = value_and_gradients(TDPO(beta=0.4), [[math.nan] * 3] * 2)
    assert output.mean().item() == value_and_gradients(TDPO(beta=0.4))[0].mean().item()


def test_weights_are_constants():
    weights = tensor(WEIGHTS).requires_grad_()
    log_ratio = tensor(M).requires_grad_()
    TDPO(weighting="activations")(batch_of(log_ratio, tensor(DELTA), weights)).mean().backward()
    assert weights.grad is None


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_alpha_0_is_dpo(beta):
    for alpha, same in ((0.0, True), (0.5, False)):
        output, by_ratio, by_delta = value_and_gradients(TDPO(beta=beta, alpha=alpha))
        log_ratio = tensor(M).requires_grad_()
        dpo = FDPO("reverse_kl", beta=beta)(batch_of(log_ratio, tensor(DELTA)))
        dpo.mean().backward()
        assert (output.mean().item() == pytest.approx(dpo.mean().item(), rel=1e-14)) is same
        if same:
            torch.testing.assert_close(by_ratio, log_ratio.grad)
            assert not by_delta.any()
            for name, values in dpo.metrics.items():
                torch.testing.assert_close(output.metrics[name], values)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_rewards_differ_by_the_logit_of_the_loss(variant, weights):
    objective = TDPO(beta=0.4, weighting="none" if weights is None else "activations", **variant)
    output, _, _ = value_and_gradients(objective, weights)
    metrics = output.metrics
    margin = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    torch.testing.assert_close(output.terms[0].losses.detach(), -torch.nn.functional.logsigmoid(margin))
    torch.testing.assert_close(metrics["rewards/margins"], margin)
    if weights is None:
        expected = objective.implicit_reward(tensor([1.2, -0.6]), tensor([0.5, 0.7]))
        torch.testing.assert_close(torch.cat([metrics["rewards/chosen"], metrics["rewards/rejected"]]), expected)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_swapping_chosen_and_rejected_turns_the_margin_around(variant):
    forward = value_and_gradients(TDPO(beta=0.4, **variant))[0].metrics
    backward = value_and_gradients(TDPO(beta=0.4, **variant), preference=(0.0, 1.0))[0].metrics
    assert forward["rewards/margins"].item() == -backward["rewards/margins"].item() != 0.0
    assert forward["divergence/chosen"].item() == backward["divergence/rejected"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("weighting", ["none", "activations"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing_and_is_never_read(variant, weighting):
    objective = TDPO(beta=0.4, weighting=weighting, **variant)
    whole, by_ratio, by_delta = value_and_gradients(objective, WEIGHTS)
    pad = lambda x, value: torch.nn.functional.pad(tensor(x), (0, 2), value=value)  # noqa: E731
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    for junk in (math.nan, math.inf, -math.inf):
        log_ratio, delta = pad(M, junk).requires_grad_(), pad(DELTA, junk).requires_grad_()
        output = objective(batch_of(log_ratio, delta, pad(WEIGHTS, junk), mask=mask))
        output.mean().backward()
        torch.testing.assert_close(output.terms[0].losses, whole.terms[0].losses, rtol=1e-14, atol=0)
        for gradient, expected in ((log_ratio.grad, by_ratio), (delta.grad, by_delta)):
            torch.testing.assert_close(gradient[mask], expected[torch.ones_like(expected, dtype=torch.bool)])
            assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_completion_without_any_weight_counts_nothing_whatever_its_tokens(variant):
    log_ratio, delta = tensor([[0.5, 0.2], [-math.inf, math.nan]]), tensor([[0.1, 0.1], [math.inf, math.nan]])
    log_ratio, delta = log_ratio.requires_grad_(), delta.requires_grad_()
    objective = TDPO(beta=1.0, weighting="activations", **variant)
    output = objective(batch_of(log_ratio, delta, tensor([[1.0, 1.0], [0.0, 0.0]])))
    output.mean().backward()
    scale = variant.get("alpha", 1.0)
    assert output.metrics["rewards/margins"].item() == pytest.approx(0.7 + scale * 0.2)
    assert output.metrics["rewards/rejected"].item() == 0.0
    assert (log_ratio.grad[1] == 0).all()
    assert (delta.grad[1] == 0).all()
    assert torch.isfinite(log_ratio.grad).all()


def test_a_weight_that_is_not_a_number_is_not_hidden():
    weights = [[1.0, math.nan, 1.0], [1.0, 1.0, 1.0]]
    assert value_and_gradients(TDPO(weighting="activations"), weights)[0].mean().isnan()


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_finite_to_ten_thousand_nats(variant):
    for dtype in (torch.float32, torch.bfloat16):
        for far in (1e4, -1e4):
            log_ratio = torch.tensor([[far], [-far]], requires_grad=True)
            delta = torch.tensor([[0.0], [1e4]], requires_grad=True)
            mask, preference = torch.ones(2, 1, dtype=torch.bool), torch.tensor([1.0, 0.0])
            loss = TDPO(**variant)(
                CompletionBatch(
                    logprobs=log_ratio.to(dtype),
                    reference_logprobs=torch.zeros(2, 1, dtype=dtype),
                    measures={"divergence": delta.to(dtype)},
                    completion_mask=mask,
                    prompt_index=torch.zeros(2, dtype=torch.long),
                    preference=preference,
                )
            ).mean()
            loss.backward()
            assert torch.isfinite(loss)
            assert torch.isfinite(log_ratio.grad).all()
            assert torch.isfinite(delta.grad).all()


def test_a_completion_can_be_chosen_in_one_pair_and_rejected_in_another():
    log_ratio = tensor([[0.5], [0.2], [-0.4]])
    delta = tensor([[0.3], [0.2], [0.6]]).requires_grad_()
    output = TDPO(beta=1.0, alpha=0.5)(batch_of(log_ratio, delta, preference=(2.0, 1.0, 0.0)))
    output.terms[0].losses.sum().backward()
    rewards = [0.5 + 0.15, 0.2 + 0.1, -0.4 + 0.3]
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = [rewards[better] - rewards[worse] for better, worse in pairs]
    assert output.metrics["rewards/margins"].tolist() == pytest.approx(expected)
    pulls = {pair: 0.5 / (1 + math.exp(margin)) for pair, margin in zip(pairs, expected, strict=True)}
    rejected = [0.0, pulls[0, 1], pulls[0, 2] + pulls[1, 2]]
    assert delta.grad.flatten().tolist() == pytest.approx(rejected)


@pytest.mark.parametrize("name", [*divergences.names()])
def test_any_divergence_of_the_registry_is_allowed(name):
    parameter = {"alpha": {"alpha": -0.5}, "generalized_js": {"b": 0.3}}.get(name, {})
    divergence = divergences.get(name, **parameter)
    assert TDPO(divergence).measures["divergence"].divergence is divergence


def test_the_default_divergence_is_the_papers():
    assert TDPO() == TokenPairwise() == TokenPairwise(ForwardKL(), 0.1, 0.5, 2, "none")
    assert TDPO("js", 0.3, None, 1).divergence.name == "jensen_shannon"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "must be positive"),
        ({"alpha": -0.1}, "must be finite and not negative"),
        ({"alpha": math.nan}, "must be finite and not negative"),
        ({"variant": 1, "alpha": 0.5}, "TDPO1 .* without α; leave alpha out"),
        ({"divergence": "kl"}, "does not say which"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TDPO(**arguments)


@pytest.mark.parametrize("arguments", [{"variant": 3}, {"weighting": "gradients"}])
def test_unknown_choices_are_refused(arguments):
    (name,) = arguments
    with pytest.raises((ValueError, TypeError), match=name):  # TypeError where annotations are checked first
        TDPO(**arguments)


@pytest.mark.parametrize("name", ["reference_logprobs", "preference", "token_weights"])
def test_a_missing_field_is_named(name):
    whole = batch_of(tensor(M), tensor(DELTA), tensor(WEIGHTS))
    with pytest.raises(ValueError, match=f"{name}, which is None"):
        TDPO(weighting="activations")(CompletionBatch(**{**vars(whole), name: None}))


def test_a_missing_measure_is_named():
    with pytest.raises(ValueError, match=r"CompletionBatch.measures\['divergence'\], which is missing"):
        TDPO()(dataclasses.replace(batch_of(tensor(M), tensor(DELTA)), measures={}))


def test_a_batch_without_pairs_is_refused():
    with pytest.raises(ValueError, match="no pair"):
        TDPO()(batch_of(tensor(M), tensor(DELTA), preference=(1.0, 1.0)))


@pytest.mark.parametrize("name", ["measures", "token_weights"])
def test_unequal_shapes_are_refused(name):
    whole = batch_of(tensor(M), tensor(DELTA), tensor(WEIGHTS))
    value = tensor([[1.0], [1.0]])
    given = {"divergence": value} if name == "measures" else value
    with pytest.raises((ValueError, TypeError), match=name):
        CompletionBatch(**{**vars(whole), name: given})


def test_token_pairwise_is_an_objective_that_names_its_needs():
    objective = TDPO("squared_hellinger")
    assert isinstance(objective, Objective)
    assert objective.needs == {"reference_logprobs", "preference"}
    assert objective.measures == {"divergence": DivergenceTo(divergences.get("squared_hellinger"))}
    assert TDPO(weighting="activations").needs == objective.needs | {"token_weights.activations"}
